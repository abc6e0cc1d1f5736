"""The contract between the compiler, the runtime and a target: dialect, request, backend, engine.

A *backend* states its *dialect* (what the target can run, and in which taste) and builds an *engine* from a *request*.
An engine turns slot tensors into a *binding*, once per choice of adapters; calls run with a binding. The compiler and
the runtime know these types and no target.
"""

from __future__ import annotations

import dataclasses
import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, Never, TypeVar

import torch
from torch import nn

from lorac.argument_types import check_fields
from lorac.errors import OptionError, Unavailable, nearest_name
from lorac.ir.graph.passes import Pass
from lorac.ir.graph.program import Program
from lorac.ir.interface import Interface
from lorac.ir.sites import BaseReader, Site, SiteKind
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.extra_outputs import check_extra_outputs
from lorac.ir.slots.live_terms import TrainingTerms
from lorac.ir.slots.plans import RankPolicy, SitePlan, SiteSlots
from lorac.storage.open_file import OpenFile
from lorac.target.binding import BoundProgram, ResultT
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache

if TYPE_CHECKING:
    from lorac.report.dump import Dump

ClaimedOps = frozenset[tuple[str, str]]
"""(domain, op) pairs; the default domain is ``""``."""
ProgramFiles = Mapping[str, OpenFile]
"""Files of a program by name, with slashes, as they were checked: nothing is read by its path again (invariant 10)."""


Model_contra = TypeVar("Model_contra", contravariant=True)


# ── What a target can run ────────────────────────────────────────────────────────────────────────────────────────────
class BranchGate(enum.Enum):
    """How a branch that is off is left out of a call."""

    NONE = "none"
    """It is not: what is off is not part of the program that runs."""
    IF = "if"
    """A conditional op around it: an idle branch is not computed."""
    WHERE = "where"
    """It is computed, and its result dropped by a selection on its strength, so that its zeros cannot turn into NaN."""


@dataclass(frozen=True, kw_only=True)
class Dialect(Generic[Model_contra]):
    """What a target can run. Pipelines and emission read it and nothing else about the target.

    It is generic in what emission writes for it, which only its own rewrites take: ``AnyDialect`` is any of them.

    Attributes:
        name: the target's.
        claims: the ops the target computes; None where no program is emitted for it.
        passes: what brings a graph from level expanded to level target, in order.
        fusions: rewrites of the emitted program before its clean-up, in order.
        finish: rewrites of the cleaned-up program, in order.
        gates: how branches that are off are left out.
        ranks: kinds of sites whose pairs have other ranks than ``FROM_ZERO``.
        dtypes: floating-point dtypes the target computes in, best first; a host in another one is cast to the first.
        packs: whether sites that read the same input are computed as one.
        functions: whether an op that is not claimed runs nevertheless where ONNX itself says it by others.
    """

    name: str
    claims: ClaimedOps | None = None
    passes: tuple[Pass, ...] = ()
    fusions: tuple[Callable[[Model_contra], None], ...] = ()
    finish: tuple[Callable[[Model_contra], None], ...] = ()
    gates: BranchGate = BranchGate.IF
    ranks: Mapping[SiteKind, RankPolicy] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    packs: bool = True
    functions: bool = True

    def ranks_at(self, site: Site) -> RankPolicy:
        """Which ranks a site's pair may have."""
        return self.ranks.get(site.kind, RankPolicy.FROM_ZERO)

    @property
    def emits(self) -> bool:
        """Whether a program is emitted for the target, which then runs it without the host."""
        return self.claims is not None


AnyDialect = Dialect[Never]


@dataclass(frozen=True, kw_only=True)
class TargetOptions(ABC):
    """What every target can be told; each adds its own.

    Attributes:
        aux: extra outputs to give, such as ``("router",)``; read them from ``compiled.aux``.
        self_test: hold the program that was captured against the host, and what was made of it against the program
            (invariant 8).
    """

    aux: tuple[str, ...] = ()
    self_test: bool = True

    def __post_init__(self) -> None:
        """Lists are taken for tuples."""
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if isinstance(value, list):
                object.__setattr__(self, spec.name, tuple(value))
        check_fields(self, "the target")
        self.check()

    @property
    def grows(self) -> bool:
        """Whether texts are to grow: a program with a cache is asked for."""
        return False

    @abstractmethod
    def check(self) -> None:
        """Raise ``OptionError`` where a value makes no sense."""


