"""What a backend gives the runtime: an engine that runs a program with whatever fills its slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from lorac.ir.graph.graph import Graph
from lorac.ir.graph.signature import CallSignature
from lorac.ir.host.sites import BaseReader, Site
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.site import SitePlan, SiteSlots
from lorac.ir.slots.snapshot import Snapshot
from lorac.ir.slots.training import LiveTerm


class Engine(Protocol):
    """One running program. Every method may be called from any thread.

    Attributes:
        target: the backend's name.
        aux: extra outputs of the last call: name -> site path -> tensor.
        settles_alone: a swap settles in the background, unasked.
        settled: the active weights are constants of a session now.
        fused: weights are written in place (``write``) instead of bound per call (``bind``).
        folder: where the emitted program and its base weights lie; None where the engine runs the host itself.
    """

    target: str
    fused: bool
    folder: Path | None
    settles_alone: bool
    settled: bool
    aux: dict[str, dict[str, Any]]

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Any:
        """Turn slot tensors into the engine's own binding; done once per choice, reused by many calls."""

    def activate(self, binding: Any) -> None:
        """``binding`` became the active one (for work that no call encloses, such as recomputation in backward)."""

    def run(self, binding: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One call with a binding (None in fused mode)."""

    def settle(self) -> None:
        """Fused mode: re-bake the active weights as constants and let calls run on them.

        Raises:
            Unavailable: the engine binds no weights.
        """

    def write(self, snapshot: Snapshot) -> int:
        """Fused mode: make the weights hold the snapshot; returns the bytes written. The caller keeps calls away."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """Everything a backend needs to build an engine.

    Attributes:
        model: the host; never written.
        sites: its sites.
        plans: the slots of every touched site.
        base: reads base weights from the host.
        mode: ``"live"``, ``"fused"`` or ``"baked"``.
        snapshot: what a baked engine holds.
        example_inputs: as given to ``compile``, or None.
        dynamic_shapes: as torch.export's, or None.
        options: the target's options.
        terms: (site path, choice) -> terms from the adapters' own tensors, for targets that train.
        lower: (graph, aux) -> None: run the passes that bring a captured graph to level expanded.
        lowered: the program at level expanded and how it is called, where it is there already (read from an artefact).
    """

    model: nn.Module
    sites: Mapping[str, Site]
    plans: Mapping[str, SitePlan]
    base: BaseReader
    mode: str
    snapshot: Snapshot
    example_inputs: Any
    dynamic_shapes: Any
    options: Any
    terms: Callable[[str, Choice], Sequence[LiveTerm] | None]
    lower: Callable[[Graph, tuple[str, ...]], None]
    lowered: tuple[Graph, CallSignature] | None = None


class Backend(Protocol):
    """A backend's module: builds engines; says what its options are."""

    Options: type

    def host_for(self, model: nn.Module) -> nn.Module:
        """The model in a dtype the target computes in: itself, or a copy."""

    def build(self, request: BuildRequest) -> Engine:
        """An engine for the request."""

    def store(self, engine: Any, folder: Path, request: Callable[[], BuildRequest]) -> dict[str, Any]:
        """Write an engine's program and base weights into a folder; returns what else ``restore`` needs, as JSON.

        Args:
            engine: what ``build`` or ``restore`` gave.
            folder: an empty folder.
            request: what the engine was built from, for engines that run the host itself.
        """

    def restore(
        self, stored: Mapping[str, Any], folder: Path, plans: Mapping[str, SitePlan], mode: str, device: Any
    ) -> Engine:
        """An engine over what ``store`` wrote."""

    def base_file(self, folder: Path) -> Path:
        """The file with the base weights that ``store`` wrote."""
