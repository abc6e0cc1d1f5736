"""The backend of a target: its options, and functions to build, store and restore its engines."""

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
    """Options that every target has; each target adds more.

    Attributes:
        aux: names of extra outputs to return, such as ``("router",)``; read them from ``compiled.aux``.
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
        """Convert lists to tuples, and check every value."""
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, list):
                object.__setattr__(self, spec.name, tuple(value))
        check_fields(self, "the target")
        self.check()

    @property
    def uses_cache(self) -> bool:
        """Whether the program gets a cache of keys and values: the option ``cache`` of targets that have one."""
        return getattr(self, "cache", False)

    @abstractmethod
    def check(self) -> None:
        """Raise ``OptionError`` if options contradict each other."""


OptionsT = TypeVar("OptionsT", bound=TargetOptions)


@dataclass(frozen=True, kw_only=True)
class BuildRequest(Generic[OptionsT]):
    """Everything that a backend needs to build an engine.

    Attributes:
        model: the model, or several models (``Components``); never modified.
        plans: the slots of every adapted site.
        base: a reader of the model's base weights.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: the weights of a baked engine.
        terms: for targets that train, terms that are computed from the adapters' own tensors.
        reads: the layers whose weights calls have read; an engine that runs the model adds to it in its first whole
            call.
        program: the lowered program, if the dialect emits one, or if an engine that runs the model is being stored.
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
    """A target: its dialect, its options, and functions to build its engines.

    Backends are registered by location: a package of ``lorac.backends`` whose module ``backend`` defines ``BACKEND``,
    or an entry point of the group ``lorac.backends``. The package or the entry point gives the name.

    Attributes:
        dialect: the ops, dtypes and rewrites of the target.
        options: the dataclass of the target's options.
    """

    dialect: AnyDialect
    options: type[OptionsT]

    def parse_options(self, options: Mapping[str, object]) -> OptionsT:
        """Parse those keyword arguments of ``compile`` that are the target's options.

        Raises:
            OptionError: the target has no such option.
        """
        known = [spec.name for spec in dataclasses.fields(self.options)]
        if not options.keys() <= {*known}:  # a loaded program needs no dialect, whose import loads the compiler
            check_known(options, known, f"target '{self.dialect.name}' has no option")
        return self.options(**options)  # type: ignore[arg-type]  # __post_init__ checks the values

    @property
    def emits(self) -> bool:
        """Whether a program is emitted for the target; otherwise the engine runs the model itself."""
        return self.dialect.emits

    def dialect_for(self, options: OptionsT) -> AnyDialect:
        """Return the dialect for the device that the options name, since devices compute in different dtypes."""
        return self.dialect

    def place_options(self, options: OptionsT, device: torch.device | None) -> OptionsT:
        """Set the device on which the engine will run in the options; only for targets that emit programs.

        Args:
            device: the requested device; None if the caller gave none.

        Raises:
            OptionError: the target does not run on the device, or the options name another device.
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
        """Return the sites, with ``Site.packed`` set where the engine will quantise the weight."""
        return dict(sites)

    def list_unsupported(self, program: Program) -> tuple[str, ...]:
        """List the ops of a lowered program that the target cannot compute, each with the module that uses it."""
        return ()

    def check(self, request: BuildRequest[OptionsT]) -> None:
        """Refuse a request for which no engine can be built, before the model is captured.

        Raises:
            OptionError: an option does not fit the request.
        """
        check_extra_outputs(request.options.aux, request.plans.values())

    @abstractmethod
    def build(self, request: BuildRequest[OptionsT]) -> Engine:
        """Build an engine."""

    @abstractmethod
    def store(self, engine: Engine, folder: Path, request: BuildRequest[OptionsT] | None) -> StoredState:
        """Write an engine's program and base weights into a folder.

        Args:
            engine: an engine that ``build`` or ``restore`` returned.
            folder: an empty folder.
            request: the model and its lowered program, if the engine runs the model; else None.

        Returns:
            All other state that ``restore`` needs, as JSON.
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
        """Build an engine from the files that ``store`` wrote; files that it reads later stay open."""

    @abstractmethod
    def read_base_weights(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        """Return the stored base weights by name; None for a program that does not need them after loading."""

    def read_interfaces(self, stored: StoredState) -> Mapping[str, Interface]:
        """Return the interface of each graph of a stored program, without loading the program.

        Raises:
            ArtifactError: an interface is inconsistent.
        """
        graphs = stored.get("graphs")
        entries = graphs.items() if isinstance(graphs, Mapping) else ()
        return {name: Interface.from_json(entry["signature"]) for name, entry in entries}

    def restore_program(
        self, stored: StoredState, files: ProgramFiles, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]
    ) -> Program:
        """Return the stored program at level expanded, from which another target can be built.

        Raises:
            Unavailable: the stored program has been lowered further.
        """
        raise Unavailable(
            f"a program for {self.dialect.name} cannot be turned into one for another target",
            next_step="compile from the model, or save an eager artifact: that can be loaded for every target",
        )
