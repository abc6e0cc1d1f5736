"""The engine of a target: a running program; binding sets the slot tensors of a choice of adapters once.

Any number of calls can then run the bound program.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Never, TypeVar

import torch
from torch import nn

from lorac.errors import InputMismatch, Unavailable
from lorac.ir.calls.call import Call
from lorac.ir.calls.interface import Interface
from lorac.ir.graph.graph import Skip
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.layouts import mark_beyond
from lorac.ir.slots.plans import SiteSlots
from lorac.ir.slots.prefix import Prefix
from lorac.ir.slots.weight_writes import SparseWrites
from lorac.report.dump import Dump
from lorac.storage.open_file import OpenFile
from lorac.target.kv_cache import CacheSpec, DecodeStep, KeyValueCache
from lorac.target.memory_budget import Charge, MemoryBudget

AuxOutputs = Mapping[str, Mapping[str, object]]
"""Extra outputs: name -> site path -> tensor."""
ProgramFiles = Mapping[str, OpenFile]
"""A program's files by name, with slashes. They stay open after they are checked, so no path is read twice
(invariant 10)."""
T = TypeVar("T")


class RowsApart(Exception):
    """A call shows that rows with different adapters cannot share it; ``Engine.why_apart`` then gives the reason."""


@dataclass(frozen=True, eq=False)
class CallResult:
    """The result of one call: the model's output object, and the requested extra outputs."""

    output: object
    aux: AuxOutputs = field(default_factory=dict)


