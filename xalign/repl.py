"""The program around a conversation: `generate.py --chat` and `--interactive`, for a person at a terminal or for a script.

Replies and what a command shows go to stdout, notes to stderr. A person's mistake is a note; a script's ends it, with its line.
"""

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, get_type_hints

from xalign.backends.base import SamplingParams
from xalign.chat import INPUT_TEMPLATE, Reply, Session, Speaker, held_out_perplexity
from xalign.console import Console, columns, side_by_side, table
from xalign.display import Paint, visible
from xalign.errors import ConfigError, XalignError, nearest
from xalign.flags import LIMITS
from xalign.generate_config import GenerateConfig
from xalign.loading import load
from xalign.nn.quantize import QuantizedLinear
from xalign.prepare import say
from xalign.stages import parameter_count, quantised

SETTINGS = [f.name for f in fields(SamplingParams) if f.name != "n"]
HELP = {
    "/set NAME VALUE": "change a setting: " + ", ".join(SETTINGS) + "; system; `/set greedy`",
    "/show": "model, settings, and how full the context is; `/show history` the conversation; "
             "`/show perplexity FILE` of its preference pairs",
    "/system TEXT": "change the system turn; `none` takes it away; without a text it is shown",
    "/clear": "forget the conversation (also: clear)",
    "/save FILE": "write the conversation",
    "/load FILE": "go on from a saved one",
    "/retry": "answer the last message again",
    "/undo": "take the last turn back",
    "/pick a|b|tie": "with --compare: record which reply is better, and go on from it",
    "/stats": "tokens, pace and cache of the last reply",
    "/help": "this (also: /?)",
    "/bye": "leave (also: exit, Ctrl-D)",
    '"""': "begins and ends a message of several lines, which may look like a command",
    "Ctrl-C": "stops a reply and keeps what there is of it; at the prompt it drops the line",
}
ALIASES = {"/?": "/help", "/exit": "/bye", "/quit": "/bye"}
COMMANDS = [name.split()[0] for name in HELP if name.startswith("/")]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what a terminal would obey


class Leave(Exception):
    """The conversation is over."""


class Halt:
    """Within the block Ctrl-C is only noted: call it to know. A second one, or the first with `at_once`, interrupts."""

    def __init__(self, on: bool, at_once: bool = False):
        self.on, self.at_once, self.asked = on and threading.current_thread() is threading.main_thread(), at_once, False

    def __enter__(self) -> "Halt":
        if self.on:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.on:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked or self.at_once:
            raise KeyboardInterrupt
        self.asked = True

    def __call__(self) -> bool:
        return self.asked


