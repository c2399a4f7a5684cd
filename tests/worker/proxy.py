"""A server's address that can be cut off from it, and joined again.

It works on sockets: asyncio's streams lose sight of a connection that comes in the moment of the cut.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Proxy:
    """Passes bytes on to a TCP server, for as long as it is not cut."""

    def __init__(self, host: str, port: int) -> None:
        self._to = (host, port)
        self._loop = asyncio.get_running_loop()
        self._listening: socket.socket | None = None
        self._passing: set[asyncio.Task[None]] = set()
        self.port = 0

    def join(self) -> None:
        """Take connections, at the same port each time."""
        listening = socket.create_server(("127.0.0.1", self.port))
        listening.setblocking(False)
        self._loop.add_reader(listening, self._accept, listening)
        self.port = listening.getsockname()[1]
        self._listening = listening

    async def cut(self) -> None:
        """End all connections, and refuse new ones."""
        if self._listening is not None:
            self._loop.remove_reader(self._listening)
            self._listening.close()
            self._listening = None
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        with suppress(BlockingIOError):  # it has left already
            near, _ = listening.accept()
            near.setblocking(False)
            task = asyncio.create_task(self._serve(near))
            self._passing.add(task)
            # Here, since a task that is cancelled before it begins does nothing.
            task.add_done_callback(lambda _: near.close())
            task.add_done_callback(self._passing.discard)

    async def _serve(self, near: socket.socket) -> None:
        with socket.socket() as far:
            far.setblocking(False)
            await self._loop.sock_connect(far, self._to)
            async with asyncio.TaskGroup() as ways:
                ways.create_task(self._pass(near, far))
                ways.create_task(self._pass(far, near))

    async def _pass(self, one: socket.socket, other: socket.socket) -> None:
        """Until one end closes; then the other one is told so."""
        with suppress(OSError):
            while data := await self._loop.sock_recv(one, 65_536):
                await self._loop.sock_sendall(other, data)
        with suppress(OSError):
            other.shutdown(socket.SHUT_WR)


@asynccontextmanager
async def proxy(host: str, port: int) -> AsyncIterator[Proxy]:
    """A proxy that is joined."""
    made = Proxy(host, port)
    made.join()
    try:
        yield made
    finally:
        await made.cut()
