"""The slots that a choice of adapters fills, and the state of one call of the model."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorac.errors import Unavailable
from lorac.frontend.capture.trace_guards import find_failing_model_line
from lorac.frontend.model_runner import is_dynamo_error
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.invocation import Invocations, find_start
from lorac.ir.slots.live_terms import TrainingTerms
from lorac.ir.slots.plans import SiteSlots
from lorac.ir.slots.program_values import BASE, INPUT, OWN, parse_value_name
from lorac.ir.slots.roles import ROLES

_NEVER = 1 << 62
"""The column from which on an adapter acts on a row without its invocation tokens."""


@dataclass(frozen=True, eq=False)
class ActiveSlots:
    """The slots that a choice fills.

    Attributes:
        choice: the choice of adapters, from which training computes its terms.
        slots: site path -> slots, at least for the sites where an adapter is active.
        touched: paths of the adapted sites; in fused mode too, where the weights are merged.
        read: program names of the values that active branches read.
        branches: whether any branch is active.
        apart: paths of sites whose slots have no axis of places, because of merged weights or branches.
        places: the slots of each part of the rows, if the parts have different choices; ``slots`` has the slots of all.
        sizes: path of a layer that the choice replaces -> the size of the replacement (``ComposedSite``).
        invocations: the invocation tokens of the choice's adapters that have some.
    """

    choice: Choice = ()
    slots: Mapping[str, SiteSlots] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    branches: bool = False
    apart: frozenset[str] = frozenset()
    places: "tuple[ActiveSlots, ...]" = ()
    sizes: Mapping[str, int] = field(default_factory=dict)
    invocations: Invocations = field(default_factory=dict)

    @property
    def needs_preparation(self) -> bool:
        """Whether values must be computed from the arguments before a call."""
        first = {BASE, INPUT, OWN}
        return bool(self.branches or self.invocations or any(parse_value_name(name)[0] in first for name in self.read))

    def base_pass(self, scope: str) -> "ActiveSlots":
        """Return empty slots for a pass of the base, which records the values that branches read from it.

        Args:
            scope: the prefix of the called component's paths; values of other components are omitted.
        """
        read = (path for kind, path in map(parse_value_name, self.read) if kind == BASE)
        return ActiveSlots(read=frozenset(path for path in read if path.startswith(scope)))


NO_ADAPTERS = ActiveSlots()


@dataclass(frozen=True, eq=False)
class AdapterPass:
    """A pass before a call in which only one adapter's branches act.

    Attributes:
        name: the adapter's name of the pass.
        owner: the prefix of the adapter's own values (``lorac.ir.slots.program_values.owner_prefix``).
        call: the call that it precedes.
    """

    name: str
    owner: str
    call: "ForwardCall"


@dataclass(eq=False)
class ForwardCall:
    """The state of one call of the model.

    Attributes:
        active: the filled slots.
        terms: the terms from the adapters' tensors; None if the call reads slots. It is set when the call starts, since
            a reentrant checkpoint turns gradients off during the call.
        seed: the seed of the call's branches, if it trains.
        values: the program values that were read so far.
        prepared: the values that were known before the model ran.
        aux: the extra outputs so far.
        attention: the attention of the call's branches.
        passing: the adapter's pass, if this call is one.
        rows: the number of rows, if parts of the rows have different choices.
        starts: name of an adapter with invocation tokens -> the column (rows,) from which it acts in each row.
        acting: the same name -> a boolean mask (rows, length) of the tokens of a forward on which it acts.
    """

    active: ActiveSlots
    terms: TrainingTerms | None = None
    seed: int | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    prepared: Mapping[str, Tensor] = field(default_factory=dict)
    aux: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    attention: BranchAttention = field(default_factory=FullAttention)
    passing: AdapterPass | None = None
    rows: int = 0
    starts: Mapping[str, Tensor] = field(default_factory=dict)
    acting: Mapping[str, Tensor] = field(default_factory=dict)


def announce_in_backward(call: ForwardCall, output: object, announce: Callable[[ForwardCall], None]) -> None:
    """Register a hook by which the backward pass announces the call whose layers a checkpoint may recompute.

    One backward pass may follow several calls. Values that the model computed are announced only with the latest call,
    since a hook that referenced them would keep their graph alive.

    Args:
        announce: a function that gets the call.
    """
    latest = weakref.ref(call)
    kept = ForwardCall(call.active, call.terms, call.seed, dict(call.prepared), rows=call.rows, acting=call.acting)

    def announce_call(_: object) -> None:
        announce(latest() or kept)

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(announce_call)


def find_start_columns(invocations: Invocations, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Compute ``ForwardCall.starts`` for whole sequences.

    Args:
        ids: token ids (rows, length).
        mask: (rows, length), 0 for padding; None if there is no padding.
    """
    columns = [row.nonzero()[:, 0] for row in (torch.ones_like(ids) if mask is None else mask)]
    rows, starts = [*zip(ids, columns, strict=True)], dict[str, Tensor]()
    for name, invocation in invocations.items():
        found = ((find_start(row[own], invocation), own) for row, own in rows)
        starts[name] = ids.new_tensor([_NEVER if place is None else own[place] for place, own in found])
    return starts


def slots_from_snapshot(snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> ActiveSlots:
    """Return the slots that a choice fills; names of values that branches read have no owner yet."""
    touched = frozenset(snapshot.composed)
    terms = [term for composed in snapshot.composed.values() for _, term in composed.branches]
    read = frozenset(name for term in terms for name in term.slot.reads)
    apart = (
        path for path, at in snapshot.composed.items() if at.branches or any(ROLES[r].why_shared for r in at.roles)
    )
    own = (snapshot.choice, slots, touched, read, bool(terms), frozenset(apart))
    return ActiveSlots(*own, sizes=snapshot.sizes, invocations=snapshot.invocations)


def check_no_cache(attention: BranchAttention) -> None:
    """Refuse a call with a cache if it needs a pass before it, since that pass would fill the cache."""
    if not isinstance(attention, FullAttention):
        raise Unavailable(
            "an active adapter needs a pass of the model before this call, and that pass would fill the call's cache",
            next_step="give the whole sequence and no cache, as generate does; with target='onnxruntime' and "
            "cache=True each pass has a cache of its own",
        )


def choose_attention(arguments: Iterable[object]) -> BranchAttention:
    """Return the attention of a call's branches: with a cache if the arguments contain one of transformers'."""
    cache_class = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())
    cache = next((value for value in arguments if isinstance(value, cache_class)), None)
    if cache is None:
        return FullAttention()
    from lorac.backends.eager.branch_cache import CachedBranchAttention

    return CachedBranchAttention(cache)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Translate errors of torch's compiler about an adapted layer, as in a branch of ``torch.cond``, and name the line.

    Raises:
        Unavailable: torch compiles a part of the model by itself, and an adapted layer is in it.
    """
    try:
        yield
    except Exception as error:
        if not is_dynamo_error(error):
            raise
        line = find_failing_model_line(error)
        raise Unavailable(
            "torch.cond, or another op of torch that compiles its body, calls an adapted layer, and eager PyTorch "
            f"cannot compile that{f', at {line}' if line else ''}",
            next_step="select between the results of layers with torch.where; target='onnxruntime' takes torch.cond",
        ) from error
