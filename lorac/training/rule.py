"""What the rules share: the terms a rule applies to, and the hooks that put it on an optimizer and take it off."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import torch

from lorac.errors import AdapterNotFound, ChoiceError, Unavailable
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Tensor = torch.Tensor


class Removable(Protocol):
    """A hook's handle."""

    def remove(self) -> None:
        """Take the hook off."""


@dataclass(frozen=True)
class _Ended:
    """A hook that ends by a call."""

    end: Callable[[], None]

    def remove(self) -> None:
        """End it."""
        self.end()


@dataclass(frozen=True, eq=False)
class TrainedTerm:
    """One adapter at one site.

    Attributes:
        adapter: its name.
        site: path of the site.
        tensors: parameter name -> tensor.
    """

    adapter: str
    site: str
    tensors: Mapping[str, Tensor]


class Rule(ABC):
    """An update rule on one optimizer; ``remove()``, or the end of a ``with`` block, takes it off.

    Each rule has an ``__init__`` of its own, which ends with ``attach``.

    Args:
        compiled: what ``lorac.compile(..., target="eager")`` returned.
        optimizer: holds the tensors that the rule applies to. Of adapters that are not to train, turn
            ``requires_grad`` off: the rule leaves such tensors alone.

    Raises:
        Unavailable: the compiled model does not train: of another target than eager, or baked.
        AdapterNotFound: it has no adapter of the rule's methods.
        ChoiceError: the optimizer lacks a tensor that the rule applies to.
    """

    methods: ClassVar[tuple[type[Variant], ...]]
    """What the rule applies to."""
    governed: ClassVar[tuple[str, ...]]
    """Names of the tensors that the optimizer must hold."""
    listens: ClassVar[tuple[str, ...]] = ()
    """Names of the extra outputs that branches of its methods give and the rule asks for (``hear``)."""
    before_gradients: bool = False
    """Whether the rule reads the gradients before the step, where a closure has not computed them yet."""

    @abstractmethod
    def __init__(self, compiled: Any, optimizer: Any) -> None:
        self.compiled, self.optimizer = compiled, _unwrapped(optimizer)
        self.terms = terms_of(compiled, self.methods)
        _require_held(self.optimizer, self.terms, self.governed)
        self._handles: list[Removable] = []

    def attach(self, *handles: Removable) -> None:
        """Put the rule on the optimizer; ``handles`` are those of further hooks, to be removed with it."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
            *handles,
        ]
        if self.listens:
            self._handles.append(_Ended(self.compiled.engine.listen(self.listens, self._hear)))

    def hear(self, emitted: Mapping[str, Mapping[str, Tensor]]) -> None:  # noqa: B027  (the same)
        """Run after every call of the model that trains, micro-batches of a step among them, each once.

        Args:
            emitted: name of an extra output -> site path -> tensor, without gradients; those the rule ``listens`` to.
        """

    def before(self) -> None:  # noqa: B027  (not abstract: a rule has work before a step, after it, or both)
        """Run before every step of the optimizer."""

    def after(self) -> None:  # noqa: B027  (the same)
        """Run after every step."""

    def remove(self) -> None:
        """Take the rule off; a second time does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _hear(self, emitted: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.hear({name: {path: t.detach() for path, t in found.items()} for name, found in emitted.items()})

    def _before(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.before_gradients and any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise Unavailable(
                f"{type(self).__name__} reads the gradients before the step; a closure computes them within it",
                next_step="call backward() first, and step() without a closure",
            )
        with torch.no_grad():
            self.before()

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            self.after()


def terms_of(compiled: Any, methods: tuple[type[Variant], ...]) -> list[TrainedTerm]:
    """The terms of a compiled model whose adapters are of these methods.

    Raises:
        Unavailable: it does not train.
        AdapterNotFound: there are none.
    """
    target = getattr(getattr(compiled, "engine", None), "target", None)
    if target != "eager":
        what = f"target '{target}'" if target else f"{type(compiled).__name__}, which lorac.compile did not return,"
        raise Unavailable(f"{what} does not train", next_step="lorac.compile(model, adapters, target='eager') does")
    compiled.refuse_baked()
    adapters: Iterable[Adapter] = compiled.adapters.values()
    found = [
        TrainedTerm(adapter.name, path, tensors)
        for adapter in adapters
        if isinstance(adapter.variant, methods)
        for path, tensors in adapter.tensors.items()
    ]
    if not found:
        wanted = " or ".join(method.name for method in methods)
        there = ", ".join(f"'{adapter.name}' ({adapter.variant.name})" for adapter in adapters) or "no adapter at all"
        raise AdapterNotFound(
            f"no adapter is of method {wanted}; there is {there}",
            next_step=f"compile with one: {{'a': lorac.{methods[0].__name__}(...)}}",
        )
    return found


def _unwrapped(optimizer: Any) -> Any:
    """The torch optimizer within accelerate's wrapper, whose own hooks are never run."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _require_held(optimizer: Any, terms: Iterable[TrainedTerm], governed: Iterable[str]) -> None:
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    wanted = ((term, name) for term in terms for name in governed if name in term.tensors)
    for term, name in wanted:
        tensor = term.tensors[name]
        if tensor.requires_grad and id(tensor) not in held:
            raise ChoiceError(
                f"the optimizer does not hold {name} of '{term.adapter}' at '{term.site}'",
                next_step="make it of all compiled.parameters() that require grad, or turn requires_grad off there",
            )
