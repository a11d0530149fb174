"""Which kernels a target is built with: those that are asked for, or the best that the machine and the model take."""

from __future__ import annotations

import dataclasses

import pytest

import configs
from engines.build_options import BuildOptions
from engines.choose import WEIGHTS, consider, estimate, weight_bytes
from engines.hardware import Hardware
from engines.kernel_sets import ORT, OWN, with_kernels
from engines.registry import all_targets, get
from engines.target import Target
from helpers.targets import own
from runtime import native
from runtime.errors import EngineError, TargetError, UsageError
from runtime.model_config import ModelConfig

pytestmark = pytest.mark.portable
INT4 = "ort-cpu-int4"
TINY = ModelConfig.from_hf({"model_type": "qwen3_vl", **configs.load("models/tiny")})


def where(*, problem: str = "", drawback: str = "") -> Target:
    """Return the 4-bit target on a machine of which both are known."""
    here = dataclasses.replace(own(INT4), check_kernels=lambda: problem, kernels_drawback=lambda: drawback)
    return dataclasses.replace(get(INT4), other_kernels=(here,))


def with_heads(head_dim: int) -> ModelConfig:
    return dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, head_dim=head_dim))


def test_our_own_kernels_are_taken_where_they_run() -> None:
    said: list[str] = []
    chosen = with_kernels(where(), None, TINY, said.append)
    assert (chosen.kernels, chosen.custom_ops, said) == (OWN, "qwen3vl.cpu", [])
    assert with_kernels(where(), ORT).kernels == ORT


@pytest.mark.parametrize(
    ("machine", "config", "reason"),
    [
        ({"problem": "no library"}, TINY, "no library"),
        ({"drawback": "slow here"}, TINY, "slow here"),
        ({}, with_heads(40), "config.json: text_config.head_dim is 40, expected a multiple of 16"),
    ],
)
def test_onnx_runtimes_are_taken_otherwise_and_the_reason_is_said(
    machine: dict[str, str], config: ModelConfig, reason: str
) -> None:
    said: list[str] = []
    chosen = with_kernels(where(**machine), None, config, said.append)
    assert (chosen.kernels, chosen.custom_ops) == (ORT, "")
    (line,) = said
    assert line.startswith(f"note: {INT4} is built with --kernels ort, not own: {reason}")
    said.clear()
    assert with_kernels(where(**machine), ORT, config, said.append).kernels == ORT
    assert said == []


def test_what_is_asked_for_is_built_or_refused() -> None:
    with pytest.raises(TargetError, match="--kernels own: no library") as raised:
        with_kernels(where(problem="no library"), OWN)
    assert "--kernels ort" in str(raised.value.remedy)
    # Another machine may be faster than the one that builds.
    assert with_kernels(where(drawback="slow here"), OWN).kernels == OWN
    for name in ("cuda", ""):
        with pytest.raises(UsageError, match=f"--kernels {name}: {INT4} has no such kernels") as refused:
            with_kernels(where(), name)
        assert "own, ort" in str(refused.value.remedy)
    for name in ("", ORT, OWN):
        with pytest.raises(UsageError, match=f"--kernels {name}: ort-cpu-fp32 has no such kernels"):
            with_kernels(get("ort-cpu-fp32"), name)


def test_only_weights_of_few_bits_on_the_cpu_have_a_choice() -> None:
    assert {target.name for target in all_targets() if target.other_kernels} == {INT4, "ort-cpu-int8"}
    for target in all_targets():
        assert with_kernels(target, None, TINY).name == target.name
        assert "custom_ops" not in target.capabilities(TINY, BuildOptions())
    capabilities = own(INT4).capabilities(TINY, BuildOptions())
    assert (capabilities["custom_ops"], capabilities["batched_chunks"]) == ("qwen3vl.cpu", True)


def test_the_library_and_what_the_processor_runs_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what this process is told to use."""
    monkeypatch.setattr(native, "failure", lambda: None)
    monkeypatch.setattr(native, "isa", lambda: native.PORTABLE)
    for isas, kernels in ((("avx2", native.PORTABLE), OWN), ((native.PORTABLE,), ORT)):
        monkeypatch.setattr(native, "isas", lambda isas=isas: isas)
        said: list[str] = []
        assert with_kernels(get(INT4), None, None, said.append).kernels == kernels
        assert bool(said) is (kernels == ORT)
        assert with_kernels(get(INT4), OWN).kernels == OWN
    monkeypatch.setattr(native, "failure", lambda: EngineError("damaged", remedy="build it"))
    with pytest.raises(TargetError, match="--kernels own: damaged"):
        with_kernels(get(INT4), OWN)
    assert with_kernels(get(INT4), None).kernels == ORT


@pytest.mark.parametrize("asked", [None, OWN])
def test_a_wrong_setting_is_an_error_and_no_reason_for_other_kernels(
    asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "failure", lambda: UsageError("QWEN3VL_CPU_ISA: 'avx3'", remedy="choose avx2"))
    with pytest.raises(UsageError, match="QWEN3VL_CPU_ISA: 'avx3'") as raised:
        with_kernels(get(INT4), asked)
    assert raised.value.remedy == "choose avx2"
    assert with_kernels(get(INT4), ORT).kernels == ORT


def test_a_choice_counts_the_weights_of_the_kernels_that_would_be_taken() -> None:
    machine = Hardware("Abacus", ("avx2",), 2, 32 << 30)
    for target in (where(), where(problem="no library")):
        (candidate,) = consider(machine, TINY, targets=[target]).candidates
        assert candidate.parts[WEIGHTS] == estimate(with_kernels(target, None, TINY), TINY)[WEIGHTS]
    assert weight_bytes(own(INT4), TINY) != weight_bytes(get(INT4), TINY)


@pytest.mark.parametrize("name", [INT4, "ort-cpu-int8"])
def test_heads_that_our_own_attention_does_not_take_are_refused(name: str) -> None:
    target = own(name)
    assert target.check_model is not None
    for head_dim in (16, 80, 128, 256):
        target.check_model(with_heads(head_dim))
    for head_dim in (8, 24, 72, 272):
        with pytest.raises(TargetError, match=f"head_dim is {head_dim}, expected a multiple of 16 up to 256") as raised:
            target.check_model(with_heads(head_dim))
        assert "--kernels ort" in str(raised.value.remedy)
