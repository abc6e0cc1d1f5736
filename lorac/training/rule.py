"""Base class of training rules: the terms a rule applies to, and its hooks on an optimizer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, ClassVar, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorac.argument_types import Operands
from lorac.errors import AdapterNotFound, ChoiceError, Unavailable
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

State: TypeAlias = dict[str, Any]
"""A state dict: tensors, numbers and strings in lists and dicts."""


@dataclass(frozen=True, eq=False)
class TrainedTerm:
    """One adapter at one site.

    Attributes:
        adapter: its name.
        site: path of the site.
        tensors: parameter name -> tensor.
        variant: its method, with the patterns applied to the site.
    """

    adapter: str
    site: str
    tensors: Mapping[str, Tensor]
    variant: Variant

    def __str__(self) -> str:
        return f"'{self.adapter}' at '{self.site}'"


class Rule(ABC):
    """An update rule on one optimizer; ``remove()``, or the end of a ``with`` block, detaches it.

    Each rule has its own ``__init__``, which ends with ``attach``. While attached, its state is part of the optimizer's
    ``state_dict()`` and is restored by ``load_state_dict``, so a resumed run, with the rule attached first, continues
    bit for bit.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager")``, possibly wrapped in DDP.
        optimizer: holds the tensors that the rule applies to. The rule skips tensors with ``requires_grad`` off.

    Raises:
        Unavailable: the compiled model does not train: it is baked, or not for target eager.
        AdapterNotFound: it has no adapter of the rule's methods.
        ChoiceError: the optimizer lacks a tensor that the rule applies to.
    """

    methods: ClassVar[tuple[type[Variant], ...]]
    """Methods that the rule applies to."""
    governed: ClassVar[tuple[str, ...]]
    """Names of the tensors that the optimizer must hold."""
    listens: ClassVar[tuple[str, ...]] = ()
    """Names of the extra outputs that the rule reads (``hear``)."""
    in_residuals: ClassVar[bool] = True
    """Whether it also applies to the inner method of a ``Residual`` (``lorac.training.initialisation``)."""
    before_gradients: bool = False
    """Whether the rule reads gradients before the step, which a closure would compute later."""
    decides: ClassVar[frozenset[str]] = frozenset()
    """The part of an update that two rules on the same tensors may not both decide: the "direction" or the "rate" of a
    step, or the "factors" between steps (``check_compatible``)."""
    saved: ClassVar[str] = ""
    """Key in the optimizer's state dict of the states of the rules of this class, in the order in which they were
    attached; empty without state."""

    @abstractmethod
    def __init__(self, compiled: nn.Module, optimizer: Optimizer) -> None:
        self.compiled, self.optimizer = unwrap_ddp(compiled), unwrap_optimizer(optimizer)
        self.terms = trained_terms(compiled, self.methods, in_residuals=self.in_residuals)
        in_optimizer = {id(tensor) for group in self.optimizer.param_groups for tensor in group["params"]}
        governed = ((term, name) for term in self.terms for name in self.governed if name in term.tensors)
        for term, name in governed:
            tensor = term.tensors[name]
            if tensor.requires_grad and id(tensor) not in in_optimizer:
                raise ChoiceError(
                    f"the optimizer does not hold {name} of '{term.adapter}' at '{term.site}'",
                    next_step="make it of all compiled.parameters() that require grad, or turn requires_grad off there",
                )
        self._detach: list[Callable[[], None]] = []
        self._skipped = False

    def attach(self, *handles: RemovableHandle) -> None:
        """Register the rule's hooks; ``handles`` of further hooks are removed with it."""
        hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
            *handles,
        ]
        if self.saved:
            hooks.append(self.optimizer.register_state_dict_post_hook(self._save))
            hooks.append(self.optimizer.register_load_state_dict_pre_hook(self._load))
        self._detach = [hook.remove for hook in hooks]
        if self.listens:

            def listener(emitted: Mapping[str, Mapping[str, Tensor]]) -> None:
                self.hear({name: {path: t.detach() for path, t in found.items()} for name, found in emitted.items()})

            self._detach.append(self.compiled.engine.listen(self.listens, listener))

    def hear(self, emitted: Mapping[str, Mapping[str, Tensor]]) -> None:  # noqa: B027  (the same)
        """Handle the extra outputs of a training call; runs once after each, micro-batches included.

        Args:
            emitted: name in ``listens`` -> site path -> tensor, without gradients.
        """

    def before(self) -> None:  # noqa: B027  (not abstract: a rule has work before a step, after it, or both)
        """Run before every step of the optimizer."""

    def view(self, optimizer: Optimizer) -> Optimizer:
        """Return the optimizer as the step sees it, after ``before``: a view of it, or by default itself.

        Args:
            optimizer: the optimizer, or the view that another rule gives of it.
        """
        return optimizer

    def after(self) -> None:  # noqa: B027  (the same)
        """Run after every step."""

    def state(self) -> State:
        """Return the rule's state: tensors, numbers and strings in lists and dicts."""
        return {}

    def load_state(self, state: State) -> None:  # noqa: B027  (not abstract: some rules have no state)
        """Restore a state of ``state()``; its tensors are copied."""

    def remove(self) -> None:
        """Detach the rule; a second call does nothing."""
        for detach in self._detach:
            detach()
        self._detach = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: Operands, kwargs: State) -> tuple[Operands, State]:
        if self.before_gradients and any(callable(given) for given in (*args[1:], *kwargs.values())):
            raise Unavailable(
                f"{type(self).__name__} reads the gradients before the step; a closure computes them within it",
                next_step="call backward() first, and step() without a closure",
            )
        adapters = self.compiled.adapters
        for term in self.terms:
            if term.adapter not in adapters or adapters[term.adapter].tensors.get(term.site) is not term.tensors:
                raise Unavailable(
                    f"adapter '{term.adapter}' has changed since {type(self).__name__} was attached",
                    next_step="remove the rule, and attach a new one",
                )
        # Where a GradScaler found infinite gradients, a fused step, unlike others, is called and does nothing.
        self._skipped = bool(getattr(optimizer, "found_inf", None))
        if self._skipped:
            return args, kwargs
        with torch.no_grad():
            if self.before_gradients and (scale := getattr(optimizer, "grad_scale", None)) is not None:
                # Divide gradients by the GradScaler's factor, which a fused step would do within itself.
                for tensor in (one for group in optimizer.param_groups for one in group["params"]):
                    if tensor.grad is not None:
                        tensor.grad.div_(scale.to(tensor.grad.device))
                setattr(optimizer, "grad_scale", None)  # noqa: B010  (an attribute that only GradScaler knows)
            self.before()
            return (self.view(args[0]), *args[1:]), kwargs

    def _after(self, *_: object) -> None:
        with torch.no_grad():
            if not self._skipped:
                self.after()

    def _save(self, optimizer: Optimizer, state_dict: State) -> None:
        state_dict.setdefault(self.saved, []).append(self.state())

    def _load(self, optimizer: Optimizer, state_dict: State) -> State:
        """Take the rule's state, and leave those of rules of this class that were attached later."""
        own, *others = state_dict.get(self.saved) or (None,)
        if own is not None:
            self.load_state(own)
        return {**state_dict, self.saved: others}


