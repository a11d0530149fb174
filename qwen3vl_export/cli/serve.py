"""`qwen3vl serve`: engines behind an HTTP server."""

# ruff: noqa: D301 (typer keeps the line breaks of a paragraph that begins with a backspace character)

from __future__ import annotations

import logging
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_export.cli.cache import Building
from qwen3vl_export.cli.engines import open_engines
from qwen3vl_export.cli.options import CheckAll, Opening, Quiet, Serving, grouped
from runtime.errors import UsageError
from runtime.files import read_small_file
from runtime.installation import how_to_install
from runtime.shown import shown

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.server.engines import Engines
    from runtime.server.settings import ServerSettings

_LIBRARIES = ("fastapi", "uvicorn", "prometheus_client")
_MB = 1_000_000
Models = Annotated[
    list[str],
    typer.Argument(
        metavar="[NAME=]ENGINE...",
        help="Engine folders, or checkpoints as qwen3vl-export takes them, which are built first and kept. Clients ask "
        "for each by its name, which is the checkpoint's unless another is given.",
    ),
]


@dataclass(frozen=True)
class Listening:
    """Where a server listens, and whom it lets in.

    Attributes:
        host: Address to listen on; 0.0.0.0 is all of them. Whoever can reach it can use the engine: set an API key.
        port: Port to listen on; 0 takes any that is free.
        api_key_file: File with API keys, one on a line; requests need one of them. [default: none is needed]
        allow_host: On a loopback address, another name that the server may be asked for as; may be repeated.
        allow_origin: Origin of web pages that may ask, such as https://chat.example.org; may be repeated. The server's
            own page always may.
        allow_url_host: Host from which images and videos may be fetched by URL; may be repeated. [default: none]
        max_body: Longest body of a request in MB.
        max_requests: Most requests in progress. [default: what the engines run and queue]
        max_connections: Most connections.
        max_answer_tokens: Most tokens of an answer. [default: what the context leaves]
        max_choices: Most answers to one request.
        max_frames: Most frames of a video that a request may ask for.
        request_timeout: Seconds in which an answer has to be complete.
        drain_timeout: Seconds that requests in progress get when the server is stopped.
        log_text: Write prompts and answers into the log, which else holds none of them.
        warm_up: Run each kind of call once before requests are taken. [default: on GPUs]
    """

    host: str = "127.0.0.1"
    port: Annotated[int, typer.Option(metavar="PORT")] = 8000
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE")] = None
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME")] = None
    allow_origin: Annotated[list[str] | None, typer.Option(metavar="ORIGIN")] = None
    allow_url_host: Annotated[list[str] | None, typer.Option(metavar="HOST")] = None
    max_body: Annotated[float, typer.Option(metavar="MB")] = 64
    max_requests: int | None = None
    max_connections: int = 1024
    max_answer_tokens: int | None = None
    max_choices: int = 16
    max_frames: int = 768
    request_timeout: Annotated[float, typer.Option(metavar="S")] = 600
    drain_timeout: Annotated[float, typer.Option(metavar="S")] = 600
    log_text: bool = False
    warm_up: Annotated[bool | None, typer.Option("--warm-up/--no-warm-up")] = None

    def settings(self) -> ServerSettings:
        """Return them as the server takes them.

        Raises:
            UsageError: One is out of range, or the file of keys holds none.
        """
        from runtime.server.settings import ServerSettings

        if not 0 < self.max_body <= 1e6:
            raise UsageError(f"--max-body {self.max_body} MB is out of range", remedy="leave it out for 64 MB")
        max_body_bytes = max(1, round(self.max_body * _MB))
        return ServerSettings(
            host=self.host,
            port=self.port,
            api_keys=() if self.api_key_file is None else _read_keys(self.api_key_file),
            allowed_hosts=tuple(self.allow_host or ()),
            allowed_origins=tuple(self.allow_origin or ()),
            allowed_url_hosts=tuple(self.allow_url_host or ()),
            max_body_bytes=max_body_bytes,
            max_bodies_bytes=max(ServerSettings.max_bodies_bytes, max_body_bytes),
            max_requests=self.max_requests,
            max_connections=self.max_connections,
            max_answer_tokens=self.max_answer_tokens,
            max_choices=self.max_choices,
            max_frames=self.max_frames,
            request_timeout_s=self.request_timeout,
            drain_timeout_s=self.drain_timeout,
            logs_text=self.log_text,
        )


