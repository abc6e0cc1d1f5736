"""The engine of a target: one running program, which binds the slot tensors of each choice of adapters once.

Any number of calls then run the bound program.
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
from lorac.ir.slots.layer_sizes import mark_beyond
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
    """Rows with adapters of their own cannot share a call after all; ``Engine.why_apart`` says so from now on."""


@dataclass(frozen=True, eq=False)
class CallResult:
    """The result of one call: the model's output object, and the requested extra outputs."""

    output: object
    aux: AuxOutputs = field(default_factory=dict)


class Engine(ABC):
    """One running program. Every method may be called from any thread.

    Attributes:
        target: the backend's name.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        fused: whether weights are written in place (``write``) instead of bound for each choice (``bind``).
        finds_invocations: whether its programs find the tokens from which on adapters with invocation tokens act.
        computes_terms: whether a call made now computes its terms from the adapters' own tensors, and reads no slot.
        trace_key: of graphs that torch.compile may keep of whole calls: the choice; None if it can keep none.
        files: the emitted program and its base weights by name; None where the engine runs the model itself.
        module: the copy of the model that it runs; None where it runs an emitted program.
        hidden: modules that it runs and that are no part of the copy.
        buffers: fused mode: the weights that it reads, by site path.
        interfaces: the interface of each graph of its program; empty where it runs the model itself.
        skipped: graph -> pass over the emitted program -> its skips; empty for a loaded program.
        settles_in_background: whether a swap starts ``settle`` by itself.
        memory_budget: counts the caches of its graphs.
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
        """Whether the weights are part of the program, which has no slots."""
        return False

    @property
    def choice_suffix(self) -> str | None:
        """Suffix of the files of choices (``write_choice``); None where the program does not run without lorac."""
        return None

    def check_module(self) -> None:  # noqa: B027  (an emitted program has no modules)
        """Raise ``Unavailable`` if children or weights of the copy that it runs are not those of the model."""

    def dump(self) -> Mapping[str, Dump]:
        """Return the emitted program as rows of text, by graph; empty where the engine runs the model itself."""
        return {}

    @abstractmethod
    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram:
        """Bind the tensors of a choice to the program's slots."""

    def why_apart(self, snapshot: ComposedWeights, graph: str) -> str | None:
        """Return why rows with a choice cannot share a call of a graph with rows of other choices; None where they can.

        Args:
            snapshot: the choice.
            graph: which of the program's graphs.
        """
        return f"target '{self.target}' takes one choice for all rows of a call"

    def most_places(self, graph: str) -> int | None:
        """Return how many choices rows of a call may have; None for any number."""
        return None

    def bind_rows(self, programs: Sequence[BoundProgram]) -> BoundProgram:
        """Bind choices that may share a call, one for each part of its rows.

        Args:
            programs: the program bound to each choice; the rows of a call are cut into as many parts of one size.

        Raises:
            NotImplementedError: the target takes one choice for all rows of a call.
        """
        raise NotImplementedError

    def cache_spec(self, graph: str) -> CacheSpec | None:
        """Return the limits of a graph's cache; None for a graph without one."""
        return None

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        """Return an empty cache.

        Raises:
            Unavailable: the graph has no cache.
            OverBudget: there is no room for it.
        """
        self.refuse_cache()

    def refuse_cache(self) -> Never:
        """Raise ``Unavailable``, since the program keeps no cache."""
        raise Unavailable(
            f"this program for {self.target} keeps no cache",
            next_step="compile with cache=True for target='onnxruntime'",
        )

    @property
    @abstractmethod
    def written_program(self) -> BoundProgram:
        """The program with the weights that were written last."""

    def write(self, snapshot: ComposedWeights) -> int:
        """Write a choice's weights; the caller keeps other calls away.

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
        """Record which choice was written."""

    @property
    def is_settled(self) -> bool:
        """Whether the active weights are constants of a session now."""
        return False

    def settle(self) -> None:
        """Make the active weights constants of a new session, and let calls run on that.

        Raises:
            Unavailable: the engine has no such state.
        """
        raise Unavailable(
            f"there is nothing to settle in {self.target}", next_step="target='onnxruntime', mode='fused' settles"
        )

    def write_choice(self, snapshot: ComposedWeights, graph: str, path: Path) -> None:
        """Write the slot tensors of a choice to a file that the target's own library reads.

        Raises:
            ChoiceError: the program has no such graph.
            Unavailable: the target has no such files, or the choice does not fit into one.
        """
        raise Unavailable(
            f"target '{self.target}' in mode '{self.mode}' takes no adapters from files",
            next_step="target='onnxruntime' does, in mode='live' and 'fused'",
        )


@dataclass(frozen=True, eq=False)
class BoundProgram(ABC):
    """An engine's program with the tensors of one choice of adapters; many threads may run it.

    Engines keep no reference to it, so that neither keeps the other alive.

    Attributes:
        own: the tensors that were made for it alone.
        charge: their memory, where that is counted.
        prefix: the virtual tokens before each sequence.
        begun: graph -> a row of its cache that holds the prefix, once one was asked for.
        parts: of choices that share a call, the program of each part of its rows, where virtual tokens precede some.
    """

    engine: Engine
    own: tuple[torch.Tensor, ...] = field(default=(), kw_only=True)
    charge: Charge | None = field(default=None, kw_only=True)
    prefix: Prefix | None = field(default=None, kw_only=True)
    begun: dict[str, KeyValueCache] = field(default_factory=dict, kw_only=True)
    parts: tuple[BoundProgram, ...] = field(default=(), kw_only=True)

    @property
    def virtual_tokens(self) -> int:
        """The most virtual tokens before a row."""
        return max(0 if part.prefix is None else part.prefix.length for part in self.parts or (self,))

    @abstractmethod
    def run(self, graph: str, call: Call) -> CallResult:
        """Call a graph of the program; inputs and outputs are both torch or both NumPy."""

    def run_with_model(self, graph: str, work: Callable[[nn.Module], T]) -> T:
        """Run ``work`` on the model, each of whose forwards answers with this choice.

        Raises:
            NotImplementedError: the engine runs an emitted program.
        """
        raise NotImplementedError

    def for_prompts(self, ids: torch.Tensor, mask: torch.Tensor | None) -> BoundProgram:
        """Return the program for sequences that begin with prompts, in which adapters' invocation tokens are found.

        Args:
            ids: token ids (rows, length), padded on the left.
            mask: (rows, length), 0 for padding; None where nothing is padding.
        """
        return self

    def activate(self) -> None:  # noqa: B027  (only where the engine runs the model there is such work)
        """Make this choice the active one, for work outside any call, such as recomputation in backward."""

    def decode(self, graph: str, cache: KeyValueCache, step: DecodeStep) -> torch.Tensor:
        """Add tokens to the rows of a cache, which has room for them; a call that fails adds none.

        Returns:
            The requested logits (rows, k, vocabulary), in memory that no later call writes to.
        """
        self.engine.refuse_cache()

    def new_cache(self, graph: str, rows: int, capacity: int) -> KeyValueCache:
        """Return a cache of rows that hold the virtual tokens alone, whose keys and values are computed once.

        Raises:
            Unavailable: the graph has no cache.
            InputMismatch: the rows may become longer than the model has positions for.
            AdapterError: the model has other layers or heads than the prefix.
            OverBudget: there is no room for it.
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
            ChoiceError, InputMismatch: the encoder does not take these inputs.
        """
        self.engine.refuse_cache()

    def compute_features(self, graph: str, inputs: Mapping[str, object]) -> torch.Tensor:
        """Run the tower of a graph on images or sounds; return the vectors (count, size) for placeholders in prompts.

        Raises:
            Unavailable: the adapters act on some tokens of a prompt alone.
            ChoiceError, InputMismatch: the tower does not take these inputs.
        """
        raise Unavailable(
            "adapters that act from their invocation tokens on are not computed for images or sounds in prompts",
            next_step="compile with target='eager', or swap to another adapter",
        )

    def placed_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors in slots that have places, by slot: each (1, …), the only place.

        Raises:
            NotImplementedError: the target takes one choice for all rows of a call.
        """
        raise NotImplementedError

    def with_places(self, places: Mapping[str, torch.Tensor]) -> BoundProgram:
        """Bind tensors (places, …) to the slots that have places, and these to the others; later writes count.

        Raises:
            NotImplementedError: as ``placed_tensors``.
        """
        raise NotImplementedError
