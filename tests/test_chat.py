"""Conversations: what the model sees each turn, the kept cache, every command, and a real terminal."""

import io
import os
import signal
import sys
import time
from itertools import takewhile
from pathlib import Path

import pexpect
import pytest
import torch
from conftest import LLAMA, tiny, tiny_ar

from tests.server import Server, prompt_of
from xalign import save_pretrained
from xalign.backends.base import SamplingParams
from xalign.backends.native import NativeBackend
from xalign.chat import Session, Speaker, as_jinja, read_transcript
from xalign.cli import SHORT, main
from xalign.console import Console, cells, side_by_side, wrapped
from xalign.data.chat_template import DEFAULT_TEMPLATE, ROLE_MARKERS, render, render_prompt, render_text
from xalign.data.records import Message
from xalign.data.sources import read_pairs
from xalign.display import Paint
from xalign.errors import ConfigError, DataError
from xalign.flags import parse
from xalign.generate_config import GenerateConfig
from xalign.nn.cache import Kept
from xalign.repl import Repl, opened
from xalign.tokenizers import ByteTokenizer

ROOT = Path(__file__).resolve().parent.parent


def tokenizer() -> ByteTokenizer:
    made = ByteTokenizer(ROLE_MARKERS)
    made.chat_template = DEFAULT_TEMPLATE
    return made


def speaker(seed=0, window=512, **options) -> Speaker:
    made = tokenizer()
    model = tiny(seed, num_tokens=made.vocab_size, max_seq_len=window, **(LLAMA | options))
    return Speaker(NativeBackend(model, made), f"m{seed}")


def session(*speakers: Speaker, **options) -> Session:
    params = {"max_new_tokens": 12, "seed": 3, "min_new_tokens": 12} | options.pop("params", {})
    return Session(speakers or [speaker()], SamplingParams(**params), **options)


def ignore(piece: str) -> None:
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    made = tokenizer()
    for seed, name in enumerate(("policy", "reference")):
        save_pretrained(tiny(seed, num_tokens=made.vocab_size, max_seq_len=4096, dim=64, attn_dim_head=16, **LLAMA),
                        folder / name, made)
    return folder


def talk(monkeypatch, capsys, script: str | bytes, *arguments, command="chat") -> tuple[int, str, str]:
    """Run a script of messages and commands in this process: exit status, stdout, stderr."""
    data = script.encode() if isinstance(script, str) else script
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    status = 0
    try:
        main([command, *map(str, arguments)])
    except SystemExit as stop:
        status = stop.code or 0
    out, err = capsys.readouterr()
    return status, out, err


# ------------------------------------------------------------------------------------------------- the kept cache


@pytest.mark.parametrize("options", [{}, {"attn_kv_heads": 2}, {"rotary_pos_emb": False, "alibi_pos_bias": True},
                                     {"rotary_pos_emb": False}, {"attn_sliding_window": 6}])
def test_what_is_kept_gives_the_logits_of_running_everything(options):
    wrapper, kept = tiny_ar(max_seq_len=64, **options), Kept()
    text: list[int] = [1, 2, 3, 4, 5]
    for turn in range(4):
        with torch.no_grad():
            prefix = kept.beginning(text)
            new = torch.tensor([text[prefix.length :]])
            logits = wrapper.net(new, cache=prefix, input_not_include_cache=True)
            whole = wrapper.net(torch.tensor([text]))[:, prefix.length :]
        assert (logits - whole).abs().max() < 1e-5
        assert prefix.length == (0 if turn == 0 else len(text) - 4)  # the last token that was written was never run
        prompt = torch.tensor(text)
        steps = [int(t) for t in wrapper.stream(prompt, 6, kept=kept, seed=turn)]
        assert steps == wrapper.generate(prompt, 6, seed=turn).tolist()
        text = [*text, *steps, 7, 8, 9]


