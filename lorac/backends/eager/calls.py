"""What one choice of adapters puts at the sites of a host, and what a call of the host carries from site to site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from lorac.ir.slots.choice import Choice
from lorac.ir.slots.reads import BASE, INPUT, OWN, parse
from lorac.ir.slots.site import SiteSlots
from lorac.ir.slots.snapshot import Snapshot


@dataclass(frozen=True, eq=False)
class Filled:
    """What one choice puts at the sites it touches.

    Attributes:
        choice: the choice, from which training computes its terms.
        slots: site path -> slots; absent where nothing is active.
        read: names of the values that branches which are on read, as the program calls them.
    """

    choice: Choice = ()
    slots: Mapping[str, SiteSlots] = field(default_factory=dict)
    touched: frozenset[str] = frozenset()
    read: frozenset[str] = frozenset()

    @property
    def begins(self) -> bool:
        """Whether something of what is read is known when a call begins, by what it is given."""
        return any(parse(name)[0] in {BASE, INPUT, OWN} for name in self.read)

    def base_pass(self) -> Filled:
        """What fills the slots of a pass of the base that gives what is read of it: nothing."""
        return Filled(read=frozenset(path for kind, path in map(parse, self.read) if kind == BASE))


BARE = Filled()


@dataclass(frozen=True, eq=False)
class Call:
    """One call of the host: what fills its slots, the program values read so far, and the extra outputs given.

    ``computes_terms`` is settled at the call's start: a reentrant checkpoint turns gradients off within it. ``seed`` is
    that of its randomness, which is the same when a checkpoint recomputes.
    """

    filled: Filled
    computes_terms: bool = False
    seed: int | None = None
    values: dict[str, Tensor] = field(default_factory=dict)
    aux: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def read_by(snapshot: Snapshot) -> frozenset[str]:
    """Names of what the branches of a choice read, but for whose own values they are."""
    terms = (term for composed in snapshot.composed.values() for _, term in composed.branches)
    return frozenset(name for term in terms for name in term.slot.reads)