class Repl:
    """Reads messages and commands, and shows what becomes of them."""

    def __init__(self, session: Session, console: Console):
        self.session, self.console, self.paint = session, console, Paint("auto")
        self.pieces = 0  # of the replies that are being written

    def run(self) -> None:
        """Until the end of the input, /bye, or, of a script, the first mistake: `ConfigError` with its line."""
        if self.console.person:
            say(self.paint(f"{self.session.speakers[0].name}  (/help tells what there is, Ctrl-D leaves)", "dim"))
        while True:
            try:
                text, literal = self.console.message(self.paint)
                if text is None:
                    return
                self.take(text, literal)
            except Leave:
                return
            except BrokenPipeError:
                raise
            except KeyboardInterrupt:
                if not self.console.person:
                    raise
                say("\n(Ctrl-D or /bye leaves)")
            except (XalignError, OSError) as error:
                what = error if isinstance(error, XalignError) else f"{error.filename or 'system'}: {error.strerror or error}"
                if not self.console.person:
                    raise ConfigError(f"standard input:{self.console.line}: {what}") from None
                say(self.paint(f"error: {visible(str(what))}", "red"))

    def take(self, text: str, literal: bool) -> None:
        """A message, or, unless it is `literal`, a command."""
        word = text.strip().lower()
        if not literal and word in ("exit", "clear"):
            text = {"exit": "/bye", "clear": "/clear"}[word]
        if literal or not text.lstrip().startswith("/"):
            if text.strip():
                self.answer(lambda write, halted: self.session.ask(text, write, halted))
            return
        name, rest = [*text.strip().split(None, 1), ""][:2]
        name = ALIASES.get(name.lower(), name.lower())
        if name not in COMMANDS:
            raise ConfigError(f"no command {name}{nearest(name, COMMANDS)}; /help lists them; what looks like one and is "
                              'a message stands in """')
        getattr(self, "do_" + name[1:])(rest)

    def answer(self, ask: Callable[..., list[Reply]]) -> None:
        """Have the message answered, as it comes or side by side."""
        session, hidden = self.session, self.session.hidden
        alone, self.pieces = len(session.speakers) == 1, 0
        with Halt(self.console.person, not all(s.native for s in session.speakers)) as halted:
            try:
                replies = ask([self.show if alone else self.tick] * len(session.speakers), halted)
            except (XalignError, OSError):
                self.end_line(alone and self.pieces > 0)
                raise
        self.end_line(alone)
        if replies[-1].finish == "stopped" and not self.console.person:
            raise KeyboardInterrupt
        if session.hidden > hidden:
            many = sum(m.role == "user" for m in session.messages[hidden : session.hidden])
            left = sum(m.role == "user" for m in session.messages[: session.hidden])
            say(f"(the context is full: the model no longer sees the oldest {many} turn{'s' * (many > 1)}, {left} in all)")
        if not alone:
            self.compared(replies)
        for reply, name, speaker in zip(replies, "AB", session.speakers, strict=False):
            which = "" if alone else f" {name}"
            if reply.finish == "stopped":
                kept = ", it is kept as far as it came" if reply.text else ": the message is taken back"
                say(f"(reply{which} stopped{kept})")
            elif reply.finish == "length":
                say(f"(reply{which} cut off after {reply.tokens} {units(speaker)}: max_new_tokens or the context)")

    def end_line(self, alone: bool) -> None:
        """Behind a reply that was shown as it came; or, of several, the signs of life go."""
        if alone:
            print(flush=True)
        elif self.pieces and len(self.session.speakers) > 1:
            print("\r" + " " * 20 + "\r", end="", flush=True, file=sys.stderr)

    def show(self, piece: str) -> None:
        self.pieces += 1
        if sys.stdout is not None and sys.stdout.isatty():
            piece = CONTROL.sub(lambda c: ascii(c[0])[1:-1], piece)
        print(piece, end="", flush=True)

    def tick(self, piece: str) -> None:
        """A sign of life while replies are written that are shown together."""
        if self.console.person:
            self.pieces += 1
            print(f"\r({self.pieces} pieces)", end="", flush=True, file=sys.stderr)

    def compared(self, replies: list[Reply]) -> None:
        """Two replies side by side, or on a narrow terminal one under the other, each with its log-ratio."""
        ratios = self.session.log_ratios() if len(replies) == 2 else None
        heads = [f"{letter}: {speaker.name}" for letter, speaker in zip("AB", self.session.speakers, strict=True)]
        feet = [f"log-ratio {ratio:+.3f}" for ratio in ratios] if ratios else ["", ""]
        texts = [CONTROL.sub(lambda c: ascii(c[0])[1:-1], reply.text) for reply in replies]
        for line in side_by_side(list(zip(heads, texts, feet, strict=False)), columns(), self.paint):
            print(line)
        if self.session.open and self.console.person:
            say(self.paint("(/pick a, b or tie)", "dim"))

    def do_set(self, rest: str) -> None:
        name, value = [*rest.split(None, 1), "", ""][:2]
        name = name.replace("-", "_").lower()
        if name == "greedy" and not value:
            name, value = "temperature", "0"
        if name == "system":
            return self.do_system(value)
        if name not in SETTINGS:
            what = f"/set {name}: no setting{nearest(name, SETTINGS)}" if name else "/set needs a name and a value"
            raise ConfigError(f"{what}; allowed are {', '.join(SETTINGS)}, system")
        if not value:
            raise ConfigError(f"/set {name} needs a value, it is {getattr(self.session.params, name)}")
        self.session.params = replace(self.session.params, **{name: as_setting(name, value)})
        print(f"{name} = {getattr(self.session.params, name)}")

    def do_show(self, rest: str) -> None:
        session, first = self.session, self.session.speakers[0]
        if rest == "history":
            for message in session.messages:
                print(f"{self.paint(message.role + ':', 'cyan')} ", end="")
                self.show(message.content + "\n")
            return
        if rest.split(None, 1)[:1] == ["perplexity"]:
            path = self._file("/show perplexity", rest.removeprefix("perplexity").strip())
            for speaker in session.speakers:
                figure, count = held_out_perplexity(speaker, path)
                table([(speaker.name, f"perplexity {figure} of the completions of {count} pairs")])
            return
        if rest:
            raise ConfigError(f"/show {rest}: allowed are nothing, history and perplexity FILE")
        rows = [("model", first.name)]
        if first.native:
            rows += described(first)
            if (perplexity := session.perplexity()) is not None:
                rows.append(("perplexity", f"{perplexity:.2f} of the replies so far"))
        if len(session.speakers) == 2:
            rows += [("compared with", session.speakers[1].name),
                     ("picks", ", ".join(f"{k} {n}" for k, n in session.picked.items()) + f" ({session.picks})")]
        rows += [("input template", repr(session.template))] if session.template is not None else [
            ("system", visible(session.system) if session.system is not None else "none"),
            ("turns", f"{len(session.messages) // 2}, {session.hidden // 2} of them no longer seen")]
        default = SamplingParams()
        rows += [(name, str(getattr(session.params, name))) for name in SETTINGS
                 if getattr(session.params, name) != getattr(default, name) or name in ("temperature", "max_new_tokens")]
        table(rows)

    def do_system(self, rest: str) -> None:
        if rest:
            self.session.say_system(None if rest == "none" else rest)
        print(f"system = {visible(self.session.system) if self.session.system is not None else 'none'}")

    def do_clear(self, rest: str) -> None:
        self.session.clear()
        say("(the conversation is forgotten)")

    def do_save(self, rest: str) -> None:
        path = self._file("/save", rest)
        say(f"({self.session.save(path)} messages saved to {path})")

    def do_load(self, rest: str) -> None:
        path = self._file("/load", rest)
        say(f"({self.session.load(path)} messages loaded from {path})")

    @staticmethod
    def _file(command: str, rest: str) -> str:
        if not rest or "\0" in rest:
            raise ConfigError(f"{command} needs a file")
        return os.path.expanduser(rest)

    def do_retry(self, rest: str) -> None:
        if not self.session.messages:
            raise ConfigError("there is no turn yet")
        self.answer(self.session.retry)

    def do_undo(self, rest: str) -> None:
        self.session.undo()
        say("(the last turn is taken back)")

    def do_pick(self, rest: str) -> None:
        written = self.session.pick(rest.lower())
        say(f"({'a pair added to ' + str(self.session.picks) if written else 'a tie: counted, not written'})")

    def do_stats(self, rest: str) -> None:
        session = self.session
        if not session.replies:
            raise ConfigError("there is no reply yet")
        for reply, speaker in zip(session.replies, session.speakers, strict=False):
            after = reply.seconds - reply.first
            pace = f"{(reply.tokens - 1) / after:.1f}" if reply.tokens > 1 and after > 0 else "-"
            unit = units(speaker)
            rows = [("model", speaker.name), ("reply", f"{reply.tokens} {unit}, {reply.seconds:.2f} s, end: {reply.finish}"),
                    (f"first {unit[:-1]}", f"after {1000 * reply.first:.0f} ms"), ("pace", f"{pace} {unit}/s after it")]
            if speaker.native:
                kept = speaker.backend.kept
                size = sum(t.nbytes for t in (*kept.prefix.keys, *kept.prefix.values)) / 1e6
                rows += [("prompt", f"{reply.prompt} tokens, {reply.reused} of them in the cache"),
                         ("cache", f"{len(kept.ids)} of {speaker.net.max_seq_len} tokens, {size:.1f} MB")]
            table(rows)
        turns = f"{session.turns} {'reply' if session.turns == 1 else 'replies'}"
        table([("in all", f"{turns}, {session.spoken} {units(session.speakers[0])}")])

    def do_help(self, rest: str) -> None:
        table(list(HELP.items()))

    def do_bye(self, rest: str) -> None:
        raise Leave


