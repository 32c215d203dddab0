"""Many engines behind one call: the same texts from each, and what one can't honour is said before anything runs."""

import json
import sys
import time
import types
from pathlib import Path

import pytest

from tests.conftest import LLAMA, tiny
from tests.server import Server
from xalign import backends, save_pretrained
from xalign.backends.base import SamplingParams, fit
from xalign.backends.text import cut
from xalign.cli import main
from xalign.data.chat_template import write
from xalign.data.records import Message
from xalign.errors import ConfigError, DataError
from xalign.formats import FORMATS, tidy
from xalign.stopping import UNFINISHED
from xalign.tokenizers import ByteTokenizer

PROMPTS = ["", "a", "The fox", "Once upon a time", "naïve 😀", "x" * 40, "a\n\n\nb", " leading"]
CHATS = [(Message("user", "hi"),), (Message("system", "be kind"), Message("user", "who is it?"))]


def make_folder(path: Path, context: int = 96, seed: int = 3, **options) -> str:
    """A tiny Llama with a byte tokenizer; its weights are sharp, and its texts are ASCII letters and a few bytes above."""
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + FORMATS["falcon"].template
    model = tiny(seed, **LLAMA, **options, num_tokens=tokenizer.vocab_size, max_seq_len=context, sharp=6.0)
    save_pretrained(model, path, tokenizer)
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def native(folder):
    return backends.open(f"native:{folder}")


@pytest.fixture(scope="module")
def foreign(folder):
    return backends.open({"backend": "transformers", "model": folder, "batch_size": 3})


def texts(rows):
    return [[c.text for c in row] for row in rows]


# -- native and transformers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 0, "presence_penalty": 1.0, "frequency_penalty": 0.5},
        {"temperature": 0, "min_new_tokens": 9},
        {"seed": 5},
        {"seed": 5, "n": 3, "top_k": 20},
        {"seed": 6, "top_p": 0.8, "temperature": 1.3},
        {"seed": 7, "min_p": 0.05},
        {"beams": 3},
    ],
)
def test_transformers_writes_what_the_native_engine_writes(native, foreign, options):
    params = SamplingParams(max_new_tokens=24, **options)
    ours, theirs = native.generate(PROMPTS + CHATS, params), foreign.generate(PROMPTS + CHATS, params)
    assert texts(ours) == texts(theirs)
    for a, b in zip(ours, theirs, strict=True):
        for one, two in zip(a, b, strict=True):
            assert one.token_ids == two.token_ids and one.finish_reason == two.finish_reason
            assert one.logps is None or one.logps == pytest.approx(two.logps, abs=1e-3)
            assert one.seconds >= 0 and two.model


def test_stop_strings_across_tokens_are_cut_alike(native, foreign):
    free = native.generate(PROMPTS, SamplingParams(temperature=0, max_new_tokens=24))
    seen = [row[0].text for row in free if len(row[0].text) > 9]
    stops = tuple({text[4:7] for text in seen} | {text[8] for text in seen[:1]})
    params = SamplingParams(temperature=0, max_new_tokens=24, stop=stops)
    ours, theirs = native.generate(PROMPTS, params), foreign.generate(PROMPTS, params)
    assert texts(ours) == texts(theirs)
    assert [r[0].token_ids for r in ours] == [r[0].token_ids for r in theirs]
    for free_row, row in zip(free, ours, strict=True):
        ends = [free_row[0].text.find(s) + len(s) for s in stops if s in free_row[0].text]
        if ends:
            assert row[0].finish_reason == "stop" and not any(s in row[0].text for s in stops)
            assert free_row[0].text.startswith(row[0].text) and len(row[0].text) < min(ends)


@pytest.mark.parametrize("which", ["native", "transformers"])
def test_a_stream_is_the_text(native, foreign, which):
    backend = native if which == "native" else foreign
    for params in (SamplingParams(max_new_tokens=20, seed=3), SamplingParams(max_new_tokens=20, temperature=0, stop=("e",))):
        for prompt in (PROMPTS[2], CHATS[0]):
            (whole,) = backend.generate([prompt], params)[0]
            assert "".join(backend.stream(prompt, params)) == whole.text and backend.ended == (whole.finish_reason == "stop")


