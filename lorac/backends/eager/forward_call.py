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
        choice: the choice, from which training computes its terms.
        slots: site path -> slots, for the sites where an adapter is active at least.
        touched: paths of these sites; in fused mode too, where the weights hold their contents.
        read: the program's names of the values that active branches read.
        branches: whether a branch is active.
        apart: paths of the sites whose slots have no places: those with merged weights and branches.
        places: the slots of each part of the rows, where they have choices of their own; ``slots`` holds all of them.
        sizes: path of a layer that the choice replaces -> its size (``ComposedSite``).
        invocations: of those adapters of the choice that act from their invocation tokens on.
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
        """Return whether values are computed before a call, from its arguments: those that branches read, for one."""
        first = {BASE, INPUT, OWN}
        return bool(self.branches or self.invocations or any(parse_value_name(name)[0] in first for name in self.read))

    def base_pass(self, scope: str) -> "ActiveSlots":
        """Return the slots of a pass of the base, all empty, with the values that branches read of it.

        Args:
            scope: prefix of the paths of the component that is called; values of other components are left out.
        """
        read = (path for kind, path in map(parse_value_name, self.read) if kind == BASE)
        return ActiveSlots(read=frozenset(path for path in read if path.startswith(scope)))


NO_ADAPTERS = ActiveSlots()


@dataclass(frozen=True, eq=False)
class AdapterPass:
    """A pass before a call, in which the branches of one adapter act alone.

    Attributes:
        name: the adapter's name of the pass.
        owner: prefix of the names of the adapter's own values (``lorac.ir.slots.program_values.owner_prefix``).
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
        terms: computed from the adapters' tensors; None if the call reads slots. Decided at the call's start, since a
            reentrant checkpoint turns gradients off within it.
        seed: of the randomness of the call's branches, if it trains.
        values: program values read so far.
        prepared: those known before the model ran.
        aux: extra outputs so far.
        attention: of the call's branches.
        passing: the adapter's pass that this call is, if it is one.
        rows: the number of rows, where they have choices of their own.
        starts: name of an adapter with invocation tokens -> the column of each row (rows,) from which on it acts.
        acting: the same name -> the tokens of a forward (rows, length) on which it acts, as booleans.
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
    """Register a hook by which a backward pass names the call whose layers a checkpoint may recompute.

    Several calls may precede one backward pass. Values that the model computed are in the graph that would hold them
    here for ever, so they are announced with the latest call alone.

    Args:
        announce: gets the call.
    """
    latest = weakref.ref(call)
    kept = ForwardCall(call.active, call.terms, call.seed, dict(call.prepared), rows=call.rows, acting=call.acting)

    def announce_call(_: object) -> None:
        announce(latest() or kept)

    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.grad_fn is not None:
            leaf.grad_fn.register_prehook(announce_call)


def find_start_columns(invocations: Invocations, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Return ``ForwardCall.starts`` of whole sequences.

    Args:
        ids: token ids (rows, length).
        mask: (rows, length), 0 for padding; None where nothing is padding.
    """
    columns = [row.nonzero()[:, 0] for row in (torch.ones_like(ids) if mask is None else mask)]
    rows, starts = [*zip(ids, columns, strict=True)], dict[str, Tensor]()
    for name, invocation in invocations.items():
        found = ((find_start(row[own], invocation), own) for row, own in rows)
        starts[name] = ids.new_tensor([_NEVER if place is None else own[place] for place, own in found])
    return starts


def slots_from_snapshot(snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> ActiveSlots:
    """Return the slots that a choice fills; names of values read have no owner yet."""
    touched = frozenset(snapshot.composed)
    terms = [term for composed in snapshot.composed.values() for _, term in composed.branches]
    read = frozenset(name for term in terms for name in term.slot.reads)
    apart = (
        path for path, at in snapshot.composed.items() if at.branches or any(ROLES[r].why_shared for r in at.roles)
    )
    own = (snapshot.choice, slots, touched, read, bool(terms), frozenset(apart))
    return ActiveSlots(*own, sizes=snapshot.sizes, invocations=snapshot.invocations)


def check_no_cache(attention: BranchAttention) -> None:
    """Refuse a call with a cache that needs a pass before it, since that pass would fill the cache."""
    if not isinstance(attention, FullAttention):
        raise Unavailable(
            "an active adapter needs a pass of the model before this call, which would fill the call's cache too",
            next_step="give the whole sequence and no cache, as generate does; with target='onnxruntime' and "
            "cache=True each pass has a cache of its own",
        )


def choose_attention(arguments: Iterable[object]) -> BranchAttention:
    """Return how the branches of a call attend: to its cache, if a cache of transformers is among the arguments."""
    cache_class = getattr(sys.modules.get("transformers.cache_utils"), "Cache", ())
    cache = next((value for value in arguments if isinstance(value, cache_class)), None)
    if cache is None:
        return FullAttention()
    from lorac.backends.eager.branch_cache import CachedBranchAttention

    return CachedBranchAttention(cache)


@contextmanager
def translate_errors() -> Iterator[None]:
    """Name the line where torch's compiler meets an adapted layer, as in a branch of ``torch.cond``.

    Raises:
        Unavailable: torch compiles a part of the model by itself, with an adapted layer in it.
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
