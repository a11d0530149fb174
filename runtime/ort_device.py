"""Where the session of ONNX Runtime on CUDA runs its graphs, and how they are opened there.

What differs between devices is in `Device`, and nothing else asks for one, so tests run the same code on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from runtime.cuda import CudaDevice
from runtime.device_weights import DeviceWeights
from runtime.errors import CapacityError, EngineError, UsageError
from runtime.installation import from_extra, how_to_install

with from_extra("cuda"):
    import onnxruntime as ort

_T = TypeVar("_T")


def _nothing(options: ort.SessionOptions) -> None:
    """Leave the options of a session as they are."""


@dataclass(frozen=True)
class Device:
    """Where the graphs run.

    Attributes:
        provider: ONNX Runtime's name of the execution provider.
        name: Name of the memory, for OrtValue and IOBinding.
        memory: Gives the memory.
        options: Options of the provider, for both graphs.
        decoder_options: Further ones for the decoder.
        stream_option: Option of the provider that takes a stream of ours; empty if it has none.
        keep_in_place: Changes a session's options so that it does not copy the weights that it is given.
    """

    provider: str
    name: str
    memory: Callable[[], CudaDevice]
    options: Mapping[str, str] = field(default_factory=dict)
    decoder_options: Mapping[str, str] = field(default_factory=dict)
    stream_option: str = ""
    keep_in_place: Callable[[ort.SessionOptions], None] = _nothing

    @property
    def records(self) -> bool:
        """Whether the decoder's runs with a graph id are recorded."""
        return "enable_cuda_graph" in self.decoder_options


# Without the strict mode SkipSimplifiedLayerNormalization sums squares of float16 in float16
# (contrib_ops/cuda/bert/skip_layer_norm_impl.cu).
CUDA = Device(
    "CUDAExecutionProvider",
    "cuda",
    lambda: CudaDevice("cuda"),
    {"enable_skip_layer_norm_strict_mode": "1"},
    {"enable_cuda_graph": "1"},
    "user_compute_stream",
)


class OpenedGraph:
    """A graph that ONNX Runtime has opened.

    Its memory goes with `close`, whoever holds this then: no one else may keep the session, and bindings to it must be
    gone before.

    Args:
        session: None for a graph of which this session runs nothing, so that it is closed from the start.
    """

    def __init__(self, session: ort.InferenceSession | None) -> None:
        self._session = session

    @property
    def session(self) -> ort.InferenceSession:
        """The session of ONNX Runtime.

        Raises:
            UsageError: It was closed.
        """
        if self._session is None:
            raise UsageError("the engine was closed", remedy="open it again")
        return self._session

    def check_open(self) -> None:
        """Raise if it was closed.

        Raises:
            UsageError: It was.
        """
        _ = self.session

    def close(self) -> None:
        """Let ONNX Runtime free what it has; a second time does nothing."""
        self._session = None


def check_provider(folder: Path, device: Device) -> None:
    """Raise if the installed ONNX Runtime does not have the device's provider.

    Raises:
        EngineError: It does not.
    """
    if device.provider not in ort.get_available_providers():
        raise EngineError(
            f"{folder}: onnxruntime {ort.__version__} has no {device.provider}, only "
            f"{', '.join(ort.get_available_providers())}",
            remedy=f"uninstall onnxruntime, which excludes onnxruntime-gpu, then {how_to_install('cuda')}",
        )


def open_graph(
    path: Path,
    device: Device,
    provider_options: Mapping[str, str],
    threads: int | None,
    weights: DeviceWeights | None = None,
    stream: int = 0,
) -> OpenedGraph:
    """Open a graph.

    Args:
        path: The graph.
        device: Where it runs.
        provider_options: Options of the provider.
        threads: Threads on the host; None for one.
        weights: Weights that are on the device, and must outlive the graph.
        stream: With weights, the stream that they were written on, and that the graph runs on.

    Raises:
        EngineError: ONNX Runtime refuses the graph, or the provider does not start.
        CapacityError: The device is out of memory.
    """
    if device.name == "cuda":
        # CUDA's libraries from the package index lie where the loader does not look; it prints what it misses.
        with contextlib.redirect_stdout(sys.stderr):
            ort.preload_dlls()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # as in ort_cpu.py
    options.intra_op_num_threads = threads or 1  # the CPU computes shapes alone
    if weights is not None:
        device.keep_in_place(options)
        if device.stream_option:
            provider_options = {**provider_options, device.stream_option: str(stream)}
    try:
        if weights is not None:
            weights.give_to(options, device.name)
        session = ort.InferenceSession(
            str(path), options, providers=[(device.provider, dict(provider_options))], enable_fallback=0
        )
    except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
        if _is_out_of_memory(error):
            raise _capacity_error(error, device) from error
        raise EngineError(
            f"{path}: ONNX Runtime {ort.__version__} does not open it on {device.provider} "
            f"({str(error).splitlines()[0]})",
            remedy="see that nvidia-smi lists a GPU with enough free memory; else build the engine again",
        ) from error
    # A provider that cannot be loaded is left out with a warning.
    if session.get_providers()[0] != device.provider:
        raise EngineError(
            f"{path}: {device.provider} does not start, ONNX Runtime offers {', '.join(session.get_providers())}",
            remedy=f"see that nvidia-smi lists a GPU, and that CUDA's libraries are there: {how_to_install('cuda')}",
        )
    return OpenedGraph(session)


def guarded(device: Device, work: Callable[[], _T]) -> _T:
    """Run something, and say what to do if the device has no memory left.

    Raises:
        CapacityError: It has not.
    """
    try:
        return work()
    except Exception as error:  # onnxruntime raises classes of its own binding, without a common base
        if _is_out_of_memory(error):
            raise _capacity_error(error, device) from error
        raise


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return any(words in text for words in ("allocate memory", "out of memory", "bad allocation"))


def _capacity_error(error: Exception, device: Device) -> CapacityError:
    return CapacityError(
        f"{device.provider}: the device has too little memory ({' '.join(str(error).split())[:200]})",
        remedy="lower max_context or max_pixels, choose a target of fewer bits, or free the GPU",
    )
