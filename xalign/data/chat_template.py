"""Messages (or plain text) to ids, loss mask and stops: training and inference call the same functions.

The rule. A conversation is rendered once to a string, in which the assistant's turns are marked: by the template's
`{% generation %}` blocks, or, where it has none, by what `messages[:i]` with a generation prompt and `messages[:i+1]`
render to. The string is cut at the borders of these spans and at special tokens, and the pieces are tokenised apart.
So the ids of a prompt at inference are exactly those that training saw in front of the reply.

- Scored are the assistant's texts and the token that ends each turn. That is the special token which the template
  puts there (`<|im_end|>`), or EOS, which is added where there is none: then blanks at the end of the text go.
- A reply begins where the generation prompt ends, also where the template's block begins only after a blank.
- One BOS stands in front if the tokenizer adds one or the template writes one, never two. Those that a template writes
  between turns stay. Where a text would begin with a scored token, BOS or EOS goes in front, so that it can be predicted.
- Special tokens come from the template only: in a message, `</s>` or `<|user|>` is spelt out as ordinary text.

Some templates write a turn differently once others follow it (Qwen3 drops an earlier turn's `<think>` block). There
each reply is learnt as it is generated, behind a prompt of its own: `NotCut` tells the caller to split a conversation.

Otherwise ids, masks and the split into prompt and completion are those of transformers' `apply_chat_template` and of
trl. What differs follows from the rule, and tests/test_chat_parity.py has a test for each: special tokens in a message
are spelt out; no token straddles the border of prompt and reply; the end of turn is scored also outside the block, and
so is a blank before it that is a token of its own; one BOS whatever the template does; a turn that ends with nothing
gets an EOS; a text of nothing begins with BOS or EOS. Blanks that an added token (`rstrip`) would swallow are kept.

Templates are untrusted code and run in jinja's immutable sandbox, which also bounds their loops and what `+` and `*`
make; a filter can still make a large text. Left out: tools and documents.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
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
CACHED = 64  # renderings, and ids of pieces of text, that are kept: the two sides of a pair begin alike
MAX_STEPS, MAX_LENGTH = 2_000_000, 50_000_000  # of all loops of a rendering together; of what `+` and `*` make
Named = tuple[tuple[str, str], ...]  # the control tokens by the names that templates know, ("bos_token", "<s>")


class NotCut(DataError):
    """A template writes an assistant's turn differently once others follow it, so it can't be found in the whole."""


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
    since: int = 0,
    spell: bool = True,
) -> Rendered:
    """Render messages by the rule above; `template` defaults to the tokenizer's, then to `DEFAULT_TEMPLATE`.

    Raises `DataError`, one line, for a template that fails, and its kind `NotCut` for one that writes a turn differently
    once others follow it. Turns before message `since` (and with `add_generation_prompt` all) are then just not cut apart.
    With `spell` False special tokens in a message are what they are called, not text.
    """
    template = template or tokenizer.chat_template or DEFAULT_TEMPLATE
    specials = tokenizer.special_tokens
    controls = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    named = tuple((name, text if text in specials else "") for name, text in controls.items())
    closer = _closer(template, named, tuple(specials))
    compiled = _Conversation(template, messages, named, tuple(specials), spell)
    text, spans = compiled.spans(add_generation_prompt, since)
    pieces: list[tuple[str, bool]] = []
    at, ended = 0, False
    for start, end in spans:
        pieces.append((text[at:start], False))
        turn = text[start:end] if compiled.has_blocks else text[start:end].rstrip()
        after = re.compile(rf"\s*{re.escape(closer)}").match(text, end)
        ended = True
        if turn.rstrip().endswith(closer):
            turn = turn.rstrip()
            at = start + len(turn)
        elif after:
            at, turn = after.end(), text[start : after.end()]
        else:
            at, turn, ended = start + len(turn), turn + closer, False
        pieces.append((turn, True))
    if add_generation_prompt or text[at:].strip() or ended or not spans:
        pieces.append((text[at:], False))

    tokens: list[tuple[int, bool]] = []
    ids: Sequence[int]
    before = ""
    for piece, scored in pieces:
        for part in compiled.cut.split(piece):
            if part in specials:
                ids, before = [specials[part]], "token"
            elif plain := _plain(part):
                ids, before = _encode(tokenizer, plain, before), "text"
            else:
                continue
            tokens += [(id, scored) for id in ids]
    bos = tokenizer.bos_id
    first = next((i for i, (id, _) in enumerate(tokens) if id != bos), len(tokens))
    if first:
        tokens = tokens[first - 1 :]
    elif tokenizer.adds_bos or not tokens or tokens[0][1]:
        tokens = [(id, False) for id in _start(tokenizer)] + tokens
    mask = [scored for _, scored in tokens]
    return Rendered([id for id, _ in tokens], mask, _plain(text), _stops(tokenizer, specials.get(closer)))


def render_text(tokenizer: Tokenizer, prompt: str, completion: str | None = None) -> Rendered:
    """`[bos] prompt completion [eos]`, the two tokenised apart; completion and EOS are scored, the prompt is not.

    A plain document is a completion of "". Without a completion: the ids to continue at inference.
    """
    head = _start(tokenizer) if tokenizer.adds_bos or not prompt else []
    head += tokenizer.encode(prompt, markers=False)
    reply: list[int] = []
    if completion is not None:
        reply = tokenizer.encode_part(completion, "text" if prompt else "")
        reply += [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    mask = [False] * len(head) + [True] * len(reply)
    return Rendered(head + reply, mask, prompt + (completion or ""), _stops(tokenizer))


def _start(tokenizer: Tokenizer) -> list[int]:
    """What a text begins with: BOS, or EOS where there is none, as texts follow one another in pretraining."""
    start = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    return [] if start is None else [start]


def _stops(tokenizer: Tokenizer, *closers: int | None) -> list[int]:
    stops = (*closers, tokenizer.eos_id, *tokenizer.stop_ids)
    return list(dict.fromkeys(id for id in stops if id is not None))


def render_prompt(tokenizer: Tokenizer, prompt: Text, template: str | None = None) -> Rendered:
    """What a model is to continue: the one way from a prompt, text or messages, to ids at inference."""
    if isinstance(prompt, str):
        return render_text(tokenizer, prompt)
    return render(tokenizer, prompt, template, add_generation_prompt=True)


def write(template: str, messages: Sequence[Message]) -> str:
    """What a template alone makes of messages, with a generation prompt: for engines that take text."""
    return _plain(_Conversation(template, messages, (), ()).write(len(messages), True))


def render_completion(
    tokenizer: Tokenizer, prompt: Text, completion: Text, template: str | None = None
) -> tuple[list[int], list[int], list[bool]]:
    """The ids of a prompt (as `render_prompt` gives them), those of its completion, and which of these are scored."""
    if isinstance(prompt, str) and isinstance(completion, str):
        head, whole = render_text(tokenizer, prompt).ids, render_text(tokenizer, prompt, completion)
    else:
        assert isinstance(prompt, tuple) and isinstance(completion, tuple)
        whole = render(tokenizer, prompt + completion, template, since=len(prompt))
        head = []
        if completion[0].role == "assistant":
            head = render(tokenizer, prompt, template, add_generation_prompt=True).ids
        elif prompt:
            head = render(tokenizer, prompt, template, since=len(prompt)).ids
        if whole.ids[: len(head)] != head:
            raise DataError("the chat template writes the prompt differently once the reply follows it")
    return head, whole.ids[len(head) :], whole.loss_mask[len(head) :]


class _Conversation:
    """Messages with their special tokens disarmed, and the compiled template that writes them."""

    def __init__(self, template: str, messages: Sequence[Message], named: Named, specials: tuple[str, ...],
                 spell: bool = True):
        self.template, self.named = template, named
        self.has_blocks = bool(re.search(r"{%[-+]?\s*generation\s*[-+]?%}", template))
        self.cut, disarm = _patterns(specials)
        self.messages = []
        for message in messages:
            escaped = re.sub(f"[{_MARKS}]", lambda mark: _ESCAPE + str(_MARKS.index(mark[0])), message.content)
            self.messages.append((message.role, disarm.sub(rf"\1{_BREAK}", escaped) if spell else escaped))

    def write(self, count: int, add_generation_prompt: bool) -> str:
        """Render the first `count` messages."""
        return _write(self.template, self.named, tuple(self.messages[:count]), add_generation_prompt)

    def spans(self, add_generation_prompt: bool, since: int) -> tuple[str, list[tuple[int, int]]]:
        """The text of all messages, and where in it the assistant's turns are; see `render`."""
        text = self.write(len(self.messages), add_generation_prompt)
        spans = []
        if self.has_blocks:
            parts = re.split(f"[{_OPEN}{_CLOSE}]", text)
            ends = list(itertools.accumulate(map(len, parts)))
            text, spans = "".join(parts), list(zip(ends[0:-1:2], ends[1::2], strict=True))
            replies = [i for i, message in enumerate(self.messages) if message[0] == "assistant"]
            if len(replies) == len(spans):
                spans = [(self._begin(text, start, i), end) for i, (start, end) in zip(replies, spans, strict=True)]
            return text, spans
        for i, message in enumerate(self.messages):
            if message[0] == "assistant":
                head, turn = self.write(i, True), self.write(i + 1, False)
                if text.startswith(turn) and turn.startswith(head):
                    spans.append((len(head), len(turn)))
                elif not add_generation_prompt and i >= since:
                    raise NotCut(
                        f"the chat template writes message {i + 1} differently once others follow it; "
                        "allowed: templates that only append, or that mark replies with {% generation %}"
                    )
        return text, spans

    def _begin(self, text: str, start: int, reply: int) -> int:
        """Where a reply begins: its block, or the blanks before it that the generation prompt doesn't have."""
        if text[:start].rstrip() == text[:start]:
            return start
        try:
            head = re.sub(f"[{_OPEN}{_CLOSE}]", "", self.write(reply, True))
        except DataError:  # some refuse to begin a conversation with a reply
            return start
        return len(head) if text.startswith(head) and text[len(head) : start].isspace() else start


