"""A real HTTP server for rewards to ask: it does what a test tells it, and keeps what it was asked."""

from __future__ import annotations

import json
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Exchange(BaseHTTPRequestHandler):
    """One request, and its answer."""

    protocol_version = "HTTP/1.1"
    asked: Asked

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.asked.lock:
            self.asked.exchanges.append(self)
            number = len(self.asked.exchanges) - 1
        answers = self.asked.answers
        answers[min(number, len(answers) - 1)](self)

    @property
    def rows(self) -> dict[str, Any]:
        rows: dict[str, Any] = json.loads(self.body)
        return rows

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Nothing is printed."""


Answering = Callable[[Exchange], None]


@dataclass
class Asked:
    """A server under way. answers: what it does at each request; at more, as at the last."""

    answers: list[Answering]
    exchanges: list[Exchange] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0
    over: threading.Event = field(default_factory=threading.Event)

    def url(self, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/score"


@contextmanager
def serving(*answers: Answering, tls: ssl.SSLContext | None = None) -> Iterator[Asked]:
    """Answers on a port of 127.0.0.1. What still waits for `over` when the test ends is let go."""
    asked = Asked(list(answers))
    handler = type("Handler", (Exchange,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    asked.port = server.server_address[1]
    server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield asked
    finally:
        asked.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


# What it does -------------------------------------------------------------------------------------------


def scores(value: object) -> Answering:
    """The same for every row."""
    return lambda exchange: exchange.answer(
        json.dumps({"scores": [value] * len(exchange.rows["responses"])}).encode()
    )


def lengths(exchange: Exchange) -> None:
    """Of each response's text."""
    exchange.answer(json.dumps({"scores": [len(text) for text in exchange.rows["responses"]]}).encode())


def status(code: int, **headers: str) -> Answering:
    return lambda exchange: exchange.answer(b"{}", code, **headers)


def raw(body: bytes) -> Answering:
    return lambda exchange: exchange.answer(body)
