"""`python -m benchmarks serve-hostile`: a server under mutated bodies, idle connections, overload, and kill -9."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from benchmarks import measure, options
from benchmarks.result_files import RESULTS, markdown, write
from benchmarks.serve_process import Memory, ServerProcess, own_server
from qwen3vl_export.load.prompts import Prompts
from qwen3vl_export.load.wire import chat_messages
from runtime.manifest import Manifest

_OVERLOAD = 10
_SAMPLE_S = 1.0
_CALIBRATION_S = 15.0
_SETTLED = 0.2  # of the time of overload: buffers and threads are there then
_MUTATIONS = (b"", b"\xff", b"9", b"-1", b'"', b"{", b"[", b"null", b"\\ud800", b"1e999", b"NaN", b"\0", b"true")


@dataclass
class Answer:
    """A response: its status, 0 where there was none, its headers and its body."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_whole(self) -> bool:
        """Whether it is a stream that came to its end."""
        return self.status == 200 and b"data: [DONE]" in self.body


class Asker:
    """Asks a server, each time over a connection of its own."""

    def __init__(self, url: str) -> None:
        self.port = urlsplit(url).port or 0

    async def ask(self, path: str, body: bytes | None = None) -> Answer:
        """Send a request and return the response."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return Answer(0)
        try:
            head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
            if body is not None:
                head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            writer.write(head.encode() + b"\r\n" + (body or b""))
            text = await reader.read()
        except OSError:
            return Answer(0)
        finally:
            writer.close()
        head_text, _, content = text.partition(b"\r\n\r\n")
        lines = head_text.decode("latin-1").split("\r\n")
        if not lines[0]:
            return Answer(0)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        return Answer(int(lines[0].split()[1]), headers, content)


def serve_hostile(
    engine: Path,
    bodies: Annotated[int, typer.Option(help="Mutated bodies.")] = 10_000,
    connections: Annotated[int, typer.Option(help="Connections that send nothing.")] = 10_000,
    minutes: Annotated[float, typer.Option(help="Time of ten times the load that the server can answer.")] = 10.0,
    threads: int = 2,
    results: options.Results = RESULTS,
) -> None:
    """Show what a server does that is asked wrongly, too much, and killed."""
    manifest = Manifest.read(engine)
    name = f"{Path(str(manifest.source.get('name'))).name}-{manifest.target}"
    result: dict[str, Any] = {"environment": measure.environment(), "engine": name}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = own_server(engine, threads, "--max-queue", "32")
        with ServerProcess(command, "/ready", log) as server:
            asker = Asker(server.url)
            result["bodies"] = asyncio.run(mutated(asker, bodies))
            result["connections"] = asyncio.run(idle(asker, connections))
            result["overload"] = asyncio.run(overload(asker, server.pid, minutes * 60))
            result["tracebacks"] = server.log().count("Traceback")
        result["kill"] = kill(command, log)
    write(f"hostile-{name}", result, table(result), results)


async def mutated(asker: Asker, number: int) -> dict[str, Any]:
    """Send bodies with errors, some at a time, and count the statuses."""
    chat = {
        "messages": chat_messages(Prompts(5, (32, 32)).messages(0)),
        "max_tokens": 2,
        "temperature": 0.5,
        "stop": ["x"],
        "logit_bias": {"5": 1},
        "stream": False,
    }
    function = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    bodies = [
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", {**chat, "tools": [function], "tool_choice": "auto"}),
        ("/v1/chat/completions", {**chat, "response_format": schema, "stream": True}),
        ("/v1/completions", {"prompt": ["a", "b"], "max_tokens": 2, "n": 2, "echo": True}),
        ("/tokenize", {"prompt": "a text", "return_token_strs": True}),
    ]
    statuses: Counter[int] = Counter()
    draw = random.Random(0)

    async def some(count: int) -> None:
        for _ in range(count):
            path, fields = draw.choice(bodies)
            body = bytearray(json.dumps(fields).encode())
            for _ in range(draw.randint(1, 4)):
                start = draw.randrange(len(body))
                body[start : start + draw.choice((0, 1, 2, 20))] = draw.choice(_MUTATIONS)
            statuses[(await asker.ask(path, bytes(body))).status] += 1

    await asyncio.gather(*(some(number // 4) for _ in range(4)))
    return {"statuses": dict(sorted(statuses.items())), "server_errors": sum(statuses[each] for each in (0, 500))}


async def idle(asker: Asker, number: int) -> dict[str, Any]:
    """Open connections that send nothing, and ask beside them."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[asyncio.StreamWriter] = []
    statuses: Counter[int] = Counter()
    body = _body(0, None)
    for index in range(number):
        try:
            held.append((await asyncio.open_connection("127.0.0.1", asker.port))[1])
        except OSError:
            statuses[-1] += 1  # refused; others go on
        if index % 500 == 0:
            statuses[(await asker.ask("/v1/chat/completions", body)).status] += 1
    for writer in held:
        writer.close()
    return {"opened": len(held), "statuses_beside_them": dict(statuses)}