@lru_cache(maxsize=CACHED)
def _encode(tokenizer: Tokenizer, text: str, before: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode_part(text, before))


@lru_cache(maxsize=CACHED)
def _write(template: str, named: Named, messages: tuple[tuple[str, str], ...], add_generation_prompt: bool) -> str:
    compiled = _compile(template)
    try:
        _steps.set(iter(range(MAX_STEPS)))
        rows = [{"role": role, "content": content} for role, content in messages]
        return compiled.render(messages=rows, add_generation_prompt=add_generation_prompt, tools=None, documents=None,
                               **dict(named))  # fmt: skip
    except Exception as error:  # a template is a program: it may fail in any way
        raise DataError(f"the chat template failed: {' '.join(str(error).split())}") from error


@lru_cache(maxsize=64)
def _patterns(specials: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What cuts a text at special tokens, and what finds the first character of each."""
    return re.compile(f"({either(specials)})"), re.compile(f"(?={either(specials)})(.)", re.DOTALL)


@lru_cache(maxsize=64)
def _closer(template: str, named: Named, specials: tuple[str, ...]) -> str:
    """The special token that a template puts after the assistant's text, else EOS ("" without one)."""
    reply = "\u00a4"
    conversation = _Conversation(template, [Message("user", "?"), Message("assistant", reply)], named, specials)
    try:
        text = conversation.write(2, False)
    except DataError:  # it wants other messages than these; it will say so when it gets the real ones
        text = ""
    after = text.rpartition(reply)[2].replace(_CLOSE, "")
    found = re.match(rf"\s*({either(specials)})", after)
    return found[1] if found else dict(named)["eos_token"]


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


_steps: ContextVar[Iterator[int]] = ContextVar("_steps")


def _counted(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, as long as the rendering has steps left."""
    for item in items:
        if next(_steps.get(), None) is None:
            raise jinja2.TemplateError(f"its loops take more than {MAX_STEPS:,} steps")
        yield item


class _Sandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox, which bounds `range`, with all loops bounded and the results of `+`, `*` and `**`."""

    intercepted_binops = frozenset(["+", "*", "**"])

    def _parse(self, *arguments: Any) -> jinja2.nodes.Template:
        tree = super()._parse(*arguments)
        for loop in tree.find_all(jinja2.nodes.For):
            if not loop.recursive:  # those end with python's stack
                loop.iter = jinja2.nodes.Filter(loop.iter, "_counted", [], [], None, None, lineno=loop.lineno)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > MAX_LENGTH:
            raise jinja2.TemplateError(f"its {operator} makes more than {MAX_LENGTH:,} characters, items or digits")
        return super().call_binop(context, operator, left, right)


def _size(operator: str, left: Any, right: Any) -> int:
    """About how many characters, items or digits `left operator right` has; 0 for what can't grow."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        return bits * 3 // 10
    sizes = [len(side) for side in (left, right) if isinstance(side, str | list | tuple)]
    times = [side for side in (left, right) if isinstance(side, int)]
    return sum(sizes) * (times[0] if times and operator == "*" else 1)


@lru_cache(maxsize=64)
def _compile(template: str) -> jinja2.Template:
    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)  # jinja's own escapes HTML

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
    environment.filters |= {"tojson": tojson, "_counted": _counted}
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        line = getattr(error, "lineno", None)
        raise DataError(f"the chat template is not valid jinja: {error.message} (its line {line})") from error
