"""A program that was emitted into a folder and is about to be loaded."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic

from torch import Tensor

from lorac.ir.graph.graph import Program, Skip
from lorac.ir.graph.passes import PassResult
from lorac.storage.open_file import open_files
from lorac.target.backend import BuildRequest, OptionsT
from lorac.target.engine import ProgramFiles


@dataclass(frozen=True, eq=False, kw_only=True)
class EmittedProgram(Generic[OptionsT]):
    """A program that was emitted into a folder and is about to be loaded.

    Attributes:
        request: the request that the program was built for.
        program: the lowered program, with its weights; the passes' notes are in its interfaces.
        folder: the folder of its files.
        file_names: the names of the files that the program may have.
        results: graph -> pass over the emitted program -> its result.
    """

    request: BuildRequest[OptionsT]
    program: Program
    folder: Path
    file_names: tuple[str, ...]
    results: Mapping[str, Mapping[str, PassResult]]

    @property
    def skipped(self) -> dict[str, dict[str, tuple[Skip, ...]]]:
        """Graph -> pass -> the patterns that it skipped."""
        return {
            graph: {name: result.skipped for name, result in results.items() if result.skipped}
            for graph, results in self.results.items()
        }

    def open_files(self) -> ProgramFiles:
        """Open those of the program's files that exist so far."""
        return open_files(self.folder, (name for name in self.file_names if (self.folder / name).exists()))

    def base_tensors(self) -> dict[str, Tensor]:
        """Return the base weights of planned sites, which mixtures and later adapters may need."""
        from lorac.frontend.base_weights import collect_base_tensors  # loading a program does without

        return collect_base_tensors(self.request.model, {path: plan.site for path, plan in self.request.plans.items()})