async def overload(asker: Asker, pid: int, duration_s: float) -> dict[str, Any]:
    """Find what the server answers in a second, then ask ten times as much for a while."""
    capacity = await _capacity(asker)
    rate = _OVERLOAD * capacity
    outcomes: Counter[str] = Counter()
    memory: list[tuple[float, int]] = []
    running: set[asyncio.Task[None]] = set()
    start = time.perf_counter()

    async def one(index: int) -> None:
        outcomes[_outcome(await asker.ask("/v1/chat/completions", _body(index)))] += 1

    async def watch() -> None:
        while True:
            memory.append((time.perf_counter() - start, Memory.of(pid).rss))
            await asyncio.sleep(_SAMPLE_S)

    watching = asyncio.create_task(watch())
    draw, index = random.Random(0), 0
    while (now := time.perf_counter() - start) < duration_s:
        task = asyncio.create_task(one(index))
        running.add(task)
        task.add_done_callback(running.discard)
        index += 1
        # Arrivals are a Poisson process, whatever the answers.
        await asyncio.sleep(max(0.0, draw.expovariate(rate) - (time.perf_counter() - start - now)))
    while running:
        await asyncio.wait(running)
    watching.cancel()
    settled = [rss for when, rss in memory if when > _SETTLED * duration_s]
    half = max(1, len(settled) // 2)
    return {
        "capacity_per_s": capacity,
        "offered_per_s": index / duration_s,
        "seconds": duration_s,
        "outcomes": dict(outcomes),
        "rss_first_half_bytes": max(settled[:half], default=0),
        "rss_second_half_bytes": max(settled[half:], default=0),
    }


def _outcome(answer: Answer) -> str:
    if answer.is_whole:
        return "answered"
    if answer.status == 429:
        return "refused, with Retry-After" if "retry-after" in answer.headers else "refused, without Retry-After"
    return f"lost (status {answer.status})"


async def _capacity(asker: Asker) -> float:
    """Return how many requests a second are answered where eight clients ask again and again."""
    start, done = time.perf_counter(), 0

    async def client(number: int) -> None:
        nonlocal done
        index = 0
        while time.perf_counter() - start < _CALIBRATION_S:
            answer = await asker.ask("/v1/chat/completions", _body(10**6 + number * 10**4 + index))
            done += answer.is_whole  # after the wait, during which others count, too
            index += 1

    await asyncio.gather(*(client(number) for number in range(8)))
    return done / (time.perf_counter() - start)


def _body(index: int, image: tuple[int, int] | None = (64, 64)) -> bytes:
    messages = chat_messages(Prompts(10, image).messages(index))
    fields = {"max_tokens": 16, "temperature": 0, "ignore_eos": True, "stream": True}
    return json.dumps({"messages": messages, **fields}).encode()


def kill(command: list[str], log: Path) -> dict[str, Any]:
    """Kill a server that answers, start it again, and say how long that takes."""
    with ServerProcess(command, "/ready", log) as server:
        asker = Asker(server.url)

        async def ask_and_kill() -> None:
            asking = [asyncio.create_task(asker.ask("/v1/chat/completions", _body(index))) for index in range(4)]
            await asyncio.sleep(0.2)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.gather(*asking)

        asyncio.run(ask_and_kill())
    with ServerProcess(command, "/ready", log) as server:
        answered = asyncio.run(Asker(server.url).ask("/v1/chat/completions", _body(9)))
        return {"ready_again_s": server.ready_s, "answers_again": answered.is_whole}


def table(result: dict[str, Any]) -> str:
    """Return the result as a table."""
    load = result["overload"]
    growth = load["rss_second_half_bytes"] - load["rss_first_half_bytes"]
    rows: list[tuple[str, str]] = [
        ("mutated bodies", ", ".join(f"{count} × {status}" for status, count in result["bodies"]["statuses"].items())),
        ("idle connections", f"{result['connections']['opened']} opened"),
        ("asked beside them", _counts(result["connections"]["statuses_beside_them"])),
        ("capacity", f"{load['capacity_per_s']:.1f} requests/s"),
        ("overload", f"{load['offered_per_s']:.1f} requests/s for {load['seconds'] / 60:.1f} min"),
        ("outcomes", _counts(load["outcomes"])),
        ("memory", f"{load['rss_second_half_bytes'] / 1e6:.0f} MB, {growth / 1e6:+.1f} MB in the second half"),
        ("tracebacks", str(result["tracebacks"])),
        ("after kill -9", f"ready after {result['kill']['ready_again_s']:.1f} s"),
    ]
    return markdown([("what", "result"), *rows])


def _counts(counts: dict[Any, int]) -> str:
    return ", ".join(f"{count} × {name}" for name, count in counts.items())