def as_setting(name: str, value: str) -> Any:
    """A value of `/set` as `SamplingParams` has it. Raises `ConfigError`."""
    hint = str(get_type_hints(SamplingParams)[name])
    if name == "stop":
        try:
            words = shlex.shlex(value, posix=True, punctuation_chars=False)
            words.whitespace_split, words.escape, words.commenters = True, "", ""
            strings = () if value == "none" else tuple(s.replace("\\n", "\n") for s in words)
            if "" in strings:
                raise ValueError("an empty string")
            return strings
        except ValueError as error:
            raise ConfigError(f"/set stop {value}: {error}, allowed are words, each in quotes where it has blanks") from None
    if value == "none" and "None" in hint:
        return None
    kind = int if "int" in hint else float
    try:
        number = kind(value)
    except ValueError:
        kinds = "a whole number" if kind is int else "a number"
        raise ConfigError(f"/set {name} {value}: allowed is {kinds}{' or none' * ('None' in hint)}") from None
    low, high = LIMITS.get(name, (-1e30, 1e30))
    if not low <= number <= high:
        raise ConfigError(f"/set {name} {value}: allowed is a number from {low} to {high}")
    return number


def units(speaker: Speaker) -> str:
    """What a reply comes in: a server's pieces are not always tokens."""
    return "tokens" if speaker.native else "pieces"


