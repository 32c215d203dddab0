"""A conversation with a model, or with two side by side. There is no terminal here: `repl.py` has it.

What a model is to continue is rendered anew each turn, as training renders it; a model of ours keeps the cache of what it
ran before (`Kept`), so that only what is new is run.
"""

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from xalign import logprobs
from xalign.backends.base import SamplingParams
from xalign.backends.native import NativeBackend
from xalign.backends.text import prompt_ids
from xalign.data.chat_template import NotCut, Rendered, render
from xalign.data.collate import encode_pair
from xalign.data.records import Message, PreferencePair, Text
from xalign.data.sources import iter_pairs
from xalign.disk import write_atomically, writing
from xalign.errors import ConfigError, DataError
from xalign.evaluation.metrics import Estimate, perplexity
from xalign.nn.cache import Kept
from xalign.nn.decoding import evaluating
from xalign.stopping import UNFINISHED

INPUT_TEMPLATE = "User: {}\nAssistant: "
Write = Callable[[str], object]


@dataclass(frozen=True)
class Reply:
    """What a model said, its token ids (none where a backend doesn't tell), and why it ended: stop, length, or stopped by hand.

    It came in so many `tokens`, of a foreign backend pieces of text. Of the `prompt` tokens (0: unknown) `reused` were in the
    cache; `first` and `seconds` passed until its first and its last token.
    """

    text: str
    ids: tuple[int, ...]
    finish: Literal["stop", "length", "stopped"]
    tokens: int
    prompt: int
    reused: int
    first: float
    seconds: float


class Speaker:
    """A model that answers: a `NativeBackend`, or any with its `stream` and `generate`, which gets text or messages."""

    def __init__(self, backend: Any, name: str):
        self.backend, self.name = backend, name
        self.native = isinstance(backend, NativeBackend)
        if self.native:
            backend.kept = Kept()

    @property
    def net(self) -> Any:
        return self.backend.wrapper.net

    def prompt(self, messages: tuple[Message, ...], template: str | None, spell: bool) -> Text | Rendered:
        """What the model is to continue: `messages` in its chat template, or the last of them in an input template."""
        if not self.native:
            return messages if template is None else template.replace("{}", messages[-1].content)
        if template is not None:
            messages = messages[-1:]
        jinja = None if template is None else as_jinja(template)
        return render(self.backend.tokenizer, messages, jinja, add_generation_prompt=True, spell=spell)

    def size(self, prompt: Text | Rendered) -> tuple[int, int] | None:
        """Tokens of a prompt, and of prompt and reply together at most; None where only a server knows."""
        if isinstance(prompt, Rendered):
            return len(prompt.ids), self.net.max_seq_len
        window = getattr(self.backend, "context", None)
        return None if window is None else (len(prompt_ids(self.backend.tokenizer, prompt, self.backend.template)), window)

    def speak(self, prompt: Text | Rendered, params: SamplingParams, write: Write, halted: Callable[[], bool]) -> Reply:
        """Answer, telling `write` piece by piece, until the end, until `halted()`, or until a KeyboardInterrupt."""
        began, first, pieces, stopped, held, text = time.monotonic(), 0.0, 0, False, "", ""
        given, window = self.size(prompt) or (0, None)
        if window is not None:  # which never moves in a reply
            params = replace(params, max_new_tokens=min(params.max_new_tokens, window - given))
        if params.beams > 1:
            best = self.backend.generate([prompt], params)[0][0]
            if best.error is not None:
                raise DataError(best.error)
            write(best.text)
            seconds = time.monotonic() - began
            return Reply(best.text, best.token_ids, best.finish_reason, len(best.token_ids), given, 0, seconds, seconds)
        try:
            with closing(self.backend.stream(prompt, params)) as stream:
                for piece in stream:
                    if piece or self.native:
                        pieces += 1
                        first = first or time.monotonic() - began
                    whole = (held + piece).rstrip(UNFINISHED)
                    held = (held + piece)[len(whole) :]
                    if whole:
                        write(whole)
                        text += whole
                    if halted():
                        stopped = True
                        break
        except KeyboardInterrupt:
            stopped = True
        ids = tuple(self.backend.streamed) if self.native else ()
        finish: Any = "stopped" if stopped else "stop" if self.backend.ended else "length"
        if held and finish == "stop":
            write(held)
            text += held
        return Reply(text, ids, finish, len(ids) if self.native else pieces, given,
                     self.backend.kept.reused if self.native else 0, first, time.monotonic() - began)


