"""`xalign score --serve`: a scorer behind OpenRLHF's POST /get_reward (its serve_rm and remote_rm_utils).

    {"query": [texts], "prompts"?, "labels"?}  ->  {"rewards": [...], "scores": [...], "extra_logs": {"dummy_scores": [...]}}

A query is the whole text, special tokens written out. Besides: {"prompts": [texts or message lists], "responses":
[texts]}, which are rendered here. Requests that wait are scored together, in one thread; the queue is bounded. Every
refusal says why: 400 a bad request, 408 a body that doesn't come, 413 too large, 503 the queue is full (try again),
500 our own failure.
"""

import asyncio
import contextlib
import json
import math
import signal
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from xalign.data.records import Text
from xalign.data.replies import as_text, reply_text
from xalign.errors import ConfigError, DataError, XalignError
from xalign.scoring import TextScorer

HELD = 4  # of the largest requests so much may be in memory at once
Row = tuple[bool, Text, str | None]  # whether it is whole: a text and what it begins with; or a prompt and its response


class Full(Exception):
    """The queue has no room for a request now."""


@dataclass
class ServeLimits:
    """What the server holds and waits for at most: texts that run together and that wait, bytes of a body, and seconds of a
    body, of a request's head, and of a connection between two requests."""

    batch_size: int = 64
    queue_size: int = 16384
    max_bytes: int = 64 * 2**20
    body_seconds: float = 60.0
    append_eos: bool = False


class Batcher:
    """Scores the rows of concurrent requests together: one thread, first come first served, `queue_size` rows at most wait."""

    def __init__(self, scorer: TextScorer, limits: ServeLimits):
        self.scorer, self.limits = scorer, limits
        self.waiting: deque[tuple[list[Row], asyncio.Future[list[float]]]] = deque()
        self.rows = 0  # that wait or are being scored
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1)

    async def ask(self, rows: list[Row]) -> list[float]:
        """The scores of a request's rows. Raises `Full`, or `DataError` for rows that can't be scored."""
        if self.rows + len(rows) > self.limits.queue_size:
            raise Full
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        self.waiting.append((rows, future))
        self.rows += len(rows)
        self._arrived.set()
        try:
            return await future
        finally:
            self.rows -= len(rows)

    async def run(self) -> None:
        """Score what arrives, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch: list[tuple[list[Row], asyncio.Future[list[float]]]] = []
            size = 0
            while self.waiting and (not batch or size + len(self.waiting[0][0]) <= self.limits.batch_size):
                job = self.waiting.popleft()
                if not job[1].done():  # else whoever asked has gone
                    batch.append(job)
                    size += len(job[0])
            if not self.waiting:
                self._arrived.clear()
            results = await loop.run_in_executor(self._thread, self._scores, [rows for rows, _ in batch])
            for (_, future), found in zip(batch, results, strict=True):
                if not future.done():
                    future.set_exception(found) if isinstance(found, Exception) else future.set_result(found)

    def _scores(self, jobs: list[list[Row]]) -> list[list[float] | Exception]:
        """The scores of each request or what went wrong with it: all together, and where that fails each half by itself."""
        try:
            flat = iter(self._score([row for rows in jobs for row in rows]))
            return [[next(flat) for _ in rows] for rows in jobs]
        except Exception as error:  # goes to whoever asked; the server lives on
            half = len(jobs) // 2
            return [error] if not half else self._scores(jobs[:half]) + self._scores(jobs[half:])

    def _score(self, rows: list[Row]) -> list[float]:
        whole = [row[1:] for row in rows if row[0]]
        pairs = [row[1:] for row in rows if not row[0]]
        texts = iter(self.scorer.score_texts([str(text) for text, _ in whole], [prompt for _, prompt in whole],
                                             append_eos=self.limits.append_eos).tolist() if whole else [])
        replies = iter(self.scorer.score([p for p, _ in pairs], [r for _, r in pairs]).tolist() if pairs else [])
        found = [next(texts) if row[0] else next(replies) for row in rows]
        if not all(map(math.isfinite, found)):
            raise ArithmeticError("the model gave a score that is not finite")
        return found

    def close(self) -> None:
        """End the thread, and every request that still waits."""
        for _, future in self.waiting:
            future.cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)


def rows_of(body: bytes) -> list[Row]:
    """The rows of a request. Raises `DataError` for one of another form."""
    try:
        asked = json.loads(body)
    except RecursionError:
        raise DataError("the body is nested too deeply") from None
    except ValueError as error:
        raise DataError(f"the body is not JSON ({error})") from None
    if not isinstance(asked, dict):
        raise DataError(f"the body must be a JSON object, not {type(asked).__name__}")
    given = {name: _listed(asked, name) for name in ("query", "prompts", "responses") if asked.get(name) is not None}
    prompts, responses, query = given.get("prompts"), given.get("responses"), given.get("query")
    if len({len(entries) for entries in given.values()}) > 1:
        told = ", ".join(f"{name!r} has {len(entries)}" for name, entries in given.items())
        raise DataError(f"{told}: allowed are as many entries of each")
    if responses is not None:
        if prompts is None:
            raise DataError("'responses' without 'prompts', allowed are as many of both")
        return [(False, as_text(p, f"prompts[{i}]"), None if r is None else reply_text(r, f"responses[{i}]"))
                for i, (p, r) in enumerate(zip(prompts, responses, strict=True))]
    if query is None:
        others = f"no 'query', only {', '.join(map(repr, asked))[:80] or 'nothing'}"
        raise DataError(f"{'the query is null' if 'query' in asked else others}; "
                        "allowed: 'query', a list of texts, or 'prompts' and 'responses'")
    texts = [reply_text(text, f"query[{i}]", "query") for i, text in enumerate(query)]
    return [(True, text, prompt if isinstance(prompt, str) else None)  # which not every scorer looks at
            for text, prompt in zip(texts, prompts or [None] * len(texts), strict=True)]


def _listed(asked: dict[str, Any], name: str) -> list[Any]:
    value = [asked[name]] if name == "query" and isinstance(asked[name], str) else asked[name]
    if not isinstance(value, list) or not value:
        raise DataError(f"{name!r} must be a list of at least one entry, not {str(value)[:60]!r}")
    return value


def application(scorer: TextScorer, limits: ServeLimits) -> Any:
    """The ASGI application: POST /get_reward, and GET /health."""
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    batcher: Batcher | None = None
    held = 0  # bytes of all requests in progress

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        nonlocal batcher
        batcher = Batcher(scorer, limits)
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()
        batcher.close()

    async def received(request: Request, body: bytearray) -> Response | None:
        """Read the body into `body`; gives the refusal where it is too large, or doesn't come."""
        nonlocal held
        told = request.headers.get("content-length", "0")
        too_large = PlainTextResponse(f"the body is larger than {limits.max_bytes} bytes (--max-bytes)", 413)
        if told.isdigit() and int(told) > limits.max_bytes:
            return too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                async for part in request.stream():
                    body += part
                    held += len(part)
                    if len(body) > limits.max_bytes:
                        return too_large
                    if held > HELD * limits.max_bytes and held > len(body):
                        return PlainTextResponse("too much is being received at once, try again", 503, {"Retry-After": "1"})
        except TimeoutError:
            return PlainTextResponse(f"the body didn't come within {limits.body_seconds:g} seconds", 408)
        return None

    async def get_reward(request: Request) -> Response:
        nonlocal held
        body = bytearray()
        try:
            refusal = await received(request, body)
            if refusal is None:
                return await answer(bytes(body))
            refusal.headers["Connection"] = "close"  # the rest of the body is not waited for
            return refusal
        except ClientDisconnect:
            return Response(status_code=400)  # there is nobody to read it
        finally:
            held -= len(body)

    async def answer(body: bytes) -> Response:
        assert batcher is not None
        try:
            rows = rows_of(body)
            if len(rows) > limits.queue_size:
                return PlainTextResponse(f"{len(rows)} texts in a request, allowed are {limits.queue_size} (--queue-size)", 413)
            scores = await batcher.ask(rows)
        except Full:
            return PlainTextResponse(f"the queue is full ({limits.queue_size} texts), try again", 503, {"Retry-After": "1"})
        except XalignError as error:
            return PlainTextResponse(" ".join(str(error).split()), 400)
        except Exception as error:
            print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return PlainTextResponse(f"scoring failed ({type(error).__name__})", 500)
        return JSONResponse({"rewards": scores, "scores": scores, "extra_logs": {"dummy_scores": scores}})

    async def health(request: Request) -> Response:
        assert batcher is not None
        return JSONResponse({"status": "ok", "waiting": batcher.rows, "queue_size": limits.queue_size})

    return Starlette(routes=[Route("/get_reward", get_reward, methods=["POST"]), Route("/health", health)], lifespan=lifespan)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one. Raises `ConfigError` where the address can't be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(f"--host {host} --port {port}: can't listen there ({error.strerror or error})") from None