def test_a_stream_that_is_left_ends_the_model_too(foreign):
    calls = []
    hook = foreign.model.register_forward_hook(lambda *_: calls.append(time.sleep(0.05)))
    stream = foreign.stream(PROMPTS[1], SamplingParams(max_new_tokens=80, min_new_tokens=80, seed=1))
    next(stream)
    stream.close()
    time.sleep(0.3)
    count = len(calls)
    time.sleep(0.2)
    hook.remove()
    assert len(calls) == count < 80


def test_draws_know_neither_batches_nor_what_was_asked_before(native, foreign):
    params = SamplingParams(max_new_tokens=12)
    seeds = list(range(100, 100 + len(PROMPTS)))
    whole = native.generate(PROMPTS, params, seeds=seeds)
    for backend in (native, foreign):
        some = backend.generate(PROMPTS[3:5], params, seeds=seeds[3:5])
        assert texts(some) == texts(whole[3:5])


@pytest.mark.parametrize("which", ["native", "transformers"])
def test_long_prompts(native, foreign, which):
    """A long one leaves room for its answer, one that is longer than the context is an error of its own, the rest goes on."""
    backend = native if which == "native" else foreign
    told = {}
    params = SamplingParams(max_new_tokens=16, temperature=0)
    prompts = ["short", "y" * 90, "z" * 200, "short"]
    rows = backend.generate(prompts, params, done=lambda i, row: told.setdefault(i, row))
    assert [row[0].finish_reason == "error" for row in rows] == [False, False, True, False]
    assert rows[2][0].error == "the prompt has 201 tokens, allowed is up to the model's 96" and rows[2][0].text == ""
    assert len(rows[1][0].token_ids) == 16 or rows[1][0].finish_reason == "stop"
    assert rows[0][0].token_ids == rows[3][0].token_ids and told == dict(enumerate(rows))
    huge = backend.generate(["y" * 90, "s"], SamplingParams(max_new_tokens=1000, temperature=0, min_new_tokens=999))
    assert [len(row[0].token_ids) for row in huge] == [48, 94]


def test_room():
    params = SamplingParams(max_new_tokens=10)
    assert fit(10, params, None) == 10 and fit(90, params, 100) == 90 and fit(95, params, 100) == 90
    assert fit(100, SamplingParams(max_new_tokens=500), 100) == 50 and fit(1, params, 1) == 1
    with pytest.raises(DataError, match="101 tokens, allowed is up to the model's 100"):
        fit(101, params, 100)


def test_nothing_asked_and_nothing_to_write(native, foreign):
    for backend in (native, foreign):
        assert backend.generate([], SamplingParams()) == []
        rows = backend.generate(["a", "b"], SamplingParams(max_new_tokens=0, n=2))
        assert [[(c.text, c.token_ids, c.finish_reason) for c in row] for row in rows] == [[("", (), "length")] * 2] * 2


def test_other_weights(folder, tmp_path):
    other = make_folder(tmp_path / "other", seed=9)
    params = SamplingParams(max_new_tokens=12, temperature=0)
    wanted = texts(backends.open(other).generate(PROMPTS, params))
    for kind in ("native", "transformers"):
        backend = backends.open(f"{kind}:{folder}")
        assert texts(backend.generate(PROMPTS, params)) != wanted
        backend.refresh(other)
        assert texts(backend.generate(PROMPTS, params)) == wanted


def test_completions_are_told_as_they_end(native):
    order = []
    native.generate(PROMPTS, SamplingParams(max_new_tokens=24, seed=1), done=lambda i, row: order.append(i))
    assert sorted(order) == list(range(len(PROMPTS)))


# -- formats and what is made of a text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stops", "ended", "expected"),
    [
        ("boss</s>", ("</s>",), False, ("boss", True)),
        ("a b", ("x",), False, ("a b", False)),
        ("ab", (), True, ("ab", True)),
        ("na\ufffd", (), False, ("na", False)),
        ("na\ufffd", (), True, ("na\ufffd", True)),
        ("aENDbEND", ("END",), False, ("a", True)),
        ("abab!", ("ab!", "ba"), False, ("a", True)),
        ("", ("x",), False, ("", False)),
    ],
)
def test_cut(text, stops, ended, expected):
    assert cut(text, stops, ended) == expected


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        ("boss</s>", "boss"),
        ("boss </s>\n", "boss"),
        ("</s>", ""),
        ("a</s></s>", "a"),
        (" a\n\n\n\nb", "a"),
        ("a\n\n\nb", "a\n\n\nb"),
        ("\n\n\n\na", "a"),
        ("class", "class"),
        ("s", "s"),
        ("x </s> y", "x </s> y"),
    ],
)
def test_tidy(text, tidied):
    assert tidy(text) == tidied


