"""The emulated link at work: a TCP proxy in a process of its own, between a client and the trunks that it is told.

    with Proxy() as proxy:
        near = proxy.route("trunk.example:50051")    # connect to `near` in the place of the trunk
        proxy.shape(Link(rtt_ms=50, up_mbit=10))     # from now on, for all connections

Bytes leave when their time has come, by absolute deadlines, so that no timer's lateness adds up. All connections share
the bandwidth of a direction. Connecting takes one RTT. What is under way is bounded: a sender that is faster than the
link has to wait, as with any full socket. Closes and resets are passed on. It listens on loopback alone and connects
to what `route` named alone.
"""

import asyncio
import ctypes
import random
import selectors
import socket
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection

from splitlearn.address import Address
from splitlearn.link.emulated import Link, Way
from splitlearn.runtime import process
from splitlearn.runtime.process import Child

PIECE_BYTES = 16384
BUFFER_BYTES = 8 << 20
"""Most bytes under way in one direction of a connection. Without a limit of bandwidth they are one: 8 MiB in half an
RTT of 50 ms are 2.7 Gbit/s."""
MOST_CONNECTIONS = 128
MOST, SHORT_S = 0.98, 0.0002
# How much earlier a timer is set than it is to end, at most, and the weight of the last lateness in the mean.
MOST_EARLY_S, WEIGHT = 0.0005, 1 / 16
_PR_SET_TIMERSLACK = 29  # linux/prctl.h


class Proxy:
    """The proxy's process, which starts at once and ends with this one or with `close`. Raises WorkerDied once it has
    ended. One thread at a time may use it."""

    def __init__(self) -> None:
        self._child: Child = process.start("The emulated link", "splitlearn.link.proxy:serve")
        self._routes: dict[str, str] = {}

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def route(self, target: str) -> str:
        """The loopback address that leads over the link to `target`."""
        if target not in self._routes:
            self._routes[target] = self._ask(Address.parse(target))
        return self._routes[target]

    def shape(self, link: Link) -> None:
        """Make the link another one, also for open connections."""
        self._ask(link)

    def close(self) -> None:
        """End the process, and with it every connection."""
        self._child.stop()

    def _ask(self, message: Address | Link) -> str:
        self._child.send(message)
        return str(self._child.receive())


def serve(connection: Connection) -> None:
    """The proxy's process. Each message is an Address to listen for, answered by where, or a Link."""
    _wake_up_in_time()
    with asyncio.Runner(loop_factory=_loop) as runner:
        runner.run(_serve(connection))


def _loop() -> asyncio.AbstractEventLoop:
    """A loop whose timers have microseconds: epoll's have milliseconds."""
    return asyncio.SelectorEventLoop(_Selector())


class _Selector(selectors.SelectSelector):
    """Waits in ever shorter parts: Linux lets a wait take 0.1% to 0.5% longer than asked for."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """What is ready; nothing after most of `timeout`."""
        return super().select(MOST * timeout if timeout and timeout > SHORT_S else timeout)


def _wake_up_in_time() -> None:
    """Have the kernel end this thread's short waits when they are over, not up to 0.05 ms later."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)


async def _serve(connection: Connection) -> None:
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    line = _Line(loop)
    servers: list[asyncio.Server] = []
    told: asyncio.Queue[Address | Link] = asyncio.Queue()

    def read() -> None:
        try:
            told.put_nowait(connection.recv())
        except (EOFError, OSError):
            loop.remove_reader(connection.fileno())
            over.set()

    async def answer() -> None:
        while True:
            message = await told.get()
            if isinstance(message, Link):
                line.link = message
                connection.send("")
            else:
                servers.append(await loop.create_server(partial(_Near, line, message), "127.0.0.1", 0))
                connection.send(f"127.0.0.1:{servers[-1].sockets[0].getsockname()[1]}")

    loop.add_reader(connection.fileno(), read)
    answering = asyncio.create_task(answer())
    await over.wait()
    answering.cancel()


