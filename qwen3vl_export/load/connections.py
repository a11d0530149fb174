"""Connections to one HTTP server, one for each thread, which later requests of the thread use again."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from runtime.errors import RequestError, UsageError

_PIECE_BYTES = 1 << 16
_SCHEMES: Mapping[str, type[http.client.HTTPConnection]] = {
    "http": http.client.HTTPConnection,
    "https": http.client.HTTPSConnection,
}


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        scheme: http or https.
        host: Its name or number.
        port: None for that of the scheme.
        path: What the paths of its API begin with, without a slash at the end.
    """

    scheme: str
    host: str
    port: int | None
    path: str

    @classmethod
    def parse(cls, url: str) -> Address:
        """Return the address that a URL names; a /v1 at its end, which some clients want, may be there or not.

        Raises:
            UsageError: It is no such URL.
        """
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise UsageError(f"--url {url}: {error}", remedy="give a URL such as http://127.0.0.1:8000") from error
        is_plain = not (parts.query or parts.fragment or parts.username or parts.password)
        if parts.scheme not in _SCHEMES or not parts.hostname or not is_plain:
            raise UsageError(
                "--url: expected http:// or https://, a host and a port, without user, query or fragment",
                remedy="give a URL such as http://127.0.0.1:8000, and a key with --api-key-file",
            )
        return cls(parts.scheme, parts.hostname, port, parts.path.rstrip("/").removesuffix("/v1"))

    def __str__(self) -> str:
        """Return it as a URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}{f':{self.port}' if self.port is not None else ''}{self.path}"


class Connections:
    """The connections of all threads.

    Args:
        address: Where the server is.
        headers: Sent with each request.
        timeout_s: How long a connection may take, and the next bytes of an answer.
    """

    def __init__(self, address: Address, headers: Mapping[str, str], timeout_s: float = 600.0) -> None:
        self.address = address
        self._headers, self._timeout_s = dict(headers), timeout_s
        self._own = threading.local()
        self._all: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()
        self._is_stopped = False

    @contextmanager
    def response(self, method: str, path: str, body: bytes | None = None) -> Iterator[http.client.HTTPResponse]:
        """Send a request and return the response, whose body is then read in this context.

        A connection that the server closed since the last request is opened again.

        Args:
            method: GET or POST.
            path: Begins with a slash.
            body: JSON.

        Raises:
            RequestError: There is no connection, or it ends within the answer.
        """
        response, is_complete = None, False
        try:
            response = self._sent(method, self.address.path + path, body)
            yield response
            is_complete = response.isclosed() and not response.will_close
        except ssl.SSLError as error:
            raise RequestError(f"{self.address}: {error.reason}", remedy="check the certificate") from error
        except TimeoutError as error:
            text = f"{self.address} sent nothing for {self._timeout_s:g} s"
            raise RequestError(text, remedy="ask for less at a time") from error
        except OSError as error:
            if response is not None:
                raise cut_off() from error
            text = f"no connection to {self.address}: {error.strerror or error}"
            raise RequestError(text, remedy="check --url, and that the server runs") from error
        except http.client.IncompleteRead as error:
            raise cut_off() from error
        except http.client.HTTPException as error:
            text = f"{self.address} does not answer as HTTP servers do: {type(error).__name__}"
            raise RequestError(text, remedy="check --url") from error
        finally:
            if not is_complete:
                self._drop()

    def stop(self) -> None:
        """End all connections, and open no others; who reads from one gets an error."""
        self._is_stopped = True
        with self._lock:
            connections = list(self._all)
        for connection in connections:
            if (sock := connection.sock) is not None:
                with contextlib.suppress(OSError):  # it is closed already
                    sock.shutdown(socket.SHUT_RDWR)

    def _sent(self, method: str, path: str, body: bytes | None) -> http.client.HTTPResponse:
        connection: http.client.HTTPConnection | None = getattr(self._own, "connection", None)
        if connection is not None:
            try:
                return self._on(connection, method, path, body)
            except (ConnectionError, http.client.BadStatusLine):
                self._drop()  # closed while it was not used
        connection = _SCHEMES[self.address.scheme](self.address.host, self.address.port, timeout=self._timeout_s)
        self._own.connection = connection
        with self._lock:
            self._all.add(connection)
        return self._on(connection, method, path, body)

    def _on(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None
    ) -> http.client.HTTPResponse:
        connection.request(method, path, body, self._headers)
        if self._is_stopped:  # looked at once there is a socket, which `stop` finds from then on
            raise ConnectionError("the load was stopped")
        return connection.getresponse()

    def _drop(self) -> None:
        connection = getattr(self._own, "connection", None)
        if connection is not None:
            connection.close()
            with self._lock:
                self._all.discard(connection)
            self._own.connection = None


def pieces(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """Yield the bytes of a body as they come."""
    while piece := response.read1(_PIECE_BYTES):
        yield piece


def cut_off() -> RequestError:
    """Return the error of an answer that ends too early."""
    return RequestError("the answer ended before it was complete", remedy="look into the log of the server")
