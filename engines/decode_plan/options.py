"""What a user chooses of a decode plan, and whether one can be made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engines.decode_plan.compile import triton_version
from engines.kernels.launch import GPUS, Gpu
from runtime.errors import TargetError, UsageError
from runtime.installation import how_to_install


@dataclass(frozen=True)
class PlanOptions:
    """How a decode plan is to be made.

    Attributes:
        is_wanted: Whether one has to be there; None for one if it can be made.
        compute_capabilities: GPUs to compile for, such as "9.0"; empty for all that kernels are made for.
    """

    is_wanted: bool | None = None
    compute_capabilities: tuple[str, ...] = ()

    @property
    def is_required(self) -> bool:
        """Whether a plan was asked for, by itself or by naming GPUs for it, so that none is an error."""
        return bool(self.is_wanted or self.compute_capabilities)

    @property
    def gpus(self) -> tuple[Gpu, ...]:
        """The GPUs to compile for, ascending.

        Raises:
            UsageError: Kernels are made for none of that name.
        """
        known = {f"{sm // 10}.{sm % 10}": gpu for sm, gpu in GPUS.items()}
        unknown = sorted(set(self.compute_capabilities) - set(known))
        if unknown:
            raise UsageError(
                f"--compute-capability {unknown[0]}: no decode kernels are made for it",
                remedy=f"choose of {', '.join(known)}",
            )
        return tuple(known[name] for name in known if name in (self.compute_capabilities or known))


NO_PLAN = PlanOptions(is_wanted=False)


def plan_problem() -> str:
    """Return why no decode plan can be made here, empty if one can."""
    if triton_version():
        return ""
    return f"its kernels are compiled by triton, which is not installed ({how_to_install('decode-plan')})"


def check_plan(options: PlanOptions, target: str) -> None:
    """Raise if a plan is asked for and cannot be made here.

    Raises:
        UsageError: Kernels are made for no such GPU.
        TargetError: Triton is missing.
    """
    options.gpus  # noqa: B018 (raises)
    problem = plan_problem()
    if options.is_required and problem:
        raise TargetError(
            f"{target}: no decode plan can be made: {problem}",
            remedy="install it, or leave --decode-plan and --compute-capability out",
        )


def names_of(gpus: Sequence[Gpu]) -> str:
    """Return the compute capabilities as text."""
    return ", ".join(f"{gpu.sm // 10}.{gpu.sm % 10}" for gpu in gpus)
