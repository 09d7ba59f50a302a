"""Serving an app on loopback until a signal.

Always holds: it listens on 127.0.0.1 and nowhere else; the address is told once it answers. Called by `glidepath page`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from cluster.signals import Interrupted
from data_pipeline.errors import UserError

HOST = "127.0.0.1"
GRACE_S = 2  # for answers under way at the end


def listen(port: int) -> socket.socket:
    """A listening socket on loopback; port 0 takes a free one. Raises UserError where the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        found = error.strerror or str(error)
        raise UserError(f"port {port} of {HOST}", "a free port", found, "give another --port, or 0") from None
    listener.listen()  # from here on connections wait instead of being refused
    return listener


def server_of(app: FastAPI) -> uvicorn.Server:
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_S)
    return uvicorn.Server(config)


def serve(app: FastAPI, port: int, ready: Callable[[str], None]) -> None:
    """Until SIGINT or SIGTERM. Raises UserError where the port is taken."""
    with listen(port) as listener, suppress(Interrupted):  # uvicorn hands on the signal that ended it
        ready(f"http://{HOST}:{listener.getsockname()[1]}")
        server_of(app).run(sockets=[listener])
