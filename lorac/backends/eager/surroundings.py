"""What the branches of a call see around them: what they read, what is computed once, what their randomness begins by.

A pass that an adapter has to itself (``lorac.ir.slots.reads``) is a call of its own, which knows for which call it is:
its branches are that call's, and so are its randomness and the values that are there from the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor, nn

from lorac.backends.eager.calls import Call, Filled, Passing
from lorac.backends.eager.draws import Draws
from lorac.ir.host.sites import Site, SiteKind, stored_tensor
from lorac.ir.slots.choice import Choice
from lorac.ir.slots.reads import (
    IN,
    OUTPUT,
    PARAM,
    WEIGHT,
    branch_of,
    full_name,
    names_read,
    owner_at,
    parse,
    pass_value,
    passes_in,
    presented,
)
from lorac.ir.slots.run import Ctx, branch_alone, own_values
from lorac.ir.slots.site import BranchFill, BranchSlot, SitePlan
from lorac.ir.slots.training import LiveTerm

Terms = Callable[[str, Choice], Sequence[LiveTerm] | None]
Branch = tuple[BranchSlot, BranchFill]
_HELD = (WEIGHT, PARAM)


@final
class Surroundings:
    """What a host's branches see of its calls.

    Args:
        module: the host copy.
        plans: what each site has.
        sites: every site of the host.
        terms: (site path, choice) -> terms computed from the adapters' own tensors, for training.
    """

    def __init__(
        self, module: nn.Module, plans: Mapping[str, SitePlan], sites: Mapping[str, Site], terms: Terms
    ) -> None:
        self.module, self.plans, self.sites, self.terms = module, plans, sites, terms
        self._draws = Draws()

    def live_terms(self, path: str, call: Call) -> Sequence[LiveTerm] | None:
        """The terms from the adapters' own tensors where the call computes them, else None."""
        return self.terms(path, call.filled.choice) if call.computes_terms else None

    def ctx(self, plan: SitePlan, call: Call, training: bool, emitted: dict[str, list[Tensor]] | None = None) -> Ctx:
        """What the branches at a site are handed."""
        return Ctx(
            plan.site,
            training=training,
            seed=functools.partial(self._seed, call if call.passing is None else call.passing.call),
            values=self._values(plan, call),
            emitted=emitted,
            attention=call.attention,
            passing="" if call.passing is None else call.passing.name,
        )

    def compute_once(self, path: str, call: Call, run: Callable[[Call], None]) -> None:
        """Have a call know what its adapters compute once, those of one structure, by passes of their own before that.

        Args:
            path: of the site that stands for them.
            call: gets the values.
            run: has the host run a pass, with what the call was given and without gradients.
        """
        plan = self.plans[path]
        for i, (slot, fill) in enumerate(self._branches(path, call)):
            owner = owner_at(path, i)
            for name, read in passes_in(slot.reads).items():
                passed = self._pass(Passing(name, owner, call), read)
                run(passed)
                found = {of: passed.values[of] for of in read if of in passed.values}
                call.values.update({full_name(owner, pass_value(name, of)): value for of, value in found.items()})
            call.values.update(own_values(slot, fill.params, self.ctx(plan, call, self.module.training), owner))

    def alone(self, path: str, passing: Passing, x: Tensor, y: Tensor, ctx: Ctx) -> Tensor:
        """What a site that an adapter adapts answers in a pass of that adapter's own.

        Args:
            path: the site's.
            passing: the pass.
            x, y: the site's input there, and what the base makes of it.
            ctx: handed to the branch.
        """
        branch = self._of_adapter(path, passing)
        assert branch is not None
        slot, fill = branch
        return branch_alone(slot, fill.params, x, y, ctx)

    def _pass(self, passing: Passing, read: Sequence[str]) -> Call:
        """A pass in which an adapter acts alone, and that gives what modules at these paths answer."""
        call, branches = passing.call, dict[str, BranchSlot]()
        for path in call.filled.touched:
            found = None if self.plans[path].site.kind is SiteKind.ONCE else self._of_adapter(path, passing)
            branches |= {} if found is None else {path: found[0]}
        names = {name for slot in branches.values() for name in slot.reads if parse(name)[0] in {OUTPUT, IN}}
        filled = Filled(touched=frozenset(branches), read=frozenset({*read, *names}))
        return Call(filled, values=dict(call.values), attention=call.attention, passing=passing)

    def _of_adapter(self, path: str, passing: Passing) -> Branch | None:
        """The branch at a site of the adapter that a pass is of."""
        branches = self._branches(path, passing.call)
        index = branch_of([slot for slot, _ in branches], passing.owner)
        return None if index is None else branches[index]

    def _branches(self, path: str, call: Call) -> list[Branch]:
        """The branches of a call at a site, in their order."""
        terms = self.live_terms(path, call)
        if terms is not None:
            return [term.branch for term in terms if term.branch is not None]
        filled = zip(self.plans[path].branches, call.filled.slots[path].branches, strict=True)
        return [(slot, fill) for slot, fill in filled if fill is not None]

    def _values(self, plan: SitePlan, call: Call) -> Mapping[str, Tensor]:
        """What the plan's branches may read now."""
        if not plan.branches:
            return {}
        parsed = [(name, *parse(name)) for name in names_read([plan])]
        held = {
            name: str(self.sites[of].weight) if kind == WEIGHT else of for name, kind, of in parsed if kind in _HELD
        }
        stored = {name: stored_tensor(self.module, fqn) for name, fqn in held.items()}
        return {**call.values, **presented(stored, self.sites)}

    def _seed(self, call: Call) -> int:
        """The seed of a call's randomness, the same for all its sites."""
        if call.seed is None:
            call.seed = self._draws.seed(call.began)
        return call.seed
