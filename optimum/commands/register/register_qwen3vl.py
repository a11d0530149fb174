"""`optimum-cli export qwen3vl`: optimum imports the files of this folder by their names, and finds the command here.

What it does is in `qwen3vl_export.integrations.optimum.command`. optimum-cli has to start for its other commands
whatever is wrong with that package, so nothing of it is imported here until an option or a run of this one asks.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class Qwen3VLExportCommand(BaseOptimumCLICommand):
    """Export a Qwen3-VL checkpoint into an engine."""

    COMMAND = CommandInfo(name="qwen3vl", help="Export a Qwen3-VL checkpoint into an engine of qwen3vl-export.")

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Add the options, or what takes any, where they cannot be found."""
        try:
            from qwen3vl_export.integrations.optimum.command import add_options
        except ImportError as error:
            parser.add_argument("arguments", nargs="*")
            parser.prefix_chars = ""  # whatever is given is an argument and no option, --help too
            parser.set_defaults(problem=f"qwen3vl-export cannot be imported: {error}")
            return
        add_options(parser)

    def run(self) -> None:
        """Export, as `qwen3vl-export` does, and end the process with its exit code."""
        problem = getattr(self.args, "problem", None)
        if problem is not None:
            print(f"error: {problem}", file=sys.stderr)
            raise SystemExit(2)
        from qwen3vl_export.integrations.optimum.command import run

        run(self.args)


# optimum goes through it once for each folder of this name on sys.path, such as a checkout's and an installed wheel's:
# a list would offer the command twice, which argparse refuses, and with that optimum-cli as a whole.
REGISTER_COMMANDS = iter([(Qwen3VLExportCommand, ExportCommand)])
