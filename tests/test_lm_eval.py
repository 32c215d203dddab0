"""lm-evaluation-harness: our adapter gives what its own `hf` model gives of the same folder, by request and by task."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny
from tokenizer_folders import write

from xalign import save_pretrained
from xalign.cli import COMMANDS
from xalign.data import toyworld
from xalign.errors import ConfigError, DataError, UnknownOption
from xalign.tokenizers import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'xalign[lm-eval]'")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from xalign.harness import XalignLM

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 80
KINDS = ("own", "gpt2", "llama3", "llama2", "qwen")
STORY = "The cat sat on the mat, and the dog sat on the log. Hello there! How are you? I'm fine, thanks 😀 1234 567"
PAIRS = [
    ("", "Hello there!"), ("", " a"), ("The cat", " sat on the mat"), ("The cat ", "sat"), ("The cat \n\t", " sat"),
    ("Hello", "there"), ("é ü 你好", " 世界?"), ("a😀", "😀\n"), ("def f(x):\n", "    if x > 10:\n        return x"),
    (STORY, " and so on"), (STORY * 4, " and so on"), (STORY * 4, " the end of it"), ("a", STORY[:40]),
    ("What is the capital of France?", " Paris"), ("What is the capital of France?", " London"),
    ("What is the capital of France?", " "), ("What is the capital of France?", " P"), ("x", "\n"), ("x", " \u00a0 "),
]  # fmt: skip
TEXTS = ["", " ", "a", STORY, STORY * 6, "é ü 你好 世界" * 20, "\n\n\n", " \t " * 30]
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]


def folder_of(kind: str, root: Path, chat_tokenizer) -> Path:
    """A folder of a tiny model with a tokenizer of this kind."""
    tokenizer = chat_tokenizer if kind == "own" else load_tokenizer(write(root / f"tokenizer-{kind}", kind))
    model = tiny(3, sharp=12, num_tokens=tokenizer.vocab_size, max_seq_len=WINDOW, attn_kv_heads=2, **LLAMA)
    if kind == "own":  # writes no single bytes: of "7" beside half a character transformers makes two marks, we make one
        with torch.no_grad():
            model.to_logits.weight[[id for id, piece in enumerate(tokenizer._pieces) if len(piece) == 1]] = 0
    save_pretrained(model, root / kind, tokenizer)
    return root / kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory, chat_tokenizer) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {kind: folder_of(kind, root, chat_tokenizer) for kind in KINDS}


@pytest.fixture(scope="module")
def theirs(folders) -> dict[str, HFLM]:
    # with its cache, requests that are the same tokens but for the last, cut at different places, get each other's numbers
    return {kind: HFLM(pretrained=str(path), device="cpu", batch_size=5, logits_cache=False) for kind, path in folders.items()}


def requests(kind: str, arguments) -> list[Instance]:
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


@pytest.mark.parametrize("kind", KINDS)
def test_loglikelihoods_are_those_of_hf(kind, folders, theirs):
    ours = XalignLM(folders[kind], batch_size="auto")
    pairs = [*PAIRS, *((context, ours.tokenizer.decode([id])) for context in ("Hello", STORY) for id in range(3, 300))]
    pairs = [pair for pair in pairs if pair[1] and theirs[kind]._encode_pair(pair[0] or "a", pair[1])[1]]
    asked = requests("loglikelihood", pairs)
    expected = theirs[kind].loglikelihood(asked, disable_tqdm=True)
    for batch in ("auto", 1, 4):
        ours = ours if batch == "auto" else XalignLM(folders[kind], batch_size=batch)
        found = ours.loglikelihood(asked, disable_tqdm=True)
        for pair, (logp, greedy), (want, likeliest) in zip(pairs, found, expected, strict=True):
            assert logp == pytest.approx(want, rel=1e-4, abs=1e-4), (batch, pair)
            assert greedy is likeliest, (batch, pair)
    assert {greedy for _, greedy in expected} == {True, False}


@pytest.mark.parametrize("kind", KINDS)
def test_rolling_loglikelihoods_are_those_of_hf(kind, folders, theirs):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs[kind].loglikelihood_rolling(asked, disable_tqdm=True)
    assert len(theirs[kind].tok_encode(TEXTS[4])) > 2 * WINDOW
    for batch in ("auto", 2):
        found = XalignLM(folders[kind], batch_size=batch).loglikelihood_rolling(asked, disable_tqdm=True)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_generated_texts_are_those_of_hf(kind, folders, theirs):
    ours = XalignLM(folders[kind], batch_size=4)
    contexts = [pair[0] for pair in PAIRS if pair[0]]
    expected: list[str] = []
    first = None
    for until in ([], ["e", "\n"]):
        kwargs = {"until": until, "max_gen_toks": 12, "do_sample": False}
        asked = requests("generate_until", [(context, kwargs) for context in contexts])
        for request in asked:  # one by one: theirs goes on with a row that ended as long as others of its batch do
            expected += theirs[kind].generate_until([request], disable_tqdm=True)
        found = ours.generate_until(asked, disable_tqdm=True)
        assert found == expected[-len(found) :]
        first = first or found
    assert found != first and any(found)


def test_tokens_are_those_of_hf_and_bos_never_comes_twice(folders, theirs):
    for kind, path in folders.items():
        ours = XalignLM(path)
        bos = theirs[kind].tokenizer.bos_token or theirs[kind].tokenizer.eos_token
        for text in [*TEXTS, STORY, bos, f"{bos}Hello{bos} there", *(context + reply for context, reply in PAIRS)]:
            for adds in (None, False):
                assert ours.tok_encode(text, adds) == theirs[kind].tok_encode(text, adds), (kind, text)
        assert (ours.prefix_token_id, ours.eot_token_id, ours.max_length) == (
            theirs[kind].prefix_token_id, theirs[kind].eot_token_id, theirs[kind].max_length)


def test_chats_are_those_of_hf(folders, theirs):
    ours, hf = XalignLM(folders["own"]), theirs["own"]
    for chat in (CHAT, [*CHAT, {"role": "assistant", "content": " It is "}]):
        for prompted in (True, False):
            text = ours.apply_chat_template(chat, prompted)
            assert text == hf.apply_chat_template(chat, prompted)
            assert ours.tok_encode(text) == hf.tok_encode(text)
    assert ours.chat_template(True) == hf.chat_template(True)
    assert ours.tokenizer_name == hf.tokenizer_name
    with pytest.raises(ConfigError, match="no chat template"):
        XalignLM(folders["gpt2"]).apply_chat_template(CHAT)


# Tasks


def write_lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> list[dict]:
    """50 items of multiple choice, 12 texts longer than the window, and 6 prompts."""
    root, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    items = []
    for number in range(50):
        prompt = toyworld.sample_prompt(rng)
        choices = [" " + toyworld.sample_story(prompt, rng).partition(".")[0] for _ in range(2 + number % 3)]
        items.append({"question": prompt, "choices": choices, "answer": rng.randrange(len(choices))})
    prompts = [toyworld.sample_prompt(rng) for _ in range(12)]
    long = [{"text": " ".join(f"{p} {toyworld.sample_story(p, rng)}" for p in prompts[: 1 + i])} for i in range(12)]
    files = {"choices": items, "texts": long, "prompts": [{"text": p, "answer": "x"} for p in prompts[:6]]}
    shared = {name: {"dataset_path": "json", "test_split": "test", "dataset_kwargs": {
        "data_files": {"test": write_lines(root / f"{name}.jsonl", rows)}, "cache_dir": str(root / "cache")}}
        for name, rows in files.items()}  # fmt: skip
    return [
        {"task": "choice", "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}",
         "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}], **shared["choices"]},
        {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
         "metric_list": [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")], **shared["texts"]},
        {"task": "write", "output_type": "generate_until", "doc_to_text": "{{text}}", "doc_to_target": "{{answer}}",
         "generation_kwargs": {"until": ["."], "max_gen_toks": 8}, "metric_list": [{"metric": "exact_match"}],
         **shared["prompts"]},
    ]  # fmt: skip


def evaluated(model, tasks, **options):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    return simple_evaluate(model, tasks=tasks, task_manager=TaskManager(include_defaults=False), bootstrap_iters=0, **options)


def test_tasks_give_what_hf_gives(folders, tasks):
    found = evaluated(XalignLM(folders["own"]), tasks)
    expected = evaluated(HFLM(pretrained=str(folders["own"]), device="cpu", batch_size=5), tasks)
    assert {name: len(rows) for name, rows in found["samples"].items()} == {"choice": 50, "rolling": 12, "write": 6}
    for name, results in expected["results"].items():
        for metric, value in results.items():
            if isinstance(value, float) and not math.isnan(value):
                assert found["results"][name][metric] == pytest.approx(value, rel=1e-5), (name, metric)
        for ours, hf in zip(found["samples"][name], expected["samples"][name], strict=True):
            assert ours["arguments"] == hf["arguments"]
            for a, b in zip(ours["filtered_resps"], hf["filtered_resps"], strict=True):
                assert a == (b if isinstance(b, str) else pytest.approx(b, rel=1e-4))
    assert 0 < expected["results"]["choice"]["acc,none"] < 1 and found["results"]["choice"]["acc_norm,none"] > 0
    assert expected["results"]["rolling"]["word_perplexity,none"] > 1
    assert found["config"]["model_num_parameters"] == expected["config"]["model_num_parameters"]


def test_a_task_that_was_stopped_goes_on_from_lm_evals_cache(folders, tasks, tmp_path, monkeypatch):
    whole = evaluated(XalignLM(folders["own"], batch_size=7), tasks[:1])
    model, score = XalignLM(folders["own"], batch_size=7), XalignLM._score
    ran: list[int] = []

    def counted(self, groups):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(sum(map(len, groups)))
        return score(self, groups)

    monkeypatch.setattr(XalignLM, "_score", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(model, tasks[:1], use_cache=str(tmp_path / "cache"))
    before = sum(ran)
    monkeypatch.setattr(XalignLM, "_score", lambda self, groups: ran.append(sum(map(len, groups))) or score(self, groups))
    again = evaluated(model, tasks[:1], use_cache=str(tmp_path / "cache"))
    assert before and sum(ran) == sum(len(row["arguments"]) for row in whole["samples"]["choice"])
    assert again["results"]["choice"]["acc,none"] == whole["results"]["choice"]["acc,none"]


# What is ours


def test_a_shared_context_is_run_once_and_the_head_for_continuations_alone(folders, monkeypatch):
    ours = XalignLM(folders["own"])
    seen: list[tuple[int, int]] = []
    run, head = ours.net.attn_layers.forward, ours.net.logits
    monkeypatch.setattr(ours.net.attn_layers, "forward", lambda x, context: seen.append((x.shape[1], 0)) or run(x, context))
    monkeypatch.setattr(ours.net, "logits", lambda hidden: seen.append((0, len(hidden))) or head(hidden))
    context, replies = "Tell me about it", [" yes", " no", " a cat", " a dog"]
    sizes = [[len(part) for part in ours._encode_pair(context, reply)] for reply in replies]
    ours.loglikelihood(requests("loglikelihood", [(context, reply) for reply in replies]), disable_tqdm=True)
    assert sum(tokens for tokens, _ in seen) <= sizes[0][0] + sum(size for _, size in sizes) < 4 * sizes[0][0]
    assert sum(rows for _, rows in seen) == sum(size for _, size in sizes)


def test_batches_keep_to_their_limits(folders):
    auto = {"batch_size": "auto:2", "max_batch_size": 2}
    for options, most in (({"batch_size": 3}, 3), ({"batch_tokens": 60}, 99), (auto, 2)):
        ours = XalignLM(folders["own"], **options)
        asked = [(("c", "d"), [5] * (1 + n % 9), [7 + k] * (1 + k)) for n in range(20) for k in range(1 + n % 5)]
        alike, batches, score = [], [], ours._score
        ours._score = lambda groups, batches=batches, score=score: batches.append(groups) or score(groups)
        ours._run(asked, lambda i, answer, alike=alike: alike.append(i), "", True)
        assert sorted(alike) == list(range(len(asked)))
        for groups in batches:
            assert sum(map(len, groups)) <= most and len({len(group) for group in groups}) == 1
            need = sum(max(len(r.inputs) for r in group) + sum(len(r.targets) for r in group) for group in groups)
            assert ours.tokens is None or need <= ours.tokens or len(groups) == 1


def test_drawn_texts_depend_on_the_seed_alone(folders):
    kwargs = {"do_sample": True, "temperature": 1.5, "top_k": 50, "top_p": 0.9, "max_gen_toks": 8, "until": []}
    asked = requests("generate_until", [("Hello", kwargs)] * 4 + [("Hello", {**kwargs, "max_tokens": 5, "top_k": 0})])
    drawn = [XalignLM(folders["own"], batch_size=rows, seed=seed).generate_until(asked, disable_tqdm=True)
             for rows, seed in ((1, 1), (4, 1), (4, 2))]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 2


def test_a_special_token_as_a_stop_string_ends_the_text(folders):
    ours = XalignLM(folders["own"])
    end = ours.tokenizer.special_tokens["<|user|>"]
    bias = torch.zeros(ours.net.num_tokens)
    bias[end] = 1e4
    head = ours.net.logits
    ours.net.logits = lambda hidden: head(hidden) + bias
    for until, text in ((["<|user|>"], ""), ([], "")):
        asked = requests("generate_until", [("Hello", {"until": until, "max_gen_toks": 5})])
        assert ours.generate_until(asked, disable_tqdm=True) == [text]


def test_quantised_and_adapted_models_load_as_elsewhere(folders):
    ours = XalignLM(folders["own"], dtype="bfloat16", load_in_8bit=True)
    ((logp, _),) = ours.loglikelihood(requests("loglikelihood", [("Hello", " there")]), disable_tqdm=True)
    ((want, _),) = XalignLM(folders["own"]).loglikelihood(requests("loglikelihood", [("Hello", " there")]), disable_tqdm=True)
    assert logp == pytest.approx(want, rel=0.1) and logp != want


@pytest.mark.parametrize(("options", "told"), [
    ({"max_lenght": 1}, "no option 'max_lenght', did you mean 'max_length'"), ({"batch_size": 0}, "batch_size is 0"),
    ({"batch_size": "many"}, "batch_size is 'many'"), ({"batch_tokens": 0.5}, "batch_tokens"),
    ({"max_length": True}, "max_length"), ({"max_length": 2 * WINDOW}, f"up to the model's {WINDOW}"),
    ({"prefix_token_id": 10**6}, "prefix_token_id"), ({"prefix_token_id": "x"}, "prefix_token_id"), ({"dtype": "int3"}, "int3"),
    ({"load_in_8bit": True, "load_in_4bit": True}, "both"), ({"device": "abacus"}, "abacus"),
    ({"adapter": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_bad_arguments_are_told_in_a_line(folders, options, told):
    with pytest.raises((ConfigError, UnknownOption, DataError, OSError), match=told) as error:
        XalignLM(folders["own"], **options)
    assert "\n" not in str(error.value)


def test_a_model_must_be_named():
    with pytest.raises(ConfigError, match="pretrained=FOLDER"):
        XalignLM()


@pytest.mark.parametrize(("kwargs", "told"), [
    ({"typical_p": 0.5}, "typical_p"), ({"num_beams": 4}, "num_beams is 4"), ({"top_p": 2}, "top_p is 2"),
    ({"max_gen_toks": WINDOW}, f"less than the {WINDOW}"), ({"max_gen_toks": "x"}, "generation_kwargs"),
    ({"top_k": "x", "do_sample": True}, "generation_kwargs"), ({"temperature": -1}, "temperature"),
])  # fmt: skip
def test_bad_generation_kwargs_are_told_in_a_line(folders, kwargs, told):
    with pytest.raises((ConfigError, UnknownOption), match=told):
        XalignLM(folders["own"]).generate_until(requests("generate_until", [("a", kwargs)]), disable_tqdm=True)


def test_what_has_no_token_to_score_or_too_many_is_an_error(folders):
    ours = XalignLM(folders["own"])
    long = (("a", STORY * 6), f"allowed is 1 to {WINDOW}")
    for pair, told in ((("a", ""), "no continuation"), (("", ""), "no continuation"), long):
        with pytest.raises(DataError, match=told):
            ours.loglikelihood(requests("loglikelihood", [pair]), disable_tqdm=True)
    assert ours.loglikelihood([]) == [] and ours.loglikelihood_rolling([]) == [] and ours.generate_until([]) == []


def test_a_tokenizer_without_bos_and_eos_needs_a_prefix(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "tokenizer", "qwen", eos_token=None))
    save_pretrained(tiny(num_tokens=tokenizer.vocab_size, **LLAMA), tmp_path / "model", tokenizer)
    ours = XalignLM(tmp_path / "model")
    asked = requests("loglikelihood", [("", " a")])
    with pytest.raises(ConfigError, match="prefix_token_id"):
        ours.loglikelihood(asked, disable_tqdm=True)
    assert ours.loglikelihood(requests("loglikelihood", [("b", " a")]), disable_tqdm=True)[0][0] < 0
    assert XalignLM(tmp_path / "model", prefix_token_id=3).loglikelihood(asked, disable_tqdm=True)[0][0] < 0


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "xalign", "lm-eval", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_is_lm_evals_own_and_loads_no_torch():
    code = ("import sys\nfrom xalign.cli import main\ntry: main(['lm-eval', '--help'])\n"
            "except SystemExit: pass\nassert not {'torch', 'transformers', 'datasets'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: lm-eval" in done.stdout, done.stderr


def test_without_lm_eval_the_command_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    with pytest.raises(ConfigError, match=r"pip install 'xalign\[lm-eval\]'"):
        COMMANDS["lm-eval"](["--tasks", "arc_easy"], "xalign lm-eval")


@pytest.mark.slow
def test_the_command_is_lm_evals_own_with_our_model_in_it(folders, tasks, tmp_path):
    for task in tasks:
        (tmp_path / f"{task['task']}.yaml").write_text(json.dumps(task))
    given = ("--model_args", f"pretrained={folders['own']}", "--tasks", "choice,rolling", "--include_path", str(tmp_path))
    done = command(*given, "--output_path", str(tmp_path / "out"), "--log_samples")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "xalign (" in done.stdout and "|choice" in done.stdout
    (written,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(written.read_text())["results"]
    expected = evaluated(HFLM(pretrained=str(folders["own"]), device="cpu"), tasks[:2])["results"]
    assert found["choice"]["acc,none"] == expected["choice"]["acc,none"]
    assert found["rolling"]["word_perplexity,none"] == pytest.approx(expected["rolling"]["word_perplexity,none"])
    for arguments, told in ((("--model_args", f"pretrained={folders['own']},max_lenght=3", *given[2:]), "'max_length'?"),
                            ((*given[:2], "--tasks", "nothing"), "not found: nothing")):
        wrong = command(*arguments)
        assert wrong.returncode == 2 and wrong.stderr.strip().endswith(told), wrong.stderr[-2000:]
    assert command(*given, "--model", "dummy").stdout.count("dummy (") == 1  # what is given counts
