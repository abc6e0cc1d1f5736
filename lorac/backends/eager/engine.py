"""The eager engine: a structural copy of the host in which every site's ``forward`` reads its slots.

The host's code runs as it is (any signature, checkpointing, autocast, Trainer); only instance-level ``forward``
attributes are set, so module types, names and state-dict keys stay the host's.
"""

from __future__ import annotations

import contextvars
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from lorac.backends.eager.branches import BranchRunner
from lorac.backends.eager.forward_call import (
    NO_ADAPTERS,
    ActiveSlots,
    ForwardCall,
    check_no_cache,
    choose_attention,
    slots_from_snapshot,
)
from lorac.backends.eager.fused_weights import adds_bias, allocate_buffers
from lorac.backends.eager.random_seeds import hash_call, is_in_backward
from lorac.backends.eager.shadow import shadow
from lorac.errors import SiteError
from lorac.frontend.base_weights import read_stored_tensor
from lorac.frontend.components import check_component, get_component_prefix, list_components
from lorac.frontend.layer_classes import (
    calls_super_forward,
    find_layer_class,
    has_plain_forward,
    pad_conv_input,
    replace_super_forward,
)
from lorac.ir.sites import BaseReader, Site, SiteKind
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.execution import read_weight_slots, run_site
from lorac.ir.slots.extra_outputs import check_extra_outputs, record_extra_outputs
from lorac.ir.slots.layouts import layout_of
from lorac.ir.slots.live_terms import TrainingTerms, combine_weights, run_terms
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.ir.slots.program_values import (
    BASE,
    IN,
    INPUT,
    first_tensor,
    list_tapped_modules,
    replace_first_tensor,
)
from lorac.target.engine import BoundProgram, CallResult, Engine

Tensor = torch.Tensor
T = TypeVar("T")
EmissionListener = Callable[[Mapping[str, Mapping[str, Tensor]]], None]

_current_call: contextvars.ContextVar[tuple[object, ForwardCall] | None] = contextvars.ContextVar("call", default=None)