OptionsT = TypeVar("OptionsT", bound=TargetOptions)


# ── What runs ────────────────────────────────────────────────────────────────────────────────────────────────────────
class Engine(ABC):
    """One running program. Every method may be called from any thread.

    Attributes:
        target: the backend's name.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        files: the emitted program and its base weights by name, held; None where the engine runs the host itself.
        module: the copy of the host that it runs; None where it runs an emitted program.
        buffers: fused mode: the weights it reads, by site path.
        interfaces: the interface of each graph of its program; empty where it runs the host itself.
        settles_alone: a swap settles in the background, unasked.
    """

    target: str
    mode: str
    files: ProgramFiles | None = None
    module: nn.Module | None = None
    buffers: Mapping[str, FusedBuffer]
    interfaces: Mapping[str, Interface] = MappingProxyType({})
    settles_alone: bool = False

    @property
    def fused(self) -> bool:
        """Whether weights are written in place (``write``) instead of bound per call (``bind``)."""
        return self.mode == "fused"

    @property
    def computes_terms(self) -> bool:
        """Whether a call made now computes its terms from the adapters' own tensors, and reads no slot."""
        return False

    def listing(self) -> Mapping[str, Dump]:
        """The emitted program, for a person to read: graph -> its rows; empty where the engine runs the host itself."""
        return {}

    def keeps(self, graph: str) -> CacheSpec | None:
        """What a graph's cache can hold; None where it keeps none."""
        return None

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        """An empty cache for a graph that keeps one; raises ``Unavailable`` where it keeps none."""
        self.refuse_cache()

    def refuse_cache(self) -> Never:
        """Raise ``Unavailable``: the program keeps no cache."""
        raise Unavailable(
            f"this program for {self.target} keeps no cache",
            next_step="compile with cache=True for target='onnxruntime'",
        )

    def extend(self, content: object, graph: str, cache: KeyValueCache, extension: DecodeStep) -> torch.Tensor:
        """As ``BoundProgram.extend``, with what the engine made of a choice."""
        self.refuse_cache()

    def encode(self, content: object, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        """As ``BoundProgram.encode``; only of engines whose graph has an encoder beside it (``CacheSpec.encodes``)."""
        self.refuse_cache()

    def lend(self, content: object, graph: str, work: Callable[[nn.Module], ResultT]) -> ResultT:
        """As ``BoundProgram.lend``; only of engines that run the host."""
        raise NotImplementedError

    @abstractmethod
    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram:
        """Turn slot tensors into a binding; done once per choice, used by many calls."""

    @property
    @abstractmethod
    def written(self) -> BoundProgram:
        """Fused mode: the binding of what was written last."""

    def write(self, snapshot: ComposedWeights) -> int:
        """Fused mode: make the weights hold the snapshot; returns the bytes written. The caller keeps calls away."""
        written = 0
        for path, buffer in self.buffers.items():
            composed = snapshot.composed.get(path)
            written += buffer.write(composed.change if composed is not None else None)
        self.hold(snapshot)
        return written

    @abstractmethod
    def hold(self, snapshot: ComposedWeights) -> None:
        """Fused mode: note what was written."""

    @property
    def constant(self) -> bool:
        """Whether what it computes with is part of the program, which has no slots to bind."""
        return False

    @property
    def portable(self) -> bool:
        """Whether the program runs without lorac, and takes choices of adapters from files (``write_choice``)."""
        return False

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """Write what a choice puts into a graph's slots, as a file of the kind that the target's own library reads.

        Raises:
            ChoiceError: there is no such graph.
            Unavailable: the target has no such files, or the choice does not fit into one.
        """
        raise Unavailable(
            f"target '{self.target}' in mode '{self.mode}' takes no adapters from files",
            next_step="target='onnxruntime' does, in mode='live' and 'fused'",
        )

    @property
    def settled(self) -> bool:
        """Whether the active weights are constants of a session now."""
        return False

    def settle(self) -> None:
        """Fused mode: re-bake the active weights as constants and let calls run on them.

        Raises:
            Unavailable: the engine has no such state.
        """
        raise Unavailable(
            f"there is nothing to settle in {self.target}", next_step="target='onnxruntime', mode='fused' settles"
        )


# ── What builds it ───────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True, kw_only=True)
class BuildRequest(Generic[OptionsT]):
    """Everything a backend needs to build an engine.

    Attributes:
        model: the host, or several (``Components``); never written.
        sites: its sites.
        plans: the slots of every touched site.
        base: reads base weights from the host.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: what a baked engine holds.
        options: the target's options.
        terms: terms from the adapters' own tensors, for targets that train.
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
    program: Program | None = None


StoredState = Mapping[str, object]
"""JSON: what ``store`` returned."""


class Backend(ABC, Generic[OptionsT]):
    """A target: what it can run, what it can be told, and how an engine for it comes to be.

    It is found by its place: a package of ``lorac.backends`` whose module ``backend`` has one as ``BACKEND``, or an
    entry point of the group ``lorac.backends`` that names one. Its name is the package's or the entry point's.

    Attributes:
        dialect: what the target can run.
        options: the class of its options.
    """

    dialect: AnyDialect
    options: type[OptionsT]

    def told(self, options: Mapping[str, object]) -> OptionsT:
        """The target's options out of what ``compile`` was given beside its own arguments.

        Raises:
            OptionError: the target has no such option.
        """
        known = [spec.name for spec in dataclasses.fields(self.options)]
        for name in options:
            if name not in known:
                raise OptionError(
                    f"target '{self.dialect.name}' has no option '{name}'",
                    nearest=nearest_name(name, known),
                    next_step=f"it takes {', '.join(known)}",
                )
        return self.options(**options)  # type: ignore[arg-type]  # each class checks its own values

    def dialect_for(self, options: OptionsT) -> AnyDialect:
        """What the target can run where its options have it run: devices compute in other dtypes."""
        return self.dialect

    def placed(self, options: OptionsT, device: torch.device | None) -> OptionsT:
        """The options of a target that emits programs, for a device that its engine is to run on.

        Args:
            options: the target's.
            device: None where none was asked for.

        Raises:
            OptionError: the target does not run on it, or the options say otherwise.
            Unavailable: this machine lacks what it takes.
        """
        if device is not None and device.type != "cpu":
            raise OptionError(
                f"target '{self.dialect.name}' does not run on device '{device}'",
                nearest="cpu",
                next_step="leave device= out",
            )
        return options

    def held(self, sites: Mapping[str, Site], options: OptionsT, mode: str) -> dict[str, Site]:
        """The sites of a host as an engine is to hold their weights: those that it quantises say so (``packed``)."""
        return dict(sites)

    def lacking(self, program: Program) -> tuple[str, ...]:
        """What the target does not compute of a lowered program, each op with who asks for it, told without a build."""
        return ()

    def check(self, request: BuildRequest[OptionsT]) -> None:
        """Refuse a request that no engine can be built for, before anything is captured.

        Raises:
            OptionError: an option that the request cannot have.
        """
        check_extra_outputs(request.options.aux, request.plans.values())

    @abstractmethod
    def build(self, request: BuildRequest[OptionsT]) -> Engine:
        """An engine for the request."""

    @abstractmethod
    def store(self, engine: Engine, folder: Path, request: BuildRequest[OptionsT] | None) -> StoredState:
        """Write an engine's program and base weights into a folder; returns what else ``restore`` needs, as JSON.

        Args:
            engine: what ``build`` or ``restore`` gave.
            folder: an empty folder.
            request: the model and its lowered program, if the engine runs the model itself.
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
        """An engine over what ``store`` wrote; it holds what it reads later."""

    @abstractmethod
    def base_of(self, files: ProgramFiles) -> Mapping[str, torch.Tensor] | None:
        """The base weights by name, as ``store`` wrote them; None where the program never needs any again."""

    def read_interfaces(self, stored: StoredState) -> Mapping[str, Interface]:
        """How each graph of a stored program is called, told without loading it; empty where it is stored otherwise.

        Raises:
            ArtifactError: a signature does not fit together.
        """
        graphs = stored.get("graphs")
        entries = graphs.items() if isinstance(graphs, Mapping) else ()
        return {name: Interface.from_json(entry["signature"]) for name, entry in entries}

    def program_of(
        self, stored: StoredState, files: ProgramFiles, sites: Mapping[str, Site], plans: Mapping[str, SitePlan]
    ) -> Program:
        """The stored program at level expanded again, for another target to build from.

        Raises:
            Unavailable: what is stored is no longer such a program.
        """
        raise Unavailable(
            f"a program for {self.dialect.name} cannot be turned into one for another target",
            next_step="compile from the model, or save an eager artefact: that can be loaded for every target",
        )
