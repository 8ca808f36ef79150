"""A server from its first connection to its last; it ends in order when the process is told to end."""

import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvicorn

from blip2.server.api import API, Settings
from blip2.server.worker import Worker

KEEP_ALIVE = 30  # seconds that a connection may be idle


class Server(uvicorn.Server):
    """Workers and what listens for them.

    Args:
        workers: one a model; they are closed with the server.
        settings: what it allows.
        ready: is called once connections are taken.
        grace: seconds that requests under way have when the server ends.
        log: whether requests go to the log.
    """

    def __init__(
        self,
        workers: Sequence[Worker],
        settings: Settings,
        *,
        ready: Callable[[], None] = lambda: None,
        grace: int = 30,
        log: bool = False,
    ):
        self.workers, self.ready, self.grace = workers, ready, grace
        config = uvicorn.Config(
            API(workers, settings).build(), log_config=None, access_log=log, lifespan="off", ws="none",
            server_header=False, timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=grace,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to take connections."""
        await super().startup(sockets)
        self.ready()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end; requests under way are answered first."""
        try:
            super().run(sockets)
        finally:
            for worker in self.workers:
                worker.close(self.grace)


def serve(server: Server, listening: socket.socket) -> None:
    """Serve in the main thread until Ctrl-C or `kill`; a second Ctrl-C does not wait for anyone."""
    # as Ctrl-C, also where a script started us in the background; uvicorn raises what it got once more
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        server.run([listening])
