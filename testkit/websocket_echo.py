"""A WebSocket server, of the `websockets` package, that sends back each message: PORT=5000 python websocket_echo.py."""

import os

from websockets.sync.server import ServerConnection, serve


def echo(connection: ServerConnection) -> None:
    """Send back what comes."""
    for message in connection:
        connection.send(message)


if __name__ == "__main__":
    serve(echo, "127.0.0.1", int(os.environ["PORT"])).serve_forever()
