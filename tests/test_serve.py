"""`xalign score --serve`: OpenRLHF's request and reply, many clients at once, bad ones, slow ones, a full queue, the end."""

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import LLAMA, tiny

from xalign import RewardModel, scoring
from xalign.data import toyworld
from xalign.data.records import Message
from xalign.errors import DataError
from xalign.scoring import GoldScorer, RemoteScorer, whole_text
from xalign.serve import Batcher, Full, ServeLimits, rows_of

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, chat_tokenizer):
    """A reward model's folder."""
    model = RewardModel(tiny(3, num_tokens=chat_tokenizer.vocab_size, max_seq_len=96, **LLAMA), chat_tokenizer)
    with torch.no_grad():
        model.head.weight.normal_(std=1)
    path = tmp_path_factory.mktemp("reward")
    model.save_pretrained(path)
    return path


@contextlib.contextmanager
def running(*arguments):
    """A server's process and address; the process is gone at the end."""
    process = subprocess.Popen([sys.executable, "-m", "xalign", "score", "--serve", "--port", "0", *map(str, arguments)],
                               env=ENVIRONMENT, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                yield process, f"http://127.0.0.1:{found[1]}"
                return
        raise AssertionError("".join(lines))
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


@pytest.fixture(scope="module")
def server(folder):
    limits = "--max-bytes", 20000, "--queue-size", 4096, "--body-seconds", 1, "--batch-size", 16
    with running("--model", folder, *limits) as (process, url):
        yield url
        assert process.poll() is None


def ask(url, body, path="/get_reward"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url + path, data), timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_200_requests_at_once_get_the_librarys_scores(server, folder):
    scorer = scoring.open(str(folder))
    texts = [[whole_text(scorer.tokenizer, (Message("user", f"Question {i}"),), "word " * (i % 7 + j))
              for j in range(i % 3 + 1)] for i in range(200)]
    barrier = threading.Barrier(200)

    def one(query):
        barrier.wait()
        return ask(server, {"query": query, "prompts": ["?"] * len(query), "labels": ["a"] * len(query)})

    with ThreadPoolExecutor(200) as pool:
        replies = list(pool.map(one, texts))
    flat = iter(scorer.score_texts(*zip(*[(text, None) for query in texts for text in query], strict=True)).tolist())
    for query, (status, reply) in zip(texts, replies, strict=True):
        assert status == 200 and reply.keys() == {"rewards", "scores", "extra_logs"}
        assert reply["scores"] == reply["rewards"] == reply["extra_logs"]["dummy_scores"]
        assert reply["rewards"] == pytest.approx([next(flat) for _ in query], abs=1e-5)
    wanted = scorer.score_texts(["<s>one text</s>"], [None]).tolist()
    assert ask(server, {"query": "<s>one text</s>"})[1]["rewards"] == pytest.approx(wanted, abs=1e-5)


def test_our_client_sends_messages_as_they_are(server, folder):
    scorer = scoring.open(str(folder))
    prompts, replies = [(Message("user", f"Q{i} </s>"),) for i in range(9)], [f"an answer {i}" for i in range(9)]
    prompts[3], replies[4] = "plain text", None
    wanted = scorer.score(prompts, replies)
    torch.testing.assert_close(RemoteScorer(server, batch_size=2).score(prompts, replies), wanted, rtol=0, atol=1e-5)
    plain = RemoteScorer(server, scorer.tokenizer).score([(Message("user", "Q"),)], ["A"])
    torch.testing.assert_close(plain, scorer.score([(Message("user", "Q"),)], ["A"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("body", "reason"), [
    (b"", "not JSON"), (b"{", "not JSON"), (b"\xff\xfe{}", "not JSON"), (b"[" * 15000, "too deeply"),
    ([], "JSON object"), ({}, "no 'query'"), ({"query": []}, "at least one"), ({"query": 5}, "list"),
    ({"query": [5]}, "query[0]"), ({"query": ["ok", None]}, "query[1]"),
    ({"query": ["\ud800"]}, "surrogate"), ({"query": [""]}, "no token"), ({"responses": ["a"]}, "as many"),
    ({"query": None}, "the query is null"), ({"prompts": ["a"], "responses": ["a", "b"]}, "as many"),
    ({"query": ["a", "b", "c"], "prompts": ["a"]}, "'query' has 3, 'prompts' has 1: allowed are as many"),
    ({"prompts": [[]], "responses": ["a"]}, "prompts[0]: 'prompt' must be text or a list of at least one message"),
    ({"prompts": [[{"role": "x", "content": ""}]], "responses": ["a"]}, "role"),
    ({"prompts": [5], "responses": ["a"]}, "prompts[0]")])
def test_bad_requests_get_400_and_the_reason(server, body, reason):
    status, told = ask(server, body)
    assert status == 400 and reason in told and "\n" not in told
    assert ask(server, {"query": ["fine"]})[0] == 200


def test_large_unknown_and_slow_requests(server):
    assert ask(server, {"query": ["x" * 30000]})[0] == 413
    assert ask(server, {"query": ["fine"] * 2000})[0] == 200
    assert ask(server, {"query": ["a"] * 4097})[0] == 413
    assert ask(server, {"query": ["a"]}, "/nothing")[0] == 404
    with urllib.request.urlopen(f"{server}/health", timeout=10) as reply:
        assert json.load(reply)["status"] == "ok"
    port = int(server.rsplit(":", 1)[1])
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(30)]
        for i, client in enumerate(slow):  # some send half a header, some half a body, some chunks without an end
            client.sendall([b"POST /get_rew", b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{",
                            b"POST /get_reward HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabcde\r\n"][i % 3])
        slow[0].close()
        assert ask(server, {"query": ["fine"]})[0] == 200  # nobody waits for them
        slow[1].settimeout(10)
        assert slow[1].recv(200).startswith(b"HTTP/1.1 408")
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /hea")
        for silent in (slow[3], client):  # no end of a first, or of a later request's head
            silent.settimeout(10)
            with contextlib.suppress(ConnectionResetError):
                while silent.recv(1000):  # what is left of the reply
                    pass
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
        client.sendall(b"POST /get_reward HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):  # it may have closed already
            for _ in range(30):
                client.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert client.recv(200).startswith(b"HTTP/1.1 413")
        # requests that stop in the middle, together more than the server holds
        many = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(8)]
        for client in many:
            client.sendall(b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: 19999\r\n\r\n" + b"x" * 19000)
        assert {client.recv(200).split()[1] for client in many} == {b"408", b"503"}
    assert ask(server, {"query": ["fine"]})[0] == 200


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_and_requests_in_progress_get_their_reply(kind):
    rows = json.loads((ROOT / "data/test.jsonl").read_text().split("\n")[0])
    with running("--model", "gold", "--body-seconds", 20) as (process, url):
        body = json.dumps({"query": [rows["prompt"] + rows["chosen"]]}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as client:
            client.sendall(b"POST /get_reward HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:10])
            time.sleep(0.5)
            process.send_signal(kind)
            time.sleep(0.5)
            client.sendall(body[10:])
            reply = client.makefile("rb").read()
        assert process.wait(20) == 0
        gold = json.loads(reply.partition(b"\r\n\r\n")[2])["rewards"]
        assert gold == pytest.approx([toyworld.gold_reward(rows["prompt"], rows["chosen"])])
        assert "Traceback" not in process.stderr.read()


def test_a_taken_port_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-m", "xalign", "score", "--serve", "--model", "gold", "--port", str(port)],
                              env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"--port {port}" in done.stderr and done.stderr.count("\n") == 1


# --- the queue, without a server


class Slow(GoldScorer):
    """Scores lengths, refuses "bad", breaks at "broken", and keeps what it was asked at once."""

    def __init__(self):
        super().__init__()
        self.batches, self.go = [], threading.Event()

    def score_texts(self, texts, prompts, *, append_eos=False):
        self.go.wait(10)
        self.batches.append(list(texts))
        if "broken" in texts:
            raise RuntimeError("broken")
        if "bad" in texts:
            raise DataError("a bad text")
        return torch.tensor([float("nan") if t == "nan" else len(t) for t in texts])


def whole(*texts):
    return [(True, text, None) for text in texts]


def test_the_queue_is_bounded_batches_requests_and_keeps_faults_apart():
    async def scenario():
        scorer = Slow()
        batcher = Batcher(scorer, ServeLimits(batch_size=4, queue_size=9))
        worker = asyncio.create_task(batcher.run())
        first = asyncio.create_task(batcher.ask(whole("x")))
        await asyncio.sleep(0.05)  # it is being scored now; the others wait
        requests = ["aa", "b"], ["bad"], ["broken"], ["nan"], ["ccc", "d", "eeeee"]
        asked = [asyncio.create_task(batcher.ask(whole(*texts))) for texts in requests]
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.ask(whole("y"))
        asked[4].cancel()
        await asyncio.sleep(0)
        scorer.go.set()
        results = await asyncio.gather(first, *asked, return_exceptions=True)
        assert await batcher.ask(whole("zz", "y")) == [2, 1]  # there is room again
        worker.cancel()
        batcher.close()
        return results, scorer.batches, batcher.rows

    results, batches, rows = asyncio.run(scenario())
    assert results[0] == [1] and results[1] == [2, 1] and rows == 0
    assert [type(r).__name__ for r in results[2:]] == ["DataError", "RuntimeError", "ArithmeticError", "CancelledError"]
    assert batches[:2] == [["x"], ["aa", "b", "bad", "broken"]] and ["ccc", "d", "eeeee"] not in batches


def test_prompts_beside_a_query_are_handed_on_where_they_are_texts():
    def rows(**told):
        return rows_of(json.dumps({"query": ["Hi there", "A b"], **told}).encode())

    assert rows(prompts=["Hi", "A "]) == [(True, "Hi there", "Hi"), (True, "A b", "A ")]
    for prompts in (None, [[], []]):
        assert rows(prompts=prompts, labels=5) == [(True, "Hi there", None), (True, "A b", None)]
    for prompts in (["Hi"], 5, {}, []):  # OpenRLHF's server looks at none, but its clients send one to each query
        with pytest.raises(DataError, match="'prompts'"):
            rows(prompts=prompts)
    assert rows(prompts=["a", "b"], responses=["c", None]) == [(False, "a", "c"), (False, "b", None)]


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    from xalign.errors import ConfigError
    from xalign.serve import listen, serve

    with listen("127.0.0.1", 0) as listening, pytest.raises(ConfigError, match=r"xalign\[serve\]"):
        serve(GoldScorer(), listening, ServeLimits())
