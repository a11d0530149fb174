"""Command line of the fuzzers; see `make fuzz`."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz import driver
from fuzz.family import ROOT, SHARES
from fuzz.outcome import USUAL

FINDINGS = ROOT / "build" / "fuzz"


def main() -> int:
    """Run inputs, or one finding again; 1 if there is a finding."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("families", nargs="*", help=f"of {', '.join(SHARES)}; all if none is given")
    parser.add_argument("--inputs", type=int, default=20_000, help="in all, divided among the families")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same inputs")
    parser.add_argument("--findings", type=Path, default=FINDINGS, help="folder for the files of findings")
    parser.add_argument("--max-cpu-s", type=float, default=USUAL.max_cpu_s, help="an input that takes more is slow")
    parser.add_argument("--engine", type=Path, help="an engine of the demo for ort-cpu-fp32; built if not given")
    parser.add_argument("--replay", type=Path, help="run this finding again and nothing else")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qwen3vl-fuzz-") as folder:
        # Resolved, since each worker has a folder of its own.
        engine = options.engine.resolve() if options.engine else _build(Path(folder) / "engine")
        if options.replay is not None:
            outcome = driver.replay(options.replay, engine)
            print(
                f"{outcome.kind} {outcome.place}: {outcome.cpu_s} s, {outcome.grown_bytes / 1e6:.0f} MB\n{outcome.text}"
            )
            return int(outcome.is_finding)
        names = driver.shares(options.inputs, driver.chosen(options.families))
        bounds = dataclasses.replace(USUAL, max_cpu_s=options.max_cpu_s)
        tallies = driver.fuzz(
            names, engine, options.seed, options.findings, lambda line: print(line, flush=True), bounds=bounds
        )
    print(driver.table(tallies))
    return int(any(tally.num_findings for tally in tallies.values()))


def _build(engine: Path) -> Path:
    """Export the demo in a process of its own: the workers are forked from this one, which stays small."""
    command = [sys.executable, "-m", "qwen3vl_export.cli.export", "demo", "--target", "ort-cpu-fp32"]
    subprocess.run([*command, "--output", str(engine)], check=True, stdout=subprocess.DEVNULL)
    return engine


if __name__ == "__main__":
    sys.exit(main())
