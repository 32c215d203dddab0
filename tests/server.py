"""A local server with OpenAI's interface that can be told to misbehave."""

import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("500", "429", "hang", "half", "json", "reset", "empty", "null", "drop")


class Server(ThreadingHTTPServer):
    """Answers by `reply(body) -> text`; a share `rate` of the requests for a completion meets one of `FAULTS` instead.

    If it `streams`, the text comes by words where that is asked for; a reply may also be the list of its pieces, in which None
    breaks the connection, and a function is called.
    """

    daemon_threads, request_queue_size = True, 128

    def __init__(self, reply=None, rate: float = 0.0, faults=FAULTS, hang: float = 1.5, seed: int = 0, greedy: bool = False,
                 port: int = 0, streams: bool = False, finish: str = "stop"):
        super().__init__(("127.0.0.1", port), Handler)
        self.reply = reply or (lambda body: f"answer to {prompt_of(body)}")
        self.rate, self.faults, self.hang, self.greedy, self.rng = rate, faults, hang, greedy, random.Random(seed)
        self.streams, self.finish = streams, finish
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.asked, self.met, self.lock = Counter(), Counter(), threading.Lock()
        self.under_way, self.most = 0, 0
        self.first_status: list[int] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that has gone is what we wanted."""


def prompt_of(body: dict) -> str:
    return body["prompt"] if "prompt" in body else body["messages"][-1]["content"]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def send(self, status: int, data: bytes, **headers):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.send(
            200,
            json.dumps({"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "test", "created": 0}]}).encode(),
        )

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.headers.append({k.lower(): v for k, v in self.headers.items()})
            server.asked[prompt_of(body)] += 1
            server.under_way += 1
            server.most = max(server.most, server.under_way)
            fault = server.rng.choice(server.faults) if server.rng.random() < server.rate else None
            fault = str(server.first_status.pop(0)) if server.first_status else fault
            server.met[fault] += 1
        try:
            self.answer(body, fault)
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, body, fault):
        server = self.server
        if fault in ("429", "503"):
            return self.send(int(fault), b'{"error": {"message": "slow down"}}', Retry_After="0.05")
        if fault is not None and fault.isdigit():
            return self.send(int(fault), b'{"error": {"message": "bad key sk-abcdefghijkl, no"}}')
        if fault == "hang":
            time.sleep(server.hang)
        if fault == "json":
            return self.send(200, b"<html>oops</html>")
        if fault == "empty":
            return self.send(200, b'{"choices": []}')
        if fault == "null":
            return self.send(200, b'{"choices": [{"message": {"content": null}, "text": null}]}')
        if fault in ("reset", "drop"):
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        text, chat = server.reply(body), "messages" in body
        if server.streams and body.get("stream"):
            return self.stream(body, text if isinstance(text, list) else re.findall(r"\S+\s*", text), chat)
        texts = [text] * (1 if server.greedy else body.get("n", 1))
        choices = [
            {"index": i, "finish_reason": server.finish,
             **({"message": {"role": "assistant", "content": t}} if chat else {"text": t})}
            for i, t in enumerate(texts)
        ]
        usage = {"prompt_tokens": 10, "completion_tokens": 3 * len(texts), "total_tokens": 10 + 3 * len(texts)}
        data = json.dumps(
            {"id": "x", "object": "y", "created": 0, "model": body["model"], "choices": choices, "usage": usage}
        ).encode()
        if fault == "half":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        self.send(200, data)

    def stream(self, body, pieces, chat):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

        def chunk(data: bytes):
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))

        head = {"id": "x", "object": "y", "created": 0, "model": body["model"]}
        for piece in [{"role": "assistant"}, *pieces, {}]:
            if piece is None:
                self.close_connection = True
                return self.connection.close()
            if callable(piece):
                piece()
                continue
            delta = piece if isinstance(piece, dict) else {"content": piece}
            choice = {"index": 0, "finish_reason": self.server.finish if piece == {} else None,
                      **({"delta": delta} if chat else {"text": delta.get("content", "")})}
            chunk(b"data: " + json.dumps(head | {"choices": [choice]}).encode() + b"\n\n")
        chunk(b"data: [DONE]\n\n")
        chunk(b"")
