"""A TCP proxy on the loopback whose network can be broken: stalled without a word, or cut."""

from __future__ import annotations

import asyncio
from typing import Self


class Proxy:
    """Forwards connections to a server; runs inside ``async with``.

    Parameters
    ----------
    target
        HOST:PORT.
    """

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._forgotten: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self.accepted = 0

    @property
    def address(self) -> str:
        """Where it listens, HOST:PORT."""
        host, port = self._server.sockets[0].getsockname()
        return f"{host}:{port}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        self.cut()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    def stall(self) -> None:
        """Forward nothing more, of old and new connections, and close none."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward again, what came meanwhile too."""
        self._flowing.set()

    def forget(self) -> None:
        """Forward nothing of the present connections ever again, as a firewall that forgot them."""
        self._forgotten |= self._connections

    def cut(self) -> None:
        """Close all connections."""
        for task in self._connections:
            task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        self.accepted += 1
        writers = [writer]
        try:
            there_reader, there_writer = await asyncio.open_connection(self._host, int(self._port))
            writers.append(there_writer)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(reader, there_writer, task))
                group.create_task(self._forward(there_reader, writer, task))
        except* (OSError, asyncio.CancelledError):
            # One side is gone, or `cut`: the other goes too.
            pass
        finally:
            for each in writers:
                each.transport.abort()
            self._connections.discard(task)
            self._forgotten.discard(task)

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, connection: asyncio.Task[None]) -> None:
        while data := await reader.read(1 << 16):
            await self._flowing.wait()
            if connection not in self._forgotten:
                writer.write(data)
                await writer.drain()
        raise ConnectionResetError