def described(speaker: Speaker) -> list[tuple[str, str]]:
    """Size, precision and context of a model of ours."""
    net, kept = speaker.net, speaker.backend.kept
    layers = [m for m in net.modules() if isinstance(m, QuantizedLinear)]
    rows = [("weights", f"{parameter_count(net) + sum(m.in_features * m.out_features for m in layers):,} parameters, "
                        f"{sum(t.nbytes for t in (*net.parameters(), *net.buffers())) / 1e6:.1f} MB, "
                        f"{str(net.token_emb.weight.dtype).removeprefix('torch.')} on {net.token_emb.weight.device}")]
    if layers:
        held = sum(t.nbytes for m in layers for t in (m.packed, m.scales))
        share = held / sum(4 * m.in_features * m.out_features for m in layers)
        rows.append(("quantised", f"{quantised(net)}; these layers take {share:.3f} of their fp32 bytes"))
    return [*rows, ("context", f"{len(kept.ids)} of {net.max_seq_len} tokens in the cache")]


def opened(config: GenerateConfig) -> Session:
    """The models and settings of a conversation. Raises `ConfigError` for flags that don't go together."""
    options, talk, draw = config.prompt, config.conversation, config.sampling
    template = None if options.chat else talk.input_template or INPUT_TEMPLATE
    if talk.input_template is not None and (options.chat or not talk.interactive):
        raise ConfigError("--input-template goes with --interactive, without --chat")
    if template is not None:
        if options.system is not None:
            raise ConfigError("--system goes with --chat")
        if template.count("{}") != 1:
            raise ConfigError(f"--input-template is {template!r}, allowed is a text with {{}} once, where the message goes")
        if "\\n" in template:
            say("warning: --input-template holds a backslash and an n, which is what the model sees; in bash a line end is "
                "written $'User: {}\\nAssistant: '")
    if talk.allow_special_tokens and options.backend != "native":
        raise ConfigError(f"--allow-special-tokens doesn't go with --backend {options.backend}")
    if options.prompts is not None or options.json:
        raise ConfigError(f"{'--json' if options.json else '--prompts'} doesn't go with --interactive or --compare")
    params = SamplingParams(**{name: getattr(draw, name) for name in SamplingParams.__dataclass_fields__})
    other = talk.compare
    if other == "reference":
        other = options.model if options.adapter else str(Path(options.model).parent / "reference")
        if not options.adapter and not Path(other).is_dir():
            raise ConfigError(f"--compare: {options.model} has no reference beside it, allowed is a model's folder or name")
    speakers = [Speaker(load(options.model, options, draw, options.adapter), options.model)]
    if other is not None:
        name = other + " without adapter" * (other == options.model and options.adapter is not None)
        speakers.append(Speaker(load(other, options, draw, None), name))
    if options.backend == "openai":  # a person waits, and asks for one thing at a time
        for speaker in speakers:
            speaker.backend.tries, speaker.backend.concurrency = 3, 1
    if options.chat and speakers[0].native and not speakers[0].backend.tokenizer.chat_template:
        say(f"{options.model} has no chat template: xalign's own is used")
    return Session(speakers, params, template=template, system=options.system, spell=not talk.allow_special_tokens,
                   beta=talk.beta, picks=talk.picks)


def talks(config: GenerateConfig) -> bool:
    """Whether the settings ask for a conversation, and not for completions of given prompts."""
    options, talk = config.prompt, config.conversation
    if talk.compare is not None and not (talk.interactive or options.chat):
        raise ConfigError("--compare goes with --chat or --interactive")
    if talk.input_template is not None and not talk.interactive:
        raise ConfigError("--input-template goes with --interactive")
    given = options.prompt is not None or options.prompts is not None
    return talk.interactive or talk.compare is not None or (options.chat and not given and not options.json)


def run_chat(config: GenerateConfig) -> None:
    """Talk until the input ends; with --prompt answer that alone."""
    session = opened(config)
    repl = Repl(session, Console(config.conversation.history, COMMANDS, [*SETTINGS, "greedy", "system"]))
    if config.prompt.prompt is not None:
        repl.console.person = False
        repl.answer(lambda write, halted: session.ask(config.prompt.prompt or "", write, halted))
        return
    with repl.console:
        repl.run()
