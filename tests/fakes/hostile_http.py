"""An HTTP server on a real socket that answers each path as a test tells it: endless, slow, oversized, encoded, cut."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = Callable[[socket.socket], None]
MAX_S = 20.0
BOMB = gzip.compress(bytes(10 << 20))


@contextmanager
def hostile_server(answer: Answer) -> Iterator[str]:
    """Serve `answer` to everybody; yields the address."""
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            with suppress(TimeoutError):
                connection, _ = listener.accept()
                threading.Thread(target=_answer, args=(connection, answer), daemon=True).start()

    thread = threading.Thread(target=serve, name="hostile server")
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        stopping.set()
        thread.join(5)
        listener.close()


def _answer(connection: socket.socket, answer: Answer) -> None:
    with connection, suppress(OSError):
        connection.settimeout(MAX_S)
        connection.recv(65536)
        answer(connection)


def endless(connection: socket.socket) -> None:
    """Announces nothing and never stops (of itself: the client must)."""
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    until = time.monotonic() + MAX_S
    while time.monotonic() < until:
        connection.sendall(b"[" * 65536)


def chunked_endless(connection: socket.socket) -> None:
    """The same in chunks."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    until = time.monotonic() + MAX_S
    while time.monotonic() < until:
        connection.sendall(b"8000\r\n" + b"[" * 0x8000 + b"\r\n")


def oversized(connection: socket.socket) -> None:
    """Announces a terabyte."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1099511627776\r\n\r\n" + b"x" * 1000)
    time.sleep(1)


def slow(connection: socket.socket) -> None:
    """A byte now and then."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n")
    _drip(connection)


def slow_headers(connection: socket.socket) -> None:
    """Not even headers end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nx-wait: ")
    _drip(connection)


def silent(connection: socket.socket) -> None:
    """Nothing at all."""
    time.sleep(MAX_S)


def bomb(connection: socket.socket) -> None:
    """Ten megabytes of zeros in ten kilobytes of gzip."""
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(BOMB)}\r\n\r\n"
    connection.sendall(head.encode() + BOMB)


def cut(connection: socket.socket) -> None:
    """Ends before what was announced."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n{")


def redirect(connection: socket.socket) -> None:
    """Points somewhere else."""
    connection.sendall(b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:9/\r\ncontent-length: 0\r\n\r\n")


def garbage(connection: socket.socket) -> None:
    """No HTTP."""
    connection.sendall(b"\x00\xff" * 5000)


def _drip(connection: socket.socket) -> None:
    until = time.monotonic() + MAX_S
    while time.monotonic() < until:
        connection.sendall(b"x")
        time.sleep(0.05)
