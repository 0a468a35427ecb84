"""A TCP proxy between client and sidecar that does to their bytes what bad networks, proxies and machines do.

It knows nothing of HTTP/2: a fault speaks of the n-th byte that goes one way, counted over all connections of the
proxy, and strikes once; what comes after it passes unharmed.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

UP, DOWN = "up", "down"  # requests; replies


class Fault:
    """Forwards everything. `seen` counts bytes by direction; `struck` is set once the fault has acted."""

    def __init__(self):
        self.seen = {UP: 0, DOWN: 0}
        self.struck = threading.Event()

    async def carry(self, direction: str, data: bytes, out: asyncio.StreamWriter) -> None:
        """Handles the next bytes of one connection; ConnectionResetError ends the connection."""
        self.seen[direction] += len(data)
        out.write(data)
        await out.drain()


class At(Fault):
    """A fault in the bytes [at, at + size) of one direction."""

    def __init__(self, direction: str, at: int, size: int = 1):
        super().__init__()
        self.direction, self.at, self.size = direction, at, size

    async def carry(self, direction, data, out):
        begin = self.at - self.seen[direction]
        if direction != self.direction or self.struck.is_set() or begin >= len(data):
            await super().carry(direction, data, out)
            return
        # Part of [at, at + size) may not have arrived yet: the arrived part is enough.
        await super().carry(direction, data[:begin], out)
        self.seen[direction] += len(data) - begin
        self.struck.set()
        await self.strike(data[begin : begin + self.size], data[begin + self.size :], out)

    async def strike(self, hit: bytes, rest: bytes, out: asyncio.StreamWriter) -> None:
        raise NotImplementedError


class FlipBit(At):
    def __init__(self, direction, at, bit):
        super().__init__(direction, at)
        self.bit = bit

    async def strike(self, hit, rest, out):
        out.write(bytes([hit[0] ^ 1 << self.bit]) + rest)


class FlipBitOf(Fault):
    """Flips one bit of the first reply that contains these bytes."""

    def __init__(self, pattern, bit):
        super().__init__()
        self.pattern, self.bit = pattern, bit

    async def carry(self, direction, data, out):
        place = data.find(self.pattern) if direction == DOWN and not self.struck.is_set() else -1
        if place >= 0:
            self.struck.set()
            flipped = bytearray(data)
            flipped[place + self.bit // 8] ^= 1 << self.bit % 8
            data = bytes(flipped)
        await super().carry(direction, data, out)


class Drop(At):
    async def strike(self, hit, rest, out):
        out.write(rest)


class Repeat(At):
    async def strike(self, hit, rest, out):
        out.write(hit + hit + rest)


class Reorder(At):
    """Swaps `size` bytes with the next `size`."""

    async def strike(self, hit, rest, out):
        out.write(rest[: self.size] + hit + rest[self.size :])


class Overwrite(At):
    """Overwrites the bytes with zeros."""

    async def strike(self, hit, rest, out):
        out.write(bytes(len(hit)) + rest)


class Cut(At):
    """Ends the connection at these bytes, with FIN or RST."""

    def __init__(self, direction, at, *, reset):
        super().__init__(direction, at)
        self.reset = reset

    async def strike(self, hit, rest, out):
        if self.reset:
            # Linger time 0: close() sends RST instead of FIN.
            linger = (1).to_bytes(4, "little") + bytes(4)
            out.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        raise ConnectionResetError


class Delay(Fault):
    def __init__(self, delay_s):
        super().__init__()
        self.delay_s = delay_s

    async def carry(self, direction, data, out):
        await asyncio.sleep(self.delay_s)
        await super().carry(direction, data, out)


class Throttle(Fault):
    """Forwards a few bytes at a time, so that every frame arrives in pieces."""

    def __init__(self, piece_bytes, pause_s):
        super().__init__()
        self.piece_bytes, self.pause_s = piece_bytes, pause_s

    async def carry(self, direction, data, out):
        for i in range(0, len(data), self.piece_bytes):
            await super().carry(direction, data[i : i + self.piece_bytes], out)
            await asyncio.sleep(self.pause_s)


class Freeze(Fault):
    """From byte `at` of `direction` on nothing goes either way, on any connection; all stay open, new ones are taken.

    Until `thaw`, after which all goes on as if nothing had been.
    """

    def __init__(self, direction, at):
        super().__init__()
        self.direction, self.at = direction, at
        self._thawed = threading.Event()

    def thaw(self):
        self._thawed.set()

    async def carry(self, direction, data, out):
        if self.struck.is_set() or (direction == self.direction and self.seen[direction] + len(data) > self.at):
            self.struck.set()
            while not self._thawed.is_set():
                await asyncio.sleep(0.01)
        await super().carry(direction, data, out)


class FaultProxy:
    """Listens on a port and forwards to `target_port` through `fault` (may be exchanged at any time)."""

    def __init__(self, target_port: int, fault: Fault | None = None):
        self.target_port = target_port
        self.fault = fault or Fault()
        self.num_connections = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(ready),), daemon=True)
        self._thread.start()
        assert ready.wait(60)

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._loop.close()

    async def _main(self, ready):
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        await asyncio.sleep(0)  # a task that is cancelled before its first line would leave its connection open
        # A connection that is being accepted is in no list yet, so cancel all tasks of the loop until none is left.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for _ in range(3):  # transports close in callbacks of callbacks
            await asyncio.sleep(0)

    async def _accept(self, reader, writer):
        self.num_connections += 1
        other_writer = None
        try:
            other_reader, other_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            pumps = [
                asyncio.ensure_future(self._pump(UP, reader, other_writer)),
                asyncio.ensure_future(self._pump(DOWN, other_reader, writer)),
            ]
            try:  # one way that ends is the end of both: gRPC half-closes nothing
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # nobody there; or we close
        finally:
            for one in (writer, other_writer):
                if one is not None:
                    one.close()
                    with contextlib.suppress(OSError, asyncio.CancelledError):
                        await one.wait_closed()

    async def _pump(self, direction, reader, writer):
        while data := await reader.read(1 << 16):
            await self.fault.carry(direction, data, writer)
