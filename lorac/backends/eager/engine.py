"""The eager engine: a structural copy of the model in which every site's ``forward`` reads its slots.

The host's code runs unchanged (any signature, checkpointing, autocast, Trainer); only instance attributes ``forward``
are set, so module types, names and state-dict keys stay the same.
"""

import contextvars
import functools
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorac.backends.eager.branches import BranchRunner, is_in_backward
from lorac.backends.eager.forward_call import (
    NO_ADAPTERS,
    ActiveSlots,
    ForwardCall,
    announce_in_backward,
    find_start_columns,
    slots_from_snapshot,
    translate_errors,
)
from lorac.backends.eager.module_calls import ChildModules, OpaqueCall, shadow
from lorac.backends.eager.prefix_hooks import stand_before
from lorac.backends.eager.row_alignment import RowAlignment
from lorac.backends.eager.row_slots import find_shared_slot, run_row_slots, run_row_terms, stack_choices
from lorac.backends.eager.site_tensors import SiteTensors, adds_bias, allocate_buffer
from lorac.context_values import run_with_value
from lorac.errors import Unavailable
from lorac.frontend.components import get_component_prefix, list_components
from lorac.frontend.copying import copy_layer
from lorac.frontend.host import Host
from lorac.frontend.layer_classes import (
    Forward,
    find_layer_class,
    guard_hooks,
    has_plain_forward,
    pad_conv_input,
    replace_super_forward,
)
from lorac.frontend.weight_reads import WeightReads, wrap_forward
from lorac.ir.calls.call import Call
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.buffers import FusedBuffer
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.execution import SiteCall, read_weight_slots, run_site
from lorac.ir.slots.layouts import hide_beyond
from lorac.ir.slots.live_terms import combine_weights, run_terms
from lorac.ir.slots.plans import SitePlan, SiteSlots
from lorac.ir.slots.program_values import (
    IN,
    check_extra_outputs,
    first_tensor,
    list_tapped_modules,
    record_extra_outputs,
    replace_first_tensor,
    split_output,
)
from lorac.ir.traces.gate import is_whole_call_traced
from lorac.target.backend import BuildRequest
from lorac.target.engine import BoundProgram, CallResult, Engine

T = TypeVar("T")
EmissionListener = Callable[[Mapping[str, Mapping[str, Tensor]]], None]

_current_call: contextvars.ContextVar[tuple[object, ForwardCall] | None] = contextvars.ContextVar("call", default=None)