class EagerEngine(Engine[ActiveSlots]):
    """Runs a host copy.

    Args:
        module: structural copy of the host; its sites' ``forward`` are replaced.
        plans: what each site has.
        base: reads base weights.
        sites: every site of the host.
        mode: ``"live"``, or merged weights are written into buffers instead of computed beside the base.
        terms: terms from the adapters' own tensors, for training.
        aux: names of the extra outputs to keep.
    """

    target = "eager"
    module: nn.Module

    def __init__(
        self,
        module: nn.Module,
        plans: Mapping[str, SitePlan],
        base: BaseReader,
        *,
        sites: Mapping[str, Site],
        mode: str,
        terms: TrainingTerms,
        aux: Sequence[str] = (),
    ) -> None:
        self.module, self.plans, self.base, self.mode = module, plans, base, mode
        self.components = list_components(module)
        self.active = NO_ADAPTERS
        self.wanted = frozenset(aux)
        self._recorded = ForwardCall(NO_ADAPTERS, computes_terms=True)
        self._heard: dict[object, tuple[frozenset[str], EmissionListener]] = {}
        self._around = BranchRunner(module, plans, sites, terms)
        self._originals: dict[str, Callable[..., Any]] = {}
        self._weights: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for path, plan in plans.items():
            self._install(path, plan)
        for path in list_tapped_modules(plans.values()):
            tap = module.get_submodule(path)
            tap.forward = functools.partial(self._forward_tap, path, tap.forward)
        self.buffers: Mapping[str, FusedBuffer] = allocate_buffers(module, plans, base) if self.fused else {}

    # --- the engine's contract -----------------------------------------------------------------------------------

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> BoundProgram[ActiveSlots]:
        """Keep the slots of the sites the choice touches; elsewhere the base runs untouched."""
        return BoundProgram(self, slots_from_snapshot(snapshot, slots))

    @property
    def written_program(self) -> BoundProgram[ActiveSlots]:
        """The choice that the weights hold."""
        return BoundProgram(self, self.active)

    def activate(self, content: ActiveSlots) -> None:
        """What runs outside any call (a submodule called directly) uses it from now on."""
        self.active = content

    @property
    def fused(self) -> bool:
        """Baked weights are written in place too, once."""
        return self.mode != "live"

    @property
    def computes_terms(self) -> bool:
        """Whether a call made now computes its terms from the adapters' own tensors, and reads no slot.

        That is so while gradients are recorded, and in training mode, where dropout acts.
        """
        return torch.is_grad_enabled() or self.module.training

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Calls run with what was written, at the sites it touches."""
        self.active = ActiveSlots(snapshot.choice, {}, frozenset(snapshot.composed))

    def call(
        self, content: ActiveSlots, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> CallResult:
        """Call the host copy, or one of several; in fused mode the weights already hold the choice."""
        module = self.components[check_component(graph, self.components)]
        call = self._new_call(content)
        self._begin(call, graph, args, kwargs)
        with self._using(call):
            output = module(*args, **kwargs)
        if torch.is_grad_enabled():
            self._recorded = call
        for names, heard in list(self._heard.values()) if call.computes_terms else ():
            heard({name: call.aux.get(name, {}) for name in names})
        return CallResult(output, {name: found for name, found in call.aux.items() if name in self.wanted})

    def listen(self, names: Iterable[str], heard: EmissionListener) -> Callable[[], None]:
        """Have calls that train tell what their branches emit; returns what ends that.

        Args:
            names: of extra outputs, whether or not they were asked for when compiling.
            heard: called after each such call with those, name -> site path -> tensor.

        Raises:
            OptionError: no branch gives one.
        """
        check_extra_outputs(list(names), self.plans.values())
        key = object()
        self._heard[key] = frozenset(names), heard

        def end() -> None:
            self._heard.pop(key, None)

        return end

    def _new_call(self, content: ActiveSlots) -> ForwardCall:
        return ForwardCall(content, self.computes_terms)

    def run_with_model(self, content: object, graph: str, work: Callable[[nn.Module], T]) -> T:
        """Have the host copy do some work of its own, each of whose forwards reads the content."""
        module = self.components[check_component(graph, self.components)]
        assert isinstance(content, ActiveSlots)
        call = self._new_call(content)

        def before(_: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
            if self._call() is call:  # not in a pass before it, nor in a call of another thread
                self._begin(call, graph, args, kwargs)

        with ExitStack() as held:
            if content.begins:
                held.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            held.enter_context(self._using(call))
            return work(module)

    def _begin(self, call: ForwardCall, graph: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Have a call know what its branches read of its arguments, of passes before its own, and compute once."""
        if not call.filled.begins:
            return
        module, scope = self.components[graph], get_component_prefix(self.module, graph)
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        call.attention = choose_attention((*given.values(), *kwargs.values()))
        call.began = hash_call((*args, *kwargs.values())) if self.module.training else 0
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        call.values.update({f"{INPUT}:{name}": value for name, value in tensors.items()})

        def run(passed: ForwardCall) -> None:
            check_no_cache(call.attention)
            with torch.no_grad(), self._using(passed):
                module(*args, **kwargs)

        base = ForwardCall(call.filled.base_pass(scope))
        if base.filled.read:
            run(base)
            call.values.update({f"{BASE}:{path}": base.values[path] for path in base.filled.read & base.values.keys()})
        here = [self.plans[path] for path in call.filled.touched if path.startswith(scope)]
        # In one order in every process: passes of a host that trains draw its random numbers.
        for path in sorted({branch.once for plan in here for branch in plan.branches} & call.filled.touched):
            self._around.compute_once(path, call, run)

    # --- the sites ---------------------------------------------------------------------------------------------

    @contextmanager
    def _using(self, call: ForwardCall) -> Iterator[None]:
        token = _current_call.set((self, call))
        try:
            yield
        finally:
            _current_call.reset(token)

    def filled(self) -> ActiveSlots:
        """What fills the slots in the running call; outside one the active choice."""
        return self._call().filled

    def _call(self) -> ForwardCall:
        current = _current_call.get()
        if current is not None and current[0] is self:
            return current[1]
        # A checkpoint recomputes within backward, outside any call: with what the call before it ran with.
        return self._recorded if is_in_backward() else ForwardCall(self.active, self.computes_terms)

    def _install(self, path: str, plan: SitePlan) -> None:
        owner = path if plan.site.within is None else plan.site.within
        if plan.site.kind is SiteKind.ONCE:
            return
        module = self.module.get_submodule(owner)
        self._weights[path] = _weight_and_bias(self.module, plan)
        if owner in self._originals:
            return
        self._originals[owner] = module.forward
        if plan.site.within is not None:
            inside = tuple(p for p, other in self.plans.items() if other.site.within == owner)
            module.forward = functools.partial(self._forward_owner, owner, module, inside)
        elif plan.site.kind is SiteKind.BLOCK:
            module.forward = functools.partial(self._forward_block, path, module)
        elif has_plain_forward(module):
            module.forward = functools.partial(self._forward_site, path, module)
        else:
            self._install_below(path, module)

    def _install_below(self, path: str, module: nn.Module) -> None:
        """Adapt what a layer of a class of its own calls by ``super().forward``, on a twin over the same attributes."""
        if not calls_super_forward(module):
            raise SiteError(
                f"'{path}' is a {type(module).__name__}, whose forward computes more than its layer, by itself",
                next_step="exclude= it, or let its forward call super().forward",
                code="site_unsupported",
            )
        whole = self._originals[path]
        self._originals[path] = functools.partial(find_layer_class(module).forward, module)
        twin = object.__new__(replace_super_forward(module, functools.partial(self._forward_site, path, module)))
        object.__setattr__(twin, "__dict__", vars(module))
        own = functools.partial(type(twin).forward, twin)
        module.forward = functools.partial(self._forward_above, path, whole, own)

    def _forward_above(
        self, path: str, whole: Callable[..., Any], own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        return (own if path in self.filled().touched else whole)(*args, **kwargs)

    def _forward_site(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        if path not in self.filled().touched:
            return self._originals[path](x)
        adapted = self._adapted(path, module, pad_conv_input(x, self.plans[path].site.conv))
        if adapted is not None:
            return adapted
        y, buffer = self._originals[path](x), self.buffers.get(path)
        shift = buffer.bias if buffer is not None and adds_bias(module, buffer.site) else None
        return y if shift is None else y + shift

    def _forward_block(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = self._originals[path](*args, **kwargs)
        if path not in self.filled().touched:
            return output
        x, y = first_tensor((args, kwargs)), first_tensor(output)
        adapted = self._adapted(path, module, x, y)
        return output if adapted is None else replace_first_tensor(output, lambda _: adapted)

    def _forward_tap(self, path: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call()
        if f"{IN}:{path}" in call.filled.read:
            call.values[f"{IN}:{path}"] = first_tensor((args, kwargs))
        output = forward(*args, **kwargs)
        if path in call.filled.read:
            call.values[path] = first_tensor(output)
        return output

    def _adapted(self, path: str, module: nn.Module, x: Tensor, block: Tensor | None = None) -> Tensor | None:
        """The output of a touched site, from its live terms or its slots; None where the weights already hold it."""
        call, plan = self._call(), self.plans[path]
        weight, bias = self._weights[path]
        emitted: dict[str, list[Tensor]] = {}
        ctx = self._around.ctx(plan, call, module.training, emitted)
        if call.passing is not None:
            y = block if block is not None or weight is None else layout_of(plan.site).base(x, weight, bias)
            assert y is not None
            return self._around.alone(path, call.passing, x, y, ctx)
        terms, slots = self._around.live_terms(path, call), call.filled.slots.get(path)
        if terms is not None:
            y = run_terms(plan.site, terms, x, weight, bias, ctx, block)
        elif slots is not None:
            y = run_site(plan, slots, x, weight, bias, ctx=ctx, block=block)
        else:
            return None
        asked = self.wanted.union(*(names for names, _ in self._heard.values()))
        record_extra_outputs(call.aux, path, {name: found for name, found in emitted.items() if name in asked})
        return y

    def _forward_owner(self, owner: str, module: nn.Module, inside: Sequence[str], *args: Any, **kwargs: Any) -> Any:
        """A module some of whose weights are replaced: its own forward, on a shadow that holds the replacements."""
        call = self._call()
        replaced: dict[str, Tensor] = {}
        for path in inside:
            if path in call.filled.touched:
                replaced |= self._replacements(path, call)
        if not replaced:
            return self._originals[owner](*args, **kwargs)
        names = {name.removeprefix(f"{owner}."): tensor for name, tensor in replaced.items()}
        return shadow(module, names).forward(*args, **kwargs)

    def _replacements(self, path: str, call: ForwardCall) -> dict[str, Tensor]:
        """What a touched site puts in the place of its weight and bias, by their names; nothing where they hold it."""
        site, slots, terms = self.plans[path].site, call.filled.slots.get(path), self._around.live_terms(path, call)
        found: tuple[Tensor | None, Tensor | None]
        if terms is not None:
            found = combine_weights(site, terms, *self._weights[path])
        elif slots is not None:
            found = read_weight_slots(site, slots)
        else:
            return {}
        names = zip((site.weight, site.bias), found, strict=True)
        return {name: tensor for name, tensor in names if name is not None and tensor is not None}


def _weight_and_bias(module: nn.Module, plan: SitePlan) -> tuple[Tensor | None, Tensor | None]:
    site = plan.site
    weight = read_stored_tensor(module, site.weight) if site.weight else None
    return weight, module.get_parameter(site.bias) if site.bias else None
