"""Reward by a server of the operator's or the user's: rows go there as JSON, scores come back.

    POST url    {"prompts": […], "responses": […], "response_ids": […], "columns": […]}   one entry per row
    200         {"scores": […]}         one number per row, or one list per row: one number per response token

Requests are signed by the scheme of Standard Webhooks 1.0 (https://www.standardwebhooks.com), where there is
a key. The name in the URL is looked up at each connection, what it stands for is checked, and the connection
goes to just that address; no redirect and no proxy leads elsewhere. Asking again is the `Scorer`'s part.
Knows no spec and no torch.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
import uuid
from binascii import Error as Base64Error
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from socket import SOCK_STREAM
from typing import Any
from urllib.parse import SplitResult, urlsplit

import anyio
import httpcore2
from anyio.from_thread import start_blocking_portal

from ppo_engine.addresses import NO_SERVERS, Address, address_of, standing
from ppo_engine.reward_kinds import HTTP_ALLOW_PRIVATE
from ppo_engine.rewards.contract import RewardBatch, RewardError, RewardValues

MAX_ANSWER_BYTES = 2**24
MIN_KEY_BYTES = 24

_KEY_PREFIX = "whsec_"
_COME_BACK = frozenset((408, 425, 429))
"""Client errors that say: later."""


def key_of(secret: str) -> bytes:
    """The key in a secret as Standard Webhooks writes it: base64, after `whsec_` or on its own.

    Raises:
        RewardError: it is none.
    """
    try:
        key = base64.b64decode(secret.strip().removeprefix(_KEY_PREFIX), validate=True)
    except (Base64Error, ValueError):
        key = b""
    if len(key) < MIN_KEY_BYTES:
        raise RewardError(
            f"the secret is no key: it needs the base64 of {MIN_KEY_BYTES} random bytes or more, as "
            f"`openssl rand -base64 32` makes; {_KEY_PREFIX} may stand before it."
        )
    return key


def signature(key: bytes, message_id: str, timestamp: int, body: bytes) -> str:
    """Of Standard Webhooks, version 1: HMAC-SHA256 over the id, the time in seconds, and the body."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


