"""A server that speaks as much of Redis' protocol (RESP3) as Feast's online store uses: hashes, no more.

Not a stand-in for our code: it lets Feast's real Redis store, which ignores a value whose timestamp is not
newer (its SQLite store does not), run where no Redis server is installed.
"""

import socketserver
import threading
from types import TracebackType
from typing import BinaryIO


class RespServer:
    """Context manager; ``address`` is host:port."""

    def __init__(self) -> None:
        self.hashes: dict[bytes, dict[bytes, bytes]] = {}
        hashes = self.hashes

        class Connection(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while (command := _read(self.rfile)) is not None:
                    self.wfile.write(_answer(hashes, command))

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection)
        self._server.daemon_threads = True
        self.address = f"127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "RespServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def _read(stream: BinaryIO) -> list[bytes] | None:
    """One command: an array of bulk strings; None at the end."""
    line = stream.readline()
    if not line:
        return None
    parts = []
    for _ in range(int(line[1:])):
        size = int(stream.readline()[1:])
        parts.append(stream.read(size))
        stream.read(2)
    return parts


def _answer(hashes: dict[bytes, dict[bytes, bytes]], command: list[bytes]) -> bytes:
    name, arguments = command[0].upper(), command[1:]
    if name == b"HELLO":
        return b"%1\r\n" + _bulk(b"proto") + b":3\r\n"
    if name == b"HSET":
        fields = dict(zip(arguments[1::2], arguments[2::2], strict=True))
        hashes.setdefault(arguments[0], {}).update(fields)
        return b":%d\r\n" % len(fields)
    if name == b"HMGET":
        known = hashes.get(arguments[0], {})
        values = [known.get(field) for field in arguments[1:]]
        return b"*%d\r\n" % len(values) + b"".join(map(_bulk, values))
    if name == b"DEL":
        return b":%d\r\n" % sum(hashes.pop(key, None) is not None for key in arguments)
    if name in (b"CLIENT", b"PING", b"SELECT"):
        return b"+OK\r\n"
    return b"-ERR unknown command %s\r\n" % name


def _bulk(value: bytes | None) -> bytes:
    return b"_\r\n" if value is None else b"$%d\r\n%s\r\n" % (len(value), value)