class Engine(ABC):
    """One running program; every method may be called from any thread.

    Attributes:
        target: the backend's name.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        fused: whether weights are written in place (``write``) instead of bound for each choice (``bind``).
        finds_invocations: whether programs locate invocation tokens, after which some adapters act.
        computes_terms: whether the next call computes terms from the adapters' own tensors, and reads no slot.
        trace_key: the part of torch.compile's cache key that stands for the choice; None if whole calls cannot be
            traced.
        files: the emitted program and its base weights by name; None if the engine runs the model itself.
        module: the copy of the model that the engine runs; None if it runs an emitted program.
        hidden: modules that the engine runs besides those of the copy.
        buffers: in fused mode, the buffers of the weights that the program reads, by site path.
        interfaces: the interface of each graph of the program; empty if the engine runs the model itself.
        skipped: graph -> pass over the emitted program -> patterns that it skipped; empty for a loaded program.
        settles_in_background: whether a swap starts ``settle`` in the background.
        memory_budget: the budget that the caches of the graphs count against.
    """

    target: str
    mode: str
    fused: bool
    finds_invocations: bool = False
    computes_terms: bool = False
    trace_key: str | None = None
    files: ProgramFiles | None = None
    module: nn.Module | None = None
    hidden: Collection[nn.Module] = ()
    buffers: Mapping[str, FusedBuffer]
    interfaces: Mapping[str, Interface] = MappingProxyType({})
    skipped: Mapping[str, Mapping[str, tuple[Skip, ...]]] = MappingProxyType({})
    settles_in_background: bool = False
    memory_budget: MemoryBudget | None = None

    @property
    def constant(self) -> bool:
        """Whether the weights are constants of the program, which then has no slots."""
        return False

    @property
    def choice_suffix(self) -> str | None:
        """Suffix of a choice's file (``write_choice``); None if the program cannot run without lorac."""
        return None

    def check_module(self) -> None:  # noqa: B027  (an emitted program has no modules)
        """Raise ``Unavailable`` if the copy's children or weights are no longer those of the model."""

    def dump(self) -> Mapping[str, Dump]:
        """Return the emitted program as text rows, by graph; empty if the engine runs the model itself."""
        return {}

    @abstractmethod
    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram:
        """Bind the tensors of a choice to the program's slots."""

    def why_apart(self, snapshot: ComposedWeights, graph: str) -> str | None:
        """Return why rows with a choice cannot share a call of a graph with rows of other choices; None if they can.

        Args:
            snapshot: the composed weights of the choice.
            graph: the name of the graph.
        """
        return f"target '{self.target}' takes one choice for all rows of a call"

    def most_places(self, graph: str) -> int | None:
        """Return the maximum number of choices among the rows of one call; None if there is no limit."""
        return None

    def bind_rows(self, programs: Sequence[BoundProgram]) -> BoundProgram:
        """Bind several choices for one call, each to one part of the call's rows.

        Args:
            programs: the bound program of each choice; the rows of a call are split into as many parts of equal size.

        Raises:
            NotImplementedError: the target supports only one choice per call.
        """
        raise NotImplementedError

    def cache_spec(self, graph: str) -> CacheSpec | None:
        """Return the limits of a graph's cache; None if the graph has no cache."""
        return None

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        """Return an empty cache.

        Raises:
            Unavailable: the graph has no cache.
            OverBudget: the memory budget has no room for the cache.
        """
        self.refuse_cache()

    def refuse_cache(self) -> Never:
        """Raise ``Unavailable``, since the program has no cache."""
        raise Unavailable(
            f"this program for {self.target} keeps no cache",
            next_step="compile with cache=True for target='onnxruntime'",
        )

    @property
    @abstractmethod
    def written_program(self) -> BoundProgram:
        """The program with the weights of the last ``write``."""

    def write(self, snapshot: ComposedWeights) -> int:
        """Write a choice's weights in place; the caller must block concurrent calls.

        Returns:
            The number of bytes written.
        """
        written, sparse = 0, SparseWrites()
        for path, buffer in self.buffers.items():
            composed = snapshot.composed.get(path)
            written += buffer.start_write(composed.change if composed is not None else None, sparse)
            mark_beyond(buffer.bias, buffer.site, snapshot.sizes.get(path, 0))
        sparse.run()
        self.record_written(snapshot)
        return written

    @abstractmethod
    def record_written(self, snapshot: ComposedWeights) -> None:
        """Record the choice that was written last."""

    @property
    def is_settled(self) -> bool:
        """Whether the active weights are now constants of a session."""
        return False

    def settle(self) -> None:
        """Create a session with the active weights as constants, and run later calls on it.

        Raises:
            Unavailable: the engine does not support settling.
        """
        raise Unavailable(
            f"there is nothing to settle in {self.target}", next_step="target='onnxruntime', mode='fused' settles"
        )

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """Write the slot tensors of a choice to a file that the target's own runtime reads.

        Raises:
            ChoiceError: the program has no such graph.
            Unavailable: the target has no such file format, or the choice does not fit into one file.
        """
        raise Unavailable(
            f"target '{self.target}' in mode '{self.mode}' takes no adapters from files",
            next_step="compile with target='onnxruntime', in mode='live' or 'fused'",
        )


