"""A function that costs next to nothing, behind a keep-alive HTTP server, to see what the gateway adds.

    python -m bench.trivial PORT

An asyncio protocol on uvloop that knows just enough HTTP for wrk and what is in front of it: a head, and a body with a
Content-Length or in chunks (of-watchdog passes every body on in chunks).
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import uvloop

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 11\r\n\r\nhello world"
LAST_CHUNK = b"\r\n0\r\n\r\n"
_FRAMING = re.compile(rb"\r\n(?:content-length: *([0-9]+)|transfer-encoding: *chunked)", re.IGNORECASE)


def request_end(data: bytes) -> int:
    """Return how many bytes the first request in `data` has; 0 if it is not whole."""
    head_end = data.find(b"\r\n\r\n")
    if head_end < 0:
        return 0
    framing = _FRAMING.search(data, 0, head_end)
    if framing is not None and framing[1] is None:
        return data.find(LAST_CHUNK, head_end + 2) + len(LAST_CHUNK) if LAST_CHUNK in data else 0
    end = head_end + 4 + (int(framing[1]) if framing else 0)
    return end if end <= len(data) else 0


class Trivial(asyncio.Protocol):
    """Answers each request with the same eleven bytes."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while end := request_end(self._received):
            self._received = self._received[end:]
            self._transport.write(ANSWER)


async def main(port: int) -> None:
    """Serve for ever on the loopback."""
    server = await asyncio.get_running_loop().create_server(Trivial, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
