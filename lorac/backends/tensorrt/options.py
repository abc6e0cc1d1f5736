"""Options of the tensorrt target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorac.backends.tensorrt.capabilities import check_capabilities
from lorac.errors import OptionError, short
from lorac.target.backend import TargetOptions

ProfileShapes = Sequence[int] | Sequence[Sequence[int]]
"""(min, opt, max), each a size or the sizes of all axes."""
OPTIMIZATION_LEVELS = range(6)
_PROFILE_POINTS = ("min", "opt", "max")


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(TargetOptions):
    """Options of the tensorrt target.

    Attributes:
        profiles: the sizes that a plan is built for, as TensorRT's optimisation profiles have them, (min, opt, max): of
            an axis by its name, ``{"batch": (1, 4, 16)}``, for all inputs that have it; or of an input by its name,
            a shape each, ``{"pixel_values": ((1, 3, 224, 224), ...)}``. Axes that are not named take the example's
            size as opt, and sizes around it. Ranks of adapters have the room that was reserved for them.
        target_capabilities: compute capabilities that one plan is built for, ``["8.6", "8.9", "12.0"]``; default: the
            local GPU's, or where there is none the library's own default.
        builder_optimization_level: how long the library looks for fast kernels, 0 to 5; None leaves it to the library.
        workspace: MiB of device memory that a layer may use for itself while it runs; None leaves it to the library.
        tf32: products of float32 may round what they read to TF32's 10 bits, which is faster; else they compute as
            the model does.
        strict_nans: comparisons and selections treat NaN as IEEE 754 has it.
        weight_streaming: weights may stay in host memory and be read from there while the plan runs.
        cuda_graphs: calls are CUDA graphs, one for each set of shapes and ranks: less work for the CPU per call, and a
            swap copies what it binds to where the graph reads it.
        plan_cache: a folder that keeps plans by what they were built from, and is looked into before any is built; for
            TensorRT for RTX the kernels that it compiles on a GPU too. None: neither.
        refit: merged weights are constants of the plan, which TensorRT replaces in place, and no inputs; in mode
            ``"fused"`` alone, and built only where there is a GPU.
        device: the GPU that plans run on, ``"cuda"`` or ``"cuda:1"``, as in ``compile(device=)``.
    """

    profiles: Mapping[str, ProfileShapes] = field(default_factory=dict)
    target_capabilities: tuple[str, ...] = ()
    builder_optimization_level: int | None = None
    workspace: int | None = None
    tf32: bool = False
    strict_nans: bool = False
    weight_streaming: bool = False
    cuda_graphs: bool = False
    plan_cache: str | None = None
    refit: bool = False
    device: str | None = None

    def check(self) -> None:
        """Raise ``OptionError`` for unknown capabilities, sizes out of order, and numbers out of range."""
        check_capabilities(self.target_capabilities)
        for name, shapes in self.profiles.items():
            _check_profile(name, shapes)
        level = self.builder_optimization_level
        if level is not None and level not in OPTIMIZATION_LEVELS:
            raise OptionError(
                f"builder_optimization_level cannot be {short(level)}",
                next_step=f"give a number from {OPTIMIZATION_LEVELS.start} to {OPTIMIZATION_LEVELS.stop - 1}, or None",
            )
        if self.workspace is not None and self.workspace < 1:
            raise OptionError(
                f"workspace cannot be {short(self.workspace)} MiB", next_step="give a number of MiB, or None"
            )


def _check_profile(name: str, shapes: ProfileShapes) -> None:
    """Raise ``OptionError`` unless a profile is three sizes or shapes in rising order."""
    rows = [(size,) if isinstance(size, int) else tuple(size) for size in shapes]
    three = len(rows) == len(_PROFILE_POINTS) and len({len(row) for row in rows}) == 1
    if not three or any(least < 1 for least in rows[0]) or any(list(axis) != sorted(axis) for axis in zip(*rows)):  # noqa: B905  (they are of one length by now)
        raise OptionError(
            f"profiles= has {short(shapes)} for '{name}'",
            next_step=f"give ({', '.join(_PROFILE_POINTS)}), each a size from 1 on or a shape of them, in rising order",
        )
