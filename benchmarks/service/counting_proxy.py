"""A TCP proxy that counts bytes, so that the bytes on the wire include HTTP/2 and gRPC framing."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType


class CountingProxy:
    """Forwards a free loopback port to `target`; `num_bytes` counts both directions."""

    def __init__(self, target: str):
        self._host, _, self._port = target.rpartition(":")
        self.num_bytes = 0
        self.endpoint = ""

    def __enter__(self) -> CountingProxy:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        server = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._forward, "127.0.0.1", 0), self._loop)
        self.endpoint = f"127.0.0.1:{server.result().sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(self._host, int(self._port))
        await asyncio.gather(self._pipe(reader, there_writer), self._pipe(there_reader, writer))

    async def _pipe(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            self.num_bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()