@dataclass(frozen=True, eq=False)
class BoundProgram(ABC):
    """An engine's program with the tensors of one choice of adapters; several threads may run it at once.

    Engines hold no reference to it, so neither keeps the other alive.

    Attributes:
        own: tensors that were allocated only for this program.
        charge: the charge for their memory, where memory is counted.
        prefix: the virtual tokens before each sequence.
        begun: graph -> a cache row that contains the prefix; filled at the first request.
        parts: for choices that share a call, the program of each part of the rows, if a part has virtual tokens.
    """

    engine: Engine
    own: tuple[torch.Tensor, ...] = field(default=(), kw_only=True)
    charge: Charge | None = field(default=None, kw_only=True)
    prefix: Prefix | None = field(default=None, kw_only=True)
    begun: dict[str, KeyValueCache] = field(default_factory=dict, kw_only=True)
    parts: tuple[BoundProgram, ...] = field(default=(), kw_only=True)

    @property
    def virtual_tokens(self) -> int:
        """The maximum number of virtual tokens before any row."""
        return max(0 if part.prefix is None else part.prefix.length for part in self.parts or (self,))

    @abstractmethod
    def run(self, graph: str, call: Call) -> CallResult:
        """Call a graph of the program; inputs are torch or NumPy, and outputs are of the same kind."""

    def run_with_model(self, graph: str, work: Callable[[nn.Module], T]) -> T:
        """Call ``work`` with the model; every forward pass in it uses this choice.

        Raises:
            NotImplementedError: the engine runs an emitted program.
        """
        raise NotImplementedError

    def for_prompts(self, ids: torch.Tensor, mask: torch.Tensor | None) -> BoundProgram:
        """Return the program for sequences that begin with prompts; locate adapters' invocation tokens in the prompts.

        Args:
            ids: token ids (rows, length), padded on the left.
            mask: (rows, length), 0 for padding; None if there is no padding.
        """
        return self

    def activate(self) -> None:  # noqa: B027  (only an engine that runs the model needs it)
        """Make this choice active for work outside of calls, such as recomputation in the backward pass."""

    def decode(self, graph: str, cache: KeyValueCache, step: DecodeStep) -> torch.Tensor:
        """Append tokens to the rows of a cache with enough capacity; a call that raises appends none.

        Returns:
            The requested logits (rows, k, vocabulary), in memory that later calls do not overwrite.
        """
        self.engine.refuse_cache()

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        """Return a cache whose rows contain only the virtual tokens; their keys and values are computed once.

        Raises:
            Unavailable: the graph has no cache.
            InputMismatch: rows may become longer than the model's positions allow.
            AdapterError: the model's layers or heads differ from the prefix's.
            OverBudget: the memory budget has no room for the cache.
        """
        if self.parts:
            whole = self.engine.new_cache(graph, 0, capacity)
            for part in self.parts:
                whole.join(part.new_cache(graph, rows // len(self.parts), capacity))
            return whole
        if self.prefix is None:
            return self.engine.new_cache(graph, rows, capacity)
        spec = self.engine.cache_spec(graph)
        if spec is not None and spec.limit is not None and self.prefix.length + capacity > spec.limit + 1:
            raise InputMismatch(
                f"{self.prefix.length} virtual tokens and {capacity} others are more than the model has positions for: "
                f"{spec.limit}",
                next_step="ask for fewer tokens, or give a shorter prompt",
            )
        if graph not in self.begun:
            one, ids = self.engine.new_cache(graph, 1, self.prefix.length), self.prefix.ids
            if not self.prefix.attends:
                self.decode(graph, one, DecodeStep(ids=ids, counts=[ids.shape[1]], wanted=ids[:, :1] * 0))
            one.hold_prefix(self.prefix.rows if self.prefix.attends else None)
            self.begun[graph] = one
        cache = self.begun[graph].copy([0] * rows)
        cache.grow(capacity)
        return cache

    def encode(self, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        """Run the encoder, and store its outputs for the rows of an empty cache.

        Raises:
            ChoiceError, InputMismatch: the encoder does not accept these inputs.
        """
        self.engine.refuse_cache()

    def compute_features(self, graph: str, inputs: Mapping[str, object]) -> torch.Tensor:
        """Run the tower of a graph on images or sounds; return vectors (count, size) for the placeholders in prompts.

        Raises:
            Unavailable: an active adapter acts on only some tokens of a prompt.
            ChoiceError, InputMismatch: the tower does not accept these inputs.
        """
        raise Unavailable(
            "adapters with invocation tokens do not work for prompts with images or sounds",
            next_step="compile with target='eager', or swap to another adapter",
        )

    def placed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of placed slots, by slot name; each is (1, …), with one place.

        Raises:
            NotImplementedError: the target supports only one choice per call.
        """
        raise NotImplementedError

    def with_places(self, places: Mapping[str, torch.Tensor]) -> BoundProgram:
        """Bind tensors (places, …) to slots with places; other slots keep this program's tensors, with later writes.

        Raises:
            NotImplementedError: as ``placed_tensors``.
        """
        raise NotImplementedError