def check_compatible(rules: Sequence[Rule]) -> None:
    """Raise ``ChoiceError`` if two rules decide the same part of an update of the same tensors."""
    for one, other in combinations(rules, 2):
        own, shared = {id(term.tensors) for term in one.terms}, one.decides & other.decides
        met = next((term for term in other.terms if shared and id(term.tensors) in own), None)
        if met is not None:
            raise ChoiceError(
                f"{type(one).__name__} and {type(other).__name__} both decide the {min(shared)} for {met}",
                next_step="keep one of them",
            )


def unwrap_ddp(compiled: nn.Module) -> Any:
    """Return the compiled model inside a wrapper that holds it as ``module``, such as DDP; otherwise the argument."""
    inner = getattr(compiled, "module", None)
    return inner if hasattr(inner, "engine") and not hasattr(compiled, "engine") else compiled


def require_trainable(compiled: nn.Module) -> Any:
    """Return the compiled model, out of its wrapper if it has one; raise ``Unavailable`` if it does not train."""
    model = unwrap_ddp(compiled)
    target = getattr(getattr(model, "engine", None), "target", None)
    if target != "eager":
        what = f"target '{target}'" if target else f"{type(model).__name__}, which lorac.compile did not return,"
        raise Unavailable(f"{what} does not train", next_step="lorac.compile(model, adapters, target='eager') does")
    model.refuse_baked()
    return model


def trained_terms(
    compiled: nn.Module, methods: tuple[type[Variant], ...], *, in_residuals: bool = True
) -> list[TrainedTerm]:
    """Return the terms of the adapters of some methods, by name; with ``in_residuals``, also inside a ``Residual``.

    Raises:
        Unavailable: the compiled model does not train.
        AdapterNotFound: no adapter has one of the methods.
    """
    model = require_trainable(compiled)
    adapters: list[Adapter] = [adapter for _, adapter in sorted(model.adapters.items())]
    found = [
        TrainedTerm(adapter.name, path, tensors, adapter.variant.at_path(path).trained_method)
        for adapter in adapters
        for path, tensors in adapter.tensors.items()
        for method in (adapter.variant.method_at(path),)
        if isinstance(method.trained_method if in_residuals else method, methods)
    ]
    if not found:
        wanted = " or ".join(method.name for method in methods)
        raise AdapterNotFound(
            f"no adapter is of method {wanted}; there is {list_adapters(adapters)}",
            next_step=f"compile with one: {{'a': lorac.{methods[0].__name__}(...)}}",
        )
    return found


def list_adapters(adapters: Iterable[Adapter]) -> str:
    """Return the names and methods of adapters."""
    return ", ".join(f"'{adapter.name}' ({adapter.variant.name})" for adapter in adapters) or "no adapter at all"


def unwrap_optimizer(optimizer: Optimizer) -> Any:
    """Return the torch optimizer inside accelerate's wrapper, whose own hooks never run."""
    while not hasattr(optimizer, "_optimizer_step_pre_hooks") and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def spans_processes() -> bool:
    """Return whether several processes train together."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
