"""Messages (or plain text) to ids, loss mask and stops: training and inference call the same functions.

The rule. A conversation is rendered once to a string, in which the assistant's turns are marked: by the template's
`{% generation %}` blocks, or, where it has none, by what `messages[:i]` with a generation prompt and `messages[:i+1]`
render to. The string is cut at the borders of these spans and at special tokens, and the pieces are tokenised apart.
So the ids of a prompt at inference are exactly those that training saw in front of the reply.

- Scored are the assistant's texts and the token that ends each turn. That is the special token which the template
  puts there (`<|im_end|>`), or EOS, which is added where there is none. A final turn ends with it: blanks after it go.
- One BOS stands in front if the tokenizer has one, whatever the template does.
- Special tokens come from the template only: in a message, `</s>` or `<|user|>` is spelt out as ordinary text.

Templates are untrusted code and run in jinja's immutable sandbox. Left out: tools and documents.
"""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from xalign.data.records import Message, Text
from xalign.errors import DataError
from xalign.tokenizers import Tokenizer, either

ROLE_MARKERS = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Unicode noncharacters, which steer the way from a rendered string to ids; in a message they are escaped.
_MARKS = "\ufdd0\ufdd1\ufdd2\ufdd3"
_OPEN, _CLOSE, _BREAK, _ESCAPE = list(_MARKS)


@dataclass(frozen=True)
class Rendered:
    """Ids, which of them are scored (True), the text as the template wrote it, and the ids that end a reply."""

    ids: list[int]
    loss_mask: list[bool]
    text: str
    stops: list[int]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    template: str | None = None,
    add_generation_prompt: bool = False,
) -> Rendered:
    """Render messages by the rule above; `template` defaults to the tokenizer's, then to `DEFAULT_TEMPLATE`.

    Raises `DataError`, one line, for a template that fails, or that writes a turn differently once others follow it
    (unless `add_generation_prompt` is set: at inference such a turn is just not cut apart).
    """
    template = template or tokenizer.chat_template or DEFAULT_TEMPLATE
    specials = tokenizer.special_tokens
    closer = _closer(template, tokenizer.bos_token, tokenizer.eos_token, tuple(specials))
    compiled = _Conversation(template, messages, tokenizer.bos_token, tokenizer.eos_token, tuple(specials))
    text, spans = compiled.spans(add_generation_prompt)
    pieces: list[tuple[str, bool]] = []
    at = 0
    for start, end in spans:
        pieces.append((text[at:start], False))
        turn = text[start:end] if compiled.has_blocks else text[start:end].rstrip()
        after = re.compile(rf"\s*{re.escape(closer)}").match(text, end)
        if turn.rstrip().endswith(closer):
            turn = turn.rstrip()
            at = start + len(turn)
        elif after:
            at, turn = after.end(), text[start : after.end()]
        else:
            at, turn = start + len(turn), turn + closer
        pieces.append((turn, True))
    if add_generation_prompt or text[at:].strip() or not spans:
        pieces.append((text[at:], False))

    tokens: list[tuple[int, bool]] = []
    for piece, scored in pieces:
        for part in re.split(f"({either(specials)})", piece):
            ids = [specials[part]] if part in specials else tokenizer.encode(_plain(part), markers=False)
            tokens += [(id, scored) for id in ids]
    bos = tokenizer.bos_id
    if bos is not None:
        # Where EOS is the same token, only those at the beginning are surely meant as BOS.
        first = next((i for i, (id, _) in enumerate(tokens) if id != bos), len(tokens))
        tokens = [(bos, False), *(t for t in tokens[first:] if t[0] != bos or bos == tokenizer.eos_id)]
    stops = [id for id in (specials.get(closer), tokenizer.eos_id) if id is not None]
    mask = [scored for _, scored in tokens]
    return Rendered([id for id, _ in tokens], mask, _plain(text), list(dict.fromkeys(stops)))


def render_text(tokenizer: Tokenizer, prompt: str, completion: str | None = None) -> Rendered:
    """`[bos] prompt completion [eos]`, the two tokenised apart; completion and EOS are scored, the prompt is not.

    A plain document is a completion of "". Without a completion: the ids to continue at inference.
    """
    ids = tokenizer.encode(prompt, bos=True, markers=False)
    reply = [] if completion is None else tokenizer.encode(completion, eos=True, markers=False)
    mask = [False] * len(ids) + [True] * len(reply)
    stops = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    return Rendered(ids + reply, mask, prompt + (completion or ""), stops)