def test_a_stream_that_is_left_keeps_what_it_ran_and_a_changed_text_only_what_is_common():
    wrapper, kept = tiny_ar(max_seq_len=64), Kept()
    stream = wrapper.stream(torch.tensor([1, 2, 3, 4]), 20, kept=kept, seed=0)
    steps = [int(next(stream)) for _ in range(5)]
    stream.close()
    assert kept.ids == [1, 2, 3, 4, *steps[:4]] and kept.prefix.length == 8
    assert kept.beginning([1, 2, 9, 4, 5]).length == kept.reused == 2
    assert kept.beginning([1, 2]).length == 1 and kept.beginning([5]).length == 0
    same = torch.tensor([1, 2, 9, 4])
    assert [int(t) for t in wrapper.stream(same, 8, kept=kept, seed=1)] == wrapper.generate(same, 8, seed=1).tolist()


def test_a_window_that_moves_is_not_kept_and_rows_are_refused():
    wrapper, kept = tiny_ar(max_seq_len=16), Kept()
    list(wrapper.stream(torch.tensor([1, 2, 3]), 8, kept=kept, seed=0))
    held = list(kept.ids)
    prompt = torch.tensor([*held, 5])
    assert [int(t) for t in wrapper.stream(prompt, 30, kept=kept, seed=0)] == wrapper.generate(prompt, 30, seed=0).tolist()
    assert kept.ids == held
    with pytest.raises(ValueError, match="kept goes with one row"):
        next(wrapper.stream([torch.tensor([1])] * 2, 3, kept=kept))


def test_bf16_keeps_its_own_precision():
    wrapper, kept = tiny_ar(max_seq_len=64).bfloat16(), Kept()
    list(wrapper.stream(torch.tensor([1, 2, 3]), 8, kept=kept, seed=0))
    assert kept.prefix.keys[0].dtype == torch.bfloat16
    list(wrapper.stream(torch.tensor([*kept.ids, 3, 4]), 8, kept=kept, seed=0))


# ---------------------------------------------------------------------------------------------------- the session


def test_each_turn_sees_the_whole_conversation_as_training_renders_it_and_runs_only_what_is_new():
    one = session(system="Be kind.")
    held: list[int] = []
    for turn, text in enumerate(("Hello", "你好 👩‍👩‍👧", "and <|user|> </s>?")):
        (reply,) = one.ask(text, [ignore])
        messages = (Message("system", "Be kind."), *one.messages[:-1])
        expected = render_prompt(one.speakers[0].backend.tokenizer, messages)
        assert one.prompts[0].ids == expected.ids and expected.ids.count(257) == 1
        alike = list(takewhile(lambda two: two[0] == two[1], zip(expected.ids[:-1], held, strict=False)))
        assert reply.reused == len(alike) and (turn == 0 or reply.reused > 10)
        fresh = speaker().speak(one.prompts[0], one._seeded(), ignore, lambda: False)
        assert fresh.ids == reply.ids and fresh.reused == 0
        held = [*expected.ids, *reply.ids[:-1]]
        assert one.speakers[0].backend.kept.ids == held


def test_a_full_context_hides_whole_oldest_turns_but_not_the_system():
    one = session(speaker(window=128), system="Be kind.", params={"max_new_tokens": 20})
    for i in range(6):
        one.ask(f"message number {i}", [ignore])
        seen = one.seen
        assert seen[0] == Message("system", "Be kind.") and [m.role for m in seen[1:]] == ["user", "assistant"] * (
            len(seen) // 2 - 1) + ["user"]
        assert len(one.prompts[0].ids) + 20 <= 128
    assert one.hidden and one.hidden % 2 == 0 and len(one.messages) == 12
    with pytest.raises(DataError, match=r"the message make 1\d\d tokens of prompt, allowed are at most 127"):
        one.ask("x" * 140, [ignore])
    before = one.hidden
    assert len(one.messages) == 12 and len(one.ask("y" * 105, [ignore])[0].ids) < 20 and one.hidden >= before


def test_the_input_template_is_exactly_what_the_model_sees_and_a_message_is_text():
    made = tokenizer()
    one = session(template="User: {}\nAssistant: ")
    for text in ("hi", 'a "b" \\n {{ x }} {} 👍 </s><|user|>'):
        one.ask(text, [ignore])
        whole = f"User: {text}\nAssistant: "
        assert one.prompts[0].ids == render_text(made, whole).ids == [257, *whole.encode()]
        assert one.prompts[0].stops == [258]
    marked = render(made, [Message("user", "<|user|>")], as_jinja("<|user|>{}\n<|assistant|>"), True)
    assert marked.ids == [257, made.markers["<|user|>"], *b"<|user|>\n", made.markers["<|assistant|>"]]


def test_special_tokens_of_a_message_are_tokens_only_on_demand():
    made, text = tokenizer(), "a</s><|system|>b"
    plain, allowed = session(), session(spell=False)
    for one in (plain, allowed):
        one.ask(text, [ignore])
    assert bytes(plain.prompts[0].ids[2:-1]) == text.encode()
    assert allowed.prompts[0].ids[2:-1] == [97, 258, made.markers["<|system|>"], 98]


class Scripted:
    """A foreign backend: pieces of text as they come."""

    def __init__(self, *pieces):
        self.pieces, self.ended = pieces, True

    def stream(self, prompt, params):
        self.prompt = prompt
        for piece in self.pieces:
            if isinstance(piece, type):
                raise piece
            yield piece


def test_any_backend_with_stream_talks_and_an_interrupt_keeps_what_came():
    said: list[str] = []
    backend = Scripted("a ", "b\ufffd", "c", KeyboardInterrupt)
    one = Session([Speaker(backend, "remote")], SamplingParams(), system="S")
    (reply,) = one.ask("hi", [said.append])
    assert "".join(said) == reply.text == one.messages[-1].content == "a b\ufffdc" and reply.finish == "stopped"
    assert backend.prompt == (Message("system", "S"), Message("user", "hi"))
    backend.pieces = (KeyboardInterrupt,)
    one.ask("again", [said.append])
    assert len(one.messages) == 2, "a message whose reply never began is taken back"
    one.retry([said.append])
    assert len(one.messages) == 2 and one.messages[-1].content == "a b\ufffdc"
    assert one.log_ratios() is None and one.perplexity() is None


def test_another_engine_hides_whole_turns_too_where_its_window_is_known(monkeypatch):
    monkeypatch.setattr("xalign.chat.prompt_ids", lambda tokenizer, prompt, template: [0] * sum(len(m.content) for m in prompt))
    backend = Scripted("a" * 10)
    backend.tokenizer, backend.template, backend.context = None, None, 64
    one = Session([Speaker(backend, "other")], SamplingParams(max_new_tokens=20), system="S")
    for _ in range(5):
        one.ask("b" * 10, [ignore])
    assert [m.role for m in backend.prompt] == ["system", "user", "assistant", "user"] and one.hidden == 6
    with pytest.raises(DataError, match="make 101 tokens of prompt, allowed are at most 63"):
        one.ask("b" * 100, [ignore])


def test_characters_of_several_tokens_come_whole_and_none_is_cut_in_two(monkeypatch):
    text = "日本 👩‍👩‍👧 é"
    one = speaker()
    monkeypatch.setattr(one.backend.wrapper, "stream", lambda _, n, *a, **k: (torch.tensor([b]) for b in text.encode()[:n]))
    for cut in range(1, len(text.encode()) + 1):
        said: list[str] = []
        reply = one.speak(render_text(tokenizer(), "x"), SamplingParams(max_new_tokens=cut), said.append, lambda: False)
        assert "".join(said) == reply.text == text.encode()[:cut].decode("utf-8", "ignore") and reply.finish == "length"


def test_stop_strings_end_a_reply_and_are_no_part_of_it(monkeypatch):
    one, said = speaker(), []
    monkeypatch.setattr(one.backend.wrapper, "stream", lambda *a, **k: (torch.tensor([b]) for b in b"yes\nUser: no"))
    reply = one.speak(render_text(tokenizer(), "x"), SamplingParams(stop=("\nUser:",)), said.append, lambda: False)
    assert reply.text == "".join(said) == "yes" and reply.finish == "stop"


def test_beams_answer_too():
    one = session(params={"seed": None, "min_new_tokens": 0, "beams": 2, "max_new_tokens": 5})
    assert one.ask("hi", [ignore])[0].tokens <= 5 and len(one.messages) == 2


def test_log_ratios_are_those_of_the_models(models):
    one = session(speaker(0), speaker(1), beta=0.5)
    a, b = one.ask("hi", [ignore] * 2)
    ratios = one.log_ratios()
    for reply, ratio in zip((a, b), ratios, strict=True):
        tokens = torch.tensor([[*one.prompts[0].ids, *reply.ids]])
        logps = [s.net(tokens).log_softmax(-1)[0, :-1].gather(1, tokens[0, 1:, None])[-len(reply.ids) :].sum()
                 for s in one.speakers]
        assert ratio == pytest.approx(0.5 * (logps[0] - logps[1]).item(), abs=1e-4)
    assert session(speaker(0), speaker(0)).ask("hi", [ignore] * 2)[0].ids == a.ids, "same seed, same model, same reply"


# ------------------------------------------------------------------------------------------------- scripts, programs


def test_a_script_of_every_command(models, monkeypatch, capsys, tmp_path):
    saved = tmp_path / "talk.jsonl"
    lines = ["/show", "Hello", "/stats", "/show history", '"""', "/two", "lines", '"""', '"""one"""', "/retry", "/undo",
             "/system Be kind.", f"/save {saved}", "clear", "/show history", f"/load {saved}", "/set temperature 0.5",
             "/set top-k 5", "/set top_k none", '/set stop "a b" c\\n', "/set greedy", "/set system none", "/help", "/?",
             "EXIT", "never read"]
    options = ("--model", models / "policy", "--max-new-tokens", 8, "--min-new-tokens", 8, "--seed", 1)
    status, out, err = talk(monkeypatch, capsys, "\n".join(lines), *options)
    assert status == 0, err
    for part in ("165,056 parameters", "8 tokens, ", "user: Hello\n", "top_k = None", "stop = ('a b', 'c\\n')",
                 "temperature = 0.0", "system = Be kind.", "system = none", "/pick"):
        assert part in out, part
    for part in ("5 messages saved", "5 messages loaded", "forgotten", "taken back", "(reply cut off after 8 tokens"):
        assert part in err, part
    assert [m.content for m in read_transcript(saved)][::3] == ["Be kind.", "/two\nlines"]
    assert "\x1b" not in out + err, "no colour where there is no terminal"
    again = talk(monkeypatch, capsys, "\n".join(lines), *options)
    assert [line for line in again[1].split("\n") if " ms" not in line and "/s" not in line and " s," not in line] == [
        line for line in out.split("\n") if " ms" not in line and "/s" not in line and " s," not in line], "the same each time"


@pytest.mark.parametrize(("script", "message"), [
    ("hi\n/foo", "standard input:2: no command /foo; /help"), ("/sve x", "did you mean '/save'"),
    ("/set temprature 1", "did you mean 'temperature'"), ("/set top-p 2", "allowed is a number in [0, 1]"),
    ("/set top_k x", "allowed is a whole number or none"), ("/set top_k", "needs a value, it is None"),
    ("/retry", "no turn yet"), ("/undo", "no turn yet"), ("/stats", "no reply yet"), ("/pick a", "no two replies to pick from"),
    ("/save", "needs a file"),
    ("/load nowhere.jsonl", "nowhere.jsonl: No such file"), ("/load {root}/setup.py", "no conversation that /save wrote"),
    ("/save {root}/setup.py", "is not overwritten"), ('a\n"""\nb', 'standard input:2: """ begins a message that doesn'),
    ("/set stop '", "No closing quotation"), ("/set seed -1", "allowed is a number from 0"), ("/show x", "history and"),
    ('/set stop ""', "an empty string"), ("/load {deep}", "no conversation"), ("/save a\0b", "/save needs a file"),
    ("/save ~nobody-here/x", "No such file"), ("/load ~nobody-here/x", "No such file"), ("\t/foo", "no command /foo"),
    (b"\xff\xfe", "standard input:1: not UTF-8"), ("/set temperature nan", "allowed is a number"),
])
def test_a_mistake_ends_a_script_with_its_line(models, monkeypatch, capsys, tmp_path, script, message):
    (tmp_path / "deep").write_text("[" * 100_000)
    if isinstance(script, str):
        script = script.replace("{root}", str(ROOT)).replace("{deep}", str(tmp_path / "deep"))
    status, _, err = talk(monkeypatch, capsys, script, "--model", models / "policy", "--max-new-tokens", 2)
    assert status == 2 and message in err and err.strip().split("\n")[-1].startswith("error: standard input:"), err


@pytest.mark.parametrize(("arguments", "message"), [
    (["-i", "--input-template", "no place"], "allowed is a text with {} once"), (["-i", "--system", "x"], "--system goes with"),
    (["--chat", "--input-template", "{}"], "--input-template goes with"),
    (["--compare", "x", "-p", "y"], "--compare goes with"),
    (["-i", "--prompts", "x"], "--prompts doesn't go with"), (["--chat", "-n", "2"], "n is 2, allowed is 1"),
    (["--chat", "--beta", "0"], "beta is 0.0"), (["--input-template", "{}", "-p", "x"], "--input-template goes with"),
])
def test_flags_that_do_not_go_together(models, monkeypatch, capsys, arguments, message):
    status, out, err = talk(monkeypatch, capsys, "", "--model", models / "policy", *arguments, command="generate")
    assert status == 2 and message in err and not out


def test_template_mode_from_a_flag_a_prompt_or_a_script(models, monkeypatch, capsys):
    options = ("--model", models / "policy", "--max-new-tokens", 6, "--temperature", 0, "--min-new-tokens", 6)
    status, plain, _ = talk(monkeypatch, capsys, "Q: hi A:", *options, command="generate")
    given = talk(monkeypatch, capsys, "", *options, "-i", "--input-template", "Q: {} A:", "-p", "hi", command="generate")
    script = talk(monkeypatch, capsys, "other\nhi\n", *options, "-i", "--input-template", "Q: {} A:", command="generate")
    assert status == 0 and plain.rstrip("\n\ufffd") == given[1].rstrip("\n")
    assert script[1].endswith(given[1])
    warned = talk(monkeypatch, capsys, "", *options, "-i", "--input-template", r"Q: {}\n", command="generate")
    assert warned[0] == 0 and "holds a backslash and an n" in warned[2] and "$'User" in warned[2]


@pytest.mark.parametrize(("flag", "most"), [("--load-in-8bit", 0.30), ("--load-in-4bit", 0.17)])
def test_a_quantised_model_talks_and_shows_its_size_and_perplexity(models, monkeypatch, capsys, tmp_path, flag, most):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "data/test.jsonl").read_text().splitlines(True)[:5]))
    options = ("--model", models / "policy", "--max-new-tokens", 8, flag)
    status, out, err = talk(monkeypatch, capsys, f"hi\nthere\n/show\n/show perplexity {few}\n", *options)
    assert status == 0, err
    share = float(" ".join(out.split()).partition("these layers take ")[2].split()[0])
    assert share <= most and "of the replies so far" in out and "of the completions of 5 pairs" in " ".join(out.split())


