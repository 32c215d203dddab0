"""The client of OpenAI-compatible servers: what is sent, what comes back, and what goes wrong in between."""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

from tests.server import FAULTS, Handler, Server
from tests.test_backends import CHATS, PROMPTS, make_folder, texts
from xalign import backends
from xalign.backends.base import SamplingParams
from xalign.backends.openai import _retry_after
from xalign.data.records import Message
from xalign.errors import ConfigError

FAST = {"backoff": 0.01, "max_backoff": 0.05, "timeout": 0.4, "deadline": 20}
GREEDY = SamplingParams(temperature=0, max_new_tokens=8)


def client(server, **options):
    return backends.open(
        {"backend": "openai", "model": "m", "base_url": server.url, "dialect": "openai", "probe": False} | FAST | options
    )


def test_every_prompt_ends_once_whatever_the_server_does():
    """500 prompts, 32 at a time, 30 % faults: each gets its own answer, none is asked for more often than allowed."""
    with Server(rate=0.3, hang=0.6) as server:
        backend = client(server, concurrency=32, tries=6)
        told: dict[int, str] = {}
        prompts = [f"prompt {i}" for i in range(500)]

        def done(i, row):
            assert i not in told, "told twice"
            told[i] = row[0].text

        rows = backend.generate(prompts, GREEDY, done=done)
        failed = [i for i, row in enumerate(rows) if row[0].error]
        for i, row in enumerate(rows):
            assert len(row) == 1 and (row[0].error or row[0].text == f"answer to prompt {i}")
        assert sorted(told) == list(range(500)) and len(failed) < 10
        assert all(re.match(r"given up after 6 tries", rows[i][0].error) for i in failed)
        assert max(server.asked.values()) <= 6 and set(server.asked) == set(prompts)
        assert server.most <= 32 and set(FAULTS) <= set(server.met)
        assert backend.usage["tries"] == sum(server.asked.values()) and backend.usage["requests"] == 500


def test_a_server_that_never_answers_is_given_up():
    with Server(rate=1.0, faults=("500",)) as server:
        rows = client(server, tries=3).generate(["a", "b"], GREEDY)
        assert [row[0].finish_reason for row in rows] == ["error", "error"] and server.asked == {"a": 3, "b": 3}
        assert "the last: HTTP 500" in rows[0][0].error
    with Server(rate=1.0, faults=("hang",), hang=5) as server:
        began = time.monotonic()
        (row,) = client(server, tries=50, deadline=0.7, timeout=0.3).generate(["a"], GREEDY)
        assert time.monotonic() - began < 10 and "no reply within" in row[0].error
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    (row,) = backends.open(
        {"backend": "openai", "model": "m", "base_url": url, "dialect": "openai", "tries": 2} | FAST
    ).generate(["a"], GREEDY)
    assert "the connection failed" in row[0].error


def test_a_rate_limit_holds_everyone_back():
    with Server() as server:
        server.first_status = [429] * 3
        began = time.monotonic()
        rows = client(server, concurrency=3, tries=9).generate(["a", "b", "c"], GREEDY)
        assert not any(row[0].error for row in rows) and time.monotonic() - began >= 0.05
        assert sum(server.asked.values()) == 6


@pytest.mark.parametrize(("status", "tries"), [(408, 2), (409, 2), (429, 2), (500, 2), (502, 2), (400, 1), (422, 1)])
def test_which_refusals_are_tried_again(status, tries):
    with Server() as server:
        server.first_status = [status]
        (row,) = client(server).generate(["a"], GREEDY)
        assert server.asked["a"] == tries
        assert row[0].text == ("answer to a" if tries == 2 else "") and (row[0].error or "").startswith("HTTP" * (tries == 1))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_no_request_can_mend_ends_all(status):
    with Server() as server:
        server.first_status = [status] * 99
        with pytest.raises(ConfigError, match=rf"m at http://127.*HTTP {status}.*bad key \*\*\*, no"):
            client(server, concurrency=4).generate(["a"] * 40, GREEDY)
        assert sum(server.asked.values()) <= 4


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch, capsys):
    secret = "xx-" + "s3cr3t" * 4
    monkeypatch.setenv("MY_KEY", secret)
    with Server(reply=lambda body: "fine") as server:
        backend = client(server, api_key_env="MY_KEY", tries=2)
        server.first_status = [400]
        rows = backend.generate(["a", "b"], GREEDY)
        assert server.headers[0]["authorization"] == f"Bearer {secret}"
        assert secret not in repr(rows) + repr(capsys.readouterr()) + repr(backend.totals())
        assert backend._safe(ValueError(f"you sent {secret}!")) == "you sent ***!"
    for spec, message in (({"api_key": secret}, "allowed is api_key_env"),
                          ({"base_url": f"http://me:{secret}@127.0.0.1/v1"}, "keys come from the environment alone")):
        with pytest.raises(ConfigError, match=message) as caught:
            backends.open({"backend": "openai", "model": "m"} | spec)
        assert secret not in str(caught.value)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        backends.open("openai:gpt-4")


