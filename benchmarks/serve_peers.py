"""`python -m benchmarks serve-peers`: our server and llama-server with the same requests, each alone in its turn."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import options
from benchmarks.measure import environment
from benchmarks.result_files import RESULTS, markdown, write
from benchmarks.serve_process import Memory, ServerProcess, cpu_s, own_server
from benchmarks.serve_work import Work, do
from qwen3vl_export.load.connections import Address
from qwen3vl_export.load.server import HttpServer
from runtime.errors import EngineError
from runtime.manifest import Manifest

OURS, PEER = "qwen3vl serve", "llama-server"
SIDES = (OURS, PEER)
_CONTEXT = 2048
_IMAGE_TOKENS = re.compile(r"decoding image batch \d+/\d+, n_tokens_batch = (\d+)")
_ENCODER = "has vision encoder"


def serve_peers(
    engine: Annotated[Path, typer.Argument(help="Engine folder.")],
    llama_server: Annotated[Path, typer.Option(help="The program, built for this machine.")],
    gguf: Annotated[Path, typer.Option(help="The same checkpoint in its format.")],
    mmproj: Annotated[Path, typer.Option(help="The checkpoint's vision tower.")],
    threads: Annotated[int, typer.Option(min=1, help="Threads of each server.")] = 2,
    clients: Annotated[str, typer.Option(help="Requests at once, with commas.")] = "1,4,8",
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client in a round.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="How often each server has its turn.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text, about.")] = 32,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    image_side: Annotated[int, typer.Option(min=32, help="Width and height of each image, a multiple of 32.")] = 512,
    peer_option: Annotated[list[str] | None, typer.Option(help="One more argument of llama-server.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and write no files.")] = False,
    results: options.Results = RESULTS,
) -> None:
    """Measure throughput and TTFT of requests with an image, at our server and at llama.cpp's, in turns.

    Each request has words and pixels of its own, so that no cache helps. Both servers run, and one at a time has work.
    """
    manifest = Manifest.read(engine)
    counts = [int(each) for each in clients.split(",")]
    sizes = {
        "threads": threads, "clients": counts, "requests": requests, "rounds": rounds, "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens, "image_side": image_side,
    }  # fmt: skip
    extra = list(peer_option or ())
    result: dict[str, Any] = {
        "model": Path(str(manifest.source.get("name"))).name,
        "target": manifest.target,
        "peer": {"gguf": gguf.name, "mmproj": mmproj.name, "bytes": gguf.stat().st_size + mmproj.stat().st_size},
        "peer_options": extra,
        "workload": sizes,
        "environment": environment(),
    }
    commands = {
        OURS: (own_server(engine, threads, "--max-context", str(_CONTEXT)), "/ready"),
        PEER: (peer_command(llama_server, gguf, mmproj, threads, max(counts)) + extra, "/health"),
    }
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        servers = {
            side: stack.enter_context(ServerProcess(command, ready, Path(name) / f"{number}.log"))
            for number, (side, (command, ready)) in enumerate(commands.items())
        }
        result |= _measure(servers, sizes)
        result["peer"] |= vision_of(servers[PEER].log())
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        write(f"peers-{result['model']}-{result['target']}", result, table(result), results)


def peer_command(program: Path, gguf: Path, mmproj: Path, threads: int, slots: int) -> list[str]:
    """Return the command of llama-server: as many slots as requests at once, and no cache of earlier prompts."""
    return [
        str(program), "--model", str(gguf), "--mmproj", str(mmproj), "--host", "127.0.0.1", "--port", "{port}",
        "--threads", str(threads), "--threads-batch", str(threads), "--parallel", str(slots),
        "--ctx-size", str(slots * _CONTEXT), "--cache-ram", "0", "--no-webui", "--verbosity", "4",
    ]  # fmt: skip


def vision_of(log: str) -> dict[str, Any]:
    """Return what llama-server's log says of images: how many it decoded, and their tokens.

    Raises:
        EngineError: It did not load the vision tower, or decoded no image.
    """
    found = [int(each) for each in _IMAGE_TOKENS.findall(log)]
    if _ENCODER not in log or not found:
        raise EngineError("llama-server saw no image by its own log", remedy="give the --mmproj of the checkpoint")
    return {"images": len(found), "visual_tokens": sorted(set(found))}


def _measure(servers: Mapping[str, ServerProcess], sizes: Mapping[str, Any]) -> dict[str, Any]:
    clients = {side: HttpServer(Address.parse(server.url)) for side, server in servers.items()}
    num_words = max(1, round(sizes["prompt_tokens"] / (clients[OURS].tokens_per_word() or 1.0)))
    shape = (num_words, sizes["new_tokens"], sizes["image_side"])
    for client in clients.values():
        do(client, Work(1, 1, *shape, seed=0))  # warms up
    turns: list[dict[str, Any]] = []
    for round_ in range(sizes["rounds"]):
        for count in sizes["clients"]:
            work = Work(count, count * sizes["requests"], *shape, seed=1 + 1000 * round_ + count)
            for side in SIDES if round_ % 2 else SIDES[::-1]:
                typer.echo(f"round {round_}: {count} at once, {side}", err=True)
                (other,) = (server for name, server in servers.items() if name != side)
                before = cpu_s(other.pid)
                measured = do(clients[side], work)
                idle = {"other_cpu_s": cpu_s(other.pid) - before}
                turns.append({"side": side, "clients": count, "round": round_, **measured, **idle})
    memory = {side: Memory.of(server.pid).rss for side, server in servers.items()}
    return {"turns": turns, "rss_bytes": memory}


def table(result: Mapping[str, Any]) -> str:
    """Return the table of a result: for each number of requests at once both servers, and the ratio."""
    sizes, peer = result["workload"], result["peer"]
    rows = [
        ["requests at once", "server", "tokens/s", "requests/s", "TTFT p50", "TTFT p95", "throughput, ours ÷ other"]
    ]
    for count in sizes["clients"]:
        speeds = {}
        for side in SIDES:
            turns = [each for each in result["turns"] if (each["side"], each["clients"]) == (side, count)]
            speeds[side] = [each["tokens_per_s"] for each in turns]
            times = [each for turn in turns for each in turn["ttft_s"]]
            ratio = "" if side == OURS else _ratio(speeds)
            rows.append([
                str(count), side, f"{statistics.median(speeds[side]):.2f}",
                f"{statistics.median(each['requests_per_s'] for each in turns):.3f}",
                *(f"{_percentile(times, q):.2f} s" for q in (50, 95)), ratio,
            ])  # fmt: skip
    prompts = {
        side: sorted({each for turn in result["turns"] if turn["side"] == side for each in turn["prompt_tokens"]})
        for side in SIDES
    }
    idle = max(turn["other_cpu_s"] / turn["wall_s"] for turn in result["turns"])
    size = f"{sizes['image_side']}x{sizes['image_side']}"
    return markdown(rows) + (
        f"\n{result['model']}: {result['target']}, and {peer['gguf']} with {peer['mmproj']}; {sizes['threads']} "
        f"threads each. Images of {size} random pixels, answers of {sizes['new_tokens']} "
        f"tokens, {sizes['requests']} requests of each client in each of {sizes['rounds']} rounds. Tokens of prompts: "
        f"{prompts[OURS]} here, {prompts[PEER]} there, of them visual {peer['visual_tokens']} there by its log. The "
        f"server without work took at most {100 * idle:.1f} % of one core.\n"
    )


def _ratio(speeds: Mapping[str, list[float]]) -> str:
    ratios = [ours / peer for ours, peer in zip(speeds[OURS], speeds[PEER], strict=True)]
    return f"{statistics.median(ratios):.2f} ({', '.join(f'{each:.2f}' for each in ratios)})"


def _percentile(values: list[float], q: int) -> float:
    import numpy as np

    return float(np.percentile(values, q))
