"""Run a server until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FrameType

import uvicorn

from runtime.errors import UsageError
from runtime.server.app import create_app
from runtime.server.connections import MAX_HEADER_BYTES, Connections
from runtime.server.engines import Engines
from runtime.server.settings import ServerSettings
from runtime.server.turns import THREADS

_LOGGER = logging.getLogger(__name__)
_BACKLOG = 1024
_OTHER_FILES = 128  # beside connections: weights, libraries, the log


def listen(settings: ServerSettings) -> socket.socket:
    """Return a socket at the server's address; who connects waits until the server runs.

    Raises:
        UsageError: The address is taken, not allowed, or not of this machine.
    """
    remedy = "pass another --port, or 0 for any that is free"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, number, _, address = found[0]
        opened = socket.socket(family, kind, number)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(_BACKLOG)  # now, since two may be bound to one address as long as neither listens
    except (OSError, UnicodeError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.EADDRINUSE, errno.EACCES):
            remedy = "pass --host 127.0.0.1 for this machine alone, or 0.0.0.0 for all that can reach it"
        raise UsageError(f"cannot listen at {settings.host}:{settings.port}: {error}", remedy=remedy) from error
    return opened


def is_local(listening: socket.socket) -> bool:
    """Return whether only this machine can reach a socket, by the address that it is bound to."""
    address = ipaddress.ip_address(listening.getsockname()[0].partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return bool((mapped or address).is_loopback)


class HttpServer:
    """A server of engines.

    Args:
        engines: Who answers. They are closed when it ends.
        settings: What is taken, and from whom.
        listening: What `listen` returned.
    """

    def __init__(self, engines: Engines, settings: ServerSettings, listening: socket.socket) -> None:
        self._engines = engines
        self._listening = listening
        connections = Connections(settings)
        config = uvicorn.Config(
            create_app(engines, settings, connections, is_local=is_local(listening)),
            http=connections.protocol(),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # they would take the place of a connection's own address
            backlog=_BACKLOG,
            timeout_keep_alive=round(settings.idle_timeout_s) + 60,  # `Connections` closes them
            timeout_graceful_shutdown=round(settings.drain_timeout_s),
            h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        )
        _raise_file_limit(settings.max_connections + _OTHER_FILES)
        self._server = _Server(config)

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self._listening.getsockname()[1])

    def run(self, on_ready: Callable[[], object] = lambda: None) -> None:
        """Answer requests until `stop` is called or SIGINT or SIGTERM comes.

        Those in progress are answered first; a second signal ends them.

        Args:
            on_ready: Called once connections are taken.
        """
        self._server.on_ready = on_ready
        try:
            with _ending_quietly():
                self._server.run(sockets=[self._listening])
        finally:
            self._engines.close(drain=False)

    def stop(self) -> None:
        """Take no more requests, and end when those in progress have been answered; from any thread."""
        self._server.should_exit = True


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it is ready."""

    on_ready: Callable[[], object]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End: after the first signal when all is answered, after a second one at once, whichever they are."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "qwen3vl-server"))
        await super().startup(sockets)
        if self.started:
            self.on_ready()


@contextlib.contextmanager
def _ending_quietly() -> Iterator[None]:
    """Let a signal end the server and nothing else: uvicorn sends it once more when it has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _raise_file_limit(wanted: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        if most < wanted:
            _LOGGER.warning("note: this process may open %d files, fewer than --max-connections needs", most)
