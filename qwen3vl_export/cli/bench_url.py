"""`qwen3vl bench --url`: many requests at once to a server that speaks OpenAI's API, ours or another."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3vl_export.cli.bench_load import LoadOptions, offered
from qwen3vl_export.cli.options import Opening, Serving, given
from qwen3vl_export.cli.output import print_json, print_text
from runtime.errors import UsageError
from runtime.files import read_small_file
from runtime.shown import columns

if TYPE_CHECKING:
    from qwen3vl_export.load.server import HttpServer

_URL_REMEDY = "give the folder of an engine, or --url http://HOST:PORT of a server"
_WITHOUT = {
    "ignore_eos": "answers may end before --new-tokens",
    "stream_options": "each chunk of an answer counts as a token",
}


@dataclass(frozen=True)
class ServerOptions:
    """A server that is asked instead of an engine.

    Attributes:
        url: Ask a server that speaks OpenAI's API (qwen3vl serve, vLLM, llama-server), over HTTP, and not an engine
            that is opened here.
        model: Name of the model there. [default: the only one]
        api_key_file: File with the key that the server wants.
    """

    url: Annotated[str | None, typer.Option(metavar="URL")] = None
    model: Annotated[str | None, typer.Option(metavar="NAME")] = None
    api_key_file: Annotated[Path | None, typer.Option(metavar="FILE")] = None

    def check(self, engine: str | None, load: LoadOptions, opening: Opening, serving: Serving) -> None:
        """Check that it is clear what is asked, and how.

        Raises:
            UsageError: Options contradict each other, or one is missing.
        """
        if self.url is None:
            alone = [name for name in ("model", "api_key_file") if getattr(self, name) is not None]
            if alone:
                raise UsageError(f"{_option(alone[0])} is of a server", remedy="add --url http://HOST:PORT")
            if engine is None:
                raise UsageError("there is neither an engine nor a server to ask", remedy=_URL_REMEDY)
            return
        if engine is not None:
            raise UsageError(f"ENGINE ({engine}) and --url are given together", remedy=f"leave one out: {_URL_REMEDY}")
        if not load.is_given:
            raise UsageError("--url needs many requests", remedy="add --concurrency N or --rate R")
        if here := [*given(opening), *given(serving)]:
            raise UsageError(
                f"{_option(here[0])} is of an engine that is opened here, not of a server",
                remedy="leave it out, and start the server with it",
            )

    def connect(self) -> HttpServer:
        """Find the server and the model there.

        Raises:
            UsageError: It has several models, or the file with the key cannot be read.
            RequestError: It does not answer.
        """
        from qwen3vl_export.load.connections import Address
        from qwen3vl_export.load.server import HttpServer

        return HttpServer(Address.parse(self.url or ""), self.model, self._key())

    def _key(self) -> str | None:
        if self.api_key_file is None:
            return None
        remedy = "give a file with the key on its first line"
        text = read_small_file(self.api_key_file, error=UsageError, remedy=remedy)
        key = text.decode("utf-8", "replace").strip()
        # A line break in a header would begin another one.
        if not key or not key.isascii() or not key.isprintable():
            raise UsageError(f"{self.api_key_file} holds no key: expected one line of ASCII", remedy=remedy)
        return key


def bench_url(
    options: ServerOptions,
    image_size: tuple[int, int] | None,
    prompt_tokens: int,
    new_tokens: int,
    load: LoadOptions,
    *,
    as_json: bool,
) -> None:
    """Send many requests to a server, and print and plot what became of them.

    Args:
        options: Which server.
        image_size: Width and height of the images in pixels, or none.
        prompt_tokens: Tokens of each text, about; words, if the server does not count tokens.
        new_tokens: Tokens of each answer.
        load: How requests arrive.
        as_json: Print JSON.
    """
    from qwen3vl_export.load.prompts import Prompts
    from qwen3vl_export.load.report import report_rows

    server = options.connect()
    per_word = server.tokens_per_word(load.seed)
    prompts = Prompts.of_length(
        per_word or 1.0, prompt_tokens, image_size, shared_tokens=load.shared_prefix, seed=load.seed
    )
    report = offered(server, prompts, new_tokens, load)
    if as_json:
        where = {"url": str(server.address), "model": server.model, "left_out": server.left_out}
        print_json({**where, "prompt_words": prompts.num_words, **load.asked(), **asdict(report)})
        return
    counted = "" if per_word else ", since the server does not count tokens"
    rows = [
        ("server", f"{server.address}, model {server.model}"),
        *(("left out", f"{name}, which the server refuses: {_WITHOUT[name]}") for name in server.left_out),
        ("prompt", f"{prompts.num_words} words{counted}"),
        *report_rows(report),
    ]
    print_text("\n".join(columns(rows)))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