def test_picks_are_pairs_that_train(models, monkeypatch, capsys, tmp_path):
    picks = tmp_path / "picks.jsonl"
    picks.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}')  # no line end, as an editor may leave it
    script = "".join(f"/clear\nmessage {i}\n/pick {'ab'[i % 2]}\n" for i in range(20)) + "once more\n/pick tie\n/show\n"
    options = ("--model", models / "policy", "--max-new-tokens", 10, "--min-new-tokens", 3, "--seed", 1)
    status, out, err = talk(monkeypatch, capsys, script, *options, "--compare", "--picks", picks, "--system", "S")
    assert status == 0, err
    assert "a 10, b 10, tie 1" in out.replace("\n", " ") and out.count("log-ratio") == 42 and "A: " in out
    first, *rest = picks.read_text().splitlines()
    picks.write_text("\n".join(rest) + "\n")
    pairs = read_pairs(picks)
    assert len(pairs) == 20 and pairs[3].prompt == (Message("system", "S"), Message("user", "message 3")) and "prompt" in first
    again = talk(monkeypatch, capsys, "hi\n/pick a\n/pick b", *options, "--compare", "--picks", tmp_path / "other.jsonl")
    assert again[0] == 2 and "no two replies" in again[2]
    main(["--dataset", str(picks), "--model", str(models / "policy"), "--output-dir", str(tmp_path / "run"), "--max-steps", "2",
          "--eval-prompts", "2", "--eval-samples", "1", "--eval-max-new-tokens", "4", "--batch-size", "4"], "dpo")
    assert (tmp_path / "run/policy/model.safetensors").exists()
    plain = talk(monkeypatch, capsys, "hi\n/pick b\n", *options, "-i", "--input-template", "<{}>",
                 "--picks", tmp_path / "t.jsonl", "--compare", models / "reference", command="generate")
    assert plain[0] == 0 and read_pairs(tmp_path / "t.jsonl")[0].prompt == "<hi>"


