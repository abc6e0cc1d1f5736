"""What one choice of adapters puts at the sites of a host, and what a call of the host carries from site to site."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lorac.errors import Unavailable
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.plans import SiteSlots
from lorac.ir.slots.program_values import BASE, INPUT, OWN, parse_value_name


@dataclass(frozen=True, eq=False)
class ActiveSlots:
    """What one choice puts at the sites it touches.

    Attributes:
        choice: the choice, from which training computes its terms.
        slots: site path -> slots; absent where nothing is active.
        read: names of the values that branches which are on read, as the program calls them.
        branches: whether any are on.
    """

    choice: Choice = ()
    slots: Mapping[str, SiteSlots] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()
    branches: bool = False

    @property
    def begins(self) -> bool:
        """Whether something of what branches ask for is known when a call begins, by what it is given."""
        return self.branches or any(parse_value_name(name)[0] in {BASE, INPUT, OWN} for name in self.read)

    def base_pass(self, scope: str) -> ActiveSlots:
        """What fills the slots of a pass of the base that gives what is read of it: nothing.

        Args:
            scope: what the paths of the component that is called begin with; what is read of another is not there.
        """
        read = (path for kind, path in map(parse_value_name, self.read) if kind == BASE)
        return ActiveSlots(read=frozenset(path for path in read if path.startswith(scope)))


NO_ADAPTERS = ActiveSlots()


@dataclass(frozen=True, eq=False)
class AdapterPass:
    """A pass before a call's own, in which one adapter's branches act alone.

    Attributes:
        name: what the adapter calls the pass.
        owner: what stands before the names of its own values (``lorac.ir.slots.program_values.owner_prefix``).
        call: for which call it is.
    """

    name: str
    owner: str
    call: ForwardCall


@dataclass(eq=False)
class ForwardCall:
    """One call of the host: what fills its slots, the program values read so far, and the extra outputs given.

    ``computes_terms`` is settled at the call's start: a reentrant checkpoint turns gradients off within it. ``seed`` is
    that of its randomness, once a branch asked for it, and the same when a checkpoint recomputes; ``began`` tells its
    beginning from those of other calls. ``attention`` is what its branches attend by, once it has begun. ``passing``
    says which pass it is, where it is one that an adapter has to itself.
    """

    filled: ActiveSlots
    computes_terms: bool = False
    seed: int | None = None
    began: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)
    aux: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    attention: BranchAttention = field(default_factory=FullAttention)
    passing: AdapterPass | None = None


def slots_from_snapshot(snapshot: ComposedWeights, slots: Mapping[str, SiteSlots]) -> ActiveSlots:
    """What a choice puts at the sites it touches; the names of what is read are but for whose own values they are."""
    touched = frozenset(snapshot.composed)
    terms = [term for composed in snapshot.composed.values() for _, term in composed.branches]
    read = frozenset(name for term in terms for name in term.slot.reads)
    return ActiveSlots(snapshot.choice, {path: slots[path] for path in touched}, touched, read, bool(terms))


def check_no_cache(attention: BranchAttention) -> None:
    """Raise ``Unavailable`` where a call that goes on with a cache needs a pass before its own, which would fill it."""
    if not isinstance(attention, FullAttention):
        raise Unavailable(
            "an adapter that is on reads a pass of the model before this call's own, and the call brings a cache, "
            "which that pass would fill too",
            next_step="give the whole text and no cache, as generate does by itself; a program of "
            "target='onnxruntime' with cache=True keeps a cache for each pass",
        )


def choose_attention(given: Iterable[object]) -> BranchAttention:
    """What the branches of a call attend by: where text grows, a cache of transformers is among its arguments."""
    library: Any = sys.modules.get("transformers.cache_utils")
    cache = next((value for value in given if library is not None and isinstance(value, library.Cache)), None)
    if cache is None:
        return FullAttention()
    from lorac.backends.eager.branch_cache import CachedBranchAttention

    return CachedBranchAttention(cache)
