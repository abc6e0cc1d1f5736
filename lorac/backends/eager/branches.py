"""What the branches of a call see around them: what they read, what is computed once, what their randomness begins by.

A pass that an adapter has to itself (``lorac.ir.slots.program_values``) is a call of its own, which knows for which
call it is: its branches are that call's, and so are its randomness and the values that are there from the start.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import final

from torch import Tensor, nn

from lorac.backends.eager.forward_call import ActiveSlots, AdapterPass, ForwardCall
from lorac.backends.eager.random_seeds import SeedHistory
from lorac.frontend.base_weights import read_stored_tensor
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.execution import FormulaContext, compute_once_values, run_branch_alone
from lorac.ir.slots.live_terms import LiveTerm, TrainingTerms
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan
from lorac.ir.slots.program_values import (
    IN,
    OUTPUT,
    PARAM,
    WEIGHT,
    find_branch,
    list_read_values,
    modules_by_pass,
    owner_prefix,
    parse_value_name,
    pass_value_name,
    present_weights,
    program_value_name,
)

FilledBranch = tuple[BranchSlot, BranchFill]
_STORED_KINDS = (WEIGHT, PARAM)


@final
class BranchRunner:
    """What a host's branches see of its calls.

    Args:
        module: the host copy.
        plans: what each site has.
        sites: every site of the host.
        terms: terms from the adapters' own tensors, for training.
    """

    def __init__(
        self, module: nn.Module, plans: Mapping[str, SitePlan], sites: Mapping[str, Site], terms: TrainingTerms
    ) -> None:
        self.module, self.plans, self.sites, self.terms = module, plans, sites, terms
        self._draws = SeedHistory()

    def live_terms(self, path: str, call: ForwardCall) -> Sequence[LiveTerm] | None:
        """The terms from the adapters' own tensors where the call computes them, else None."""
        return self.terms.at(path, call.filled.choice) if call.computes_terms else None

    def ctx(
        self, plan: SitePlan, call: ForwardCall, training: bool, emitted: dict[str, list[Tensor]] | None = None
    ) -> FormulaContext:
        """What the branches at a site are handed."""
        return FormulaContext(
            plan.site,
            training=training,
            seed=functools.partial(self._seed, call if call.passing is None else call.passing.call),
            values=self._values(plan, call),
            emitted=emitted,
            attention=call.attention,
            passing="" if call.passing is None else call.passing.name,
        )

    def compute_once(self, path: str, call: ForwardCall, run: Callable[[ForwardCall], None]) -> None:
        """Have a call know what its adapters compute once, those of one structure, by passes of their own before that.

        Args:
            path: of the site that stands for them.
            call: gets the values.
            run: has the host run a pass, with what the call was given and without gradients.
        """
        plan = self.plans[path]
        for i, (slot, fill) in enumerate(self._branches(path, call)):
            owner = owner_prefix(path, i)
            for name, read in modules_by_pass(slot.reads).items():
                passed = self._pass(AdapterPass(name, owner, call), read)
                run(passed)
                found = {of: passed.values[of] for of in read if of in passed.values}
                call.values.update(
                    {program_value_name(owner, pass_value_name(name, of)): value for of, value in found.items()}
                )
            call.values.update(
                compute_once_values(slot, fill.params, self.ctx(plan, call, self.module.training), owner)
            )

    def alone(self, path: str, passing: AdapterPass, x: Tensor, y: Tensor, ctx: FormulaContext) -> Tensor:
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
        return run_branch_alone(slot, fill.params, x, y, ctx)

    def _pass(self, passing: AdapterPass, read: Sequence[str]) -> ForwardCall:
        """A pass in which an adapter acts alone, and that gives what modules at these paths answer."""
        call, branches = passing.call, dict[str, BranchSlot]()
        for path in call.filled.touched:
            found = None if self.plans[path].site.kind is SiteKind.ONCE else self._of_adapter(path, passing)
            branches |= {} if found is None else {path: found[0]}
        names = {name for slot in branches.values() for name in slot.reads if parse_value_name(name)[0] in {OUTPUT, IN}}
        filled = ActiveSlots(touched=frozenset(branches), read=frozenset({*read, *names}))
        return ForwardCall(filled, values=dict(call.values), attention=call.attention, passing=passing)

    def _of_adapter(self, path: str, passing: AdapterPass) -> FilledBranch | None:
        """The branch at a site of the adapter that a pass is of."""
        branches = self._branches(path, passing.call)
        index = find_branch([slot for slot, _ in branches], passing.owner)
        return None if index is None else branches[index]

    def _branches(self, path: str, call: ForwardCall) -> list[FilledBranch]:
        """The branches of a call at a site, in their order."""
        terms = self.live_terms(path, call)
        if terms is not None:
            return [term.branch for term in terms if term.branch is not None]
        filled = zip(self.plans[path].branches, call.filled.slots[path].branches, strict=True)
        return [(slot, fill) for slot, fill in filled if fill is not None]

    def _values(self, plan: SitePlan, call: ForwardCall) -> Mapping[str, Tensor]:
        """What the plan's branches may read now."""
        if not plan.branches:
            return {}
        parsed = [(name, *parse_value_name(name)) for name in list_read_values([plan])]
        held = {
            name: str(self.sites[of].weight) if kind == WEIGHT else of
            for name, kind, of in parsed
            if kind in _STORED_KINDS
        }
        stored = {name: read_stored_tensor(self.module, fqn) for name, fqn in held.items()}
        return {**call.values, **present_weights(stored, self.sites)}

    def _seed(self, call: ForwardCall) -> int:
        """The seed of a call's randomness, the same for all its sites."""
        if call.seed is None:
            call.seed = self._draws.seed(call.began)
        return call.seed