def test_what_is_sent():
    with Server() as server:
        params = SamplingParams(temperature=0.7, top_p=0.9, n=2, stop=("END",), seed=1, max_new_tokens=9, presence_penalty=0.5)
        client(server).generate([(Message("system", "s"), Message("user", "u"))], params)
        client(server, dialect="vllm").generate(
            ["t"], SamplingParams(top_k=5, min_p=0.1, repetition_penalty=1.2, min_new_tokens=2)
        )
        client(server, dialect="transformers").generate(["t"], SamplingParams(temperature=0.5, top_k=5))
        client(server, api="chat").generate(["t"], GREEDY)
        chat, vllm, transformers, text = server.bodies
        assert chat["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
        sent = {"temperature": 0.7, "top_p": 0.9, "n": 2, "stop": ["END"], "max_tokens": 9, "presence_penalty": 0.5}
        assert sent.items() <= chat.items() and isinstance(chat["seed"], int)
        assert {"prompt": "t", "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.2, "min_tokens": 2, "temperature": 1.0,
                "top_p": 1.0, "max_tokens": 256}.items() <= vllm.items() and "seed" not in vllm
        config = json.loads(transformers["generation_config"])
        assert {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 1.0, "min_p": 0.0}.items() <= config.items()
        assert "top_k" not in transformers and text["messages"] == [{"role": "user", "content": "t"}]


def test_a_format_makes_text_of_messages():
    with Server() as server:
        backend = client(server, format="vicuna")
        backend.generate([(Message("system", "s"), Message("user", "u"))], GREEDY)
        assert server.bodies[0]["prompt"] == "s USER: u ASSISTANT:"


def test_what_a_server_ignores_is_found_out(capsys):
    """Fewer texts than asked for, a text that is always the same, stop strings left in, too many tokens."""
    with Server(greedy=True, reply=lambda body: "always STOP here") as server:
        rows = client(server).generate(["a", "b"], SamplingParams(temperature=0, n=3, max_new_tokens=1, stop=("STOP",)))
        assert texts(rows) == [["always "] * 3] * 2 and all(c.finish_reason == "stop" for row in rows for c in row)
        warned = capsys.readouterr().err
        assert (
            "n is 3, but 1 came back" in warned
            and warned.count("n is") == 1
            and "max_new_tokens is 1, but the server wrote 3" in warned
        )
        with pytest.raises(ConfigError, match=r"temperature is 1\.0, but this server writes the same text at temperature 2"):
            client(server, probe=True).generate(["a"], SamplingParams())
        before = len(server.bodies)
        client(server, probe=True, unsupported="warn").generate(["a"], SamplingParams())
        assert "it ignores it; it goes on without it" in capsys.readouterr().err and len(server.bodies) == before + 5
        before = len(server.bodies)
        client(server, probe=True).generate(["a"], GREEDY)
        assert len(server.bodies) == before + 1  # greedy needs no probe
    with Server(reply=lambda body: f"{time.monotonic_ns()}") as server:
        client(server, probe=True).generate(["a"], SamplingParams(seed=3))
        assert "seed is ignored by this server" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"min_p": 0.1}, {"beams": 2}, {"repetition_penalty": 1.1}, {"min_new_tokens": 1}]
)
def test_what_a_server_does_not_know_is_an_error_before_the_first_request(options, capsys):
    with Server() as server:
        with pytest.raises(ConfigError, match=f"m: {next(iter(options))} is .*which this backend doesn't honour"):
            client(server).generate(["a"], SamplingParams(**options))
        assert not server.bodies
        assert client(server, unsupported="warn").generate(["a"], SamplingParams(**options))[0][0].text == "answer to a"
        assert f"warning: m: {next(iter(options))} is" in capsys.readouterr().err


def test_usage_and_cost():
    with Server() as server:
        backend = client(server, prices=[1.0, 2.0])
        backend.generate(["a"] * 4, GREEDY)
        assert backend.usage == {"requests": 4, "tries": 4, "prompt_tokens": 40, "completion_tokens": 12}
        assert backend.cost == pytest.approx((40 + 24) / 1e6)
        assert backend.totals() == "4 requests, 4 tries, 40 prompt and 12 completion tokens, $0.0001"


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [
        ("3", 3, 3),
        ("0.5", 0.5, 0.5),
        ("-1", 0, 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0, 0),
        (formatdate(2**32, usegmt=True), 1e9, 2**32),
    ],
)
def test_how_long_a_server_asks_to_wait(value, low, high):
    assert low <= _retry_after({"retry-after": value}) <= high


@pytest.mark.parametrize(
    "headers", [{}, {"retry-after": "soon"}, {"retry-after": "inf"}, {"retry-after": "nan"}, {"retry-after": ""}]
)
def test_no_usable_word_on_waiting(headers):
    assert _retry_after(headers) is None