def test_a_continued_text_keeps_its_beginning():
    assert tidy(" The fox. \n", FORMATS["text"]) == " The fox."


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vicuna", "S P USER: x ASSISTANT:"),
        ("alpaca", "S P\n\n### Instruction:\nx\n\n### Response:"),
        ("llama-2", "[INST] <<SYS>>\nS P\n<</SYS>>\n\nx [/INST]"),
        ("falcon", "S P\n\nUser: x\n\nAssistant:"),
        ("mpt", "<|im_start|>system\nS P<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n"),
        ("starchat", "<|system|>\nS P<|end|>\n<|user|>\nx<|end|>\n<|assistant|>\n"),
        ("ultralm", "User: S P</s>\nUser: x</s>\nAssistant:"),
        ("wizardlm-7b", "S P\n\nx\n\n### Response:"),
    ],
)
def test_formats(name, expected):
    template = FORMATS[name].template
    assert write(template, (Message("system", "S P"), Message("user", "x"))) == expected
    bare = write(template, (Message("user", "{{ 1 }}"),))
    assert "{{ 1 }}" in bare and "S P" not in bare and not bare.startswith("\n")


def test_a_format_in_the_place_of_the_template(folder):
    chat = (Message("system", "s"), Message("user", "u"))
    params = SamplingParams(temperature=0, max_new_tokens=8)
    for kind in ("native", "transformers"):
        shaped = backends.open({"backend": kind, "model": folder, "format": "alpaca"})
        assert texts(shaped.generate([chat], params)) == texts(
            shaped.generate(["s\n\n### Instruction:\nu\n\n### Response:"], params)
        )


# -- vLLM, by a module in its place ---------------------------------------------------------------------------------


@pytest.fixture
def vllm(monkeypatch, folder):
    """What we use of vLLM's interface, answered by transformers' tokenizer and a fixed text."""
    from transformers import AutoTokenizer

    made = types.SimpleNamespace(calls=[], rpc=[], options=None)

    class Params:
        def __init__(self, **options):
            self.__dict__.update(options)

    class LLM:
        def __init__(self, model, **options):
            made.options = options
            self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=96))

        def get_tokenizer(self):
            return AutoTokenizer.from_pretrained(folder)

        def generate(self, prompts, params, use_tqdm):
            made.calls.append((prompts, params, use_tqdm))
            one = types.SimpleNamespace(text="boss STOP", token_ids=[1, 2], finish_reason="length", cumulative_logprob=-1.5)
            return [types.SimpleNamespace(outputs=[one] * p.n) for p in params]

        def collective_rpc(self, name, kwargs):
            made.rpc.append((name, kwargs))

        def reset_prefix_cache(self):
            made.rpc.append(("reset_prefix_cache", {}))

    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, Params
    monkeypatch.setitem(sys.modules, "vllm", module)
    return made


def test_what_vllm_is_given(vllm, folder):
    backend = backends.open({"backend": "vllm", "model": folder, "tensor_parallel_size": 2, "dtype": "bfloat16"})
    assert vllm.options == {"tensor_parallel_size": 2, "trust_remote_code": False, "dtype": "bfloat16"}
    params = SamplingParams(
        temperature=0.5, top_k=7, top_p=0.0, n=2, stop=("STOP", "</s>"), seed=3, max_new_tokens=60, min_new_tokens=2
    )
    told = []
    rows = backend.generate(["ab", "z" * 200, CHATS[1], "y" * 90], params, done=lambda i, row: told.append(i))
    ((prompts, given, bar),) = vllm.calls
    assert [p["prompt_token_ids"][0] for p in prompts] == [257] * 2 + [121] and not bar  # BOS; the long one lost its beginning
    assert [len(p["prompt_token_ids"]) for p in prompts] == [3, len("be kind\n\nUser: who is it?\n\nAssistant:") + 1, 48]
    assert {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 1e-6,
        "min_p": 0.0,
        "n": 2,
        "stop": ["STOP", "</s>"],
        "stop_token_ids": [258],
        "max_tokens": 60,
        "min_tokens": 2,
    }.items() <= vars(given[0]).items()
    assert [p.max_tokens for p in given] == [60, 96 - len(prompts[1]["prompt_token_ids"]), 48] and len(
        {p.seed for p in given}
    ) == 3
    assert texts(rows) == [["boss "] * 2, ["", ""], ["boss "] * 2, ["boss "] * 2] and told == [0, 1, 2, 3]
    assert rows[0][0].finish_reason == "stop" and rows[0][0].logps == -1.5 and "201 tokens" in rows[1][0].error
    plain = backend.mapped(SamplingParams(), None, 5)
    assert {"top_k": 0, "top_p": 1.0, "seed": None, "stop": None, "stop_token_ids": None, "logprobs": None}.items() <= vars(
        plain
    ).items()
    with pytest.raises(ConfigError, match="beams is 2, which this backend doesn't honour"):
        backend.generate(["a"], SamplingParams(beams=2))
    backend.refresh("elsewhere")
    assert vllm.rpc == [("reload_weights", {"weights_path": "elsewhere"}), ("reset_prefix_cache", {})]
    assert "".join(backend.stream("a", SamplingParams(stop=("STOP",)))) == "boss "