class Session:
    """Messages so far and how to answer: one speaker, or two that are compared, of which the second is the reference.

    With an input `template` each message is answered by itself. Without `spell` special tokens in a message are tokens.
    A turn whose reply has no room drops whole oldest turns from what the model sees: `hidden` messages, never the system's.
    """

    def __init__(self, speakers: Sequence[Speaker], params: SamplingParams, *, template: str | None = None,
                 system: str | None = None, spell: bool = True, beta: float = 0.1, picks: str = "picks.jsonl"):
        if params.n > 1:
            raise ConfigError(f"n is {params.n}, allowed is 1 in a conversation: it goes on from one reply")
        self.speakers, self.params, self.template, self.system, self.spell = speakers, params, template, system, spell
        self.beta, self.picks = beta, Path(picks)
        self.messages: list[Message] = []
        self.hidden = self.retries = self.turns = self.spoken = 0
        self.seen: tuple[Message, ...] = ()  # what the newest replies answer
        self.replies: list[Reply] = []
        self.picked: dict[str, int] = {"a": 0, "b": 0, "tie": 0}
        self.open = False  # whether the newest replies can be picked from

    def ask(self, text: str, write: Sequence[Write], halted: Callable[[], bool] = lambda: False) -> list[Reply]:
        """Answer a message, one reply a speaker, each told to its `write`; a reply that was stopped is kept, an empty one that
        was stopped is not, nor is its message. Raises `DataError` for what can't be rendered or is too long.
        """
        self.retries = 0
        return self._answer(text, write, halted)

    def _answer(self, text: str, write: Sequence[Write], halted: Callable[[], bool]) -> list[Reply]:
        before = self.hidden
        self.messages.append(Message("user", text))
        self.replies, self.open = [], False
        try:
            prompts = self._fitted()
            params = self._seeded()
            for speaker, prompt, tell in zip(self.speakers, prompts, write, strict=True):
                self.replies.append(speaker.speak(prompt, params, tell, halted))
                if self.replies[-1].finish == "stopped":
                    break
        except BaseException:
            self.messages.pop()
            self.hidden, self.replies = before, []
            raise
        self.prompts = prompts
        first = self.replies[0]
        self.turns, self.spoken = self.turns + 1, self.spoken + sum(r.tokens for r in self.replies)
        self.open = len(self.replies) == 2 and all(r.finish != "stopped" for r in self.replies)
        if first.finish == "stopped" and not first.text:
            self.messages.pop()
        else:
            self.messages.append(Message("assistant", first.text))
        return self.replies

    def _context(self) -> tuple[Message, ...]:
        """The messages that the model sees."""
        if self.template is not None:
            return tuple(self.messages[-1:])
        head = (Message("system", self.system),) if self.system is not None else ()
        return (*head, *self.messages[self.hidden :])

    def _fitted(self) -> list[Text | Rendered]:
        """A prompt for each speaker, oldest turns hidden until the reply has its room, at least half the window."""
        while True:
            self.seen = self._context()
            prompts = [s.prompt(self.seen, self.template, self.spell) for s in self.speakers]
            sizes = [size for s, p in zip(self.speakers, prompts, strict=True) if (size := s.size(p)) is not None]
            if all(n + min(self.params.max_new_tokens, window // 2) <= window for n, window in sizes):
                return prompts
            later = [i for i in range(self.hidden + 1, len(self.messages)) if self.messages[i].role == "user"]
            if self.template is not None or not later:
                break
            self.hidden = later[0]
        for n, window in sizes:
            if n >= window:
                what = "the message makes" if self.system is None else "the system turn and the message make"
                raise DataError(f"{what} {n} tokens of prompt, allowed are at most {window - 1} of this model")
        return prompts

    def _seeded(self) -> SamplingParams:
        """The settings with a seed, which all speakers of a turn share: the one that was set, another one for each retry.

        A foreign speaker that is alone gets one only if it was set.
        """
        if self.params.beams > 1 or (self.params.seed is None and len(self.speakers) == 1 and not self.speakers[0].native):
            return self.params
        seed = secrets.randbelow(2**31) if self.params.seed is None else self.params.seed
        return replace(self.params, seed=(seed + self.retries) % 2**63)

    def retry(self, write: Sequence[Write], halted: Callable[[], bool] = lambda: False) -> list[Reply]:
        """Answer the newest message again, by another seed."""
        before, hidden, retries = list(self.messages), self.hidden, self.retries
        text = self.undo()
        self.retries = retries + 1
        done = False
        try:
            replies = self._answer(text, write, halted)
            done = len(self.messages) == len(before)
        finally:
            if not done:  # nothing took its place
                self.messages, self.hidden = before, hidden
        return replies

    def undo(self) -> str:
        """Take the newest turn back; gives its message."""
        if not self.messages:
            raise ConfigError("there is no turn yet")
        user = max(i for i, message in enumerate(self.messages) if message.role == "user")
        text = self.messages[user].content
        del self.messages[user:]
        self.hidden, self.retries, self.replies, self.open = min(self.hidden, user), 0, [], False
        return text

    def clear(self) -> None:
        """Forget all turns; the system's stays."""
        self.messages, self.replies = [], []
        self.hidden, self.retries, self.open = 0, 0, False

    def say_system(self, text: str | None) -> None:
        if self.template is not None:
            raise ConfigError("a system turn goes with --chat: --interactive shows the model its template alone")
        self.system = text

    def save(self, path: str) -> int:
        """Write the conversation as a line {"messages": [...]}, which `load` and `xalign sft` read; gives how many there are.

        Raises `ConfigError` if there is a file already that isn't one.
        """
        if Path(path).exists():
            try:
                read_transcript(path)
            except DataError:
                raise ConfigError(f"{path} is there and holds no conversation, so it is not overwritten") from None
        system = [Message("system", self.system)] if self.system is not None else []
        rows = as_dicts((*system, *self.messages))
        write_atomically(path, json.dumps({"messages": rows}, ensure_ascii=False) + "\n")
        return len(rows)

    def load(self, path: str) -> int:
        """Go on from a saved conversation; gives how many messages it has."""
        messages = read_transcript(path)
        system = messages[0].content if messages and messages[0].role == "system" else None
        if system is not None and self.template is not None:
            raise ConfigError(f"{path} has a system turn, which goes with --chat")
        self.clear()
        self.system, self.messages = system, messages[system is not None :]
        return len(messages)

    @torch.no_grad()
    def log_ratios(self) -> list[float] | None:
        """beta (log pi - log ref) of both newest replies, nats, all their tokens; None if the models read different tokens, or
        one has no room for the other's.
        """
        a, b = self.prompts if len(self.replies) == 2 else (None, None)
        if not (isinstance(a, Rendered) and isinstance(b, Rendered) and a.ids == b.ids):
            return None
        ratios = []
        for reply in self.replies:
            tokens = torch.tensor([[*a.ids, *reply.ids]])
            logps = []
            if len({s.backend.tokenizer.decode(reply.ids) for s in self.speakers}) > 1:
                return None
            for speaker in self.speakers:
                net = speaker.net
                if max(reply.ids, default=0) >= net.num_tokens or tokens.shape[1] > net.max_seq_len:
                    return None
                here = tokens.to(net.token_emb.weight.device)
                with evaluating(net):
                    scored = torch.arange(here.shape[1], device=here.device)[None] >= len(a.ids)
                    logps.append(float(logprobs.sequence_logprobs(net, here, scored)))
            ratios.append(self.beta * (logps[0] - logps[1]))
        return ratios

    def pick(self, which: str) -> bool:
        """Prefer one of the newest two replies: the pair goes to the file `picks`, and the conversation goes on from it.

        A "tie" is only counted, as nothing can be learnt from it: False. Raises `ConfigError` where there is nothing to pick.
        """
        if which not in self.picked:
            raise ConfigError(f"/pick {which}: allowed are a, b and tie")
        if not self.open:
            raise ConfigError("there are no two replies to pick from" + ("" if len(self.speakers) == 2 else " (see --compare)"))
        if which != "tie":
            chosen, rejected = self.replies if which == "a" else self.replies[::-1]
            prompt: Any = self.seen
            sides: list[Any] = [(Message("assistant", r.text),) for r in (chosen, rejected)]
            if self.template is not None:
                prompt, sides = self.template.replace("{}", self.seen[-1].content), [chosen.text, rejected.text]
            pair = PreferencePair(prompt, *sides)
            if pair.identical:
                raise ConfigError("both replies are the same text, which makes no pair; allowed is tie")
            fields = {name: getattr(pair, name) for name in ("prompt", "chosen", "rejected")}
            append_line(self.picks, {k: v if isinstance(v, str) else as_dicts(v) for k, v in fields.items()})
            self.messages[-1] = Message("assistant", chosen.text)
        self.open = False
        self.picked[which] += 1
        return which != "tie"

    @torch.no_grad()
    def perplexity(self) -> float | None:
        """Perplexity of the conversation's replies under the first model, given what came before; None where there is none."""
        speaker, messages = self.speakers[0], self._context()
        if not speaker.native or self.template is not None or not any(m.role == "assistant" for m in messages):
            return None
        try:
            shown = render(speaker.backend.tokenizer, messages, spell=self.spell)
        except NotCut:  # the template drops a part of earlier replies
            return None
        net = speaker.net
        tokens, mask = (torch.tensor([row[: net.max_seq_len]], device=net.token_emb.weight.device)
                        for row in (shown.ids, shown.loss_mask))
        with evaluating(net):
            logps, scored = logprobs.scored_logprobs(net, tokens, mask)
        return float((-logps.masked_fill(~scored, 0).sum() / scored.sum()).exp()) if scored.any() else None


def held_out_perplexity(speaker: Speaker, path: str, limit: int = 200) -> tuple[Estimate, int]:
    """Perplexity of the completions of a file's preference pairs, at most `limit` that fit the window, and of how many."""
    if not speaker.native:
        raise ConfigError(f"{speaker.name} is no model of ours, only theirs tells log-probabilities")
    tokenizer, window = speaker.backend.tokenizer, speaker.net.max_seq_len
    pairs = [encode_pair(pair, tokenizer) for pair in islice(iter_pairs(Path(path)), limit)]
    fitting = [p for p in pairs if len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= window]
    if not fitting:
        raise DataError(f"{path}: no pair that fits {window} tokens")
    return perplexity(speaker.net, fitting, tokenizer.pad_id), len(fitting)


def as_jinja(template: str) -> str:
    """An input template as a chat template, whose own special tokens are tokens and whose message is text."""
    before, after = (json.dumps(part, ensure_ascii=False) for part in template.split("{}"))
    reply = "{% if messages | length > 1 %}{{ messages[1].content }}{% endif %}"  # of an example: see where a reply ends
    return "{{ " + before + " }}{{ messages[0].content }}{{ " + after + " }}" + reply


def as_dicts(messages: Sequence[Message]) -> list[dict[str, str]]:
    return [{"role": m.role, "content": m.content} for m in messages]


def read_transcript(path: str) -> list[Message]:
    """The messages of a saved conversation: a system's or none, then user and assistant by turns. Raises `DataError`."""
    try:
        with writing(path):
            held = json.loads(Path(path).read_text(encoding="utf-8"))
        messages = [Message(m["role"], m["content"]) for m in held["messages"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{path}: no conversation that /save wrote ({' '.join(str(error).split())})") from None
    turns = [m.role for m in messages if m.role != "system"]
    if turns != ["user", "assistant"] * (len(turns) // 2) or any(m.role == "system" for m in messages[1:]):
        raise DataError(f"{path}: allowed is a system turn or none, then user and assistant by turns")
    return messages


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Add a line to a JSONL file; one that was left without an end is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path), open(path, "a+b") as file:
        ended = not file.tell() or (file.seek(-1, os.SEEK_END), file.read())[1] == b"\n"
        file.write(b"" if ended else b"\n")
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
