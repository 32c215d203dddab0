"""`report.html`: one file with everything in it, readable on a phone; nothing is loaded from anywhere."""

import base64
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xalign.data.records import Text
from xalign.disk import write_atomically
from xalign.evaluation.figures import Comparison

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # of no use on a page, and a file with NUL is no text
SHOWN = 200  # prompts whose samples are on the page
# what a browser may do with the page, whatever a model has written: its own style and script, pictures that are in it
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark; --line: #8886; --dim: #777; --good: #2a8a3e; --bad: #c0392b }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2rem }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top }
td + td, th + th { white-space: nowrap; font-variant-numeric: tabular-nums }
figure { margin: 1rem 0 } img { max-width: 100%; height: auto; background: #fff } figcaption, .dim { color: var(--dim) }
.alert { border-left: 4px solid var(--bad); padding: .5rem 1rem }
#tools { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; margin: 1rem 0 }
#tools input, #tools select { font: inherit; padding: .3rem; max-width: 100% }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem 1rem; margin: .8rem 0 }
article[hidden] { display: none } .text { white-space: pre-wrap; margin: .2rem 0 }
.two { display: grid; grid-template-columns: 1fr 1fr; gap: 0 1.5rem } .two > * { min-width: 0 }
.won { color: var(--good) } .lost { color: var(--bad) } pre { overflow-x: auto; font-size: .85rem }
@media (max-width: 640px) {
  h1 { font-size: 1.2rem } .two { grid-template-columns: 1fr; gap: .8rem }
  table { font-size: .8rem } th, td { padding: .25rem .3rem } td + td, th + th { white-space: normal; min-width: 4.2rem }
  td:first-child { overflow-wrap: anywhere; min-width: 6rem }
}
"""
SCRIPT = """
const all = [...document.querySelectorAll('article')], list = document.getElementById('samples');
const by = id => document.getElementById(id);
function show() {
  const words = by('words').value.toLowerCase(), who = by('who').value;
  let count = 0;
  for (const card of all) {
    card.hidden = (who && card.dataset.who !== who) || !card.textContent.toLowerCase().includes(words);
    count += !card.hidden;
  }
  by('count').textContent = count + ' of ' + all.length;
}
function sort() {
  const key = by('order').value;
  list.append(...[...all].sort((a, b) => a.dataset[key] - b.dataset[key]));
}
by('words').oninput = by('who').onchange = show;
by('order').onchange = sort;
show();
"""


def write_page(path: Path, title: str, result: Comparison, head: Sequence[str], rows: Sequence[Sequence[str]],
               notes: Sequence[str], pictures: Sequence[tuple[bytes, str]], settings: dict[str, Any]) -> None:
    """Write the page; `pictures` are PNGs with their captions, `head` and `rows` the table of all figures."""
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="alert"><b>Warning</b>: {escape(alert)}.</p>' for alert in result.alerts]
    parts += [_table(head, rows), *(f'<p class="dim">{escape(note)}</p>' for note in notes)]
    parts += [f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escape(text)}">'
              f"<figcaption>{escape(text)}</figcaption></figure>" for png, text in pictures]
    for section in result.sections:
        parts += [f"<h2>{escape(section.title)}</h2>", _table(section.head, section.rows),
                  f'<p class="dim">{escape(section.note)}</p>']
    script = ""
    if result.prompts and "policy" in result.texts:
        parts += _samples(result)
        script = f"<script>{SCRIPT}</script>"
    parts += ["<h2>Settings</h2>", f"<pre>{escape(json.dumps(settings, indent=2))}</pre>"]
    page = (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style>\n</head>\n<body>\n')
    write_atomically(path, page + "\n".join(parts) + script + "\n</body>\n</html>\n")


def escape(text: str) -> str:
    return html.escape(CONTROL.sub("\N{REPLACEMENT CHARACTER}", text))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
    return '<div class="wide"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _samples(result: Comparison) -> list[str]:
    """A card for each prompt, and what picks some of them."""
    names = [m for m in ("reference", "policy") if m in result.texts]
    judged = bool(result.won)
    orders = '<option value="i">in their order</option>' + (
        '<option value="won">lost by the policy first</option>' if judged else "")
    orders += '<option value="gain">smallest gain first</option>' if len(result.scores.keys() & set(names)) == 2 else ""
    who = '<option value="">all</option>' + ("".join(
        f'<option value="{w}">{text}</option>' for w, text in (("won", "won by the policy"), ("lost", "lost"), ("tie", "tied")))
        if judged else "")
    parts = ["<h2>Samples</h2>",
             f'<div id="tools"><input id="words" type="search" placeholder="search" aria-label="search">'
             f'<select id="who" aria-label="which">{who}</select><select id="order" aria-label="order">{orders}</select>'
             '<span id="count" class="dim"></span></div>', '<div id="samples">']
    for i, prompt in enumerate(result.prompts[:SHOWN]):
        rate = result.won[i] if judged else 0.5
        verdict = "won" if rate > 0.5 else "lost" if rate < 0.5 else "tie"
        gain = 0.0
        if result.scores.keys() >= {"policy", "reference"}:
            means = [sum(result.scores[m][i]) / max(1, len(result.scores[m][i])) for m in ("policy", "reference")]
            gain = means[0] - means[1]
        told = f'<span class="{verdict}">policy wins {rate:.0%} of the comparisons</span>' if judged else ""
        columns = []
        for name in names:
            texts = [_text(result, name, i, k) for k in range(len(result.texts[name][i]))]
            more = f"<details><summary>{len(texts) - 1} more</summary>{''.join(texts[1:])}</details>" if len(texts) > 1 else ""
            columns.append(f"<div><b>{name}</b>{texts[0]}{more}</div>")
        parts.append(f'<article data-i="{i}" data-who="{verdict}" data-won="{rate:.4f}" data-gain="{gain:.6g}">'
                     f'<div class="dim">{i + 1} {told}</div><p class="text">{escape(_plain(prompt))}</p>'
                     f'<div class="two">{"".join(columns)}</div></article>')
    parts.append("</div>")
    if len(result.prompts) > SHOWN:
        parts.append(f'<p class="dim">The first {SHOWN} of {len(result.prompts):,} prompts.</p>')
    return parts


def _text(result: Comparison, name: str, i: int, k: int) -> str:
    score = ""
    if name in result.scores and k < len(result.scores[name][i]):
        score = f'<div class="dim">{escape(result.score_name)} {result.scores[name][i][k]:+.3f}</div>'
    text = escape(result.texts[name][i][k].strip()) or '<span class="dim">(nothing)</span>'
    return f'{score}<p class="text">{text}</p>'


def _plain(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.role}: {m.content}" for m in prompt)