class _Line:
    """The link: until when each direction is taken by what was sent before, and who uses it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.link = Link()
        self.connections = 0
        self._free = {True: 0.0, False: 0.0}
        self._early_s = 0.0  # by how much timers were late of late
        self._random = random.Random()

    def way(self, *, up: bool) -> Way:
        """A direction as it is now."""
        return self.link.up if up else self.link.down

    def at(self, due: float, call: Callable[[], None]) -> None:
        """Call at `due`: the timer is set earlier by what timers are late on average."""
        aim = due - self._early_s
        timed = aim - self.loop.time() > SHORT_S

        def on_time() -> None:
            if timed:
                self._early_s += WEIGHT * (min(self.loop.time() - aim, MOST_EARLY_S) - self._early_s)
            call()

        self.loop.call_at(aim, on_time)

    def due(self, size: int, *, up: bool, more: bool) -> float:
        """When `size` bytes that are sent now arrive; whether `more` follows them at once."""
        way = self.way(up=up)
        sent = self.loop.time() - self._early_s  # what waits for data wakes up as late as what waits for a time
        self._free[up] = max(self._free[up], sent) + way.transfer_s(size)
        jitter_s = self._random.uniform(-way.jitter_s, way.jitter_s) if way.jitter_s else 0.0
        return self._free[up] + way.delay_s + jitter_s + way.late_s(self._random.random(), size, more=more)


class _End(asyncio.Protocol):
    """One end of a connection: what comes in here goes out at the other end, later."""

    other: "_End"

    def __init__(self, line: _Line, *, up: bool) -> None:
        self._line, self._up = line, up
        self.transport: asyncio.Transport | None = None
        self._last = 0.0  # when the last of what came in here goes out
        self._acts: deque[Callable[[], None]] = deque()
        self._under_way = 0
        self._sink_full = False
        self.ended = False  # the end of what came in here was passed on

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Both ends send small messages at once, as gRPC does."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        """Have `data` leave in pieces, each when the line has taken it and its delay has passed."""
        for piece in _pieces(data):
            self._under_way += len(piece)
            self._at(
                self._line.due(len(piece), up=self._up, more=len(piece) == PIECE_BYTES), partial(self._deliver, piece)
            )
        self._read_or_wait()

    def eof_received(self) -> bool:
        """Pass the end on; what comes the other way goes on."""
        self._at(self._line.due(0, up=self._up, more=False), self._end)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass a loss on, after what came before it. After an orderly end the other end is closed by then."""
        self._at(self._line.due(0, up=self._up, more=False), self.other.reset)

    def pause_writing(self) -> None:
        """The reader at this end is slower than the link."""
        self.other.sink_is(full=True)

    def resume_writing(self) -> None:
        """It has caught up."""
        self.other.sink_is(full=False)

    def reset(self) -> None:
        """Break this end off."""
        if self.transport is not None and not self.transport.is_closing():
            now = struct.pack("ii", 1, 0)  # a reset in the place of an orderly end
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, now)
            self.transport.abort()

    def write(self, piece: bytes) -> None:
        """Send `piece` to what is connected here; an end that was lost takes no more."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(piece)

    def sink_is(self, *, full: bool) -> None:
        """Stop reading here while the other end, or the target, does not take what comes."""
        self._sink_full = full
        self._read_or_wait()

    def _at(self, due: float, act: Callable[[], None]) -> None:
        """Act at `due`, in the order in which it was asked for."""
        self._last = max(due, self._last)
        self._acts.append(act)
        self._line.at(self._last, self._act)

    def _act(self) -> None:
        self._acts.popleft()()

    def _deliver(self, piece: bytes) -> None:
        self._under_way -= len(piece)
        self.other.write(piece)
        self._read_or_wait()

    def _end(self) -> None:
        """What came in here has all gone out: end that direction, or both ends where the other one is over, too."""
        self.ended = True
        ends = [end.transport for end in (self, self.other) if end.transport is not None]
        if self.other.ended:
            for transport in ends:
                transport.close()
        elif not ends[-1].is_closing():
            ends[-1].write_eof()

    def _read_or_wait(self) -> None:
        """Read on where there is room for more under way."""
        if self.transport is not None:
            full = self._sink_full or self._under_way >= BUFFER_BYTES
            (self.transport.pause_reading if full else self.transport.resume_reading)()


class _Near(_End):
    """The client's end: connects to the target once a connection over the link would have come about."""

    def __init__(self, line: _Line, target: Address) -> None:
        super().__init__(line, up=True)
        self._target = target
        self.other = _Far(line, self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to connect; what the client sends meanwhile waits in its socket."""
        super().connection_made(transport)
        self._line.connections += 1
        self._sink_full = True
        self._read_or_wait()
        if self._line.connections > MOST_CONNECTIONS:
            self.reset()
        else:
            self._connecting = asyncio.create_task(self._connect())

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room for another connection."""
        self._line.connections -= 1
        super().connection_lost(exc)

    async def _connect(self) -> None:
        await asyncio.sleep(self._line.link.rtt_ms / 1e3)
        try:
            await self._line.loop.create_connection(lambda: self.other, self._target.host, self._target.port)
        except OSError:
            self.reset()
            return
        if self.transport is None or self.transport.is_closing():
            self.other.reset()
        self.sink_is(full=False)


class _Far(_End):
    """The target's end."""

    def __init__(self, line: _Line, near: _Near) -> None:
        super().__init__(line, up=False)
        self.other = near


def _pieces(data: bytes) -> Iterator[bytes]:
    return (data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))
