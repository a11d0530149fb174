"""Options of `polygraphy run`, which finds them by the entry point `polygraphy.run.plugins` (see pyproject.toml)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from polygraphy.logger import G_LOGGER
from polygraphy.tools.args import DataLoaderArgs, ModelArgs, RunnerSelectArgs
from polygraphy.tools.args import util as args_util
from polygraphy.tools.args.base import BaseRunnerArgs
from polygraphy.tools.script import make_invocable

from engines.bundle import BUNDLE_MANIFEST_NAME, DECODER
from qwen3vl_export.integrations.polygraphy.inputs import DEFAULT_PROMPT
from qwen3vl_export.integrations.polygraphy.loaders import GRAPHS
from runtime.manifest import LOWERED_NAME, MANIFEST_NAME

_OPTION = "qwen3vl"
_PUBLIC = "qwen3_vl.integrations.polygraphy"


def argument_groups() -> list[BaseRunnerArgs]:
    """Return the groups of options that `polygraphy run` adds to its own."""
    return [EngineRunnerArgs()]


class EngineRunnerArgs(BaseRunnerArgs):
    """Qwen3-VL Engine Inference: running an engine, and its bundle beside it.

    Depends on:

        - RunnerSelectArgs
        - ModelArgs
        - DataLoaderArgs
    """

    def get_name_opt_impl(self) -> tuple[str, str]:
        """Return the name of the runner and of its option."""
        return "a Qwen3-VL engine", _OPTION

    def get_extra_help_text_impl(self) -> str:
        """Return what the option's help adds."""
        return "The model is then the folder of the engine, and inputs are those of a real prompt."

    def add_parser_args_impl(self) -> None:
        """Add the options."""
        self.group.add_argument(
            "--qwen3vl-graph", choices=GRAPHS, default=DECODER, help="Which graph to run. Defaults to 'decoder'."
        )
        self.group.add_argument(
            "--qwen3vl-bundle",
            help="Folder that `qwen3vl-export CHECKPOINT --bundle` wrote; runners of ONNX models get its graph.",
        )
        self.group.add_argument("--qwen3vl-prompt", help=f"Text of the prompt. Defaults to '{DEFAULT_PROMPT}'")
        self.group.add_argument(
            "--qwen3vl-image", nargs="+", help="Image files before the text. Defaults to a drawn picture."
        )

    def parse_impl(self, args: Any) -> None:
        """Read the options, and put the bundle's graph and a real prompt in the place of model and random inputs."""
        self.engine: str | None = None
        runners = list(self.arg_groups[RunnerSelectArgs].runners.keys())
        if _OPTION not in runners:
            return
        self.graph = args_util.get(args, "qwen3vl_graph")
        self.bundle = args_util.get(args, "qwen3vl_bundle")
        model = self.arg_groups[ModelArgs]
        self.engine = _checked_engine(model.path)
        self._give_bundle(model, [each for each in runners if each != _OPTION])
        prompt, images = (args_util.get(args, f"qwen3vl_{name}") for name in ("prompt", "image"))
        if missing := [each for each in images or () if not Path(each).is_file()]:
            G_LOGGER.critical(f"--qwen3vl-image {missing[0]}: there is no such file.")
        if self.arg_groups[DataLoaderArgs].is_using_random_data():
            inputs = PromptInputArgs(self.engine, self.graph, prompt, images)
            inputs.parse(args)
            self.arg_groups[DataLoaderArgs] = inputs
        elif prompt is not None or images is not None:
            G_LOGGER.critical(
                "--load-inputs or --data-loader-script brings inputs: leave --qwen3vl-prompt and --qwen3vl-image out."
            )

    def add_to_script_impl(self, script: Any) -> None:
        """Add the runner to the script that Polygraphy runs."""
        script.add_import(imports=["EngineRunner", "EngineSession"], frm=_PUBLIC)
        loader = script.add_loader(make_invocable("EngineSession", self.engine), "open_engine")
        script.add_runner(make_invocable("EngineRunner", loader, self.graph))

    def _give_bundle(self, model: ModelArgs, others: list[str]) -> None:
        """Let runners of ONNX models run the bundle's graph."""
        if self.bundle is None:
            if others:
                G_LOGGER.critical(
                    f"--{', --'.join(others)} needs an ONNX model beside the engine: write its bundle with "
                    "`qwen3vl-export CHECKPOINT --bundle FOLDER`, and add --qwen3vl-bundle FOLDER."
                )
            return
        if not (Path(self.bundle) / BUNDLE_MANIFEST_NAME).is_file():
            G_LOGGER.critical(
                f"--qwen3vl-bundle {self.bundle} is no bundle. `qwen3vl-export CHECKPOINT --bundle FOLDER` writes one."
            )
        model.path = str(Path(self.bundle) / f"{self.graph}.onnx")
        model.model_type = ModelArgs.ModelType("onnx")


class PromptInputArgs(DataLoaderArgs):
    """Data Loader: inputs of a real prompt.

    Depends on:

        - ModelArgs
    """

    def __init__(self, engine: str, graph: str, prompt: str | None, images: list[str] | None) -> None:
        super().__init__()
        self._engine, self._graph, self._prompt, self._images = engine, graph, prompt, images

    def parse_impl(self, args: Any) -> None:
        """Read the options of the random inputs, and warn of those that have no use."""
        super().parse_impl(args)
        for name in ("seed", "val_range", "iterations"):
            if args_util.get(args, name) is not None:
                G_LOGGER.warning(f"--{name.replace('_', '-')} has no use: the inputs are those of a prompt.")

    def add_to_script_impl(self, script: Any, user_input_metadata_str: str | None = None) -> Any:
        """Add the data loader to the script, and return its name there."""
        script.add_import(imports=["PromptInputs"], frm=_PUBLIC)
        inputs = make_invocable("PromptInputs", self._engine, self._graph, prompt=self._prompt, images=self._images)
        return script.set_data_loader(inputs)

    def is_using_random_data(self) -> bool:
        """Return False."""
        return False


def _checked_engine(path: str | None) -> str:
    if path is None or not any((Path(path) / name).is_file() for name in (MANIFEST_NAME, LOWERED_NAME)):
        G_LOGGER.critical(
            f"--{_OPTION}: {path} is no engine. Give the folder that `qwen3vl-export CHECKPOINT --output FOLDER` wrote."
        )
    return str(path)
