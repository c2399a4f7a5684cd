"""The proxy of the outage tests: an outage is one only if no connection survives it."""

from __future__ import annotations

import asyncio
import socket

import pytest

from tests.worker.proxy import proxy
from tests.worker.waiting import DEADLINE_SECONDS

pytestmark = pytest.mark.anyio


async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server that says nothing, until the other side leaves."""
    await reader.read()
    writer.close()


@pytest.mark.parametrize("steps", range(8))
async def test_no_connection_survives_a_cut_however_far_it_has_come(steps: int) -> None:
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server, proxy(*server.sockets[0].getsockname()) as way:
        with socket.create_connection(("127.0.0.1", way.port)) as client:  # the kernel has taken it
            for _ in range(steps):
                await asyncio.sleep(0)
            await way.cut()
            client.settimeout(DEADLINE_SECONDS)
            try:
                heard = await asyncio.to_thread(client.recv, 1)
            except ConnectionResetError:
                heard = b""
            assert heard == b""