def render_prompt(tokenizer: Tokenizer, prompt: Text, template: str | None = None) -> Rendered:
    """What a model is to continue: the one way from a prompt, text or messages, to ids at inference."""
    if isinstance(prompt, str):
        return render_text(tokenizer, prompt)
    return render(tokenizer, prompt, template, add_generation_prompt=True)


def render_completion(
    tokenizer: Tokenizer, prompt: Text, completion: Text, template: str | None = None
) -> tuple[list[int], list[int], list[bool]]:
    """The ids of a prompt (as `render_prompt` gives them), those of its completion, and which of these are scored."""
    if isinstance(prompt, str) and isinstance(completion, str):
        head, whole = render_text(tokenizer, prompt).ids, render_text(tokenizer, prompt, completion)
    else:
        assert isinstance(prompt, tuple) and isinstance(completion, tuple)
        whole = render(tokenizer, prompt + completion, template)
        head = []
        if completion[0].role == "assistant":
            head = render(tokenizer, prompt, template, add_generation_prompt=True).ids
        elif prompt:
            head = render(tokenizer, prompt, template).ids
        if whole.ids[: len(head)] != head:
            raise DataError("the chat template writes the prompt differently once the reply follows it")
    return head, whole.ids[len(head) :], whole.loss_mask[len(head) :]


class _Conversation:
    """Messages with their special tokens disarmed, and the compiled template that writes them."""

    def __init__(self, template: str, messages: Sequence[Message], bos: str, eos: str, specials: tuple[str, ...]):
        self.template, self.has_blocks = _compile(template), bool(re.search(r"{%-?\s*generation\s*-?%}", template))
        self.tokens = {"bos_token": bos if bos in specials else "", "eos_token": eos if eos in specials else ""}
        disarm = re.compile(f"(?={either(specials)})(.)", re.DOTALL)
        self.messages = []
        for message in messages:
            escaped = re.sub(f"[{_MARKS}]", lambda mark: _ESCAPE + str(_MARKS.index(mark[0])), message.content)
            self.messages.append({"role": message.role, "content": disarm.sub(rf"\1{_BREAK}", escaped)})

    def write(self, count: int, add_generation_prompt: bool) -> str:
        """Render the first `count` messages."""
        try:
            return self.template.render(
                messages=self.messages[:count], add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                **self.tokens,
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may fail in any way
            raise DataError(f"the chat template failed: {' '.join(str(error).split())}") from error

    def spans(self, add_generation_prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text of all messages, and where in it the assistant's turns are."""
        text = self.write(len(self.messages), add_generation_prompt)
        spans = []
        if self.has_blocks:
            parts = re.split(f"[{_OPEN}{_CLOSE}]", text)
            ends = list(itertools.accumulate(map(len, parts)))
            return "".join(parts), list(zip(ends[0:-1:2], ends[1::2], strict=True))
        for i, message in enumerate(self.messages):
            if message["role"] == "assistant":
                head, turn = self.write(i, True), self.write(i + 1, False)
                if text.startswith(turn) and turn.startswith(head):
                    spans.append((len(head), len(turn)))
                elif not add_generation_prompt:
                    raise DataError(
                        f"the chat template writes message {i + 1} differently once others follow it; "
                        "allowed: templates that only append, or that mark replies with {% generation %}"
                    )
        return text, spans


@lru_cache(maxsize=64)
def _closer(template: str, bos: str, eos: str, specials: tuple[str, ...]) -> str:
    """The special token that a template puts after the assistant's text, else EOS ("" without one)."""
    reply = "\u00a4"
    conversation = _Conversation(template, [Message("user", "?"), Message("assistant", reply)], bos, eos, specials)
    try:
        text = conversation.write(2, False)
    except DataError:  # it wants other messages than these; it will say so when it gets the real ones
        text = ""
    after = text.rpartition(reply)[2].replace(_CLOSE, "")
    found = re.match(rf"\s*({either(specials)})", after)
    return found[1] if found else conversation.tokens["eos_token"]


def _plain(piece: str) -> str:
    """The text as it was written, without what `_Conversation` put in to protect it."""
    return re.sub(f"{_ESCAPE}([0-3])|{_BREAK}", lambda mark: _MARKS[int(mark[1])] if mark[1] else "", piece)


class _Generation(jinja2.ext.Extension):
    """The block `{% generation %}...{% endgeneration %}` of transformers: what the assistant wrote."""

    tags: set[str] = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja's own escapes HTML

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise DataError(f"the chat template is not valid jinja: {error.message} (its line {line})") from error
