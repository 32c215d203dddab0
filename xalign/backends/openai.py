"""Any OpenAI-compatible server, through the official client: many requests at once, each with bounded tries.

Servers differ in what they take and in what they quietly ignore. A *dialect* (`dialects`) says where each parameter goes, and
what comes back is checked: the number of texts, their length, stop strings (cut here in any case), and, by a probe before the
first request, whether temperature and seed do anything. The key comes from an environment variable and is never shown.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from tqdm import tqdm

from xalign.backends.base import Backend, Completion, Done, SamplingParams, failure
from xalign.backends.dialects import ALWAYS, DIALECTS, NAMED, request
from xalign.backends.text import cut
from xalign.data.records import Text
from xalign.errors import ConfigError, DataError, nearest
from xalign.stopping import StopStrings

T = TypeVar("T")
API = "https://api.openai.com/v1"
LOCAL = ("localhost", "127.0.0.1", "::1")
AGAIN = (408, 409, 429)  # and all from 500 on: the same request may succeed later
HOPELESS = (401, 403, 404)  # no request of this run can succeed: a wrong key, model or address
RETRY_AFTER_LIMIT = 120.0  # seconds that a server may make us wait
TELL = 10.0  # seconds of waiting that are told
PROBE, PROBES, PROBE_TOKENS = "Write one random word.", 4, 8


class TryAgain(Exception):
    """A try failed in a way that another may not; `after` is what the server asked to wait, in seconds."""

    def __init__(self, why: str, after: float | None = None):
        super().__init__(why)
        self.after = after


class GiveUp(Exception):
    """A request that no further try can help."""


class OpenAIBackend(Backend):
    """A model behind a server. At most `concurrency` requests are under way; a try takes `timeout` seconds at most, a request
    with its `tries` `deadline`. `prices` are dollars for a million tokens of prompts and of answers.

    `api`: "chat" takes messages (a text is sent as a user's), "completions" takes text. `usage` counts requests, tries and
    tokens.
    """

    def __init__(self, model: str, *, base_url: str | None = None, api: Literal["auto", "chat", "completions"] = "auto",
                 dialect: str = "auto", api_key_env: str = "OPENAI_API_KEY", concurrency: int = 16, tries: int = 8,
                 timeout: float = 120.0, deadline: float = 600.0, backoff: float = 0.5, max_backoff: float = 30.0,
                 prices: Sequence[float] | None = None, probe: bool = True, name: str | None = None):
        try:
            import openai
        except ImportError:
            raise ConfigError("the backend openai needs its client: pip install 'xalign[openai]'") from None
        self.library, self.model, self.name = openai, model, name or model
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or API).rstrip("/")
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"base_url is {self.base_url!r}, allowed is an address such as http://127.0.0.1:8000/v1")
        if parts.username or parts.password or parts.query:
            raise ConfigError("base_url holds a name, password or query; keys come from the environment alone (api_key_env)")
        if dialect not in ("auto", *DIALECTS):
            raise ConfigError(f"no dialect {dialect!r}{nearest(dialect, DIALECTS)}; allowed are auto, {', '.join(DIALECTS)}")
        if api not in ("auto", "chat", "completions"):
            raise ConfigError(f"api is {api!r}, allowed are auto, chat, completions")
        for option, value in (("timeout", timeout), ("deadline", deadline), ("backoff", backoff), ("max_backoff", max_backoff)):
            if not 0 < value < 1e9:
                raise ConfigError(f"{option} is {value!r}, allowed is a number > 0")
        if prices is not None and not (isinstance(prices, list | tuple) and len(prices) == 2
                                       and all(isinstance(p, int | float) and 0 <= p < 1e9 for p in prices)):
            raise ConfigError(f"prices is {prices!r}, allowed are two numbers: dollars a million tokens of prompts, of answers")
        self.local = parts.hostname in LOCAL
        self._key = os.environ.get(api_key_env, "")
        if not self._key and self.base_url == API:
            raise ConfigError(f"{api_key_env} is not set, allowed is the key in that environment variable")
        self.api, self.concurrency, self.tries, self.timeout = api, concurrency, tries, float(timeout)
        self.deadline, self.backoff, self.max_backoff, self.prices = float(deadline), backoff, max_backoff, prices
        self.dialect: str | None = None if dialect == "auto" else dialect
        possible = DIALECTS.values() if self.dialect is None else [DIALECTS[self.dialect]]
        self.supports = ALWAYS.union(*(d.fields for d in possible))
        self.probe, self._probed, self._pause, self._single = probe, set[str](), 0.0, False
        self.usage: Counter[str] = Counter()
        self._told: set[str] = set()

    # -- what goes out, and what comes back -------------------------------------------------------------------------

    def request(self, prompt: Text, params: SamplingParams, seed: int | None, n: int) -> tuple[str, dict[str, Any]]:
        """The endpoint ("chat" or "completions") and the body of a request."""
        assert self.dialect is not None
        return request(self.model, DIALECTS[self.dialect], prompt, params, seed, n, api=self.api, template=self.template,
                       official=self.base_url == API)

    async def _send(self, client: Any, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        """One try: the reply's object. Raises `TryAgain` or `GiveUp`."""
        self.usage["tries"] += 1
        plain = {name: value for name, value in body.items() if name in NAMED}  # the client takes no others by name
        extra = {name: value for name, value in body.items() if name not in NAMED}
        endpoint = client.chat.completions if kind == "chat" else client.completions
        error, library = "", self.library
        try:
            raw = await endpoint.with_raw_response.create(**plain, extra_body=extra or None)
            reply = json.loads(raw.content)
        except library.APITimeoutError:
            raise TryAgain(f"no reply within {self.timeout:g} s") from None
        except library.APIConnectionError as broken:
            cause = broken.__cause__ or broken
            raise TryAgain(f"the connection failed ({self._safe(cause) or type(cause).__name__})") from None
        except library.APIStatusError as refused:
            error = f"HTTP {refused.status_code}: {self._safe(refused.response.text or refused.message)}"
            if refused.status_code in AGAIN or refused.status_code >= 500:
                raise TryAgain(error, _retry_after(refused.response.headers)) from None
            if refused.status_code in HOPELESS:
                raise ConfigError(f"{self.name} at {self.base_url}: {error}") from None
            raise GiveUp(error) from None
        except (ValueError, RecursionError, library.OpenAIError) as wrong:
            raise TryAgain(f"the reply is no JSON ({self._safe(wrong)})") from None
        if not isinstance(reply, dict):
            raise TryAgain("the reply is no JSON object")
        return reply

    async def _ask(self, client: Any, prompt: Text, params: SamplingParams, seed: int | None, n: int) -> list[Completion]:
        """The texts of one request, after as many tries as it takes and is allowed. Raises `GiveUp`."""
        kind, body = self.request(prompt, params, seed, n)
        began, wait, why = time.monotonic(), self.backoff, "none, the server asked all to wait"
        self.usage["requests"] += 1
        tried = 0
        while tried < self.tries and (left := self.deadline - (time.monotonic() - began)) > 0:
            if (pause := self._pause - time.monotonic()) > 0:  # a rate limit holds for all
                await asyncio.sleep(min(pause * random.uniform(1.0, 1.2), left))
                continue
            tried += 1
            try:
                async with asyncio.timeout(min(left, self.timeout)):
                    reply = await self._send(client, kind, body)
                return self._read(reply, kind, params, n, time.monotonic() - began)
            except TimeoutError:
                why, after = f"no reply within {min(left, self.timeout):.3g} s", None
            except TryAgain as error:
                why, after = str(error), error.after
            if after is not None:
                self._pause = max(self._pause, time.monotonic() + min(after, RETRY_AFTER_LIMIT))
                if after >= TELL:
                    self._warn("Retry-After", f"is {after:g} s: no request for {min(after, RETRY_AFTER_LIMIT):g} s")
            elif tried < self.tries:
                await asyncio.sleep(min(wait * random.uniform(0.5, 1.0), max(0.0, self.deadline - (time.monotonic() - began))))
                wait = min(2 * wait, self.max_backoff)
        raise GiveUp(f"given up after {tried} tries and {time.monotonic() - began:.1f} s; the last: {why}")

    def _read(self, reply: dict[str, Any], kind: str, params: SamplingParams, n: int, seconds: float) -> list[Completion]:
        choices = reply.get("choices")
        if not isinstance(choices, list) or not choices:
            raise TryAgain("the reply has no choices")
        made = []
        for choice in choices[:n]:
            message = choice.get("message") if isinstance(choice, dict) else None
            text = (message if isinstance(message, dict) else {}).get("content") if kind == "chat" else (
                choice.get("text") if isinstance(choice, dict) else None)
            if not isinstance(text, str):
                raise TryAgain("a choice of the reply has no text")
            text, ended = cut(text, params.stop, choice.get("finish_reason") not in ("length", None))
            made.append(Completion(text, (), "stop" if ended else "length", None, seconds, self.name))
        given = reply.get("usage")
        usage = given if isinstance(given, dict) else {}
        prompt_tokens, answer_tokens = (usage[key] if isinstance(usage.get(key), int) else 0
                                        for key in ("prompt_tokens", "completion_tokens"))
        self.usage.update(prompt_tokens=prompt_tokens, completion_tokens=answer_tokens)
        if answer_tokens > params.max_new_tokens * max(1, len(choices)) + 1:
            self._warn("max_new_tokens", f"is {params.max_new_tokens}, but the server wrote {answer_tokens} tokens")
        return made

    @property
    def cost(self) -> float | None:
        """Dollars so far, None without prices."""
        if self.prices is None:
            return None
        return (self.usage["prompt_tokens"] * self.prices[0] + self.usage["completion_tokens"] * self.prices[1]) / 1e6

    def totals(self) -> str:
        """Requests, tries and tokens so far, in words."""
        u, dollars = self.usage, "" if self.cost is None else f", ${self.cost:.4f}"
        return (
            f"{u['requests']:,} requests, {u['tries']:,} tries, {u['prompt_tokens']:,} prompt and {u['completion_tokens']:,} "
            f"completion tokens{dollars}"
        )

    def _warn(self, name: str, what: str) -> None:
        if name not in self._told:
            self._told.add(name)
            print(f"warning: {self.name}: {name} {what}", file=sys.stderr)

    def _safe(self, error: object) -> str:
        """An error's text in one line, without our key, and without anything else that looks like one."""
        text = " ".join(str(error).split())
        if self._key:
            text = text.replace(self._key, "***")
        return re.sub(r"\b(sk|hf|key)[-_][\w-]{8,}", "***", text)[:300]

    # -- who the server is ------------------------------------------------------------------------------------------

    async def _meet(self, client: Any, params: SamplingParams, seeded: bool) -> SamplingParams:
        """Find out the dialect, and what the server quietly ignores; params without what can't be honoured."""
        if self.dialect is None:
            self.dialect = "openai" if self.base_url == API else await self._dialect(client)
        self.supports = ALWAYS.union(DIALECTS[self.dialect].fields)
        params = self.checked(params)
        if self.probe and params.temperature > 0 and "temperature" not in self._probed:
            self._probed.add("temperature")
            hot = SamplingParams(temperature=2.0, max_new_tokens=PROBE_TOKENS)
            texts = await self._probe(client, hot, range(1, 1 + PROBES))
            if len(set(texts)) == 1:
                self.refuse("temperature", f"is {params.temperature}, but this server writes the same text at temperature 2 "
                            f"{PROBES} times: it ignores it")
        if seeded and DIALECTS[self.dialect].in_config and self.concurrency > 1 and params.temperature > 0:
            self._warn(
                "seed", "is set by this server when a request comes, not when it runs: draws repeat with concurrency 1 alone"
            )
        if self.probe and seeded and params.temperature > 0 and "seed" not in self._probed:
            self._probed.add("seed")
            if len(set(await self._probe(client, SamplingParams(temperature=2.0, max_new_tokens=PROBE_TOKENS), [7, 7]))) == 2:
                self._warn("seed", "is ignored by this server: its texts can't be drawn again")
        return params

    async def _probe(self, client: Any, params: SamplingParams, seeds: Sequence[int]) -> list[str]:
        """Texts for these seeds. Raises `ConfigError` where the server doesn't even answer this."""
        try:
            return [(await self._ask(client, PROBE, params, seed, 1))[0].text for seed in seeds]
        except GiveUp as error:
            raise ConfigError(f"{self.name} at {self.base_url}: {error}") from None

    async def _dialect(self, client: Any) -> str:
        """Told by what a server says of its models, and by whether it takes a field that nobody knows, as only one refuses."""
        owners: set[str] = set()
        with contextlib.suppress(self.library.OpenAIError, ValueError, AttributeError, TimeoutError):
            async with asyncio.timeout(self.timeout):
                owners = {str(m.owned_by) for m in (await client.models.list()).data}
        for name in ("vllm", "llamacpp"):
            if name in owners:
                return name
        with contextlib.suppress(TryAgain, TimeoutError, ConfigError):
            try:
                async with asyncio.timeout(self.timeout):
                    await self._send(
                        client, "completions", {"model": self.model, "prompt": "a", "max_tokens": 1, "xalign_probe": 1}
                    )
            except GiveUp as error:
                return "transformers" if "Unexpected fields" in str(error) else "openai"
        return "openai"

    # -- running ----------------------------------------------------------------------------------------------------

    def _client(self, kind: Any) -> Any:
        """The official client; its own tries are off, ours also know broken replies and hold all requests back on a limit."""
        transport = {}
        if self.local:  # a proxy of the environment is not for this machine
            plain = "DefaultAsyncHttpxClient" if kind is self.library.AsyncOpenAI else "DefaultHttpxClient"
            transport["http_client"] = getattr(self.library, plain)(trust_env=False, timeout=self.timeout)
        return kind(api_key=self._key or "none", base_url=self.base_url, max_retries=0, timeout=self.timeout, **transport)

    def generate(self, prompts: Sequence[Text], params: SamplingParams, progress: str = "", *,
                 seeds: Sequence[int] | None = None, done: Done | None = None) -> list[list[Completion]]:
        """See `Backend.generate`."""
        params = self.checked(params)
        results: list[list[Completion]] = [[] for _ in prompts]
        _run(self._generate(prompts, params, progress, seeds, done, results))
        return results

    async def _generate(self, prompts: Sequence[Text], params: SamplingParams, progress: str, seeds: Sequence[int] | None,
                        done: Done | None, results: list[list[Completion]]) -> None:
        if seeds is None and params.seed is not None:
            rng = random.Random(params.seed)
            seeds = [rng.getrandbits(31) for _ in prompts]
        async with self._client(self.library.AsyncOpenAI) as client:
            params = await self._meet(client, params, seeds is not None)
            waiting = iter(range(len(prompts)))

            async def work() -> None:
                for i in waiting:
                    results[i] = await self._complete(client, prompts[i], params, None if seeds is None else seeds[i])
                    bar.update()
                    if done is not None:
                        done(i, results[i])

            with tqdm(total=len(prompts), desc=progress, unit="prompt", disable=not progress, mininterval=1) as bar:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self.concurrency, len(prompts))):
                        group.create_task(work())

    async def _complete(self, client: Any, prompt: Text, params: SamplingParams, seed: int | None) -> list[Completion]:
        """`params.n` texts: by one request where the server knows n, else by one each. What fails has an error in its place."""
        assert self.dialect is not None
        made: list[Completion] = []
        began = time.monotonic()
        try:
            while len(made) < params.n:
                n = params.n - len(made) if DIALECTS[self.dialect].n and not self._single else 1
                own = None if seed is None else (seed + 1_000_003 * len(made)) % 2**31
                texts = await self._ask(client, prompt, params, own, n)
                if len(texts) < n:
                    self._single = True
                    self._warn("n", f"is {n}, but {len(texts)} came back: each text gets a request of its own")
                made += texts
        except (GiveUp, DataError) as error:
            made += [failure(str(error), self.name, time.monotonic() - began)] * (params.n - len(made))
        return made

    def stream(self, prompt: Text, params: SamplingParams) -> Iterator[str]:
        """See `Backend.stream`; a server that doesn't stream gives the whole text in one piece. A connection that breaks is not
        tried again, as part of the text has been shown.
        """
        from httpx import HTTPError, StreamError  # the client's own transport, whose errors a stream lets through

        self.ended, params = True, _run(self._met(params))
        kind, body = self.request(prompt, params, None if params.seed is None else params.seed % 2**31, 1)
        extra = {name: body.pop(name) for name in list(body) if name not in NAMED}
        cutter = StopStrings(params.stop)
        with self._client(self.library.OpenAI) as client:
            endpoint = client.chat.completions if kind == "chat" else client.completions
            try:
                answer = endpoint.with_raw_response.create(**body, extra_body=extra or None, stream=True)
                if "json" in answer.headers.get("content-type", ""):
                    reply = json.loads(answer.http_response.read())
                    (whole,) = self._read(reply if isinstance(reply, dict) else {}, kind, params, 1, 0.0)
                    self.ended = whole.finish_reason == "stop"
                    yield whole.text
                    return
                for chunk in answer.parse():
                    for choice in (getattr(chunk, "choices", None) or [])[:1]:
                        part = getattr(choice, "delta", None) if kind == "chat" else choice
                        yield cutter.push(getattr(part, "content" if kind == "chat" else "text", None) or "")
                        self.ended = self.ended and getattr(choice, "finish_reason", None) != "length"
                    if cutter.stopped is not None:
                        self.ended = True
                        return
            except (self.library.OpenAIError, HTTPError, StreamError, ValueError, TryAgain) as error:
                raise DataError(f"{self.name} at {self.base_url}: {self._safe(error)}") from None
            yield cutter.flush()

    async def _met(self, params: SamplingParams) -> SamplingParams:
        async with self._client(self.library.AsyncOpenAI) as client:
            return await self._meet(client, params, params.seed is not None)


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, by a number or a date; None where it doesn't, or can't be understood."""
    value = headers.get("retry-after")
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end, also where a loop runs already (a notebook's): then in a thread with a loop of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _unwrapped(work)
    found: list[T | BaseException] = []

    def inside() -> None:
        try:
            found.append(_unwrapped(work))
        except BaseException as error:  # raised below, in the caller's thread
            found.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _unwrapped(work: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, with the first error of a group of tasks in the group's place."""
    try:
        return asyncio.run(work)
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
