"""Scorers and `xalign score`: what each kind gives, whole texts, servers that fail, files that are killed and go on."""

import json
import math
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny

from xalign import RewardModel, load_pretrained, save_pretrained, scoring
from xalign import score as program
from xalign.cli import main
from xalign.data import toyworld
from xalign.data.chat_template import render, render_completion, render_text
from xalign.data.records import Message
from xalign.data.replies import Replies, renamed, to_replies
from xalign.errors import ConfigError, DataError
from xalign.logprobs import sequence_logprobs
from xalign.nn.quantize import quantize
from xalign.scoring import GoldScorer, ImplicitScorer, RemoteScorer, RewardScorer, apart, parse, whole_text

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ["Mia was glad.", "The owl got stuck in the mud, and Tom helped her.", "A kite!", "They went home in silence. " * 3, ""]


@pytest.fixture
def tokenizer(chat_tokenizer):
    return chat_tokenizer


@pytest.fixture(scope="module")
def policies(chat_tokenizer):
    return [tiny(seed, num_tokens=chat_tokenizer.vocab_size, max_seq_len=96, **LLAMA) for seed in (1, 2)]


@pytest.fixture(scope="module")
def reward(chat_tokenizer):
    model = RewardModel(tiny(3, num_tokens=chat_tokenizer.vocab_size, max_seq_len=96, **LLAMA), chat_tokenizer)
    with torch.no_grad():
        model.head.weight.normal_(std=1)
    return RewardScorer(model, batch_size=3)


def chat(prompt):
    return (Message("user", prompt),)


def test_gold_is_the_toy_worlds(capsys):
    rows = [json.loads(line) for line in (ROOT / "data/test.jsonl").read_text().splitlines()[:5]]
    told = [toyworld.gold_reward(r["prompt"], r["chosen"]) for r in rows]
    prompts, replies = [r["prompt"] for r in rows], [r["chosen"] for r in rows]
    assert scoring.open("gold").score(prompts, replies).tolist() == pytest.approx(told)
    whole = [p + r for p, r in zip(prompts, replies, strict=True)]
    assert GoldScorer().score_texts(whole, [None] * 5).tolist() == pytest.approx(told)
    assert GoldScorer().score([[{"role": "user", "content": prompts[0]}]], replies[:1]).tolist() == pytest.approx(told[:1])
    main(["score", "--model", "gold", "-p", prompts[0], "--response", replies[0]])
    assert float(capsys.readouterr().out) == pytest.approx(told[0], abs=1e-6)


@pytest.mark.parametrize("prompt", ["Once there was a girl. ", chat("Once there was a girl.")])
def test_implicit_rewards_are_the_log_probabilities(policies, tokenizer, prompt):
    policy, reference = policies
    wanted, counts = [], []
    for text in TEXTS:
        reply = text if isinstance(prompt, str) else (Message("assistant", text),)
        head, ids, _ = render_completion(tokenizer, prompt, reply)
        tokens, mask = torch.tensor([head + ids]), torch.tensor([[False] * len(head) + [True] * len(ids)])
        wanted.append([float(sequence_logprobs(model, tokens, mask).detach()) for model in policies])
        counts.append(len(ids))
    ours, theirs = torch.tensor(wanted).T
    rows = [prompt] * len(TEXTS), TEXTS
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(ImplicitScorer(policy, tokenizer, reference, beta=0.3, batch_size=2).score(*rows),
                               0.3 * (ours - theirs), **close)
    torch.testing.assert_close(ImplicitScorer(policy, tokenizer).score(*rows), ours, **close)
    torch.testing.assert_close(ImplicitScorer(policy, tokenizer, kind="avg").score(*rows), ours / torch.tensor(counts), **close)


