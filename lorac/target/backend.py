"""The backend of a target: its options, and how engines for it are built, stored and restored."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import nn

from lorac.argument_types import check_fields
from lorac.errors import OptionError, Unavailable, check_known
from lorac.frontend.weight_reads import LayerReads
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import Program
from lorac.ir.sites.site import BaseReader, Site
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.live_terms import TrainingTerms
from lorac.ir.slots.plans import SitePlan
from lorac.ir.slots.program_values import check_extra_outputs
from lorac.target.dialect import AnyDialect
from lorac.target.engine import Engine, ProgramFiles

StoredState = Mapping[str, object]
"""JSON, as ``Backend.store`` returned it."""


@dataclass(frozen=True, kw_only=True)
class TargetOptions(ABC):
    """Options of every target; each target adds its own.

    Attributes:
        aux: extra outputs to return, such as ``("router",)``; read them from ``compiled.aux``.
        self_test: compare the captured program with the model, and the emitted program with the captured one
            (invariant 8).
    """

    running: ClassVar[tuple[str, ...]] = ()
    """The options that say how a program runs, rather than what it is: ``lorac.load`` takes them too."""
    local: ClassVar[tuple[str, ...]] = ()
    """The options that name something of this machine: no artifact says them."""
    aux: tuple[str, ...] = ()
    self_test: bool = True

    def __post_init__(self) -> None:
        """Accept lists in place of tuples, and check every value."""
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, list):
                object.__setattr__(self, spec.name, tuple(value))
        check_fields(self, "the target")
        self.check()

    @property
    def uses_cache(self) -> bool:
        """Whether the program is to keep a cache of keys and values."""
        return False

    @abstractmethod
    def check(self) -> None:
        """Raise ``OptionError`` for a value that makes no sense."""


OptionsT = TypeVar("OptionsT", bound=TargetOptions)


@dataclass(frozen=True, kw_only=True)
class BuildRequest(Generic[OptionsT]):
    """Everything that a backend needs to build an engine.

    Attributes:
        model: the model, or several (``Components``); never written to.
        plans: the slots of every touched site.
        base: reads base weights from the model.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: the weights of a baked engine.
        terms: terms from the adapters' own tensors, for targets that train.
        reads: the layers whose weights calls have read; an engine that runs the model notes its first whole call there.
        program: the lowered program, if the dialect emits one, or if an engine that runs the model itself is stored.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    plans: Mapping[str, SitePlan]
    base: BaseReader
    mode: str
    snapshot: ComposedWeights
    options: OptionsT
    terms: TrainingTerms
    reads: LayerReads
    program: Program | None = None


class Backend(ABC, Generic[OptionsT]):
    """A target: its dialect, its options, and how engines for it are built.

    A backend is found by its place: a package of ``lorac.backends`` whose module ``backend`` names one ``BACKEND``, or
    an entry point of the group ``lorac.backends``. Its name is the package's or the entry point's.

    Attributes:
        dialect: the ops, dtypes and rewrites of the target.
        options: the class of its options.
    """

    dialect: AnyDialect
    options: type[OptionsT]

    def parse_options(self, options: Mapping[str, object]) -> OptionsT:
        """Return the target's options from the keyword arguments of ``compile`` that are not its own.

        Raises:
            OptionError: the target has no such option.
        """
        known = [spec.name for spec in dataclasses.fields(self.options)]
        if not options.keys() <= {*known}:  # loading a program does without the dialect, which imports what builds one
            check_known(options, known, f"target '{self.dialect.name}' has no option")
        return self.options(**options)  # type: ignore[arg-type]  # __post_init__ checks the values

    @property
    def emits(self) -> bool:
        """Whether programs are emitted for the target, rather than the model run by itself."""
        return self.dialect.emits

    def dialect_for(self, options: OptionsT) -> AnyDialect:
        """Return the dialect of the device that the options name: devices compute in different dtypes."""
        return self.dialect

    def place_options(self, options: OptionsT, device: torch.device | None) -> OptionsT:
        """Return the options of a target that emits programs with the device that its engine will run on.

        Args:
            device: None where the caller named none.

        Raises:
            OptionError: the target does not run on the device, or the options name another one.
            Unavailable: this machine lacks something that the device needs.
        """
        if device is not None and device.type != "cpu":
            raise OptionError(
                f"target '{self.dialect.name}' does not run on device '{device}'",
                nearest="cpu",
                next_step="leave device= out",
            )
        return options

    def mark_quantised(self, sites: Mapping[str, Site], options: OptionsT, mode: str) -> dict[str, Site]:
        """Return the sites, those whose weights the engine will quantise marked (``Site.packed``)."""
        return dict(sites)

    def list_unsupported(self, program: Program) -> tuple[str, ...]:
        """List the ops of a lowered program that the target cannot compute, with the module that uses each."""
        return ()

    def check(self, request: BuildRequest[OptionsT]) -> None:
        """Refuse a request that no engine can be built for, before anything is captured.

        Raises:
            OptionError: an option that the request cannot have.
        """
        check_extra_outputs(request.options.aux, request.plans.values())

    @abstractmethod
    def build(self, request: BuildRequest[OptionsT]) -> Engine:
        """Build an engine."""

    @abstractmethod
    def store(self, engine: Engine, folder: Path, request: BuildRequest[OptionsT] | None) -> StoredState:
        """Write an engine's program and base weights into a folder.

        Args:
            engine: returned by ``build`` or ``restore``.
            folder: an empty folder.
            request: the model and its lowered program, if the engine runs the model itself.

        Returns:
            The other facts that ``restore`` needs, as JSON.
        """

    @abstractmethod
    def restore(
        self,
        stored: StoredState,
        files: ProgramFiles,
        plans: Mapping[str, SitePlan],
        mode: str,
        device: str | torch.device | None,
    ) -> Engine:
        """Build an engine from the files that ``store`` wrote. It keeps those that it reads later open."""

    @abstractmethod
    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        """Return the stored base weights by name; None for a program that never needs them again."""

    def read_interfaces(self, stored: StoredState) -> Mapping[str, Interface]:
        """Return the interface of each graph of a stored program without loading the program.

        Raises:
            ArtifactError: an interface contradicts itself.
        """
        graphs = stored.get("graphs")
        entries = graphs.items() if isinstance(graphs, Mapping) else ()
        return {name: Interface.from_json(entry["signature"]) for name, entry in entries}

    def restore_program(
        self, stored: StoredState, files: ProgramFiles, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]
    ) -> Program:
        """Return the stored program at level expanded, for another target to build from.

        Raises:
            Unavailable: the stored program has been lowered further.
        """
        raise Unavailable(
            f"a program for {self.dialect.name} cannot be turned into one for another target",
            next_step="compile from the model, or save an eager artifact: that can be loaded for every target",
        )
