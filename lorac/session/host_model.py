"""The model a compilation works on, for as long as somebody else keeps it; then what is left of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lorac.errors import BaseNeeded
from lorac.frontend import skeleton

Again = Callable[..., Any]
"""``lorac.compile``."""


class HostModel:
    """A host model.

    An engine that runs the host keeps it. One that runs an emitted program lets it go after the build: adapters then
    find their places on a skeleton (``lorac.frontend.skeleton``), and base weights come from the engine's own file.

    Args:
        module: the model, in the dtype the target computes in.
        given: the model or models as the caller gave them, from which to compile again.
        moved: how ``module`` differs from that: compile's ``dtype`` and ``device``.

    Attributes:
        kept: the base weights that there still are once the model was let go, by name.
        packed: name of a weight that the engine holds quantised -> as what.
    """

    def __init__(self, module: nn.Module | None, given: Any = None, moved: Mapping[str, Any] | None = None) -> None:
        self._module = module
        self._given = _weak_reference(given)
        self._moved = dict(moved or {})
        self._described: dict[str, Any] | None = None
        self._made: Callable[[], nn.Module | None] = lambda: None
        self.kept: Mapping[str, Tensor] = {}
        self.packed: Mapping[str, str] = {}

    @classmethod
    def stored(cls, described: Mapping[str, Any], kept: Mapping[str, Tensor]) -> HostModel:
        """What an artefact has of a host.

        Args:
            described: its skeleton.
            kept: its base weights.
        """
        host = cls(None)
        host._described, host.kept = dict(described), kept
        return host

    @property
    def module(self) -> nn.Module:
        """The model, or its skeleton, which lives as long as somebody holds it, so that no weight stays in memory."""
        if self._module is not None:
            return self._module
        made = self._made()
        if made is None:
            assert self._described is not None
            made = skeleton.build_skeleton(self._described, self.kept)
            self._made = weakref.ref(made)
        return made

    @property
    def described(self) -> dict[str, Any]:
        """The skeleton as JSON."""
        return self._described if self._described is not None else skeleton.describe_skeleton(self.module, self.packed)

    def let_go(self, kept: Mapping[str, Tensor]) -> None:
        """Hold the model weakly from now on; ``kept`` are the base weights that are still needed."""
        if self._module is not None:
            self._described, self._module, self.kept = self.described, None, kept

    def original(self, step: str) -> tuple[Any, dict[str, Any]]:
        """What to compile again, and compile's dtype and device for it.

        Args:
            step: what needs it, for the message.

        Raises:
            BaseNeeded: the model is gone.
        """
        if self._module is not None:
            return self._module, {}
        given = self._given()
        if given is None:
            raise BaseNeeded(
                f"{step} compiles again from the host model, which is gone",
                next_step="keep the model alive, or compile it again with adapters=compiled.adapters; "
                "an eager artefact becomes an ONNX Runtime one by lorac.load(folder, target='onnxruntime')",
            )
        return given, self._moved

    def recompiled(
        self, again: Again, examples: Mapping[str, Any], compiled: Any, *, target: str, mode: str, **options: Any
    ) -> Any:
        """Compile again from the model, with the adapters' present tensors and the same active choice.

        Args:
            again: ``lorac.compile``.
            examples: its example inputs and dynamic shapes.
            compiled: what was compiled from the model.
            target, mode, options: of the new one; they come before what was given for the old one.
        """
        given, moved = self.original("export()")
        told = {"active": dict(compiled.choice) or None, **examples, **moved, **options}
        return again(given, dict(compiled.adapters), target=target, mode=mode, **told)


def _weak_reference(given: Any) -> Callable[[], Any]:
    """A way back to a model, or to several by name, that keeps none of them alive."""
    if isinstance(given, nn.Module):
        return weakref.ref(given)
    if not isinstance(given, Mapping):
        return lambda: None
    references = {name: weakref.ref(module) for name, module in given.items()}

    def found() -> dict[str, nn.Module] | None:
        alive = {name: module for name, ref in references.items() if (module := ref()) is not None}
        return alive if len(alive) == len(references) else None

    return found
