"""`qwen3vl serve` as a process: what it says, whom it lets in, and how it ends."""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="needs the extra serve")
pytest.importorskip("uvicorn", reason="needs the extra serve")

from helpers.http_server import Client, shown, until
from qwen3vl_export.cli.engines import name_of

_COMMAND = [sys.executable, "-m", "qwen3vl_export.cli.run", "serve"]
_LONG = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 400, "ignore_eos": True, "stream": True}


class Process:
    """A server and what it has said so far."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen([*_COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if "serving " in line:
                self._ready.set()
        self._ready.set()

    @property
    def client(self) -> Client:
        assert self._ready.wait(120)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", "".join(self.said))
        assert found is not None, self.said
        return Client(int(found[1]))

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(120)
        self._reader.join(10)
        return code


@contextmanager
def served(*arguments: str) -> Iterator[Process]:
    found = Process(*arguments, "--port", "0")
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def test_from_a_checkpoint_to_an_endpoint(tmp_path: Path) -> None:
    for said in ("built", "found in the cache"):
        with served("digits=demo", "--target", "ort-cpu-fp32", "--cache", str(tmp_path)) as server:
            assert server.client.chat(shown(), model="digits").status == 200
            assert any(line.startswith("engine: ") and said in line for line in server.said)
            assert server.end() == 0
    assert len([each for each in tmp_path.iterdir() if each.name.startswith("demo-")]) == 1


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"name": "demo"}, "demo"),
        ({"name": "/home/somebody/Qwen3-VL-2B"}, "Qwen3-VL-2B"),
        ({"name": "checkpoints/mine/", "revision": None}, "mine"),
        ({"name": "Qwen/Qwen3-VL-2B-Instruct", "revision": "a" * 40}, "Qwen/Qwen3-VL-2B-Instruct"),
        ({}, "engine"),
    ],
)
def test_a_name_says_no_path(source: dict[str, Any], name: str) -> None:
    assert name_of(SimpleNamespace(source=source), Path("/some/engine")) == name  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_answers_what_was_accepted(demo_engine: Path, number: int) -> None:
    with served(str(demo_engine)) as server:
        connection = server.client.begin(_LONG)
        first = connection.recv(1 << 16)
        assert first.startswith(b"HTTP/1.1 200")
        assert server.end(number) == 0
        rest = b""
        while block := connection.recv(1 << 16):
            rest += block
        assert b"data: [DONE]" in rest and b'"finish_reason":"length"' in rest
        assert not any("Traceback" in line for line in server.said)
        assert sum("POST /v1/chat/completions 200" in line for line in server.said) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(demo_engine: Path, number: int) -> None:
    with served(str(demo_engine)) as server:
        connections = [server.client.begin({**_LONG, "max_tokens": 4000}) for _ in range(20)]
        # Any of them: several threads prepare requests, so the first may wait behind eight that run for minutes.
        assert select.select(connections, [], [], 60)[0]
        server.process.send_signal(number)
        until(lambda: _is_refused(server.client.port))
        assert server.end(number) == 0
        assert not any("Traceback" in line for line in server.said), server.said


def _is_refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_a_drain_that_takes_too_long_is_cut(demo_engine: Path) -> None:
    with served(str(demo_engine), "--drain-timeout", "0", "--max-sequences", "1") as server:
        streamed = server.client.begin({**_LONG, "max_tokens": 4000})
        assert streamed.recv(100)
        whole = server.client.begin({**_LONG, "max_tokens": 4000, "stream": False})
        until(lambda: b'waiting{model_name="demo"} 1.0' in server.client.ask("/metrics").content)
        assert server.end() == 0
        for connection in (streamed, whole):
            rest = b""
            while block := connection.recv(1 << 16):
                rest += block
            assert b"the server was stopped before the answer was complete" in rest
        assert not any("Traceback" in line or "ASGI" in line for line in server.said), server.said


def test_names_and_keys(demo_engine: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys.txt"
    keys.write_text("# of the web shop\nabc123\n\n")
    arguments = [f"small={demo_engine}", str(demo_engine), "--api-key-file", str(keys), "--quiet"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Process(*arguments, "--port", str(port))
    try:
        client = Client(port)
        for _ in range(600):
            try:
                if client.ask("/ready").status == 200:
                    break
            except ConnectionRefusedError:
                threading.Event().wait(0.1)
        assert client.ask("/v1/models").status == 401
        models = client.ask("/v1/models", headers={"authorization": "Bearer abc123"}).json
        assert [each["id"] for each in models["data"]] == ["small", "demo"]
        assert found.end() == 0 and found.said == []
    finally:
        found.process.kill()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ENGINE", "a=ENGINE", "a=ENGINE"], 2, "a name of its own: NAME=ENGINE"),
        (["=ENGINE"], 2, "NAME=ENGINE"),
        (["ENGINE", "--port", "70000"], 2, "0 to 65535"),
        (["ENGINE", "--port", "PORT"], 2, "another --port"),
        (["ENGINE", "--host", "192.0.2.1"], 2, "--host 127.0.0.1"),
        (["ENGINE", "--host", "no.such.host.invalid"], 2, "--host 127.0.0.1"),
        (["ENGINE", "--api-key-file", "EMPTY"], 2, "openssl rand"),
        (["ENGINE", "--api-key-file", "MISSING"], 2, "openssl rand"),
        (["ENGINE", "--max-body", "0"], 2, "--max-body"),
        (["ENGINE", "--max-body", "nan"], 2, "--max-body"),
        (["ENGINE", "--request-timeout", "nan"], 2, "request_timeout"),
        (["ENGINE", "--max-choices", "0"], 2, "max_choices"),
    ],
)
def test_what_is_refused_at_the_start(
    arguments: list[str], code: int, words: str, demo_engine: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").write_text("\n# none\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names = {
            "ENGINE": str(demo_engine),
            "PORT": str(taken.getsockname()[1]),
            "EMPTY": str(tmp_path / "empty"),
            "MISSING": str(tmp_path / "missing"),
        }
        for name, value in names.items():
            arguments = [argument.replace(name, value) for argument in arguments]
        given = arguments if "--port" in arguments else [*arguments, "--port", "0"]
        done = subprocess.run([*_COMMAND, *given], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert words.replace("_", "-") in done.stderr.replace("_", "-") and "remedy: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_extra_is_named_where_it_is_missing(demo_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from qwen3vl_export.cli import serve
    from runtime.errors import UsageError

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "uvicorn" else find(name, *more)
    )
    with pytest.raises(UsageError, match="uvicorn") as caught:
        serve.check_installed()
    assert "`serve`" in str(caught.value.remedy)


def test_nothing_of_the_server_is_imported_otherwise(demo_engine: Path) -> None:
    code = (
        "import sys; from qwen3_vl import Qwen3VLModel; import qwen3vl_export.cli.run; "
        f"Qwen3VLModel.from_engine({str(demo_engine)!r}).generate('x', max_new_tokens=1); "
        "print([name for name in ('fastapi', 'uvicorn', 'starlette', 'pydantic', 'prometheus_client') "
        "if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