def as_person(monkeypatch, capsys, lines, *arguments) -> tuple[Session, str]:
    """Type lines as a person does, for whom mistakes and Ctrl-C end nothing: the session, and what stderr holds."""
    one = opened(parse(GenerateConfig, [*map(str, arguments)], "generate", SHORT))
    console, typed = Console(None, [], []), iter(lines)
    console.person = True

    def read(prompt):
        line = next(typed, EOFError)
        if not isinstance(line, str):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    Repl(one, console).run()
    return one, capsys.readouterr().err


def test_a_server_talks_too(monkeypatch, capsys):
    def reply(body):
        message = prompt_of(body)
        if message == "refused next":
            server.first_status = [500]
        if message == "wait":
            pause = lambda: time.sleep(0.3)  # noqa: E731
            return ["begun ", pause, lambda: os.kill(os.getpid(), signal.SIGINT), pause, "no"]
        return ["part ", None] if message == "break" else f"so 日本 👍 {message}"

    options = ("--backend", "openai", "--model", "m", "--temperature", 0, "--max-new-tokens", 9, "--chat", "--system", "S")
    system = {"role": "system", "content": "S"}
    with Server(reply=reply, streams=True) as server:
        remote = (*options, "--base-url", server.url)
        status, out, err = talk(monkeypatch, capsys, "hi\nyou\n/stats\n/show\n", *remote)
        assert (status, err) == (0, "") and "so 日本 👍 hi\nso 日本 👍 you\n" in out and "4 pieces, " in out
        assert server.bodies[-1]["messages"] == [system, *({"role": ["user", "assistant"][i % 2], "content": text}
                                                           for i, text in enumerate(("hi", "so 日本 👍 hi", "you")))]
        one, err = as_person(monkeypatch, capsys, ["wait", "refused next", "a", "break", "/show", "/undo", "/retry"], *remote)
        assert [m.content for m in one.messages] == ["wait", "begun "], err
        assert "reply stopped, it is kept" in err and err.count(f"error: m at {server.url}: ") == 2 and "HTTP/1" not in err
        assert server.bodies[-1]["messages"] == [system, {"role": "user", "content": "wait"}]
        status, out, err = talk(monkeypatch, capsys, "break\n", *remote)
        assert (status, out) == (2, "part \n") and err.startswith(f"error: standard input:1: m at {server.url}: ")
        assert len(err.splitlines()) == 1
        server.bodies.clear()
        status, out, err = talk(monkeypatch, capsys, "hi\n/pick b\n", *remote, "--compare", "m2", "--seed", 5)
        assert status == 2 and "the same text" in err and "A: m " in out and "B: m2" in out
        assert [(b["model"], b.get("seed")) for b in server.bodies if b.get("stream")] == [("m", 5), ("m2", 5)]
    with Server(finish="length") as server:  # one that doesn't stream
        status, out, err = talk(monkeypatch, capsys, "hi\n", *options, "--base-url", server.url)
        assert (status, out) == (0, "answer to hi\n") and "cut off after 1 pieces" in err
    status, _, err = talk(monkeypatch, capsys, "hi\n", *options, "--base-url", server.url)
    assert status == 2 and "127.0.0.1" in err and "connection" in err.lower()
    assert talk(monkeypatch, capsys, "", "--base-url", "http://127.0.0.1:1/v1")[2].startswith("error: --base-url goes with")


