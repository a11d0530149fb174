"""Fetching by URL: allowed hosts at public addresses, within time, size and redirects."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from helpers.http_server import HELD_OUT, running
from helpers.serving import asked, serving
from runtime.model import Qwen3VLModel
from runtime.server.errors import ApiError
from runtime.server.fetch import Fetcher, is_public
from runtime.server.settings import ServerSettings

_PNG = HELD_OUT.read_bytes()


class _Site(BaseHTTPRequestHandler):
    """Pictures, and all that a bad host may do."""

    asked: list[str] = []  # noqa: RUF012 (of all its requests)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        getattr(self, f"_{self.path.strip('/').partition('?')[0]}", self._missing)()

    def _picture(self) -> None:
        self._send(200, _PNG)

    def _missing(self) -> None:
        self._send(404, b"no")

    def _here(self) -> None:
        self._go("/picture")

    def _loop(self) -> None:
        self._go("/loop")

    def _elsewhere(self) -> None:
        self._go("http://elsewhere.example/a.png")

    def _inside(self) -> None:
        self._go("http://127.0.0.1:1/a.png")

    def _file(self) -> None:
        self._go("file:///etc/passwd")

    def _large(self) -> None:
        self._send(200, b"x" * 100_000)

    def _endless(self) -> None:
        self.send_response(200)
        self.end_headers()
        self._drip(b"x" * 1000, 0.0)

    def _slow(self) -> None:
        self.send_response(200)
        self.end_headers()
        self._drip(b"x", 0.02)

    def _headers(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        self._drip(b"x: y\r\n"[:1], 0.02)

    def _drip(self, data: bytes, pause_s: float) -> None:
        try:
            for _ in range(100_000):
                self.wfile.write(data)
                time.sleep(pause_s)
        except OSError:
            pass

    def _go(self, where: str) -> None:
        self.send_response(302)
        self.send_header("location", where)
        self.end_headers()

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_address[1]}"
    server.shutdown()


def fetcher(**settings: Any) -> Fetcher:
    chosen = {"allowed_url_hosts": ("localhost",), "fetch_timeout_s": 0.5, "max_fetch_bytes": 50_000}
    return Fetcher(ServerSettings(**{**chosen, **settings}), lambda address: True)


def refusal(fetch: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(url)
    assert caught.value.status == 400 and "Remedy: " in caught.value.message
    return caught.value


def test_a_picture_is_fetched(site: str) -> None:
    assert fetcher()(f"{site}/picture") == fetcher()(f"{site}/picture?size=1#part") == _PNG
    assert fetcher(allowed_url_hosts=("LOCALHOST",))(f"{site}/here") == _PNG


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("missing", "404"),
        ("loop", "redirected more than 3 times"),
        ("elsewhere", "elsewhere.example"),
        ("inside", "127.0.0.1"),
        ("file", "expected http"),
        ("large", "more than 50000 bytes"),
        ("endless", "more than 50000 bytes"),
        ("slow", "not there after 0.5 s"),
        ("headers", "not there after 0.5 s"),
    ],
)
def test_a_bad_host(site: str, path: str, word: str) -> None:
    assert word in refusal(fetcher(), f"{site}/{path}").message


@pytest.mark.parametrize(
    "url",
    [
        "http://user:secret@localhost/a",
        "http://localhost:99999/a",
        "http://[::1/a",
        "http://localhost/ä",
        "http://localhost/a b",
        "http://localhost/a\r\nhost: b",
        "ftp://localhost/a",
        "http:///a",
        "http://localhost" + "/a" * 10_000,
        "http://localhost:1/a",
    ],
)
def test_urls_that_are_not_asked(url: str) -> None:
    refusal(fetcher(), url)


def test_the_bytes_of_all_urls_of_a_request_are_counted(site: str) -> None:
    fetch = fetcher(max_fetch_bytes=2 * len(_PNG))
    assert fetch(f"{site}/picture") == fetch(f"{site}/picture") == _PNG
    assert "what the request names by URL has more than" in refusal(fetch, f"{site}/picture").message


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
@pytest.mark.parametrize("path", ["picture", "slow", "headers"])
def test_https_is_fetched_within_the_same_time(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    server.daemon_threads = True
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    url = f"https://localhost:{server.server_address[1]}/{path}"
    try:
        if path == "picture":
            assert fetcher(fetch_timeout_s=60)(url) == _PNG
        else:
            assert "not there after" in refusal(fetcher(), url).message
        monkeypatch.undo()
        assert "CERTIFICATE_VERIFY_FAILED" in refusal(fetcher(fetch_timeout_s=60), url).message
    finally:
        server.shutdown()


def test_only_hosts_that_are_allowed(site: str) -> None:
    assert "--allow-url-host" in refusal(fetcher(allowed_url_hosts=()), f"{site}/picture").message
    assert "--allow-url-host" in refusal(fetcher(allowed_url_hosts=("example.com",)), f"{site}/picture").message
    for host in ("localhost.example.com", "xlocalhost", "127.0.0.1"):
        assert refusal(fetcher(), site.replace("localhost", host)).code == "url_not_allowed"


def test_private_addresses_are_refused_also_behind_a_name(site: str) -> None:
    _Site.asked.clear()
    settings = ServerSettings(allowed_url_hosts=("localhost",))
    error = refusal(Fetcher(settings), f"{site}/picture")
    assert error.code == "url_not_allowed" and "not public" in error.message
    assert _Site.asked == []


def test_a_name_is_resolved_once(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address that was checked is the one that is connected to, whatever the name says later."""
    port = int(site.rpartition(":")[2])
    answers = [[(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]]
    checked: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> Any:
        if host == "localhost":
            return answers.pop()
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (host, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    settings = ServerSettings(allowed_url_hosts=("localhost",))
    fetch = Fetcher(settings, lambda address: checked.append(address) or True)  # type: ignore[func-returns-value]
    assert fetch(f"{site}/picture") == _PNG
    assert checked == ["127.0.0.1"] and answers == []


def test_one_private_address_among_others_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (each, 80)) for each in ("93.184.216.34", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: both)
    error = refusal(Fetcher(ServerSettings(allowed_url_hosts=("a.example",))), "http://a.example/")
    assert error.code == "url_not_allowed"


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1"])
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
        ),
        *("224.0.0.1", "255.255.255.255", "240.0.0.1", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1"),
        *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::a00:1", "2002:7f00:1::", "localhost", ""),
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "fec0::1", "::10.0.0.1", "::1.1.1.1"),
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_a_server_fetches_what_it_may(opened: Qwen3VLModel, site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.fetch.is_public", lambda address: True)
    with running(serving(opened), allowed_url_hosts=("localhost",)) as client:
        part = {"type": "image_url", "image_url": {"url": f"{site}/picture"}}
        answered = client.chat([part, {"type": "text", "text": "Which digits are there?"}])
        expected = opened.generate(asked("Which digits are there?", 0))
        assert answered.json["choices"][0]["message"]["content"] == expected.text
        part["image_url"]["url"] = f"{site}/missing"  # type: ignore[index]
        assert client.chat([part]).error["code"] == "url_not_fetched"
