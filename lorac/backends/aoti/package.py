"""Packages of AOTInductor (``.pt2``): compilation and loading by torch.

Only this module calls torch's private functions for packages: the search for a compiler, and the loader.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from lorac.errors import ArtifactError, Unavailable
from lorac.third_party_output import suppress_third_party_output

_INPUTS = "lorac.inputs"
"""The key of a package's metadata for its inputs: pairs of a name and a dtype, in the order in which it takes them."""


def check_compiler() -> None:
    """Raise ``Unavailable`` if torch finds no C++ compiler on this machine, which it needs to make packages."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise Unavailable(
            "target 'aoti' compiles C++, and this machine has no compiler of it that torch finds",
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
        with torch.no_grad(), suppress_third_party_output():
            aoti_compile_and_package(
                program,
                package_path=str(path),
                inductor_configs={"aot_inductor.metadata": {_INPUTS: json.dumps(named)}},
            )
    except Exception as error:  # any library of torch's compiler may raise
        reason = str(error).strip().partition("\n")[0]
        raise Unavailable(
            f"torch's compiler does not take the program: {type(error).__name__}: {reason}",
            next_step="target='eager' runs it; TORCHINDUCTOR_CACHE_DIR names the folder that torch compiles in",
        ) from error


class Package:
    """A loaded package; it runs machine code, so only load packages from trusted makers.

    Attributes:
        inputs: the name and dtype of each input, in the package's order.

    Raises:
        ArtifactError: the file is not a package, or was made for another machine or release of torch.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
            named = json.loads(self._loader.get_metadata()[_INPUTS])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"'{path.name}' is not a package that torch {torch.__version__} loads here: {reason}",
                next_step="compile the model again on this machine, with this release of torch",
            ) from error
        self.inputs: Mapping[str, torch.dtype] = {name: getattr(torch, dtype) for name, dtype in named}

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Compute the outputs for contiguous tensors in the order of ``inputs``; sizes and dtypes are not checked."""
        outputs: list[Tensor] = self._loader.boxed_run(list(tensors))
        return outputs