def test_a_long_prompt_loses_its_beginning_and_is_counted(policies, tokenizer):
    scorer = ImplicitScorer(policies[0], tokenizer, max_length=24)
    long, reply = "The owl was glad. " * 30, "Mia was glad."
    found = scorer.score([long, "short "], [reply, reply])
    ids = render_text(tokenizer, "", reply).ids[1:]
    head = render_text(tokenizer, long).ids
    kept = [head[0], *head[len(head) - 24 + len(ids) + 1 :]]
    tokens = torch.tensor([kept + ids])
    assert tokens.shape[1] == 24 and scorer.cut == 1
    mask = torch.tensor([[False] * len(kept) + [True] * len(ids)])
    assert float(found[0]) == pytest.approx(float(sequence_logprobs(policies[0], tokens, mask).detach()), abs=1e-4)


def test_a_reward_model_scores_texts_messages_and_conversations(reward, tokenizer):
    def by_hand(ids):
        return float(reward.model(torch.tensor([ids])).detach())

    prompts = ["Once. ", chat("Once."), (*chat("Hi"), Message("assistant", "Yes?"), Message("user", "Bye")), "alone"]
    found = reward.score(prompts, ["Mia was glad.", "Mia was glad.", None, None]).tolist()
    assert found[0] == pytest.approx(by_hand(render_text(tokenizer, "Once. ", "Mia was glad.").ids), abs=1e-5)
    turns = render(tokenizer, (*prompts[1], Message("assistant", "Mia was glad."))).ids
    assert turns.count(tokenizer.bos_id) == 1 and turns[-1] == tokenizer.eos_id
    assert found[1] == pytest.approx(by_hand(turns), abs=1e-5)
    assert found[2] == pytest.approx(by_hand(render(tokenizer, prompts[2]).ids), abs=1e-5)
    assert found[3] == pytest.approx(by_hand(render_text(tokenizer, "", "alone").ids), abs=1e-5)


