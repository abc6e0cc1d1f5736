"""A session's model, while the engine or the caller keeps it; afterwards its skeleton."""

import weakref
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from lorac.errors import BaseNeeded
from lorac.frontend.copying import widen_layers
from lorac.frontend.skeleton import build_skeleton, describe_skeleton, read_widened

GivenModel = nn.Module | Mapping[str, nn.Module]


class HostModel:
    """The model that a session compiles, or its skeleton.

    An engine that runs the model keeps it. An engine of an emitted program releases it after the build: adapters then
    find their sites on a skeleton (``lorac.frontend.skeleton``), and base weights come from the engine's own file.

    Args:
        module: the model in the dtype in which the target computes; None if only a skeleton exists.
        given: the model or models as the caller gave them, from which to compile again.
        moved: compile()'s ``dtype`` and ``device``, with which ``module`` was made from ``given``.

    Attributes:
        packed: name of a weight that the engine stores quantised -> its format.
        widened: name of a tensor -> the narrower dtype in which it was given.
    """

    def __init__(
        self, module: nn.Module | None, given: GivenModel | None = None, moved: Mapping[str, object] | None = None
    ) -> None:
        self._module, self._given, self._moved = module, _weak_reference(given), dict(moved or {})
        self._own = module
        self._skeleton: Mapping[str, object] = {}
        self._base: Mapping[str, Tensor] = {}
        self._built: Callable[[], nn.Module | None] = lambda: None
        self.packed: Mapping[str, str] = {}
        self.widened: Mapping[str, torch.dtype] = {}

    @classmethod
    def stored(cls, skeleton: Mapping[str, object], base: Mapping[str, Tensor]) -> "HostModel":
        """Make the host of an artifact from its skeleton as JSON, and its base weights by name."""
        host = cls(None)
        host._skeleton, host._base = skeleton, base
        host.widened = read_widened(skeleton)
        return host

    @property
    def in_memory(self) -> bool:
        """Whether the whole model is in memory, not only its skeleton."""
        return self._module is not None

    @property
    def module(self) -> nn.Module:
        """The model, or its skeleton, which is built again once no caller references it."""
        if self._module is not None:
            return self._module
        built = self._built()
        if built is None:
            built = build_skeleton(self._skeleton, self._base)
            self._built = weakref.ref(built)
        return built

    @property
    def skeleton(self) -> Mapping[str, object]:
        """The skeleton as JSON."""
        return self._skeleton if self._module is None else describe_skeleton(self._module, self.packed, self.widened)

    def widen(self, sizes: Mapping[str, int]) -> None:
        """Replace the model by a copy with more rows in some tensors (``widen_layers``)."""
        assert self._module is not None
        self._module = widen_layers(self._module, sizes)

    def release(self, base: Mapping[str, Tensor]) -> None:
        """Replace the model by its skeleton; ``base`` has the base weights that are still needed, by name."""
        if self._module is not None:
            self._skeleton, self._module, self._own, self._base = self.skeleton, None, None, base

    def original(self) -> tuple[GivenModel, Mapping[str, object]]:
        """Return the model to compile again, and compile()'s dtype and device for it.

        Raises:
            BaseNeeded: the model no longer exists.
        """
        if self._own is not None:
            return self._own, {}
        given = self._given()
        if given is None:
            raise BaseNeeded(
                "export() compiles again from the original model, which no longer exists",
                next_step="keep the model alive, or compile it again with adapters=compiled.adapters; "
                "an eager artifact becomes an ONNX Runtime one by lorac.load(folder, target='onnxruntime')",
            )
        return given, self._moved


def _weak_reference(given: GivenModel | None) -> Callable[[], GivenModel | None]:
    """Return a function that returns the model or models while others reference them, and then None."""
    if given is None:
        return lambda: None
    if isinstance(given, nn.Module):
        return weakref.ref(given)
    references = {name: weakref.ref(module) for name, module in given.items()}

    def dereference() -> dict[str, nn.Module] | None:
        alive = {name: module for name, reference in references.items() if (module := reference()) is not None}
        return alive if len(alive) == len(references) else None

    return dereference
