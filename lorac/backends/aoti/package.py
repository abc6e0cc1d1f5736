"""Packages of AOTInductor (``.pt2``): compilation and loading by torch, and the engine that calls them.

Only this module calls torch's private functions for packages: the search for a compiler, the loader, and how sizes are
compared.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lorac.backends.onnx.engine import OnnxEngine, SlotInputProgram
from lorac.errors import ArtifactError, Unavailable
from lorac.frontend.components import check_component
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.feeds import collect_slot_tensors, select_reached_plans
from lorac.ir.graph.graph import SlotInput
from lorac.ir.slots.composition import ComposedWeights, fill_slots
from lorac.report.dump import Dump
from lorac.storage.tensor_file import write_safetensors
from lorac.target.backend import TargetOptions
from lorac.third_party_output import suppress_third_party_output

_INPUTS = "lorac.inputs"
"""The key of a package's metadata for its inputs: pairs of a name and a dtype, in the order in which it takes them."""


def keep_sizes_of_one() -> AbstractContextManager[object]:
    """Return a context in which torch does not broadcast a variable size because it is 1 in the example.

    A segment has one row where the example has as many rows as places.
    """
    from torch.fx.experimental import _config

    return _config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]  # torch adds the method when it is imported


def check_compiler() -> None:
    """Raise ``Unavailable`` if torch finds no C++ compiler on this machine, which it needs to make packages."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise Unavailable(
            "target 'aoti' compiles C++, and torch finds no C++ compiler on this machine",
            next_step="install g++ (apt install g++), or name one in the environment variable CXX",
        ) from error


def compile_package(program: ExportedProgram, path: Path, inputs: Mapping[str, torch.dtype]) -> None:
    """Compile a program into a package.

    Args:
        program: a program of aten ops.
        path: the path of the package, ending in ``.pt2``.
        inputs: the name and dtype of each input, in the program's order.

    Raises:
        Unavailable: torch's compiler cannot compile the program.
    """
    from torch._inductor import aoti_compile_and_package

    named = [(name, str(dtype).removeprefix("torch.")) for name, dtype in inputs.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad(), suppress_third_party_output(), keep_sizes_of_one():
            aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {_INPUTS: json.dumps(named)}},
            )
    except Exception as error:  # any library of torch's compiler may raise
        reason = str(error).strip().partition("\n")[0]
        raise Unavailable(
            f"torch's compiler does not take the program: {type(error).__name__}: {reason}",
            next_step="use target='eager', or look into torch's folder (TORCHINDUCTOR_CACHE_DIR)",
        ) from error


class PackagedGraph:
    """One graph of the program: a loaded package; it runs machine code, so only load packages from trusted makers.

    Args:
        path: the path of the package.
        interface: its inputs and outputs.
        slots: its slot inputs, by public name.

    Attributes:
        dtypes: the dtype of each input by name, in the package's order.

    Raises:
        ArtifactError: the file is not a package, or was made for another machine or release of torch.
    """

    def __init__(self, path: Path, interface: Interface, slots: Mapping[str, SlotInput]) -> None:
        self.interface, self.slots = interface, slots
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
            named = json.loads(self._loader.get_metadata()[_INPUTS])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"torch {torch.__version__} cannot load the package '{path.name}' here: {reason}",
                next_step="compile the model again on this machine, with this release of torch",
            ) from error
        self.dtypes: Mapping[str, torch.dtype | None] = {name: getattr(torch, dtype) for name, dtype in named}

    def run(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Run the graph on contiguous inputs and slot tensors, given by name; sizes and dtypes are not checked."""
        outputs: list[Tensor] = self._loader.boxed_run([inputs[name] for name in self.dtypes])
        return outputs


class AotiEngine(OnnxEngine[PackagedGraph, TargetOptions]):
    """An engine of one package per graph."""

    target = "aoti"

    def bind_tensors(self, tensors: Mapping[str, Tensor]) -> SlotInputProgram:
        return SlotInputProgram(self, {name: tensor.detach().contiguous() for name, tensor in tensors.items()})

    def dump(self) -> dict[str, Dump]:
        """Return nothing, since a package is machine code."""
        return {}

    @property
    def choice_suffix(self) -> str | None:
        return ".slots.safetensors" if self.slots and not self.constant else None

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """Write the tensors of all slots of a graph as safetensors, in the form that its package accepts."""
        slots = self.graphs[check_component(graph, self.graphs)].slots
        plans = select_reached_plans(slots, self.plans)
        tensors = collect_slot_tensors(slots, plans, fill_slots(plans, snapshot, self.base))
        write_safetensors(path, {name: tensor.detach().contiguous() for name, tensor in tensors.items()}, {})