def test_a_missing_engine_is_named(monkeypatch, folder):
    for kind, module in (("vllm", "vllm"), ("openai", "openai"), ("transformers", "transformers")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ConfigError, match=f"the backend {kind} needs .*pip install"):
            backends.open(f"{kind}:{folder}")


@pytest.mark.slow
def test_vllm_itself(tmp_path, monkeypatch):
    """Greedy texts of a real vLLM where one is installed (its kernels want heads of 32 or more: a model of its own).

    Known to differ: where EOS comes in the middle of a character vLLM drops its bytes, and others show them as U+FFFD.
    """
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    first, second = (make_folder(tmp_path / str(seed), seed=seed, dim=64, attn_dim_head=32, heads=2) for seed in (3, 4))
    params, stopped = SamplingParams(temperature=0, max_new_tokens=24), SamplingParams(temperature=0, stop=("e",))
    backend = backends.open({"backend": "vllm", "model": first, "dtype": "float32"})
    for folder in (first, second):
        native = backends.open(f"native:{folder}")
        for given in (params, stopped):
            theirs, ours = (texts(b.generate(PROMPTS[1:], given)) for b in (backend, native))
            assert theirs == [[text.rstrip(UNFINISHED) for text in row] for row in ours]
        backend.refresh(second)


# -- the program ----------------------------------------------------------------------------------------------------


def generate(capsys, *flags):
    try:
        main(["generate", *flags])
        status = 0
    except SystemExit as stop:
        status = stop.code
    out, err = capsys.readouterr()
    return status, out, err


def test_generate_by_any_backend(folder, native, capsys, tmp_path):
    flags = ("--model", folder, "--max-new-tokens", "12", "--temperature", "0", "--stop", "!", "--json", "-p", "The fox")
    ours = generate(capsys, *flags)
    assert (
        ours[0] == 0 and generate(capsys, *flags, "--backend", "transformers")[1].split("logps")[0] == ours[1].split("logps")[0]
    )
    with Server() as server:
        status, out, _ = generate(capsys, "--model", "m", "--backend", "openai", "--base-url", server.url, "--temperature", "0",
                                  "--json", "-p", "hello")
        assert status == 0 and json.loads(out)["completion"] == "answer to hello"
        assert server.bodies[-1] | {"max_tokens": 256, "temperature": 0.0} == server.bodies[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--backend", "openai", "--adapter", "x"), "--adapter doesn't go with --backend openai"),
        (("--backend", "openai", "--device", "cpu"), "--device doesn't go with --backend openai"),
        (("--backend", "transformers", "--load-in-8bit"), "--load-in-8bit doesn't go with --backend transformers"),
        (("--base-url", "http://127.0.0.1:1/v1"), "--base-url goes with --backend openai"),
        (("--backend", "transformers", "--model", "/nowhere"), "/nowhere: transformers can't open it"),
        (
            ("--backend", "openai", "--model", "m", "--base-url", "http://127.0.0.1:1/v1", "--beams", "2"),
            "beams is 2, which this backend",
        ),
    ],
)
def test_flags_that_do_not_go_together(capsys, flags, message):
    status, out, err = generate(capsys, *flags, "-p", "a")
    assert status == 2 and out == "" and message in err and len(err.strip().splitlines()) == 1