def test_whole_texts_are_the_same_ids_and_scores(reward, tokenizer):
    rows = [(chat("Who </s> came <|user|> there?"), "Mia, and the owl."), (chat("Hi"), ""), ("", "A kite!")]
    for prompt, reply in rows[1:]:
        head, ids, _ = render_completion(tokenizer, *apart(prompt, reply))
        assert parse(tokenizer, whole_text(tokenizer, prompt, reply)) == head + ids
    texts = [whole_text(tokenizer, *row) for row in rows[1:]]
    wanted = reward.score(*zip(*rows[1:], strict=True))
    torch.testing.assert_close(reward.score_texts(texts, [None] * 2), wanted, rtol=0, atol=1e-5)
    bare = [text.removesuffix("</s>") for text in texts]
    torch.testing.assert_close(reward.score_texts(bare, [None] * 2, append_eos=True), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(reward.score_texts(bare, [None] * 2), wanted)
    with pytest.raises(DataError, match="no token"):
        reward.score_texts([""], [None])


def test_a_policy_takes_whole_texts_with_their_prompts(policies, tokenizer):
    scorer = ImplicitScorer(policies[0], tokenizer)
    wanted = scorer.score([chat("Who?"), "Once. "], ["Mia.", "A kite!"])
    prompts = ["<s><|user|>Who?<|assistant|>", "<s>Once. "]
    texts = [prompts[0] + "Mia.</s>", prompts[1] + "A kite!</s>"]
    torch.testing.assert_close(scorer.score_texts(texts, prompts), wanted, rtol=0, atol=1e-5)
    bare = [text.removesuffix("</s>") for text in texts]
    torch.testing.assert_close(scorer.score_texts(bare, prompts, append_eos=True), wanted, rtol=0, atol=1e-5)
    for prompt in (None, "<s>Another"):
        with pytest.raises(DataError, match="no prompt is told"):
            scorer.score_texts(texts[:1], [prompt])


def test_open_knows_its_kinds(policies, tokenizer, tmp_path):
    folders = []
    for i, model in enumerate(policies):
        folders.append(str(tmp_path / f"m{i}"))
        save_pretrained(model, folders[-1], tokenizer)
    dpo = scoring.open(f"dpo:{folders[0]},{folders[1]}", beta=0.5)
    wanted = ImplicitScorer(*load_pretrained(folders[0]), load_pretrained(folders[1])[0], beta=0.5).score(["a "], ["kite"])
    assert torch.equal(dpo.score(["a "], ["kite"]), wanted)
    assert scoring.open(f"avg:{folders[0]}").kind == "avg" and scoring.open(f"sum:{folders[0]}").reference is None
    assert scoring.open("http://127.0.0.1:9,http://127.0.0.1:8/get_reward").urls == [
        "http://127.0.0.1:9/get_reward", "http://127.0.0.1:8/get_reward"]
    for bad in (f"dpo:{folders[0]}", f"avg:{folders[0]},{folders[1]}", "sum:", "dpo:,x", ""):
        with pytest.raises(ConfigError, match=r"dpo:POLICY,REFERENCE"):
            scoring.open(bad)
    for spec, setting in (("gold", {"max_length": 9}), (f"sum:{folders[0]}", {"normalize": True}), ("rm", {"tokenizer": "x"}),
                          ("http://h", {"truncation_side": "right"})):
        with pytest.raises(ConfigError, match=f"{next(iter(setting))} is .* has no use for"):
            scoring.open(spec, **setting)
    with pytest.raises(ConfigError, match="allowed is"):
        RemoteScorer("127.0.0.1:80")


# --- records


def test_records_of_every_shape():
    user, said = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
    hi = (Message("user", "Hi"),)
    for record, told in [
        ({"prompt": "Hi", "response": "Yes"}, Replies("Hi", ("Yes",))), ({"prompt": "", "response": ""}, Replies("", ("",))),
        ({"prompt": [user], "completion": [said], "label": None}, Replies(hi, ("Yes",))),
        ({"instruction": "Hi", "output": "Yes"}, Replies(hi, ("Yes",))),
        ({"prompt": [user], "responses": ["Yes", "No"]}, Replies(hi, ("Yes", "No"), True)),
        ({"messages": [user, said]}, Replies(hi, ("Yes",))), ({"messages": [user]}, Replies(hi, (None,)))]:
        found = to_replies(record, "f:1")
        assert (found.prompt, found.replies, found.several, found.where) == (told.prompt, told.replies, told.several, "f:1")


@pytest.mark.parametrize("record", [{}, {"prompt": "Hi"}, {"response": "Yes"}, {"prompt": 3, "response": "Yes"},
                                    {"prompt": "Hi", "responses": []}, {"prompt": "Hi", "responses": "Yes"},
                                    {"prompt": "Hi", "response": ["Yes"]}, {"prompt": "Hi", "response": "\ud800"},
                                    {"messages": []}, {"messages": "Hi"}, {"prompt": "a" * 10**6, "response": "b"},
                                    {"prompt": [{"role": "x", "content": ""}], "response": "a"}])
def test_bad_records_are_told_by_line(record):
    with pytest.raises(DataError, match=r"^f:7: "):
        to_replies(record, "f:7")


@pytest.mark.parametrize(("record", "told"), [
    ({"prompt": "a", "response": "b", "responses": ["b"]}, "both 'response' and 'responses'"),
    ({"instruction": "a", "output": "b", "messages": [{"role": "user", "content": "a"}]}, "both 'output' and 'messages'"),
    ({"prompt": "a", "instruction": "b", "response": "c"}, "both 'prompt' and 'instruction'"),
    ({"prompt": None, "response": None}, r"the keys 'prompt' \(null\), 'response' \(null\); allowed"),
    ({"prompt": [], "response": "a"}, "not an empty list"), ({"messages": []}, "list of at least one"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "a reply alone")])
def test_records_that_contradict_themselves_or_say_nothing(record, told):
    with pytest.raises(DataError, match=rf"^f:7: .*{told}"):
        to_replies(record, "f:7")


def test_columns_that_are_named_settle_what_is_meant():
    record = {"prompt": "a", "instruction": "b", "response": "c", "output": "d", "messages": [], "text": "e"}
    found = to_replies(renamed(record, {"prompt": "text", "response": "output"}), "")
    assert (found.prompt, found.replies) == ("e", ("d",))
    with pytest.raises(DataError, match="both 'response' and 'output'"):
        to_replies(renamed(record, {"prompt": "text"}), "")


# --- a server that another wrote, and one that fails


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status, reply = self.server.answer(body)
        data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 503:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


def url(server):
    return f"http://127.0.0.1:{server.server_address[1]}"


def test_the_client_sends_whole_texts_and_keeps_their_order(server, tokenizer, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    seen, fails = [], iter([(503, {}), (500, b"oops"), (200, b"no json")])

    def answer(body):
        if (failure := next(fails, None)) is not None:
            return failure
        seen.append(body)
        return 200, {"rewards": [float(len(q)) for q in body["query"]]}

    server.answer = answer
    scorer = RemoteScorer(url(server), tokenizer, batch_size=2, concurrency=1)
    rows = [chat("Hi")] * 5, ["x" * i for i in range(5)]
    wanted = [whole_text(tokenizer, p, r) for p, r in zip(*rows, strict=True)]
    assert wanted[3] == "<s><|user|>Hi<|assistant|>xxx</s>"
    assert scorer.score(*rows).tolist() == [len(text) for text in wanted]
    assert [q for body in seen for q in body["query"]] == wanted and all(body.keys() == {"query"} for body in seen)
    assert RemoteScorer(url(server)).score(["a", "b"], ["bc", ""]).tolist() == [3, 1]


@pytest.mark.parametrize(("reply", "told"), [((400, b"a reason"), "400 a reason"), ((500, b"x"), r"500 x \(tried 2 times\)"),
                                             ((200, {"rewards": [1]}), "2 rewards were asked for"),
                                             ((200, {"rewards": [1, "x"]}), "2 rewards were asked for"),
                                             ((200, []), "no JSON object")])
def test_what_a_server_refuses_or_garbles_is_told(server, monkeypatch, reply, told):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.answer = lambda body: reply
    with pytest.raises(DataError, match=told):
        RemoteScorer(url(server), tries=2).score(["a", "b"], ["c", "d"])


def test_a_server_that_is_not_there(monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(DataError, match=r"refused.*tried 2 times"):
        RemoteScorer("http://127.0.0.1:9", tries=2).score(["a"], ["b"])


# --- the program


def rows_of(count):
    lines = (ROOT / "data/test.jsonl").read_text().splitlines()[:count]
    return [{"prompt": r["prompt"], "responses": [r["chosen"], r["rejected"]], "id": i} for i, r in
            enumerate(map(json.loads, lines))]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_file_is_scored_with_its_numbers_and_picture(tmp_path, capsys):
    rows = rows_of(40)
    data, out = write(tmp_path / "a.jsonl", rows), tmp_path / "out"
    main(["score", "--model", "gold", "--dataset", data, "--output-dir", str(out)])
    told = capsys.readouterr()
    assert told.out.strip() == str(out / "scores.jsonl") and "top-1" in told.err and "█" in told.err
    found = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    gold = [[toyworld.gold_reward(r["prompt"], s) for s in r["responses"]] for r in rows]
    assert [f["rewards"] for f in found] == [pytest.approx(g) for g in gold] and [f["id"] for f in found] == list(range(40))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mean"] == pytest.approx(sum(map(sum, gold)) / 80, abs=1e-5)
    assert summary["top_1"] == pytest.approx(sum(map(max, gold)) / 40, abs=1e-5) and summary["scores"] == 80
    assert (out / "histogram.png").read_bytes()[:4] == b"\x89PNG"
    main(["score", "--model", "gold", "--dataset", data, "--output-dir", str(out)])
    assert "finished" in capsys.readouterr().err
    main(["score", "--model", "gold", "--dataset", data, "--limit", "3"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    with pytest.raises(SystemExit):
        main(["score", "--model", "gold", "--dataset", data, "--limit", "3", "--output-dir", str(out)])
    assert "limit" in capsys.readouterr().err


def test_a_killed_file_goes_on_to_the_same_bytes(tmp_path, monkeypatch, reward):
    monkeypatch.setattr(program, "CHUNK", 4)
    monkeypatch.setattr(scoring, "open", lambda *_, **__: reward)
    data = write(tmp_path / "a.jsonl", rows_of(10))
    arguments = ["score", "--model", "rm", "--dataset", data, "--output-dir"]
    main([*arguments, str(tmp_path / "whole")])
    whole = (tmp_path / "whole/scores.jsonl").read_bytes()
    cut = json.loads((tmp_path / "whole/summary.json").read_text())["texts_cut"]
    code = ("import os, sys; from xalign import score; from xalign.cli import main\n"
            "score.CHUNK, told, left = 4, score._rows, [2]\n"
            "def rows(*a):\n    left[0] -= 1\n    if left[0] < 0: os.kill(os.getpid(), 9)\n    return told(*a)\n"
            "score._rows = rows; main(sys.argv[1:])")
    killed = tmp_path / "killed"
    gold = ["score", "--model", "gold", "--dataset", data, "--output-dir"]
    done = subprocess.run([sys.executable, "-c", code, *gold, str(killed)], cwd=ROOT, capture_output=True)
    assert done.returncode == -9
    partial = (killed / "scores.jsonl").read_bytes()
    assert partial.count(b"\n") == 8
    (killed / "scores.jsonl").write_bytes(partial + b'{"prompt": "half')
    monkeypatch.undo()
    monkeypatch.setattr(program, "CHUNK", 4)
    seen = []
    told = program._rows
    monkeypatch.setattr(program, "_rows", lambda *a: seen.append(len(a[1])) or told(*a))
    main([*gold, str(killed)])
    assert seen == [2]
    main([*gold, str(tmp_path / "again")])
    assert (killed / "scores.jsonl").read_bytes() == (tmp_path / "again/scores.jsonl").read_bytes()
    # and with a model, of which texts are cut, where batches change last bits: cut at any place, the same bytes
    monkeypatch.setattr(scoring, "open", lambda *_, **__: reward)
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "whole/summary.json").unlink()
        (tmp_path / "whole/scores.jsonl").write_bytes(whole[:size])
        main([*arguments, str(tmp_path / "whole")])
        assert (tmp_path / "whole/scores.jsonl").read_bytes() == whole
        assert json.loads((tmp_path / "whole/summary.json").read_text())["texts_cut"] == cut > 0


def test_columns_chat_and_a_system_turn(tmp_path, monkeypatch, capsys):
    seen = []

    class Spy(GoldScorer):
        def score(self, prompts, responses, *, progress=""):
            seen.extend(zip(prompts, responses, strict=True))
            return torch.zeros(len(prompts))

    monkeypatch.setattr(scoring, "open", lambda *_, **__: Spy())
    data = write(tmp_path / "a.jsonl", [{"q": "Hi", "a": "Yes", "prompt": "another"}])
    main(["score", "--dataset", data, "--columns", "prompt=q", "response=a", "--chat", "--system", "Be."])
    assert seen == [((Message("system", "Be."), Message("user", "Hi")), "Yes")]
    assert json.loads(capsys.readouterr().out)["reward"] == 0


@pytest.mark.parametrize(("arguments", "told"), [
    ([], "nothing given"), (["-p", "a"], "--prompt needs --response"), (["--response", "a"], "nothing given"),
    (["-p", "a", "--dataset", "x.jsonl"], "allowed is one of"), (["-p", "a", "--response", "b", "--system", "c"], "--chat"),
    (["--dataset", "missing.jsonl"], "missing.jsonl"), (["--dataset", "bad.jsonl"], "bad.jsonl:2: "),
    (["--dataset", "bad.jsonl", "--columns", "chosen=x"], "allowed names are"), (["--port", "70000", "--serve"], "65535"),
    (["-p", "a", "--response", "b", "--output-dir", "x"], "--output-dir x goes with --dataset"),
    (["--dataset", "bad.jsonl", "--port", "3"], "--port 3 goes with --serve"),
    (["--dataset", "bad.jsonl", "--overwrite"], "--overwrite goes with --output-dir"),
    (["--serve", "--chat"], "--chat doesn't go with --serve"),
    (["-p", "a", "--response", "b", "--load-in-4bit"], "no weights"),
    (["--model", "nowhere", "-p", "a", "--response", "b"], "nowhere"),
    (["--model", "http://x y", "-p", "a", "--response", "b"], "HOST")])
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "bad.jsonl", [{"prompt": "a", "response": "b"}, {"prompt": "a"}])
    with pytest.raises(SystemExit) as stop:
        main(["score", *([] if "--model" in arguments else ["--model", "gold"]), *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and error.count("\n") == 1


def test_scores_that_are_no_number_are_null_counted_and_end_in_an_error(tmp_path, monkeypatch, capsys):
    class Broken(GoldScorer):
        def score(self, prompts, responses, *, progress=""):
            return torch.tensor([math.nan if r == "nan" else math.inf if r == "inf" else 1.0 for r in responses])

    monkeypatch.setattr(scoring, "open", lambda *_, **__: Broken())
    data = write(tmp_path / "a.jsonl", [{"prompt": "a", "responses": ["nan", "b", "inf"]}, {"prompt": "a", "response": "b"}])
    for folder in ([], ["--output-dir", str(tmp_path / "out")], ["--output-dir", str(tmp_path / "out")]):  # again: finished
        with pytest.raises(SystemExit) as stop:
            main(["score", "--dataset", data, *folder])
        told = capsys.readouterr()
        assert stop.value.code == 1 and "error: 2 of 4 scores are not finite" in told.err
        text = (tmp_path / "out/scores.jsonl").read_text() if folder else told.out
        assert json.loads(text.splitlines()[0])["rewards"] == [None, 1, None]
    assert json.loads((tmp_path / "out/summary.json").read_text())["not_finite"] == 2
    with pytest.raises(SystemExit) as stop:
        main(["score", "-p", "a", "--response", "nan"])
    assert stop.value.code == 1 and capsys.readouterr().out == "nan\n"


def test_weights_may_be_quantised(policies, reward, tmp_path, capsys):
    rm, policy = str(tmp_path / "rm"), str(tmp_path / "policy")
    reward.model.save_pretrained(rm)
    save_pretrained(policies[0], policy, reward.tokenizer)

    def told(*flags):
        main(["score", "-p", "Once. ", "--response", "Mia was glad.", *flags])
        said = capsys.readouterr()
        assert ("layers int" in said.err) == (len(flags) > 2)
        return float(said.out)

    for bits in (8, 4):
        model = RewardModel.from_pretrained(rm)
        quantize(model.net, bits)
        alone = ImplicitScorer(quantize(load_pretrained(policy)[0], bits, head=False), reward.tokenizer, kind="avg")
        for spec, scorer in ((rm, RewardScorer(model)), (f"avg:{policy}", alone)):
            found = told("--model", spec, f"--load-in-{bits}bit")
            assert found == pytest.approx(float(scorer.score(["Once. "], ["Mia was glad."])[0]), abs=1e-5)
            assert found != (plain := told("--model", spec)) and (bits == 4 or found == pytest.approx(plain, abs=0.3))


def test_a_histogram_of_anything():
    assert program.histogram([]) == [] and len(program.histogram([1.0, 1.0])) == 1
    lines = program.histogram([0, 0, 0, 1])
    assert lines[0].count("█") == 40 and lines[-1].endswith(" 1") and len(lines) == 12
    assert program.summary([[math.nan, 1.0], [2.0, 3.0]], 0)["not_finite"] == 1