def test_a_long_wait_ends_by_the_deadline(capsys):
    with Server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Handler, "answer", lambda self, body, fault: self.send(429, b"{}", Retry_After="86400"))
        began = time.monotonic()
        rows = client(server, deadline=0.5, concurrency=2).generate(["a", "b", "c"], GREEDY)
    assert time.monotonic() - began < 5 and len(server.bodies) <= 2
    assert "HTTP 429" in rows[0][0].error and "the last: none, the server asked all to wait" in rows[2][0].error
    assert capsys.readouterr().err.count("Retry-After is 86400 s: no request for 120 s") == 1


def test_inside_a_running_loop():
    import asyncio

    async def notebook():
        with Server() as server:
            return client(server).generate(["a"], GREEDY)

    assert texts(asyncio.run(notebook())) == [["answer to a"]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url is '127.0.0.1:8000', allowed is an address"),
        ({"base_url": "ftp://x/v1"}, "base_url is 'ftp://x/v1'"),
        ({"dialect": "vlm"}, "no dialect 'vlm', did you mean 'vllm'"),
        ({"api": "chats"}, "api is 'chats'"),
        ({"tries": 0}, "tries is 0"),
        ({"prices": [1]}, "prices is"),
        ({"prices": 3}, "prices is 3"),
        ({"tries": "x"}, "tries is 'x', allowed is a whole number >= 1"),
        ({"timeout": 0}, "timeout is 0"),
        ({"probe": 1}, "probe is 1"),
        ({"concurrency": 0.5}, "concurrency is 0.5"),
        ({"concurrency": True}, "concurrency is True"),
        ({"name": 3}, "name is 3"),
        ({"model": ""}, "needs a model"),
        ({"conncurrency": 3}, "no option 'conncurrency', did you mean 'concurrency'"),
        ({"backend": "opnai"}, "did you mean 'openai'"),
        ({"format": "vicunna"}, "no format 'vicunna', did you mean 'vicuna'"),
        ({"unsupported": "no"}, "unsupported is 'no'"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        backends.open({"backend": "openai", "model": "m", "base_url": "http://127.0.0.1:1/v1"} | spec)


# -- a server that nobody here wrote --------------------------------------------------------------------------------


@contextmanager
def transformers_serve(folder: str, home: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "hub").mkdir(parents=True)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        folder,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--device",
        "cpu",
    ]
    with open(home / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except OSError:
                    assert process.poll() is None, (home / "log").read_text()[-2000:]
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(20)


@pytest.mark.slow
def test_the_same_greedy_text_from_transformers_own_server(tmp_path, capsys):
    """Native, transformers in process, and `transformers serve`: text by text, with stop strings, and streamed."""
    folder = make_folder(tmp_path / "tiny")
    native, local = backends.open(folder), backends.open(f"transformers:{folder}")
    with transformers_serve(folder, tmp_path / "home") as url:
        remote = backends.open({"backend": "openai", "model": folder, "base_url": url, "concurrency": 4})
        params = SamplingParams(temperature=0, max_new_tokens=24)
        prompts = PROMPTS[1:] + CHATS
        ours = texts(native.generate(prompts, params))
        assert ours == texts(local.generate(prompts, params)) == texts(remote.generate(prompts, params))
        assert remote.dialect == "transformers" and len({t for (t,) in ours}) == len(prompts)
        stops = SamplingParams(temperature=0, max_new_tokens=24, stop=tuple({t[3:6] for (t,) in ours if len(t) > 8}))
        cut = texts(native.generate(prompts, stops))
        assert cut != ours and cut == texts(local.generate(prompts, stops)) == texts(remote.generate(prompts, stops))
        for prompt in (PROMPTS[2], CHATS[1]):
            assert "".join(remote.stream(prompt, params)) == native.generate([prompt], params)[0][0].text
        # through its dialect it draws; spoken to as if it were OpenAI's it would not, and that is found out
        drawn = texts(remote.generate(PROMPTS[1:3], SamplingParams(max_new_tokens=8, n=3, top_k=50, seed=1)))
        assert all(len(set(row)) > 1 for row in drawn)
        plain = backends.open({"backend": "openai", "model": folder, "base_url": url, "dialect": "openai"})
        with pytest.raises(ConfigError, match=r"temperature is 1\.0, but this server writes the same text"):
            plain.generate(["a"], SamplingParams())
        capsys.readouterr()
        assert len(texts(plain.generate(["a"], SamplingParams(temperature=0, n=2, max_new_tokens=4)))[0]) == 2
        assert "n is 2, but 1 came back" in capsys.readouterr().err
        with pytest.raises(ConfigError, match="top_k is 3, which this backend doesn't honour"):
            plain.generate(["a"], SamplingParams(top_k=3))