class EagerEngine(Engine):
    """An engine that runs a copy of the model.

    Args:
        module: a structural copy of the model; its sites get another ``forward``.
        request: the model, its plans and the options. In modes other than ``"live"`` merged weights are written to
            buffers.
    """

    target = "eager"
    finds_invocations = True
    module: nn.Module

    def __init__(self, module: nn.Module, request: BuildRequest[Any]) -> None:
        plans, base = request.plans, request.base
        self.module, self.plans, self.base, self.mode = module, plans, base, request.mode
        self.fused = self.mode != "live"  # baked weights are written in place, once
        self.components = list_components(module)
        self.active, self.choice_text = NO_ADAPTERS, repr(NO_ADAPTERS.choice)
        self.extra_names = frozenset(request.options.aux)
        self._last_recorded = ForwardCall(NO_ADAPTERS)
        self._listeners: dict[object, tuple[frozenset[str], EmissionListener]] = {}
        self.alignment = RowAlignment(request.model, plans.values())
        self._reads, self._unobserved = request.reads, self.components.keys() - request.reads.observed
        self._observing, self._lent = threading.Lock(), set[str]()
        self._branches = BranchRunner(module, plans, request.sites)
        self._originals: dict[str, Forward] = {}
        self._merged: dict[str, Forward] = {}
        own = (plan.site for plan in plans.values() if plan.site.kind is not SiteKind.ONCE)
        self._weights = SiteTensors(module, own)
        self._terms = request.terms.over(self._weights.make_reader())
        for path, plan in plans.items():
            self._install(path, plan)
        for path in list_tapped_modules(plans.values()):
            tap = module.get_submodule(split_output(path)[0])
            tap.forward = functools.partial(self._forward_tap, path, tap.forward)
        bound = {path: plan for path, plan in plans.items() if self.fused and plan.bound}
        self.buffers: Mapping[str, FusedBuffer] = {
            path: allocate_buffer(self._find_written_module(plan.site), plan, base) for path, plan in bound.items()
        }
        self._weights.remember(self.buffers.keys() - self._merged)
        self._children = ChildModules(module)

    def bind(self, snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> "EagerProgram":
        """Bind the slots of the sites that the choice touches; other sites run unchanged."""
        return EagerProgram(self, slots_from_snapshot(snapshot, slots))

    @property
    def written_program(self) -> "EagerProgram":
        return EagerProgram(self, self.active)

    def why_apart(self, snapshot: ComposedWeights, graph: str) -> str | None:
        if self.fused:
            return super().why_apart(snapshot, graph)
        if snapshot.prefix is not None:
            return "virtual tokens make its rows longer"
        unaligned = ((path, self.alignment.why_apart(path)) for path in snapshot.composed)
        found = next((f"at '{path}', {why}" for path, why in unaligned if why), None)
        return found or find_shared_slot(self.plans, snapshot, self._recorded_names)

    def bind_rows(self, programs: Sequence[BoundProgram]) -> "EagerProgram":
        each = [program.active for program in programs if isinstance(program, EagerProgram)]
        stacked = stack_choices(self.plans, each, fill=not self.computes_terms)
        own = [tensor for slots in stacked.slots.values() for tensor in slots.tensors.values()]
        return EagerProgram(self, stacked, own=tuple(own))

    @property
    def computes_terms(self) -> bool:  # type: ignore[override]  # changes with torch's gradient mode
        """Return whether the next call computes its terms from the adapters' tensors, instead of reading slots.

        It does so if gradients are recorded, and in training mode, because of dropout.
        """
        return torch.is_grad_enabled() or self.module.training

    @property
    def trace_key(self) -> str | None:  # type: ignore[override]  # changes with each swap
        """Return the choice if torch.compile can trace whole calls; None if each call must run in Python.

        A traced graph cannot have extra outputs, seeds of training branches, positions of invocation tokens, or weights
        other than the model's own.
        """
        active = self.active
        writes = self.mode == "fused" or self.hidden
        anew = writes or self.extra_names or self._listeners or active.invocations
        return None if anew or (active.branches and self.module.training) else self.choice_text

    def record_written(self, snapshot: ComposedWeights) -> None:
        """Make later calls use the written weights at the sites of the choice."""
        self.active = ActiveSlots(snapshot.choice, {}, frozenset(snapshot.composed), sizes=snapshot.sizes)

    def listen(self, names: Iterable[str], listener: EmissionListener) -> Callable[[], None]:
        """Call a listener with extra outputs after each training call; return a function that removes the listener.

        Args:
            names: names of the extra outputs, which calls need not return.
            listener: a function that gets name -> site path -> tensor.

        Raises:
            OptionError: no branch emits an output of one of these names.
        """
        check_extra_outputs(list(names), self.plans.values())
        key = object()
        self._listeners[key] = frozenset(names), listener

        def end() -> None:
            self._listeners.pop(key, None)

        return end

    def check_module(self) -> None:
        self._children.check()
        self._weights.check()

    def make_call(self, active: ActiveSlots) -> ForwardCall:
        """Return the state of a new call, with the terms that the call computes.

        Raises:
            Unavailable: modules of the copy were replaced, or weights that a swap writes were.
        """
        if not torch.compiler.is_compiling():
            self._children.check()
        if self.mode == "baked" and (torch.compiler.is_exporting() or is_whole_call_traced()):
            return ForwardCall(active)  # the tracer substitutes all weights, which are merged
        terms = self._terms.current(active.choice)
        given = self._weights.are_given() or terms is not self._terms or active.invocations
        return ForwardCall(active, terms if self.computes_terms or given else None)

    def prepare(self, call: ForwardCall, graph: str, arguments: Call) -> None:
        """Compute the values that a call's branches read of its arguments, of passes before it, and once per call."""
        module = self.components[graph]
        if call.active.places:
            call.rows = self.alignment.count_rows(self.module, module, call.active.touched, arguments)
        if call.active.needs_preparation:
            scope = get_component_prefix(self.module, graph)
            self._branches.prepare(call, module, scope, arguments, self.run_within)

    def run_within(self, call: ForwardCall, work: Callable[[], T]) -> T:
        """Run work as part of a call."""
        return run_with_value(_current_call, (self, call), work)

    def observing(self, graph: str, active: ActiveSlots) -> AbstractContextManager[None]:
        """Return a context in which a component's first call records the layers whose weights it reads.

        Raises:
            SiteError: an adapter acts only on layers that are never called, though their weights are read.
        """
        traced = torch.compiler.is_compiling() or is_whole_call_traced()
        waits = graph in self._unobserved and active.touched and not traced
        return self._observe_once(graph) if waits else nullcontext()

    @contextmanager
    def _observe_once(self, graph: str) -> Iterator[None]:
        if not self._observing.acquire(blocking=False):
            yield
            return
        thread, scope = threading.get_ident(), get_component_prefix(self.module, graph)

        def observe(forward: Forward, *args: Any, **kwargs: Any) -> Any:
            if graph not in self._unobserved or threading.get_ident() != thread:
                return forward(*args, **kwargs)
            layers = [path for path, plan in self.plans.items() if plan.site.is_layer and path.startswith(scope)]
            reads = WeightReads(self.module, layers)
            output = reads.run(lambda: forward(*args, **kwargs))
            self._reads.note(graph, reads.read, reads.called | self._lent)
            self._unobserved.discard(graph)
            # Merged layers that other modules read: the merged weights move to copies, which calls of the layers use.
            baked = [path for path in reads.read if path in self.buffers and path not in self._merged]
            for path in baked:
                module = self.module.get_submodule(path)
                if self._find_written_module(self.plans[path].site) is not module:
                    self._weights.restore(path)
            self._weights.remember(self.buffers.keys() - self._merged)
            return forward(*args, **kwargs) if baked else output

        try:
            with wrap_forward(self.components[graph], observe):
                yield
        finally:
            self._observing.release()

    def announce(self, call: ForwardCall, output: object) -> None:
        """Register a call that recorded gradients with the backward pass, and pass its extra outputs to listeners."""
        if torch.is_grad_enabled() and not is_whole_call_traced():
            self._last_recorded = call
            announce_in_backward(call, output, functools.partial(setattr, self, "_last_recorded"))
        for names, listener in list(self._listeners.values()) if call.terms is not None else ():
            listener({name: call.aux.get(name, {}) for name in names})

    def current_slots(self) -> ActiveSlots:
        """Return the slots of the running call, or outside of calls the slots of the active choice."""
        call = self.running_call()
        return self.active if call is None else call.active

    def _call(self) -> ForwardCall:
        return self.running_call() or self.make_call(self.active)

    def running_call(self) -> ForwardCall | None:
        """Return the call that is running in this thread; None outside of calls."""
        current = _current_call.get()
        if current is not None and current[0] is self:
            return current[1]
        # In backward, outside of calls, a checkpoint recomputes layers with the slots of the last call.
        return self._last_recorded if is_in_backward() else None

    def adapted_weight(self, path: str) -> tuple[Tensor, Tensor | None] | None:
        """Return a layer's weight and bias after the running call's terms; None if no adapter changes them.

        Raises:
            Unavailable: a branch or dropout acts on the layer, or rows have different adapters.
        """
        call = self._call()
        if path not in call.active.touched:
            return None
        terms = None if call.active.places else (call.terms or self._terms).at(path, call.active.choice)
        resized = self.plans[path].site.own_size
        if (
            resized
            or terms is None
            or any(term.change is None or term.invoked or (term.rate and self.module.training) for term in terms)
        ):
            raise Unavailable(
                f"TRL's fused head reads only the weight of '{path}', and the adapters there change more",
                next_step=f"set the method's dropout to 0, or leave '{path}' out of the adapter's targets",
            )
        self._lent.add(path)
        return combine_weights(self.plans[path].site, terms, *self._weights[path])

    def _install(self, path: str, plan: SitePlan) -> None:
        owner = path if plan.site.within is None else plan.site.within
        if plan.site.kind is SiteKind.ONCE:
            return
        module = self.module.get_submodule(owner)
        if owner in self._originals:
            return
        self._originals[owner] = module.forward
        if plan.site.within is not None:
            inside = tuple(p for p, other in self.plans.items() if other.site.within == owner)
            module.forward = OpaqueCall(functools.partial(self._forward_owner, owner, module, inside))
        elif plan.site.kind is SiteKind.BLOCK:
            module.forward = OpaqueCall(functools.partial(self._forward_block, path, module))
        elif has_plain_forward(module):
            module.forward = OpaqueCall(functools.partial(self._forward_site, path, module))
        else:
            # Wrap the forward of the layer's own class (``super().forward``), on a copy with the same attributes.
            original = self._originals[path]
            self._originals[path] = functools.partial(find_layer_class(module).forward, module)
            twin = object.__new__(replace_super_forward(module, functools.partial(self._forward_site, path, module)))
            object.__setattr__(twin, "__dict__", vars(module))
            adapted = functools.partial(type(twin).forward, twin)

            def forward(*args: object, **kwargs: object) -> object:
                return (adapted if path in self.current_slots().touched else original)(*args, **kwargs)

            module.forward = forward
        if plan.site.is_layer:
            guard_hooks(module, path, lambda: path in self.current_slots().touched)

    def _find_written_module(self, site: Site) -> nn.Module:
        """Return the module whose weight a swap writes; for a layer, the copy that adapted calls use.

        Other readers of the layer's weight get the base weight, in fused as in live mode. In a baked model the layers
        themselves have the merged weights, except layers whose weights others read.
        """
        module = self.module.get_submodule(str(site.weight).rpartition(".")[0])
        baked = self.mode == "baked" and site.path not in self._reads.read
        if baked or not site.is_layer or "_old_forward" in vars(module):  # accelerate's hooks call the layer itself
            return module
        twin, original = copy_layer(module), self._originals[site.path]
        if isinstance(original, functools.partial) and original.args == (module,):
            self._merged[site.path] = functools.partial(original.func, twin)
        elif isinstance(original, types.MethodType):
            self._merged[site.path] = types.MethodType(original.__func__, twin)
        else:
            return module
        self.hidden = (*self.hidden, twin)
        return twin

    def _forward_site(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        site, original = self.plans[path].site, self._originals[path]
        if path not in self.current_slots().touched:
            y = original(x)
        elif (adapted := self._compute_adapted(path, module, pad_conv_input(x, site.conv))) is not None:
            y = adapted
        else:
            y, buffer = self._merged.get(path, original)(x), self.buffers.get(path)
            if buffer is not None and buffer.bias is not None and adds_bias(module, buffer.site):
                y = y + buffer.bias
        if not site.own_size:
            return y
        active = self._call().active
        return hide_beyond(y, x, site, [one.sizes.get(path, site.own_size) for one in active.places or (active,)])

    def _forward_block(self, path: str, module: nn.Module, *args: object, **kwargs: object) -> object:
        output = self._originals[path](*args, **kwargs)
        if path not in self.current_slots().touched:
            return output
        x, y = first_tensor((args, kwargs)), first_tensor(output)
        adapted = self._compute_adapted(path, module, x, y)
        return output if adapted is None else replace_first_tensor(output, lambda _: adapted)

    def _forward_tap(self, path: str, forward: Callable[..., T], *args: object, **kwargs: object) -> T:
        call = self._call()
        if f"{IN}:{path}" in call.active.read:
            call.values[f"{IN}:{path}"] = first_tensor((args, kwargs))
        output = forward(*args, **kwargs)
        if path in call.active.read:
            call.values[path] = first_tensor(output, split_output(path)[1])
        return output

    def _compute_adapted(self, path: str, module: nn.Module, x: Tensor, block: Tensor | None = None) -> Tensor | None:
        """Return the output of an adapted site from live terms or slots; None if the weights are already merged."""
        call, plan = self._call(), self.plans[path]
        emitted: dict[str, list[Tensor]] = {}
        ctx = self._branches.ctx(plan, call, module.training, emitted)
        site_call = SiteCall(x, ctx, *self._weights[path], block=block, acting=call.acting)
        if call.passing is not None:
            return self._branches.run_alone(path, call.passing, x, site_call.base(), ctx)
        places = call.active.places
        if places:
            self.alignment.require_rows(path, x, call.rows, len(places))
            if call.terms is None:
                return run_row_slots(plan, call.active, site_call)
            return run_row_terms(call.terms, places, site_call)
        terms, slots = self._branches.live_terms(path, call), call.active.slots.get(path)
        if terms is not None:
            y = run_terms(terms, site_call)
        elif slots is not None:
            y = run_site(plan, slots, site_call)
        else:
            return None
        record_extra_outputs(call.aux, path, {n: found for n, found in emitted.items() if n in self._recorded_names})
        return y

    @property
    def _recorded_names(self) -> frozenset[str]:
        """The names of the extra outputs that calls must record."""
        return self.extra_names.union(*(names for names, _ in self._listeners.values()))

    def _forward_owner(
        self, owner: str, module: nn.Module, inside: Sequence[str], *args: object, **kwargs: object
    ) -> object:
        """Run the forward of a module with replaced weights: call it on a shallow copy that has the replacements."""
        call = self._call()
        replaced: dict[str, Tensor] = {}
        for path in inside:
            if path not in call.active.touched:
                continue
            site, terms = self.plans[path].site, self._branches.live_terms(path, call)
            found: tuple[Tensor | None, Tensor | None]
            if terms is not None:
                found = combine_weights(site, terms, *self._weights[path])
            elif path in call.active.slots:
                found = read_weight_slots(site, call.active.slots[path])
            else:
                continue  # the weights are already merged
            for name, tensor in zip((site.weight, site.bias), found, strict=True):
                if name is not None and tensor is not None:
                    replaced[name.removeprefix(f"{owner}.")] = tensor
        return (
            shadow(module, replaced).forward(*args, **kwargs) if replaced else self._originals[owner](*args, **kwargs)
        )


@dataclass(frozen=True, eq=False)
class EagerProgram(BoundProgram):
    """The copy of the model, with the slots of one choice of adapters."""

    engine: EagerEngine
    active: ActiveSlots
    starts: Mapping[str, Tensor] = field(default_factory=dict, kw_only=True)

    def for_prompts(self, ids: Tensor, mask: Tensor | None) -> "EagerProgram":
        return replace(self, starts=find_start_columns(self.active.invocations, ids, mask))

    def activate(self) -> None:
        """Use these slots outside of calls too, such as when a submodule is called directly."""
        self.engine.active, self.engine.choice_text = self.active, repr(self.active.choice)

    def run(self, graph: str, call: Call) -> CallResult:
        """Call the copy of the model, or one of its components; in fused mode the weights are already written."""
        engine = self.engine
        module, forward = engine.components[graph], engine.make_call(self.active)
        engine.prepare(forward, graph, call)
        with translate_errors(), engine.observing(graph, self.active), stand_before(module, self.prefix):
            output = engine.run_within(forward, lambda: module(*call.args, **call.kwargs))
        engine.announce(forward, output)
        return CallResult(output, {name: found for name, found in forward.aux.items() if name in engine.extra_names})

    def run_with_model(self, graph: str, work: Callable[[nn.Module], T]) -> T:
        engine, active = self.engine, self.active
        module, call = engine.components[graph], engine.make_call(active)
        call.starts = self.starts

        def before(called: nn.Module, *given: Any) -> None:
            own = engine.running_call() is call  # else it is in a pass before it, or in another thread's call
            if own and called is module:
                engine.prepare(call, graph, Call(*given))
            elif own and not call.rows:
                call.rows = engine.alignment.count_rows(engine.module, called, active.touched, Call(*given))

        prepared = [module] if active.needs_preparation or active.places else []
        with engine.observing(graph, active), stand_before(module, self.prefix), ExitStack() as stack:
            for each in (*prepared, *(Host.of(module).encoders() if active.places else ())):
                stack.callback(each.register_forward_pre_hook(before, with_kwargs=True).remove)
            return engine.run_within(call, lambda: work(module))