def serve(scorer: TextScorer, listening: socket.socket, limits: ServeLimits) -> None:
    """Serve until SIGINT or SIGTERM; requests in progress get their replies (10 seconds at most are waited for)."""
    try:
        import uvicorn
    except ImportError:
        raise ConfigError("--serve needs starlette and uvicorn: pip install 'xalign[serve]'") from None

    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        """uvicorn's own, which would wait for ever for the end of a request's head, and for a reply to be read."""

        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.await_request(None)

        def on_response_complete(self) -> None:
            before = self.cycle
            super().on_response_complete()  # which may begin the next request, if that is here already
            self.await_request(before)

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            if self.timer is not None:
                self.timer.cancel()

        def await_request(self, before: Any) -> None:
            """End the connection unless a new request's head is whole in time (its body has a limit of its own)."""
            if self.timer is not None:
                self.timer.cancel()
            self.timer = self.loop.call_later(limits.body_seconds, lambda: self.cycle is before and self.transport.abort())

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Ours end the server and nothing else: uvicorn would raise them again, and the exit status would be a kill's."""
            before = {kind: signal.signal(kind, self.handle_exit) for kind in (signal.SIGINT, signal.SIGTERM)}
            try:
                yield
            finally:
                for kind, handler in before.items():
                    signal.signal(kind, handler)

    config = uvicorn.Config(application(scorer, limits), log_level="warning", access_log=False, lifespan="on",
                            timeout_graceful_shutdown=10, server_header=False, http=Protocol)
    host, port = listening.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}/get_reward"
    print(f"scoring on {address} (Ctrl-C ends it)", file=sys.stderr, flush=True)
    Server(config).run(sockets=[listening])
    print("stopped", file=sys.stderr, flush=True)

