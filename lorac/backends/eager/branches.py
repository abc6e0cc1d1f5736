"""Contexts of branches: the values that they read, the values that are computed once per call, and seeds.

A pass in which one adapter acts alone (``lorac.ir.slots.program_values``) is a separate call that belongs to another
call: it uses that call's branches, random numbers and initial values.
"""

import functools
import inspect
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from lorac.backends.eager.forward_call import (
    ActiveSlots,
    AdapterPass,
    ForwardCall,
    check_no_cache,
    choose_attention,
    find_start_columns,
)
from lorac.errors import Unavailable
from lorac.frontend.base_weights import read_stored_tensor
from lorac.ir.calls.call import Call
from lorac.ir.graph.attention_ops import DECODER_IDS, IDS
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.execution import FormulaContext, compute_once_values, run_branch_alone
from lorac.ir.slots.invocation import no_prompt_error
from lorac.ir.slots.live_terms import LiveTerm
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan
from lorac.ir.slots.program_values import (
    BASE,
    IN,
    INPUT,
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

_MAX_SEED = (1 << 63) - 1
_MAX_CALLS = 256
"""Number of calls that are remembered, more than any training step recomputes."""


def is_in_backward() -> bool:
    """Return whether a backward pass is running, in which only checkpoints call the model."""
    return bool(torch._C._current_graph_task_id() != -1)


FilledBranch = tuple[BranchSlot, BranchFill]
_STORED_KINDS = (WEIGHT, PARAM)


@final
class BranchRunner:
    """A runner of the branches in a model's calls.

    Args:
        module: the running copy of the model.
        plans: the slots of each site.
        sites: every site of the model.
    """

    def __init__(self, module: nn.Module, plans: Mapping[str, SitePlan], sites: Mapping[str, Site]) -> None:
        self.module, self.plans, self.sites = module, plans, sites
        self._seeds: deque[int] = deque(maxlen=_MAX_CALLS)

    def live_terms(self, path: str, call: ForwardCall) -> Sequence[LiveTerm] | None:
        """Return the terms from the adapters' tensors if the call computes them; else None."""
        return None if call.terms is None else call.terms.at(path, call.active.choice)

    def ctx(
        self, plan: SitePlan, call: ForwardCall, training: bool, emitted: dict[str, list[Tensor]] | None = None
    ) -> FormulaContext:
        """Return the context of the branches at a site."""
        values: Mapping[str, Tensor] = {}
        if plan.branches:
            parsed = [(name, *parse_value_name(name)) for name in list_read_values([plan])]
            names = {
                name: str(self.sites[of].weight) if kind == WEIGHT else of
                for name, kind, of in parsed
                if kind in _STORED_KINDS
            }
            stored = {name: read_stored_tensor(self.module, fqn) for name, fqn in names.items()}
            values = {**call.values, **present_weights(stored, self.sites)}
        return FormulaContext(
            plan.site,
            training=training,
            seed=functools.partial(self._seed, call if call.passing is None else call.passing.call),
            values=values,
            emitted=emitted,
            attention=call.attention,
            passing="" if call.passing is None else call.passing.name,
        )

    def prepare(
        self,
        call: ForwardCall,
        module: nn.Module,
        scope: str,
        arguments: Call,
        run: Callable[[ForwardCall, Callable[[], object]], object],
    ) -> None:
        """Compute the values that a call's branches read of its arguments, of passes before it, and once per call.

        Args:
            call: the call, which receives the values.
            module: the called module.
            scope: the prefix of the paths in that module.
            arguments: the arguments of the call.
            run: a function that runs work as part of a call.
        """
        named = inspect.signature(module.forward).bind_partial(*arguments.args, **arguments.kwargs).arguments
        call.attention = choose_attention((*named.values(), *arguments.kwargs.values()))
        if call.active.branches:
            self.draw_seed(call)
        if call.active.invocations:
            ids, mask, active = named.get(IDS), named.get("attention_mask"), call.active.invocations
            decodes = DECODER_IDS not in inspect.signature(module.forward).parameters
            places = call.attention.positions(ids[..., None]) if isinstance(ids, Tensor) and ids.dim() == 2 else None
            if not isinstance(ids, Tensor) or not decodes or places is None or not (call.starts or int(places[0]) == 0):
                raise no_prompt_error(active)
            whole = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else None
            starts = call.starts or find_start_columns(active, ids, whole)
            repeats = {name: len(ids) // len(own) for name, own in starts.items()}
            call.acting = {
                name: places >= own.repeat_interleave(repeats[name])[:, None] for name, own in starts.items()
            }
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        call.values.update({f"{INPUT}:{name}": value for name, value in tensors.items()})

        def run_pass(passed: ForwardCall) -> None:
            check_no_cache(call.attention)
            with torch.no_grad():
                run(passed, lambda: module(*arguments.args, **arguments.kwargs))

        base = ForwardCall(call.active.base_pass(scope))
        if base.active.read:
            run_pass(base)
            call.values.update({f"{BASE}:{path}": base.values[path] for path in base.active.read & base.values.keys()})
        plans = [self.plans[path] for path in call.active.touched if path.startswith(scope)]
        # In the same order in every process, since passes of a training model draw random numbers.
        for path in sorted({branch.once for plan in plans for branch in plan.branches} & call.active.touched):
            self.compute_once(path, call, run_pass)
        call.prepared = dict(call.values)

    def compute_once(self, path: str, call: ForwardCall, run: Callable[[ForwardCall], None]) -> None:
        """Compute the values that adapters of one structure need once per call, after the passes that these read.

        Args:
            path: the path of the site that stands for these adapters.
            call: the call, which receives the values.
            run: a function that runs a pass of the model with the call's arguments, without gradients.
        """
        plan = self.plans[path]
        for i, (slot, fill) in enumerate(self._branches(path, call)):
            owner = owner_prefix(path, i)
            for name, read in modules_by_pass(slot.reads).items():
                passing, slots = AdapterPass(name, owner, call), dict[str, BranchSlot]()
                for site in call.active.touched:
                    branch = self._of_adapter(site, passing)
                    slots |= {} if branch is None or self.plans[site].site.kind is SiteKind.ONCE else {site: branch[0]}
                names = {value for each in slots.values() for value in each.reads}
                names = {value for value in names if parse_value_name(value)[0] in {OUTPUT, IN}}
                acting = ActiveSlots(touched=frozenset(slots), read=frozenset({*read, *names}))
                passed = ForwardCall(acting, values=dict(call.values), attention=call.attention, passing=passing)
                run(passed)  # it records the outputs of the modules that the adapter reads
                found = {of: passed.values[of] for of in read if of in passed.values}
                call.values.update(
                    {program_value_name(owner, pass_value_name(name, of)): value for of, value in found.items()}
                )
            call.values.update(
                compute_once_values(slot, fill.params, self.ctx(plan, call, self.module.training), owner)
            )

    def run_alone(self, path: str, passing: AdapterPass, x: Tensor, y: Tensor, ctx: FormulaContext) -> Tensor:
        """Compute the output of a site in a pass in which one adapter acts alone.

        Args:
            x, y: the site's input and its base output.
        """
        branch = self._of_adapter(path, passing)
        assert branch is not None
        slot, fill = branch
        return run_branch_alone(slot, fill.params, x, y, ctx)

    def _of_adapter(self, path: str, passing: AdapterPass) -> FilledBranch | None:
        """Return the branch of a pass's adapter at a site; None if the adapter has none there."""
        branches = self._branches(path, passing.call)
        index = find_branch([slot for slot, _ in branches], passing.owner)
        return None if index is None else branches[index]

    def _branches(self, path: str, call: ForwardCall) -> list[FilledBranch]:
        """Return the branches of a call at a site, in order."""
        terms = self.live_terms(path, call)
        if terms is not None:
            return [term.branch for term in terms if term.branch is not None]
        filled = zip(self.plans[path].branches, call.active.slots[path].branches, strict=True)
        return [(slot, fill) for slot, fill in filled if fill is not None]

    def draw_seed(self, call: ForwardCall) -> None:
        """Draw a training call's seed before the model runs, whose layers also draw from torch's generator."""
        call.seed = self._draw() if self.module.training else None

    def _draw(self) -> int:
        """Draw the seed of a call's random numbers from torch's CPU generator.

        So ``torch.manual_seed`` makes a call reproducible, and a training checkpoint with torch's random state resumes
        it. If ``torch.utils.checkpoint`` recomputes a whole call, it restores that state; if it recomputes a layer, the
        call and its seed are known.

        Raises:
            Unavailable: a backward pass recomputes a call, and no earlier call drew this seed.
        """
        seed = int(torch.randint(_MAX_SEED, (), dtype=torch.int64, device="cpu"))
        if is_in_backward() and seed not in self._seeds:
            raise Unavailable(
                "a checkpoint recomputes a call that draws random numbers, and torch's random state is not that of an "
                "earlier call",
                next_step="have torch.utils.checkpoint preserve the random state, which is its default, or checkpoint "
                "the model's layers instead of the whole model",
            )
        self._seeds.append(seed)
        return seed

    def _seed(self, call: ForwardCall) -> int:
        """Return the seed that all sites of a call share; draw it now if the call has none yet."""
        if call.seed is None:
            call.seed = self._draw()
        return call.seed