@grouped
def serve(
    models: Models,
    *,
    listening: Listening,
    opening: Opening,
    serving: Serving,
    building: Building,
    quiet: Quiet = False,
    check: CheckAll = False,
) -> None:
    """Serve engines over HTTP: OpenAI's API under /v1, a page to try them at /, figures for Prometheus at /metrics.

    The first Ctrl-C, or SIGTERM, takes no more requests and answers those in progress; the second ends at once. The log
    goes to stderr, a line for each request. docs/serving.md says what is taken, and what limits there are.

    \b
    Examples:
      qwen3vl serve demo
      qwen3vl serve Qwen/Qwen3-VL-2B-Instruct
      qwen3vl serve small=engines/2b large=engines/8b --port 9000
      qwen3vl serve ENGINE --host 0.0.0.0 --api-key-file keys.txt --max-sequences 16
      curl http://127.0.0.1:8000/v1/chat/completions -H 'content-type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "Hello"}]}'
    """
    check_installed()
    settings = listening.settings()
    from runtime.server.run import HttpServer, is_local, listen

    socket = listen(settings)  # before work that takes long
    with _logging(quiet):
        try:
            engines = open_engines(models, building, opening, serving, settings, check=check, is_quiet=quiet)
            _warm_up(engines, listening.warm_up)
            if not (is_local(socket) or settings.api_keys):
                _warn(settings.host)
            server = HttpServer(engines, settings, socket)
            server.run(lambda: _announce(engines, settings, server.port))
        finally:
            socket.close()


def _warm_up(engines: Engines, wanted: bool | None) -> None:
    from runtime.session import is_on_gpu

    for served in engines.values():
        if wanted or (wanted is None and is_on_gpu(served.model.manifest)):
            served.model.warm_up()


def check_installed() -> None:
    """Check that the libraries of the extra are there.

    Raises:
        UsageError: One is not.
    """
    import importlib.util

    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"serve needs the Python package {missing[0]}", remedy=how_to_install("serve"))


def _read_keys(path: Path) -> tuple[str, ...]:
    text = read_small_file(path, error=UsageError, remedy="make one with: openssl rand -hex 32 > keys.txt")
    lines = [line.strip() for line in text.decode("utf-8", "replace").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise UsageError(f"{shown(path)} holds no API key", remedy="make one with: openssl rand -hex 32 > keys.txt")
    return keys


def _warn(host: str) -> None:
    logging.getLogger("runtime.server").warning(
        "note: whoever can reach %s may use the engine; --api-key-file asks for a key", host
    )


def _announce(engines: Engines, settings: ServerSettings, port: int) -> None:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    logging.getLogger("runtime.server").info(
        "serving %s at http://%s:%d (page: /, base URL for OpenAI's clients: /v1)", ", ".join(engines), host, port
    )


class _Lines(logging.Formatter):
    """Lines of the log: time, then what happened; a warning says that it is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = super().format(record)
        return text if record.levelno < logging.WARNING else text.replace("  ", f"  {record.levelname.lower()}: ", 1)


@contextmanager
def _logging(quiet: bool) -> Iterator[None]:
    """Write what the server says to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("%(asctime)s  %(message)s", "%Y-%m-%dT%H:%M:%S%z"))
    loggers = [logging.getLogger(name) for name in ("runtime.server", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(handler)
        # What uvicorn warns of, any client can do: requests that are no HTTP, and upgrades.
        is_uvicorn = logger.name == "uvicorn.error"
        logger.setLevel(logging.ERROR if is_uvicorn else logging.WARNING if quiet else logging.INFO)
        logger.propagate = False
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True