@dataclass(frozen=True)
class HttpReward:
    """Asks a server, for `batch_size` rows at a time, in up to `concurrency` requests at once.

    timeout: seconds for one request, from the look-up of the name to the last byte. key: requests are signed
    with it. allow_private: addresses that are not everybody's may be asked.

    Raises:
        RewardError: the URL's host is an address that may not be asked.
    """

    url: str
    batch_size: int = 64
    concurrency: int = 4
    timeout: float = 30.0
    key: bytes | None = None
    allow_private: bool = False

    def __post_init__(self) -> None:
        if (address := address_of(self._parts.hostname or "")) is not None:
            _check_address(address, self.shown_url, self.allow_private)

    @property
    def shown_url(self) -> str:
        """Without its query, which is nobody else's business."""
        return f"{self._parts.scheme}://{self._parts.netloc}{self._parts.path}"

    def __call__(self, batch: RewardBatch) -> RewardValues:
        # An event loop in a thread of its own: a notebook's is taken.
        with start_blocking_portal() as portal:
            return portal.call(self._scores, batch)

    @property
    def _parts(self) -> SplitResult:
        return urlsplit(self.url)

    async def _scores(self, batch: RewardBatch) -> RewardValues:
        parts = [
            batch.take(range(start, min(start + self.batch_size, len(batch))))
            for start in range(0, len(batch), self.batch_size)
        ]
        answers: dict[int, Sequence[Any]] = {}
        turn = anyio.Semaphore(self.concurrency)
        backend = _CheckedBackend(self.shown_url, self.allow_private)

        async def ask(index: int) -> None:
            async with turn:
                try:
                    answers[index] = await self._ask(pool, parts[index])
                except RewardError as error:
                    answers[index] = [error] * len(parts[index])

        async with (
            httpcore2.AsyncConnectionPool(network_backend=backend, max_connections=self.concurrency) as pool,
            anyio.create_task_group() as group,
        ):
            for index in range(len(parts)):
                group.start_soon(ask, index)
        return [value for index in range(len(parts)) for value in answers[index]]

    async def _ask(self, pool: httpcore2.AsyncConnectionPool, part: RewardBatch) -> Sequence[Any]:
        """One request. Raises RewardError."""
        body = _body(part)
        try:
            with anyio.fail_after(self.timeout):
                async with pool.stream(
                    "POST", self.url, headers=self._headers(body), content=body
                ) as response:
                    self._check_status(response.status, response.headers)
                    answer = await self._read(response)
        except (TimeoutError, httpcore2.TimeoutException):
            raise RewardError(f"{self.shown_url} has not answered within {self.timeout:g} s.") from None
        except (httpcore2.NetworkError, httpcore2.ProtocolError, OSError, UnicodeError) as error:
            why = str(error) or type(error).__name__
            raise RewardError(f"{self.shown_url} could not be asked: {why}.") from None
        return self._scores_in(answer, len(part))

    def _headers(self, body: bytes) -> list[tuple[str, str]]:
        headers = [
            ("Host", self._parts.netloc),
            ("Content-Type", "application/json"),
            ("Accept", "application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "proxima"),
        ]
        if self.key is None:
            return headers
        message_id, timestamp = f"msg_{uuid.uuid4().hex}", int(time.time())
        return [
            *headers,
            ("webhook-id", message_id),
            ("webhook-timestamp", str(timestamp)),
            ("webhook-signature", signature(self.key, message_id, timestamp, body)),
        ]

    def _check_status(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if 200 <= status < 300:
            return
        answered = f"{self.shown_url} answered {status}"
        if 300 <= status < 400:
            raise RewardError(f"{answered}; redirects are not followed: give the last URL.", lasting=True)
        comes_back = status in _COME_BACK or status >= 500
        raise RewardError(
            f"{answered}; it should answer 200 with scores.",
            lasting=not comes_back,
            retry_after=_retry_after(headers) if comes_back else 0.0,
        )

    async def _read(self, response: httpcore2.Response) -> bytes:
        answer = bytearray()
        async for piece in response.aiter_stream():
            answer += piece
            if len(answer) > MAX_ANSWER_BYTES:
                raise RewardError(
                    f"{self.shown_url} answered with more than {MAX_ANSWER_BYTES} bytes; it should answer "
                    "with scores alone, or batch_size be smaller.",
                    lasting=True,
                )
        return bytes(answer)

    def _scores_in(self, answer: bytes, rows: int) -> list[Any]:
        try:
            given = json.loads(answer)
        except (ValueError, RecursionError):
            raise RewardError(f"{self.shown_url} answered with what is no JSON.") from None
        scores = given.get("scores") if isinstance(given, dict) else None
        if not isinstance(scores, list):
            raise RewardError(f'{self.shown_url} answered without scores; the form is {{"scores": […]}}.')
        if len(scores) != rows:
            raise RewardError(
                f"{self.shown_url} answered with {len(scores)} scores for {rows} rows; give one per row."
            )
        return scores


def _body(part: RewardBatch) -> bytes:
    rows = {
        "prompts": part.prompts,
        "responses": part.responses,
        "response_ids": part.response_ids,
        "columns": part.columns,
    }
    try:
        return json.dumps(rows, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(f"the rows cannot be sent as JSON: {error}.", lasting=True) from None


def _retry_after(headers: Iterable[tuple[bytes, bytes]]) -> float:
    """Seconds that a server asks to be left alone for (RFC 9110, 10.2.3: seconds, or a date)."""
    text = next((value.decode("latin-1") for name, value in headers if name.lower() == b"retry-after"), "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        date = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    now = datetime.now(UTC) if date.tzinfo else datetime.now(UTC).replace(tzinfo=None)
    return max((date - now).total_seconds(), 0.0)


# Where connections go ------------------------------------------------------------------------------------


def _check_address(address: Address, url: str, allow_private: bool) -> None:
    match standing(address):
        case "refused":
            raise RewardError(
                f"{url} leads to an address without servers; {NO_SERVERS}: give another.", lasting=True
            )
        case "private" if not allow_private:
            raise RewardError(
                f"{url} leads to a private address; give a public one, or have the operator set "
                f"{HTTP_ALLOW_PRIVATE}=1 for the worker.",
                lasting=True,
            )


class _CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to an address that was looked up and checked just before, and to no other."""

    def __init__(self, url: str, allow_private: bool) -> None:
        self._url, self._allow_private = url, allow_private
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        found = await anyio.getaddrinfo(host, port, type=SOCK_STREAM)
        # One bad address spoils the name: which of them it leads to is the chance of a moment.
        hosts = list(dict.fromkeys(str(address[4][0]) for address in found))
        for each in hosts:
            address = address_of(each)
            assert address is not None, "what a name is resolved to is an address"
            _check_address(address, self._url, self._allow_private)
        for each in hosts[:-1]:
            try:
                return await self._inner.connect_tcp(each, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue  # the name's next address may answer
        return await self._inner.connect_tcp(hosts[-1], port, timeout, local_address, socket_options)