def test_a_terminal_that_goes_keeps_what_was_typed(monkeypatch, tmp_path, capsys):
    readline = pytest.importorskip("readline")
    console, other = (Console(str(tmp_path / "history"), [], []) for _ in range(2))
    console.person = other.person = True
    before = signal.getsignal(signal.SIGTERM)
    with console, pytest.raises(SystemExit) as stop:
        readline.add_history("mine")
        signal.raise_signal(signal.SIGTERM)
    assert stop.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    with other:
        readline.add_history("theirs")
    assert (tmp_path / "history").read_text().splitlines() == ["mine", "theirs"]
    bad = Console(str(tmp_path / "history/below"), [], [])
    bad.person = True
    with bad:
        readline.add_history("lost")
    assert capsys.readouterr().err.count("history/below: ") == 2
    monkeypatch.setattr("builtins.input", lambda prompt: b"\xff".decode())
    with pytest.raises(DataError, match="not UTF-8"):
        bad.read("")


def test_columns_fit_whatever_the_text():
    text = "words and words 日本語日本語 👩‍👩‍👧 " * 6 + "x" * 90 + "\n\nend"
    for width in (20, 40, 80):
        lines = side_by_side([("A: one", text, "foot"), ("B: two", "short", "foot")], width, Paint("never"))
        assert max(map(cells, lines)) <= width
        assert "".join(wrapped(text, width)).replace(" ", "") == text.replace("\n", "").replace(" ", "")
    assert wrapped("", 20) == [""] and cells("日本é") == 5


