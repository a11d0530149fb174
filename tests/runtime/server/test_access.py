"""Who may ask: API keys, names of the host, pages of other sites; and how many at once."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from helpers.http_server import Client, running, until
from helpers.serving import serving
from runtime.model import Qwen3VLModel
from runtime.server import access


@pytest.fixture(scope="module")
def guarded(demo_engine: Path):  # type: ignore[no-untyped-def]
    with running(
        Qwen3VLModel.from_engine(demo_engine),
        api_keys=("first-key", "second-key"),
        allowed_origins=("https://chat.example.org",),
        allowed_hosts=("gpu-box",),
    ) as client:
        yield client


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_each_key_is_taken(guarded: Client, key: str) -> None:
    assert guarded.ask("/v1/models", headers={"authorization": f"Bearer {key}"}).status == 200
    assert guarded.ask("/v1/models", headers={"authorization": f"bearer {key}"}).status == 200


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize(
    "header", [None, "Bearer", "Bearer ", "Bearer first", "Basic first-key", "first-key", "Bearer ä"]
)
def test_without_a_key(guarded: Client, path: str, header: str | None) -> None:
    answered = guarded.ask(path, headers={} if header is None else {"authorization": header})
    assert answered.status == 401 and answered.error["code"] == "invalid_api_key"
    assert answered.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/health", "/ready", "/"])
def test_what_needs_no_key(guarded: Client, path: str) -> None:
    assert guarded.ask(path).status == 200


def test_keys_are_compared_in_constant_time(guarded: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = access.hmac.compare_digest
    monkeypatch.setattr(access.hmac, "compare_digest", lambda *both: compared.append(both) or compare(*both))
    guarded.ask("/v1/models", headers={"authorization": "Bearer first-key"})
    assert len(compared) == 2, "also those after the one that fits"
    assert {len(each) for both in compared for each in both} == {32}, "hashes, whose lengths tell nothing"


_KEY = {"authorization": "Bearer first-key"}


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:9", "gpu-box", "GPU-BOX:1", "localhost"])
def test_names_of_the_host(guarded: Client, host: str) -> None:
    assert guarded.ask("/v1/models", headers={**_KEY, "host": host}).status == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "a@localhost", "", "[::1", "127.0.0.1.nip.io"]
)
def test_a_page_that_rebinds_its_name_is_refused(guarded: Client, host: str) -> None:
    assert guarded.ask("/v1/models", headers={**_KEY, "host": host}).error["code"] == "wrong_host"


def test_pages_of_other_sites(guarded: Client) -> None:
    own = {"host": f"127.0.0.1:{guarded.port}", "origin": f"http://127.0.0.1:{guarded.port}"}
    assert guarded.ask("/v1/models", headers={**_KEY, **own}).status == 200
    proxied = {"host": "gpu-box", "origin": "https://gpu-box"}  # TLS ends at a proxy
    assert guarded.ask("/v1/models", headers={**_KEY, **proxied}).status == 200
    allowed = guarded.ask("/v1/models", headers={**_KEY, "origin": "https://chat.example.org"})
    assert allowed.status == 200
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example.org"
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "https://chat.example.org.evil.example"):
        refused = guarded.ask("/v1/models", headers={**_KEY, "origin": origin})
        assert refused.error["code"] == "wrong_origin" and "access-control-allow-origin" not in refused.headers


def test_a_browser_may_ask_first(guarded: Client) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-stainless-os"}
    answered = guarded.ask(
        "/v1/chat/completions", method="OPTIONS", headers={**asks, "origin": "https://chat.example.org"}
    )
    assert answered.status == 200 and "x-stainless-os" in answered.headers["access-control-allow-headers"]
    refused = guarded.ask("/v1/chat/completions", method="OPTIONS", headers={**asks, "origin": "https://evil.example"})
    assert refused.status == 403


def test_too_many_requests_are_told_when_to_come_again(opened: Qwen3VLModel) -> None:
    model = serving(opened)
    with running(model, max_requests=1) as client:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3000, "ignore_eos": True}
        with client.begin(body):
            until(lambda: model.statistics()["running"] == 1)
            refused = client.chat("Hi")
            assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
            assert refused.error["type"] == "rate_limit_error"
            assert client.ask("/health").status == 200
        until(lambda: model.statistics()["running"] == 0)
        assert client.chat("Hi").status == 200


def test_a_full_queue_says_when_to_come_again(opened: Qwen3VLModel) -> None:
    model = serving(opened, max_sequences=1, max_queue=1)
    with running(model, max_requests=10) as client:
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3000, "ignore_eos": True}
        with client.begin(body):
            until(lambda: model.statistics()["running"] == 1)
            with client.begin(body):
                until(lambda: model.statistics()["waiting"] == 1)
                refused = client.chat("Hi")
                assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1


@pytest.mark.parametrize("logs_text", [False, True])
def test_the_log_holds_no_texts_unless_asked(
    opened: Qwen3VLModel, logs_text: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with running(serving(opened), logs_text=logs_text) as client:
        client.chat("the secret word is xyzzy")
        client.chat("the secret word is xyzzy", temperature=-1)
        client.ask("/v1/chat/completions?xyzzy", raw=b'{"messages": "xyzzy"}')
        client.ask("/v1/completions", {"prompt": "xyzzy", "max_tokens": 1})
    ours = [each.getMessage() for each in caplog.records if each.name.startswith(("runtime", "uvicorn"))]
    assert sum("/v1/chat/completions 200" in line for line in ours) == 1
    assert any("xyzzy" in line for line in ours) == logs_text
