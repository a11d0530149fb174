"""Fetch an image or a video by URL: from hosts that are allowed, at public addresses, within time and size.

A name is resolved once, its addresses are checked, and the connection is made to one of those: a name that resolves
otherwise a moment later (DNS rebinding) changes nothing. Each redirect is checked as the first URL was.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urljoin, urlsplit

from runtime.server.errors import ApiError
from runtime.server.settings import ServerSettings
from runtime.shown import shown

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_LONGEST_URL = 8192


class Fetcher:
    """Fetches what one request names, within the limits of a server; its time begins when it is made.

    Args:
        settings: The server's.
        is_allowed_address: Whether an address may be connected to; by default, whether it is a public one.
    """

    def __init__(self, settings: ServerSettings, is_allowed_address: Callable[[str], bool] | None = None) -> None:
        self._settings = settings
        self._hosts = frozenset(host.lower() for host in settings.allowed_url_hosts)
        self._is_allowed = is_allowed_address or is_public
        self._deadline = time.monotonic() + settings.fetch_timeout_s
        self._left_bytes = settings.max_fetch_bytes

    def __call__(self, url: str) -> bytes:
        """Return what is behind a URL.

        Raises:
            ApiError: Its host is not allowed, it leads to a private address, or it cannot be fetched in time.
        """
        for _ in range(self._settings.max_redirects + 1):
            found = self._get(url, self._deadline)
            if isinstance(found, bytes):
                return found
            url = urljoin(url, found)
        raise _refusal(url, f"it is redirected more than {self._settings.max_redirects} times")

    def _get(self, url: str, deadline: float) -> bytes | str:
        """Return the contents, or where they are said to be."""
        scheme, host, port, target = self._parts(url)
        address = self._address(url, host, port)
        try:
            with _connected(scheme, host, port, address, deadline) as connection:
                connection.request("GET", target, headers={"accept": "image/*, video/*", "accept-encoding": "identity"})
                response = connection.getresponse()
                body = self._read(url, response) if response.status == 200 else b""
                if time.monotonic() >= deadline:  # then what was read ends where the connection was closed
                    raise TimeoutError
                location = response.getheader("location")
                if response.status in _REDIRECTS and location:
                    return location
                if response.status != 200:
                    raise _refusal(url, f"the host answers with status {response.status}")
                return body
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if time.monotonic() >= deadline:
                reason = f"it is not there after {self._settings.fetch_timeout_s:g} s"
            raise _refusal(url, reason) from error

    def _read(self, url: str, response: http.client.HTTPResponse) -> bytes:
        body = response.read(self._left_bytes + 1)
        if len(body) > self._left_bytes:
            most = self._settings.max_fetch_bytes
            raise _refusal(url, f"what the request names by URL has more than {most} bytes")
        self._left_bytes -= len(body)
        return body

    def _parts(self, url: str) -> tuple[str, str, int, str]:
        """Return scheme, host, port and target of a URL that may be fetched."""
        if not self._hosts:
            raise ApiError(
                400,
                "this server fetches no images or videos by URL. Remedy: send the file itself as a data URL, "
                "data:image/png;base64,…, or start the server with --allow-url-host HOST",
                code="url_not_allowed",
            )
        if len(url) > _LONGEST_URL or not url.isascii() or any(ord(mark) <= 32 for mark in url):
            raise _refusal(url, "it is too long, or not plain ASCII")
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError as error:
            raise _refusal(url, str(error)) from error
        if parts.scheme not in _PORTS or parts.username is not None or parts.password is not None:
            raise _refusal(url, "expected http://HOST/… or https://HOST/…, without a name and password")
        if host not in self._hosts:
            raise ApiError(
                400,
                f"the host {shown(host)} is not one that this server fetches from. Remedy: send the file itself as a "
                f"data URL, or start the server with --allow-url-host {shown(host)}",
                code="url_not_allowed",
            )
        port = _PORTS[parts.scheme] if port is None else port
        return parts.scheme, host, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")

    def _address(self, url: str, host: str, port: int) -> str:
        """Return an address of a host; all that it has must be public."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise _refusal(url, f"its host cannot be found: {error}") from error
        addresses = [str(entry[4][0]) for entry in found]
        for address in addresses:
            if not self._is_allowed(address):
                raise ApiError(
                    400,
                    f"the host {shown(host)} is at an address that is not public, which is never fetched from. "
                    "Remedy: send the file itself as a data URL",
                    code="url_not_allowed",
                )
        return addresses[0]


def is_public(address: str) -> bool:
    """Return whether an IP address is one of the public Internet; one inside of another (6to4 …) counts, too."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return is_public(str(ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)))
        if int(found) < 1 << 32 or found.is_site_local:  # ::10.0.0.1, and fec0::/10: forms that are deprecated
            return False
        inner = [found.ipv4_mapped, found.sixtofour, *(found.teredo or ())]
        if any(each is not None and not is_public(str(each)) for each in inner):
            return False
        if found.ipv4_mapped is not None:
            return True
    return found.is_global and not found.is_multicast


_NAT64 = ipaddress.ip_network("64:ff9b::/96")


@contextmanager
def _connected(
    scheme: str, host: str, port: int, address: str, deadline: float
) -> Iterator[http.client.HTTPConnection]:
    """Connect to an address, which knows the host by its name; all that is read until the deadline."""
    left_s = max(0.001, deadline - time.monotonic())
    connection = http.client.HTTPConnection(host, port)
    connected = [socket.create_connection((address, port), left_s)]

    def hang_up() -> None:
        with suppress(OSError):
            connected[-1].shutdown(socket.SHUT_RDWR)

    # A time limit of a socket begins anew with each byte; this one does not.
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), hang_up)
    timer.daemon = True
    timer.start()
    try:
        if scheme == "https":
            # The plain socket hands its connection over, so that it could not be shut down any more.
            context = ssl.create_default_context()
            secure = context.wrap_socket(connected[0], server_hostname=host, do_handshake_on_connect=False)
            connected.append(secure)
            secure.do_handshake()
        connection.sock = connected[-1]
        yield connection
    finally:
        timer.cancel()
        connection.close()
        connected[-1].close()


def _refusal(url: str, reason: str) -> ApiError:
    return ApiError(
        400,
        f"{shown(url, 100)} cannot be fetched: {shown(reason, 200)}. Remedy: send the file itself as a data URL",
        code="url_not_fetched",
    )
