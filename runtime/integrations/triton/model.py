"""`TritonPythonModel`: what Triton's Python backend loads, asks and ends.

It follows the interface of the backend's README (github.com/triton-inference-server/python_backend) in its decoupled
mode: `execute` returns at once, and responses are sent whenever the engine has something.
"""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import Qwen3VLError
from runtime.installation import EXTRAS, how_to_install
from runtime.integrations.triton.config import ENGINE_FOLDER, read_parameters
from runtime.session import is_on_gpu
from runtime.settings import show_one_gpu

if TYPE_CHECKING:
    from runtime.integrations.triton.answering import Answering


class TritonPythonModel:
    """A model of the Python backend; one instance is one process with one engine."""

    _answering: Answering
    _log: _Log

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the engine, and begin to take requests.

        Args:
            args: What the backend gives, see its README: `model_config`, `model_repository`, `model_version` and so on.

        Raises:
            TritonModelException: The engine cannot be opened. The server logs the message and loads no model.
        """
        backend = importlib.import_module("triton_python_backend_utils")
        self._log = _Log(backend.Logger)
        logging.getLogger("runtime").addHandler(self._log)
        try:
            self._answering = _opened(backend, args)
        except BaseException as error:
            logging.getLogger("runtime").removeHandler(self._log)
            message = _opening_failure(error)
            if message is None:
                raise
            raise backend.TritonModelException(f"{args['model_name']}: {message}") from error

    def execute(self, requests: Sequence[Any]) -> None:
        """Take requests, and return: their answers follow, in whichever order they come."""
        for request in requests:
            self._answering.begin(request)

    def finalize(self) -> None:
        """Answer what was accepted, within the drain timeout, and close the engine."""
        self._answering.close()
        logging.getLogger("runtime").removeHandler(self._log)


def _opened(backend: Any, args: Mapping[str, str]) -> Answering:
    """Open the engine of a model's version, on the instance's device.

    Raises:
        Qwen3VLError: It cannot be opened.
        ModuleNotFoundError: A package of an extra is missing.
    """
    if args["model_instance_kind"] == "GPU":
        show_one_gpu(int(args["model_instance_device_id"]))
    from runtime.integrations.triton.answering import Answering
    from runtime.model import Qwen3VLModel
    from runtime.server.engines import Served

    folder = Path(args["model_repository"]) / args["model_version"] / ENGINE_FOLDER
    options, settings = read_parameters(json.loads(args["model_config"]))
    model = Qwen3VLModel.from_engine(folder, **options)
    if is_on_gpu(model.manifest):
        model.warm_up()
    return Answering(backend, Served(args["model_name"], model, settings))


def _opening_failure(error: BaseException) -> str | None:
    """Return what an engine could not be opened for, and what to do; None for a bug, whose traceback is wanted."""
    if isinstance(error, Qwen3VLError):
        return f"{error.message}. Remedy: {error.remedy}"
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if package not in EXTRAS:
        return None
    return f"the backend's Python has no package {package}. Remedy: {how_to_install(EXTRAS[package])}"


class _Log(logging.Handler):
    """Passes what the runtime logs on to the server's log."""

    def __init__(self, logger: Any) -> None:
        super().__init__(logging.INFO)
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        """Pass one record on."""
        is_error, is_warning = record.levelno >= logging.ERROR, record.levelno >= logging.WARNING
        write = "log_error" if is_error else "log_warn" if is_warning else "log_info"
        getattr(self._logger, write)(self.format(record))
