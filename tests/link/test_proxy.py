"""What goes over an emulated link arrives as it was sent: whole, in order, ended as it was ended, and bounded."""

import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from splitlearn.address import Address
from splitlearn.errors import WorkerDied
from splitlearn.link.emulated import Link
from splitlearn.link.proxy import BUFFER_BYTES, MOST_CONNECTIONS, Proxy
from splitlearn.link.words import parse
from tests.client.test_remote import free_port

WAIT_S = 60.0
ROUGH = Link(rtt_ms=4, jitter_ms=4, up_mbit=800, down_mbit=800, loss_percent=2)
DATA = random.Random(0).randbytes(1 << 20)


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    with Proxy() as made:
        yield made


@contextmanager
def target(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server on loopback that does `serve` with each connection, and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        def one(connection: socket.socket) -> None:
            with connection:
                serve(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def connect(address: str) -> socket.socket:
    found = Address.parse(address)
    return socket.create_connection((found.host, found.port), timeout=WAIT_S)


def rest(connection: socket.socket) -> bytes:
    """All that comes until the end."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def echo(connection: socket.socket) -> None:
    while data := connection.recv(1 << 16):
        connection.sendall(data)


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def test_bytes_arrive_whole_and_in_order_whatever_the_link_does_to_them(proxy: Proxy) -> None:
    with target(echo) as address:
        near = proxy.route(address)
        for link in (Link(), ROUGH):
            proxy.shape(link)
            with connect(near) as one, connect(near) as other:
                sending = [
                    threading.Thread(target=send, args=(each, data))
                    for each, data in ((one, DATA), (other, DATA[::-1]))
                ]
                for each in sending:
                    each.start()
                assert rest(one) == DATA
                assert rest(other) == DATA[::-1]
                for each in sending:
                    each.join()


def test_a_round_trip_takes_no_less_than_the_link_says_from_the_change_on(proxy: Proxy) -> None:
    with target(echo) as address, connect(proxy.route(address)) as open_before:
        proxy.shape(Link(rtt_ms=200, up_mbit=1))
        started = time.perf_counter()
        open_before.sendall(bytes(5000))
        left = 5000
        while left:
            left -= len(open_before.recv(left))
        assert time.perf_counter() - started > 0.230  # 200 ms and 40 ms for the bytes, less what timers are set early


def test_the_end_of_one_direction_leaves_the_other_open(proxy: Proxy) -> None:
    with target(lambda connection: connection.sendall(rest(connection)[::-1])) as address:
        proxy.shape(ROUGH)
        with connect(proxy.route(address)) as client:
            send(client, b"the end")
            assert rest(client) == b"dne eht"


def test_a_target_that_closes_or_breaks_off_ends_the_connection_after_what_it_had_sent(proxy: Proxy) -> None:
    def closes(connection: socket.socket) -> None:
        connection.sendall(DATA)

    def resets(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    proxy.shape(ROUGH)
    with target(closes) as address, connect(proxy.route(address)) as client:
        assert rest(client) == DATA
    with target(resets) as address, connect(proxy.route(address)) as client:
        client.sendall(b"x")
        with pytest.raises(ConnectionResetError):
            client.recv(1)


def test_a_target_that_does_not_listen_breaks_the_connection_off(proxy: Proxy) -> None:
    with connect(proxy.route(f"127.0.0.1:{free_port()}")) as client, pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_client_that_leaves_is_gone_at_the_target_too(proxy: Proxy) -> None:
    gone = threading.Event()

    def until_gone(connection: socket.socket) -> None:
        with connection:
            rest(connection)
        gone.set()

    proxy.shape(ROUGH)
    with target(until_gone) as address:
        connect(proxy.route(address)).close()
        assert gone.wait(WAIT_S)


def test_a_sender_that_is_faster_than_the_link_has_to_wait(proxy: Proxy) -> None:
    over = threading.Event()

    def reads_nothing(connection: socket.socket) -> None:
        over.wait(WAIT_S)

    proxy.shape(parse("rtt=10s"))
    with target(reads_nothing) as address, connect(proxy.route(address)) as client:
        client.settimeout(1)
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 8 * BUFFER_BYTES:
                sent += client.send(bytes(1 << 16))
        over.set()
    proxy.shape(Link())


def test_more_connections_than_there_may_be_are_broken_off_and_the_others_go_on() -> None:
    with target(echo) as address, Proxy() as own:
        near = own.route(address)
        clients = [connect(near) for _ in range(MOST_CONNECTIONS + 1)]
        with pytest.raises(ConnectionResetError):
            clients[-1].recv(1)
        for client in clients[:-1]:
            client.sendall(b"x")
            assert client.recv(1) == b"x"
            client.close()


def test_it_listens_on_loopback_alone_and_ends_when_it_is_closed() -> None:
    with target(echo) as address, Proxy() as own:
        near = own.route(address)
        assert own.route(address) == near
        assert Address.parse(near).host == "127.0.0.1"
        client = connect(near)
        client.sendall(b"x")
        assert client.recv(1) == b"x"
        own.close()
        assert rest(client) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(near)
        with pytest.raises((WorkerDied, OSError)):
            own.shape(Link())