# --------------------------------------------------------------------------------------------------- a real terminal


def terminal(models: Path, tmp_path: Path, *arguments, columns=80, **environment) -> pexpect.spawn:
    (tmp_path / "inputrc").write_text("set enable-bracketed-paste off\n")
    child = pexpect.spawn(sys.executable, [str(ROOT / "generate.py"), "--model", str(models / "policy"), *map(str, arguments)],
                          encoding="utf-8", timeout=60, dimensions=(24, columns), cwd=tmp_path,
                          env=os.environ | {"XDG_STATE_HOME": str(tmp_path), "TERM": "xterm", "OMP_NUM_THREADS": "1",
                                            "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1",
                                            "INPUTRC": str(tmp_path / "inputrc")} | environment)
    child.expect(">>> ")
    return child


def interrupt(child: pexpect.spawn, answer: str) -> None:
    """Ctrl-C at the prompt, as often as it takes: CPython's readline looks for signals only where one interrupts its `select`,
    so that one which comes while it takes a key in waits for the next (a person's hands are too slow for that).
    """
    for _ in range(12):
        child.sendintr()
        if child.expect([answer, pexpect.TIMEOUT], timeout=5) == 0:
            return
    raise AssertionError(child.before)


def test_a_terminal(models, tmp_path):
    child = terminal(models, tmp_path, "--chat", "--seed", 1, "--max-new-tokens", 3000, "--min-new-tokens", 3000, NO_COLOR="1")
    child.sendline("a first message")
    child.expect("a first message\r\n(?s:.)")  # the reply has begun
    child.sendintr()
    child.expect("reply stopped, it is kept")
    child.expect(">>> ")
    child.send("half a line")
    child.expect("half a line")
    interrupt(child, "Ctrl-D or /bye leaves")
    child.expect(">>> ")
    child.sendline("/set max_new_tokens 5")
    child.expect("max_new_tokens = 5")
    child.sendline('"""')
    child.expect(r"\.\.\. ")
    child.sendline("/one")
    child.expect(r"\.\.\. ")
    child.sendline('two"""')
    child.expect("cut off after 5 tokens")
    child.expect(">>> ")
    child.sendline("/show history")
    child.expect("user: a first message\r\nassistant: .*user: /one\r\ntwo\r\nassistant: ")
    child.expect(">>> ")
    child.sendline("/nonsense")
    child.expect("error: no command /nonsense")
    child.expect(">>> ")
    child.send("/unfi\t")
    child.send("\x15/sta\t")
    child.expect("/stats ")
    child.sendline("")
    child.expect("first token")
    child.expect(">>> ")
    assert "\x1b[1m" not in child.before + child.after
    child.sendeof()
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    assert (tmp_path / "xalign/history").stat().st_mode & 0o777 == 0o600

    child = terminal(models, tmp_path, "--chat", "--seed", 1, "--compare", "--max-new-tokens", 30, columns=40)
    child.send("\x10")  # the line before
    child.expect("/stats")
    child.send("\x15")
    child.sendline("hello")
    child.expect("A: ")
    child.expect("B: ")
    child.expect("log-ratio")
    child.expect("/pick a, b or tie")
    child.expect(">>> ")
    child.sendline("/bye")
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0
    history = (tmp_path / "xalign/history").read_text()
    assert "a first message" in history and history.rstrip().endswith("/bye")


