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


class HookHandle(Protocol):
    """A hook's handle."""

    def remove(self) -> None:
        """Take the hook off."""


@dataclass(frozen=True)
class _CallbackHandle:
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
        variant: its method, with what the patterns say of the site.
    """

    adapter: str
    site: str
    tensors: Mapping[str, Tensor]
    variant: Variant

    def __str__(self) -> str:
        return f"'{self.adapter}' at '{self.site}'"


class Rule(ABC):
    """An update rule on one optimizer; ``remove()``, or the end of a ``with`` block, takes it off.

    Each rule has an ``__init__`` of its own, which ends with ``attach``. What a rule keeps between steps is part of the
    optimizer's ``state_dict()`` as long as the rule is on, and comes back by its ``load_state_dict``: so a run that is
    resumed, with the rule put on anew before that, goes on to the bit.

    Args:
        compiled: what ``lorac.compile(..., target="eager")`` returned; as it is, or within DDP.
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
    begun: ClassVar[bool] = True
    """Whether it applies to adapters whose method has what a start took out of the base around it, too."""
    before_gradients: bool = False
    """Whether the rule reads the gradients before the step, where a closure has not computed them yet."""
    saved: ClassVar[str] = ""
    """Key of the optimizer's state dict under which the rule's own state is; none where it has no state."""

    @abstractmethod
    def __init__(self, compiled: Any, optimizer: Any) -> None:
        self.compiled, self.optimizer = unwrap_ddp(compiled), _unwrap_optimizer(optimizer)
        self.terms = trained_terms(compiled, self.methods, begun=self.begun)
        _check_optimizer_holds(self.optimizer, self.terms, self.governed)
        self._handles: list[HookHandle] = []

    def attach(self, *handles: HookHandle) -> None:
        """Put the rule on the optimizer; ``handles`` are those of further hooks, to be removed with it."""
        self._handles = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
            *handles,
        ]
        if self.saved:
            self._handles.append(self.optimizer.register_state_dict_post_hook(self._save))
            self._handles.append(self.optimizer.register_load_state_dict_pre_hook(self._load))
        if self.listens:
            self._handles.append(_CallbackHandle(self.compiled.engine.listen(self.listens, self._hear)))

    def hear(self, emitted: Mapping[str, Mapping[str, Tensor]]) -> None:  # noqa: B027  (the same)
        """Run after every call of the model that trains, micro-batches of a step among them, each once.

        Args:
            emitted: name of an extra output -> site path -> tensor, without gradients; those the rule ``listens`` to.
        """

    def before(self) -> None:  # noqa: B027  (not abstract: a rule has work before a step, after it, or both)
        """Run before every step of the optimizer."""

    def after(self) -> None:  # noqa: B027  (the same)
        """Run after every step."""

    def state(self) -> dict[str, Any]:
        """What the rule keeps between steps: tensors, numbers and texts in lists and dicts, as a file can hold them."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027  (not abstract: some rules have no state)
        """Take a state as ``state()`` gave it; its tensors are copied."""

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
        self._require_present()
        with torch.no_grad():
            self.before()

    def _after(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            self.after()

    def _require_present(self) -> None:
        """Raise ``Unavailable`` where an adapter is gone, or has other tensors since the rule was put on."""
        adapters = self.compiled.adapters
        for term in self.terms:
            if term.adapter not in adapters or adapters[term.adapter].tensors.get(term.site) is not term.tensors:
                raise Unavailable(
                    f"adapter '{term.adapter}' is not what it was when {type(self).__name__} was put on",
                    next_step="take the rule off, and put it on anew",
                )

    def _save(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        state_dict[self.saved] = self.state()

    def _load(self, optimizer: Any, state_dict: dict[str, Any]) -> None:
        if self.saved in state_dict:
            self.load_state(state_dict[self.saved])


def unwrap_ddp(compiled: Any) -> Any:
    """The compiled model within a wrapper that holds it as ``module``, as torch's DDP does; else what is given."""
    inner = getattr(compiled, "module", None)
    return inner if hasattr(inner, "engine") and not hasattr(compiled, "engine") else compiled


def trained_terms(compiled: Any, methods: tuple[type[Variant], ...], *, begun: bool = True) -> list[TrainedTerm]:
    """The terms of a compiled model whose adapters are of these methods, or with ``begun`` have one of them inside.

    Raises:
        Unavailable: it does not train.
        AdapterNotFound: there are none.
    """
    compiled = unwrap_ddp(compiled)
    target = getattr(getattr(compiled, "engine", None), "target", None)
    if target != "eager":
        what = f"target '{target}'" if target else f"{type(compiled).__name__}, which lorac.compile did not return,"
        raise Unavailable(f"{what} does not train", next_step="lorac.compile(model, adapters, target='eager') does")
    compiled.refuse_baked()
    adapters: Iterable[Adapter] = compiled.adapters.values()
    found = [
        TrainedTerm(adapter.name, path, tensors, adapter.variant.at_path(path).trained_method)
        for adapter in adapters
        if isinstance(adapter.variant.trained_method if begun else adapter.variant, methods)
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


def _unwrap_optimizer(optimizer: Any) -> Any:
    """The torch optimizer within accelerate's wrapper, whose own hooks are never run."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _check_optimizer_holds(optimizer: Any, terms: Iterable[TrainedTerm], governed: Iterable[str]) -> None:
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    wanted = ((term, name) for term in terms for name in governed if name in term.tensors)
    for term, name in wanted:
        tensor = term.tensors[name]
        if tensor.requires_grad and id(tensor) not in held:
            raise ChoiceError(
                f"the optimizer does not hold {name} of '{term.adapter}' at '{term.site}'",
                next_step="make it of all compiled.parameters() that require grad, or turn requires_grad off there",
            )
