"""`ServerSettings`: what a server takes, from whom, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UsageError


@dataclass(frozen=True)
class ServerSettings:
    """Limits and permissions of a server; all times in seconds.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0 takes any that is free.
        api_keys: Requests need one of them as a bearer token; none are needed if there are none.
        allowed_hosts: Names under which the server may be asked for beside `host`. Only looked at on loopback
            addresses, where a page of another site could reach it under a name of its own (DNS rebinding).
        allowed_origins: Origins of pages, such as `https://chat.example.org`, that may call the server from a browser;
            its own page always may.
        allowed_url_hosts: Hosts from which images and videos are fetched by URL; none by default.
        local_folder: Requests may name files of this machine, by paths that begin there. For batches of one's own; a
            server has none.
        max_body_bytes: Longest body of a request.
        max_bodies_bytes: Bytes of the bodies of all requests in progress.
        max_requests: Most requests in progress; None for as many as the engines run and queue.
        max_connections: Most connections; the longest idle one is closed for a new one.
        max_answer_tokens: Most tokens of an answer; None for what the context leaves.
        max_choices: Most answers to one request (`n`, times the number of prompts).
        max_frames: Most frames of one video that a request may ask for.
        request_timeout_s: An answer that takes longer fails; None for no limit.
        body_timeout_s: A body has to arrive within this time.
        idle_timeout_s: A connection that sends no complete headers for this long is closed.
        write_timeout_s: A client that takes nothing for this long is dropped.
        drain_timeout_s: When the server is stopped, how long requests in progress may go on.
        fetch_timeout_s: All images and videos of a request that are fetched have to arrive within this time.
        max_fetch_bytes: Most bytes of all images and videos of a request that are fetched.
        max_redirects: How often a fetch may be sent on.
        logs_text: Write prompts and answers into the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    allowed_url_hosts: tuple[str, ...] = ()
    local_folder: Path | None = None
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 512 << 20
    max_requests: int | None = None
    max_connections: int = 1024
    max_answer_tokens: int | None = None
    max_choices: int = 16
    max_frames: int = 768
    request_timeout_s: float | None = 600.0
    body_timeout_s: float = 60.0
    idle_timeout_s: float = 15.0
    write_timeout_s: float = 60.0
    drain_timeout_s: float = 600.0
    fetch_timeout_s: float = 15.0
    max_fetch_bytes: int = 64 << 20
    max_redirects: int = 3
    logs_text: bool = False

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UsageError: One is out of range.
        """
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"port = {self.port}, expected 0 to 65535", remedy="8000 is the default, 0 takes any")
        for name in (
            *("max_body_bytes", "max_bodies_bytes", "max_connections", "max_choices", "max_frames", "max_fetch_bytes"),
            *("max_requests", "max_answer_tokens"),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} = {value}, expected at least 1", remedy=f"leave {name} out for the default")
        for name in (
            *("request_timeout_s", "body_timeout_s", "idle_timeout_s", "write_timeout_s", "fetch_timeout_s"),
            *("drain_timeout_s", "max_redirects"),
        ):
            value = getattr(self, name)
            if value is not None and not (0 if name in ("max_redirects", "drain_timeout_s") else 1e-3) <= value <= 1e9:
                raise UsageError(f"{name} = {value} is out of range", remedy=f"leave {name} out for the default")
        if any(not key.strip() or not key.isascii() for key in self.api_keys):
            raise UsageError("an API key is empty or not ASCII", remedy="make one with: openssl rand -hex 32")
