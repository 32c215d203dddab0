"""The course: each page runs as printed and draws its picture, its links lead somewhere, and the names it mentions exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COURSE = ROOT / "docs/course"
sys.path.insert(0, str(COURSE))
from run import agrees, blocks, run  # noqa: E402

PAGES = sorted(COURSE.glob("[1-9]-*.md"))
QUICK = ("3-dpo",)  # of the others each takes some ten seconds


def test_there_are_six_pages_and_the_index_names_them():
    index = (COURSE / "README.md").read_text(encoding="utf-8")
    assert [page.name[0] for page in PAGES] == list("123456")
    assert re.findall(r"^\| \[\d\. [^\]]+\]\(([^)]+)\)", index, re.MULTILINE) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow) for p in PAGES])
def test_the_page_runs_and_ends_in_its_picture(page, tmp_path, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    run(page)
    drawn = [path.name for path in tmp_path.iterdir()]
    assert drawn == [f"{page.stem}.png"] and 5_000 < (tmp_path / drawn[0]).stat().st_size < 80_000


@pytest.mark.parametrize("page", [COURSE / "README.md", *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere_and_names_exist(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{4,5}", link), link
        else:
            assert (page.parent / link).exists(), link
    for name in set(re.findall(r"\bxalign(?:\.\w+)+", text)):
        module, *rest = name.split(".")
        found = importlib.import_module(module)
        for part in rest:
            if not hasattr(found, part):
                importlib.import_module(f"{found.__name__}.{part}")
            found = getattr(found, part)
    if page in PAGES:
        assert any("arxiv" in link for link in links) and any(link.startswith("../../xalign/") for link in links)
        assert text.count(f"({page.stem}.png)") == 1 and (COURSE / f"{page.stem}.png").stat().st_size < 80_000
        assert f'savefig("{page.stem}.png"' in blocks(text)[-1][1]
        assert re.findall(r"^(\d)\. ", text.split("## Exercises")[1], re.MULTILINE) == list("123")
        assert len(text.splitlines()) <= 220 and f"docs/course/{page.name}`" in text


def test_what_a_page_tells_is_compared_with_what_it_prints(tmp_path, monkeypatch):
    assert agrees("KL 2.26, about 15 of 20\n", "KL 2.31,  about 15 of 20") and agrees("off .01", "off .01")
    assert agrees("0.01", "0.03") and not agrees("0.01", "0.04")
    others = {"KL 2.26": "KL 2.5", "KL 2.27": "reward 2.27", "1 2": "1", "": "1", "5 pairs": "6 pairs", "-1.0": "1.0"}
    for told, printed in others.items():
        assert not agrees(told, printed), (told, printed)
    page = tmp_path / "page.md"
    page.write_text("# A page\n\n```python\nx = 2\n```\n\nSo:\n\n```python\nprint(x + 1)\n```\n\n```text\n4\n```\n")
    assert [line for line, _, _ in blocks(page.read_text(encoding="utf-8"))] == [3, 9]
    with pytest.raises(AssertionError, match=r"page\.md:9"):
        run(page)
    page.write_text("text\n\n```python\n\n1 / 0\n```\n", encoding="utf-8")
    done = subprocess.run([sys.executable, COURSE / "run.py", page], capture_output=True, text=True)
    assert done.returncode == 1 and 'page.md", line 5' in done.stderr
