"""Options that several commands have, and groups of options that a command takes as one record.

An option that is not given is not passed on, so that the defaults are those of the checkpoint and of the runtime.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.model import Qwen3VLModel

Engine = Annotated[Path, typer.Argument(metavar="ENGINE", help="Engine folder that qwen3vl-export wrote.")]
CheckAll = Annotated[bool, typer.Option("--check", help="Hash the weight files too, not only the small ones.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]
Images = Annotated[
    # Text, not Path: a path would fold the "//" of a URL, and the refusal of URLs would not see one.
    list[str] | None,
    typer.Option("--image", metavar="PATH", help="Image file shown before the prompt; repeat for several, in order."),
]
System = Annotated[
    str | None, typer.Option(metavar="TEXT", help="System message: how the model is to answer.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no progress and no notes on stderr, but errors.")]
ShowStats = Annotated[bool, typer.Option("--stats", help="Print times, speed and cache size on stderr.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Longest answer, in tokens.", show_default=False)]
DoSample = Annotated[
    bool | None,
    typer.Option("--do-sample/--greedy", help="Draw tokens, or take the likeliest. [default: the checkpoint's]"),
]
Temperature = Annotated[float | None, typer.Option(help="Below 1 sharper, above 1 flatter; needs sampling.")]
Seed = Annotated[int | None, typer.Option(help="The same seed draws the same answer.")]
PromptLookupNumTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-lookup-num-tokens",
        "--prompt-lookup",
        metavar="N",
        help="Draft up to N tokens by looking up the last ones in prompt and answer: faster where the answer copies.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="Threads of the engine. [default: OMP_NUM_THREADS, or the cores]")]
NoCudaGraphs = Annotated[
    bool, typer.Option("--no-cuda-graphs", help="On a GPU, do not record the decode step as a CUDA graph.")
]
HugePages = Annotated[
    bool, typer.Option("--huge-pages", help="Move the weights to huge pages first: seconds to open, faster tokens.")
]


@dataclass(frozen=True)
class Opening:
    """How an engine is opened."""

    min_pixels: Annotated[int | None, typer.Option(help="Enlarge images below this many pixels.")] = None
    max_pixels: Annotated[
        int | None, typer.Option(help="Shrink images above this many pixels: faster, less detail.")
    ] = None
    max_image_pixels: Annotated[
        int | None,
        typer.Option(
            help="Refuse images of more pixels before they are decoded. [default: 50000000]", show_default=False
        ),
    ] = None
    max_context: Annotated[
        int | None, typer.Option(help="Room of the KV cache: prompt, images and answer, in tokens.")
    ] = None
    max_memory: Annotated[
        float | None,
        typer.Option(
            metavar="GB",
            help="Most memory that weights, cache and workspace may take, in units of 10^9 bytes. "
            "[default: the machine's]",
        ),
    ] = None
    threads: Threads = None
    huge_pages: HugePages = False
    no_cuda_graphs: NoCudaGraphs = False

    def open(self, engine: Path, *, check: bool) -> Qwen3VLModel:
        """Open it.

        Raises:
            UsageError: An option is out of range.
        """
        from runtime.model import Qwen3VLModel

        options = given(self)
        if self.max_memory is not None:
            if not math.isfinite(self.max_memory):
                raise UsageError(
                    f"--max-memory {self.max_memory}: expected a number of GB",
                    remedy="leave it out for the machine's",
                )
            options["max_memory"] = round(self.max_memory * 1e9)
        options["cuda_graphs"] = not options.pop("no_cuda_graphs")
        return Qwen3VLModel.from_engine(engine, check=check, **options)


@dataclass(frozen=True)
class Answering:
    """How an answer is made, by the names of `GenerationOptions`."""

    max_new_tokens: MaxNewTokens = None
    max_length: Annotated[
        int | None,
        typer.Option(help="Longest prompt and answer together, in tokens; --max-new-tokens takes its place."),
    ] = None
    do_sample: DoSample = None
    temperature: Temperature = None
    top_k: Annotated[int | None, typer.Option(help="Keep the K likeliest tokens; 0 keeps all; needs sampling.")] = None
    top_p: Annotated[
        float | None, typer.Option(help="Keep the likeliest that sum to P; 1 keeps all; needs sampling.")
    ] = None
    min_p: Annotated[
        float | None, typer.Option(help="Drop those below P times the likeliest; 0 keeps all; needs sampling.")
    ] = None
    repetition_penalty: Annotated[
        float | None, typer.Option(help="Above 1 repeats prompt and answer less; 1 is off.")
    ] = None
    presence_penalty: Annotated[
        float | None, typer.Option(help="Taken from each token already in the answer; 0 is off.")
    ] = None
    frequency_penalty: Annotated[float | None, typer.Option(help="The same, for each time it occurred; 0 is off.")] = (
        None
    )
    seed: Seed = None
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; repeat for several.")] = None
    prompt_lookup_num_tokens: PromptLookupNumTokens = None


def given(options: Any) -> dict[str, Any]:
    """Return the fields of a group that were given, by name; an option that may be repeated is None or a list."""
    return {name: value for name, value in vars(options).items() if value is not None and value != []}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Show typer, in the place of each parameter that is a dataclass, the fields of it as options."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind))
            continue
        groups[parameter.name] = kind
        types = get_type_hints(kind, include_extras=True)
        for field in dataclasses.fields(kind):
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters.append(parameter.replace(name=field.name, default=default, annotation=types[field.name]))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        records = {
            name: kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            for name, kind in groups.items()
        }
        command(**values, **records)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat
