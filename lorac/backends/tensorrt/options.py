"""Options of the tensorrt target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from lorac.backends.tensorrt.library import NVIDIA, RTX, TensorRTLibrary, check_capabilities, find_library
from lorac.errors import OptionError, not_one_of, short
from lorac.target.backend import TargetOptions

ProfileShapes = Sequence[int] | Sequence[Sequence[int]]
"""(min, opt, max), each a size or the sizes of all axes."""
OPTIMIZATION_LEVELS = range(6)
COMPATIBILITY_LEVELS = ("ampere_plus", "same_compute_capability")
"""Names of ``HardwareCompatibilityLevel``."""
_PROFILE_POINTS = ("min", "opt", "max")


@dataclass(frozen=True, kw_only=True)
class TensorRTOptions(TargetOptions):
    """Options of the tensorrt target.

    Attributes:
        profiles: the sizes that a plan is built for, as TensorRT's optimisation profiles have them, (min, opt, max): of
            an axis by its name, ``{"batch": (1, 4, 16)}``, for all inputs that have it; or of an input by its name,
            a shape each, ``{"pixel_values": ((1, 3, 224, 224), ...)}``. Axes that are not named take the example's
            size as opt, and sizes around it. Ranks of adapters have the room that was reserved for them.
        library: ``"tensorrt"`` or ``"tensorrt_rtx"``, which builds the plan and then runs it; default: the one that has
            the other options, else ``tensorrt`` where it is installed and there is a GPU.
        target_capabilities: compute capabilities that one plan is built for, ``["8.6", "8.9", "12.0"]``; default: the
            local GPU's, or where there is none the library's own default. TensorRT for RTX has it.
        hardware_compatibility: further GPUs that a plan runs on, at the cost of some speed: ``"ampere_plus"``, all from
            Ampere on, or ``"same_compute_capability"``; None: GPUs like this machine's. NVIDIA's ``tensorrt`` has it.
        builder_optimization_level: how long the library looks for fast kernels, 0 to 5; None leaves it to the library.
        workspace: MiB of device memory that a layer may use for itself while it runs; None leaves it to the library.
        tf32: products of float32 may round their operands to TF32's 10 bits, which is faster; else they compute as the
            model does.
        strict_nans: comparisons and selections treat NaN as IEEE 754 has it.
        weight_streaming: weights may stay in host memory and be read from there while the plan runs.
        cuda_graphs: calls are CUDA graphs, one for each set of shapes and ranks: less work for the CPU per call, and a
            swap copies its tensors to where the graph reads them. ``explain()`` says how many there are at a time.
        plan_cache: a folder that keeps plans by their models and settings, and is searched before any is built, with
            the kernels that TensorRT for RTX compiles on a GPU, and the kernels' times that NVIDIA's ``tensorrt``
            measures there. It belongs to the user, with the mode 0700, and is not part of an artifact. None: no folder.
        refit: merged weights are constants of the plan, which TensorRT replaces in place, and no inputs; in mode
            ``"fused"`` alone, and built only where there is a GPU.
        device: the GPU that plans run on, ``"cuda"`` or ``"cuda:1"``, as in ``compile(device=)``.
    """

    running: ClassVar[tuple[str, ...]] = ("cuda_graphs", "plan_cache")
    local: ClassVar[tuple[str, ...]] = ("plan_cache",)
    profiles: Mapping[str, ProfileShapes] = field(default_factory=dict)
    library: str | None = None
    target_capabilities: tuple[str, ...] = ()
    hardware_compatibility: str | None = None
    builder_optimization_level: int | None = None
    workspace: int | None = None
    tf32: bool = False
    strict_nans: bool = False
    weight_streaming: bool = False
    cuda_graphs: bool = False
    plan_cache: str | None = None
    refit: bool = False
    device: str | None = None

    @property
    def builder(self) -> TensorRTLibrary:
        """The library that builds plans: the named one, otherwise the one that supports the options.

        Raises:
            MissingExtra: the library is not installed.
        """
        return find_library(
            self.library or (RTX if self.target_capabilities else NVIDIA if self.hardware_compatibility else None)
        )

    def check(self) -> None:
        """Raise ``OptionError`` for libraries and values that do not exist, and options that the library lacks."""
        level = self.hardware_compatibility
        for name, value, known in (
            ("library", self.library, (NVIDIA, RTX)),
            ("hardware_compatibility", level, COMPATIBILITY_LEVELS),
        ):
            if value is not None and value not in known:
                raise not_one_of(f"{name} cannot be", value, known)
        check_capabilities(self.target_capabilities, self.builder)
        if level is not None and self.builder.is_rtx:
            raise OptionError(
                f"{self.builder.name_and_version} takes no hardware_compatibility",
                next_step=f"give target_capabilities= in its place, or library='{NVIDIA}'",
            )
        for name, shapes in self.profiles.items():
            rows = [(size,) if isinstance(size, int) else tuple(size) for size in shapes]
            three = len(rows) == len(_PROFILE_POINTS) and len({len(row) for row in rows}) == 1
            if (
                not three
                or any(least < 1 for least in rows[0])
                or any(list(axis) != sorted(axis) for axis in zip(*rows, strict=True))
            ):
                raise OptionError(
                    f"profiles= has {short(shapes)} for '{name}'",
                    next_step=f"give ({', '.join(_PROFILE_POINTS)}), each a size from 1 on or a shape of them, in "
                    "rising order",
                )
        effort = self.builder_optimization_level
        if effort is not None and effort not in OPTIMIZATION_LEVELS:
            raise OptionError(
                f"builder_optimization_level cannot be {short(effort)}",
                next_step=f"give a number from {OPTIMIZATION_LEVELS.start} to {OPTIMIZATION_LEVELS.stop - 1}, or None",
            )
        if self.workspace is not None and self.workspace < 1:
            raise OptionError(
                f"workspace cannot be {short(self.workspace)} MiB", next_step="give a number of MiB, or None"
            )
