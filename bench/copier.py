"""What `socat TCP-LISTEN:PORT,fork EXEC:cat` does, to compare large bodies with: bytes through a process, no HTTP.

    python -m bench.copier PORT

Each connection gets a cat of its own and two threads that copy 64 KiB at a time, which Python does without its lock.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

PIECE_BYTES = 65536


def copy(source: int, target: int) -> None:
    """Copy descriptor `source` to `target` until its end."""
    while piece := os.read(source, PIECE_BYTES):
        view = memoryview(piece)
        while view:
            view = view[os.write(target, view) :]


def serve(connection: socket.socket) -> None:
    """Send what comes on `connection` through a cat and back."""
    with connection, subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as cat:
        assert cat.stdin is not None
        assert cat.stdout is not None
        back = threading.Thread(target=copy, args=(cat.stdout.fileno(), connection.fileno()))
        back.start()
        copy(connection.fileno(), cat.stdin.fileno())
        cat.stdin.close()
        back.join()


def main(port: int) -> None:
    """Serve for ever on the loopback."""
    with socket.create_server(("127.0.0.1", port)) as listener:
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=serve, args=(connection,), daemon=True).start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
