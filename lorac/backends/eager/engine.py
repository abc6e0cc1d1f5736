"""The eager engine: a structural copy of the host in which every site's ``forward`` reads its slots.

The host's code runs as it is (any signature, checkpointing, autocast, Trainer); only instance-level ``forward``
attributes are set, so module types, names and state-dict keys stay the host's.
"""

from __future__ import annotations

import contextvars
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lorac.backends.eager.buffers import fused_buffers
from lorac.ir.adapted import LiveTerm, run_terms
from lorac.ir.choice import Choice
from lorac.ir.fused import FusedBuffer
from lorac.ir.slots import Ctx, Prepared, SitePlan, SiteSlots, run_site
from lorac.ir.snapshot import BaseReader, Snapshot
from lorac.ir.types import SiteKind

Tensor = torch.Tensor
Terms = Callable[[str, Choice], Sequence[LiveTerm]]


@dataclass(frozen=True, eq=False)
class Binding:
    """What one choice puts at the sites it touches.

    Attributes:
        choice: the choice, from which training computes its terms.
        slots: site path -> slots; absent where nothing is active.
        trains: whether one of its adapters needs gradients.
    """

    choice: Choice = ()
    slots: Mapping[str, SiteSlots] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()


_NONE = Binding()
_current: contextvars.ContextVar[tuple[object, Binding] | None] = contextvars.ContextVar("binding", default=None)


class EagerEngine:
    """Runs a host copy.

    Args:
        module: structural copy of the host; its sites' ``forward`` are replaced.
        plans: what each site has.
        base: reads base weights.
        fused: merged weights are written into buffers instead of computed beside the base.
        terms: (site path, choice) -> terms computed from the adapters' own tensors, for training.
    """

    target = "eager"

    def __init__(
        self, module: nn.Module, plans: Mapping[str, SitePlan], base: BaseReader, *, fused: bool, terms: Terms
    ) -> None:
        self.module, self.plans, self.base, self.fused, self.terms = module, plans, base, fused, terms
        self.active = _NONE
        self.aux: dict[str, dict[str, Tensor]] = {}
        self._originals: dict[str, Callable[..., Any]] = {}
        self._weights: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for path, plan in plans.items():
            self._install(path, plan)
        self.buffers: dict[str, FusedBuffer] = fused_buffers(module, plans, base) if fused else {}

    # --- the engine protocol -----------------------------------------------------------------------------------

    def bind(self, snapshot: Snapshot, slots: Mapping[str, SiteSlots]) -> Binding:
        """Keep the slots of the sites the choice touches; elsewhere the base runs untouched."""
        touched = frozenset(snapshot.composed)
        return Binding(snapshot.choice, {path: slots[path] for path in touched}, touched)

    def activate(self, binding: Binding) -> None:
        """Recomputation in backward (checkpointing) runs outside any call: it uses the active binding."""
        self.active = binding

    def run(self, binding: Binding | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the host copy with a binding; in fused mode the weights already hold it."""
        with self._using(binding if binding is not None else self.active):
            return self.module(*args, **kwargs)

    def write(self, snapshot: Snapshot) -> int:
        """Write merged weights; only touched buffers change."""
        written = 0
        for path, buffer in self.buffers.items():
            composed = snapshot.composed.get(path)
            written += buffer.write(composed.value if composed is not None else None)
        self.active = Binding(snapshot.choice, {}, frozenset(snapshot.composed))
        return written

    def forget(self, prepared: Prepared) -> None:
        """Drop what fused buffers keep for the values of a removed adapter."""
        for path, value in prepared.values.items():
            if path in self.buffers:
                self.buffers[path].release(value)

    # --- the sites ---------------------------------------------------------------------------------------------

    @contextmanager
    def _using(self, binding: Binding) -> Iterator[None]:
        token = _current.set((self, binding))
        try:
            yield
        finally:
            _current.reset(token)

    def binding(self) -> Binding:
        """The binding of the running call; outside one (a checkpoint's recomputation in backward) the active one."""
        current = _current.get()
        return current[1] if current is not None and current[0] is self else self.active

    def _install(self, path: str, plan: SitePlan) -> None:
        owner = path.rpartition(".")[0] if plan.site.kind is SiteKind.PARAMETER else path
        module = self.module.get_submodule(owner)
        self._weights[path] = _stored(self.module, plan)
        if owner in self._originals:
            return
        self._originals[owner] = module.forward
        if plan.site.kind is SiteKind.PARAMETER:
            leaves = {p.rpartition(".")[2]: p for p in self.plans if p.rpartition(".")[0] == owner}
            module.forward = functools.partial(self._forward_owner, owner, module, leaves)
        elif plan.site.kind is SiteKind.BLOCK:
            module.forward = functools.partial(self._forward_block, path, module)
        else:
            module.forward = functools.partial(self._forward_site, path, module)

    def _forward_site(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        binding = self.binding()
        if path not in binding.touched:
            return self._originals[path](x)  # type: ignore[no-any-return]
        terms = self._live_terms(path, binding)
        ctx = self._ctx(path, module)
        weight, bias = self._weights[path]
        if terms is not None:
            return run_terms(self.plans[path].site, terms, x, weight, bias, ctx)
        slots = binding.slots.get(path)
        if slots is None:
            return self._originals[path](x)  # type: ignore[no-any-return]
        return run_site(self.plans[path], slots, x, weight, bias, ctx=ctx)

    def _forward_block(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self._originals[path](*args, **kwargs)
        binding = self.binding()
        if path not in binding.touched:
            return output
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        y = output if isinstance(output, Tensor) else output[0]
        terms, ctx = self._live_terms(path, binding), self._ctx(path, module)
        if terms is not None:
            changed = run_terms(self.plans[path].site, terms, x, None, None, ctx, y)
        else:
            changed = run_site(self.plans[path], binding.slots[path], x, None, None, ctx=ctx, block=y)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    def _forward_owner(
        self, owner: str, module: nn.Module, leaves: Mapping[str, str], *args: Any, **kwargs: Any
    ) -> Any:
        """A module some of whose parameters are replaced: its own forward, on a shadow that holds the replacements."""
        binding = self.binding()
        replaced = {}
        for leaf, path in leaves.items():
            if path not in binding.touched:
                continue
            terms = self._live_terms(path, binding)
            if terms is not None:
                replaced[leaf] = terms[-1].value.weight  # type: ignore[union-attr]
            elif path in binding.slots:
                replaced[leaf] = binding.slots[path].weight
        if not replaced:
            return self._originals[owner](*args, **kwargs)
        shadow = copy.copy(module)
        shadow.__dict__ = {k: v for k, v in module.__dict__.items() if k != "forward"}
        shadow._parameters = {**module._parameters, **replaced}  # type: ignore[dict-item]
        return shadow.forward(*args, **kwargs)

    def _live_terms(self, path: str, binding: Binding) -> Sequence[LiveTerm] | None:
        """The terms from the adapters' own tensors while gradients are recorded, else None."""
        return self.terms(path, binding.choice) if torch.is_grad_enabled() else None

    def _ctx(self, path: str, module: nn.Module) -> Ctx:
        def emit(name: str, tensor: Tensor) -> None:
            self.aux.setdefault(name, {})[path] = tensor

        return Ctx(self.plans[path].site, training=module.training, emit=emit)


def _stored(module: nn.Module, plan: SitePlan) -> tuple[Tensor | None, Tensor | None]:
    site = plan.site
    weight = module.get_parameter(site.weight) if site.weight else None
    return weight, module.get_parameter(site.bias) if site.bias else None