def test_ctrl_c_ends_a_script(models, tmp_path):
    import subprocess

    child = subprocess.Popen([sys.executable, ROOT / "generate.py", "--chat", "--model", models / "policy", "--max-new-tokens",
                              "4000", "--min-new-tokens", "4000"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT)
    child.stdin.write(b"hi\n")
    child.stdin.flush()
    assert child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and b"Traceback" not in err


def test_a_message_that_the_template_refuses_is_a_note_and_not_kept():
    one = session()
    one.speakers[0].backend.tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    with pytest.raises(DataError, match="no user"):
        one.ask("hi", [ignore])
    assert not one.messages
    with pytest.raises(ConfigError, match="goes with --chat"):
        session(template="{}").say_system("x")


def test_a_template_that_drops_a_part_of_earlier_replies_has_no_perplexity():
    one = session()
    one.speakers[0].backend.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '[' + m.content + ']' }}{% endfor %}")
    one.ask("hi", [ignore])
    assert one.perplexity() > 1
    one.ask("you", [ignore])
    assert one.perplexity() is None


def test_replies_that_the_other_model_cannot_read_have_no_log_ratio():
    short = session(speaker(0), speaker(1, window=40), params={"max_new_tokens": 30, "min_new_tokens": 30})
    short.ask("hello hello", [ignore] * 2)
    assert short.log_ratios() is None and len(short.replies[1].ids) < len(short.replies[0].ids) == 30
    other = session(speaker(0), speaker(1))
    other.ask("hi", [ignore] * 2)
    assert other.log_ratios() is not None
    other.speakers[1].backend.tokenizer._pieces = other.speakers[1].backend.tokenizer._pieces[:256][::-1]
    assert other.log_ratios() is None


def test_a_system_turn_without_room_is_refused():
    one = session(speaker(window=32), system="x" * 60)
    with pytest.raises(DataError, match=r"the system turn and the message make 6\d tokens of prompt, allowed are at most 31"):
        one.ask("hi", [ignore])
    assert not one.messages
