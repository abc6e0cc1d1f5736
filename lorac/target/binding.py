"""What one choice of adapters comes to in an engine, and how it is run with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from lorac.target.kv_cache import DecodeStep, KeyValueCache

AuxOutputs = Mapping[str, Mapping[str, object]]
"""Extra outputs: name -> site path -> tensor."""
ResultT = TypeVar("ResultT")
Content = TypeVar("Content")
Content_contra = TypeVar("Content_contra", contravariant=True)


@dataclass(frozen=True, eq=False)
class CallResult:
    """What one call gives: the host's own output object, and the extra outputs asked for."""

    output: object
    aux: AuxOutputs = field(default_factory=dict)


class ProgramRunner(Protocol[Content_contra]):
    """An engine as its own bindings know it: it runs with what it made of a choice."""

    def call(
        self, content: Content_contra, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> CallResult:
        """One call of a graph of the program; inputs and outputs are torch or numpy, as they came."""

    def extend(self, content: Content_contra, graph: str, cache: KeyValueCache, extension: DecodeStep) -> torch.Tensor:
        """As ``BoundProgram.extend``."""

    def encode(self, content: Content_contra, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        """As ``BoundProgram.encode``."""

    def lend(self, content: Content_contra, graph: str, work: Callable[[nn.Module], ResultT]) -> ResultT:
        """As ``BoundProgram.lend``."""

    def activate(self, content: Content_contra) -> None:
        """It became the active one (for work that no call encloses, such as recomputation in backward)."""


class BoundProgram(Protocol):
    """What one choice of adapters comes to in an engine. It may be run from any thread, by many calls."""

    def run(self, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> CallResult:
        """As the engine's ``call``."""

    def extend(self, graph: str, cache: KeyValueCache, extension: DecodeStep) -> torch.Tensor:
        """Add tokens to the rows of a cache; returns the logits asked for, (rows, k, vocabulary), not written again.

        The cache has room for them. Where the call fails, it is as it was.
        """

    def encode(self, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        """Run the encoder, and keep what it makes of each row's inputs beside the rows of a cache, which are empty.

        Raises:
            ChoiceError, InputMismatch: inputs that it does not take.
        """

    def lend(self, graph: str, work: Callable[[nn.Module], ResultT]) -> ResultT:
        """Have the host that runs do some work of its own, each of whose forwards answers with this choice."""

    def activate(self) -> None:
        """As the engine's."""


@dataclass(frozen=True, eq=False)
class EngineBinding(Generic[Content]):
    """An engine and what it made of a choice. No engine keeps one, so that neither keeps the other alive."""

    engine: ProgramRunner[Content]
    content: Content

    def run(self, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> CallResult:
        """One call."""
        return self.engine.call(self.content, graph, args, kwargs)

    def extend(self, graph: str, cache: KeyValueCache, extension: DecodeStep) -> torch.Tensor:
        """As ``BoundProgram`` says."""
        return self.engine.extend(self.content, graph, cache, extension)

    def encode(self, graph: str, cache: KeyValueCache, inputs: Mapping[str, object]) -> None:
        """As ``BoundProgram`` says."""
        self.engine.encode(self.content, graph, cache, inputs)

    def lend(self, graph: str, work: Callable[[nn.Module], ResultT]) -> ResultT:
        """As ``BoundProgram`` says."""
        return self.engine.lend(self.content, graph, work)

    def activate(self) -> None:
        """Make it the active one."""
        self.engine.activate(self.content)
