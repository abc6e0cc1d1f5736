"""Program values: what a branch may read through ``ctx.value``, by name.

    =====================  ============================================================================================
    name                   value
    =====================  ============================================================================================
    ``<path>``             the output of that module in this pass, adapted as it is
    ``in:<path>``          its input in this pass
    ``base:<path>``        its output in a pass of the unadapted model over the same inputs, without gradients
    ``pass:<name>:<path>`` its output in another pass over the same inputs, without gradients, in which the branches of
                           the adapter that reads it act whole, and nothing else does
    ``weight:<path>``      the base weight W (out, in) of that site
    ``param:<name>``       a parameter or buffer of the model, as the base has it
    ``input:<argument>``   what this call gives the model's forward
    ``own:<name>``         what the method's ``once`` computed for this call
    =====================  ============================================================================================

Any module may be read. Of one that takes or returns several tensors the first counts, of several calls the latest.

A pass of an adapter's own is for what is computed once, which alone reads it: each branch is asked for its y' there
with ``ctx.passing``, the name that the method gave the pass, and does without ``own:`` values, which come of the pass.
It depends neither on the adapter's strength nor on what else is active: of two adapters each has its own.

What a method computes once is a site of its own, without a module (``SiteKind.ONCE``): its plan has a branch for every
adapter that may compute it, and branches at modules name it (``BranchSlot.once``). Of several adapters of one structure
each has its own, told apart by their order: ``own:<path>[<index>].<name>`` is what a program calls such a value, and
``pass:<path>[<index>].<name>:<module>`` one of a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lorac.errors import SiteError, nearest_name
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.plans import BranchSlot, SitePlan

OUTPUT, IN, BASE, WEIGHT, PARAM, INPUT, OWN = "", "in", "base", "weight", "param", "input", "own"
PASS = "pass"
_MODULE_KINDS = (OUTPUT, IN, BASE, PASS)
_KNOWN_AT_START = (BASE, PASS, WEIGHT, PARAM, INPUT)
"""What is known when a call begins."""
ONCE_PREFIX = "once:"
"""Begins the path of a site that is no module: what an adapter computes once per call."""


def parse_value_name(name: str) -> tuple[str, str]:
    """(kind, what it is of) of a value's name; the kind is one of those above."""
    kind, colon, rest = name.partition(":")
    if not colon:
        return OUTPUT, name
    return kind, rest.rpartition(":")[2] if kind == PASS else rest


def pass_name_of(name: str) -> str:
    """Which pass a value's name says, where it is of one that an adapter has to itself; else empty."""
    kind, _, rest = name.partition(":")
    return rest.rpartition(":")[0] if kind == PASS else ""


def modules_by_pass(names: Iterable[str]) -> dict[str, list[str]]:
    """The passes of an adapter's own that are among what it reads -> paths of the modules that are read of each."""
    found: dict[str, list[str]] = {}
    for name in names:
        if told := pass_name_of(name):
            found.setdefault(told, []).append(parse_value_name(name)[1])
    return found


def pass_value_name(name: str, path: str) -> str:
    """What a method calls a module's output in a pass of its own."""
    return f"{PASS}:{name}:{path}"


def make_once_site(path: str, dtype: torch.dtype) -> Site:
    """The site of what is computed once per call, in the dtype of the sites it is for."""
    return Site(path, SiteKind.ONCE, 0, 0, dtype, None)


# ── What there is ────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class ReadableValues:
    """What of a model may be read.

    Attributes:
        sites: its sites.
        modules: paths of its modules.
        tensors: names of its parameters and buffers.
        arguments: of its forward; None where it has none any more.
    """

    sites: Mapping[str, Site]
    modules: frozenset[str]
    tensors: frozenset[str]
    arguments: frozenset[str] | None

    def check(self, names: Iterable[str], *, once: bool = False, owns: bool = False) -> None:
        """Refuse names that are no values of the program.

        Args:
            names: of values.
            once: whether what is computed once reads them, when the call has only begun.
            owns: whether the method computes something once.

        Raises:
            SiteError: a name is none.
            SiteError: what is computed once reads what comes later.
        """
        for name in names:
            kind, of = parse_value_name(name)
            if kind == PASS and not once:
                raise SiteError(
                    f"the value '{name}' is of a pass of the adapter's own, which `once` alone reads",
                    next_step="name it in `reads_once`, and have `once` answer what the branches need of it",
                    code="site_unreached",
                )
            if once and kind not in _KNOWN_AT_START:
                kinds = " or ".join(f"'{known}:...'" for known in _KNOWN_AT_START)
                raise SiteError(
                    f"the value '{name}' is not known when a call begins, which is when `once` reads it",
                    next_step=f"let it read {kinds}",
                    code="site_unreached",
                )
            if not self._has(kind, of, owns) or (kind == PASS and not pass_name_of(name)):
                raise SiteError(
                    f"'{name}' is no value of the program",
                    nearest=nearest_name(of, self._named(kind)),
                    next_step="values are named <module>, in:<module>, base:<module>, pass:<name>:<module>, "
                    "weight:<site>, param:<tensor>, input:<argument> or own:<what once computes>; "
                    "lorac.sites(model) lists the sites",
                    code="site_not_found",
                )

    def _has(self, kind: str, of: str, owns: bool) -> bool:
        if kind == OWN:
            return owns
        if kind == WEIGHT:
            return of in self.sites and self.sites[of].weight is not None
        return of in self._named(kind) or (kind == INPUT and self.arguments is None)

    def _named(self, kind: str) -> Iterable[str]:
        of_modules = dict.fromkeys(_MODULE_KINDS, self.modules)
        known = {WEIGHT: self.sites, PARAM: self.tensors, INPUT: self.arguments or (), **of_modules}
        return known.get(kind, ())


# ── What is read ─────────────────────────────────────────────────────────────────────────────────────────────────────
def owner_prefix(path: str, index: int) -> str:
    """What stands before the names of the values that one of several adapters computes once, at the site ``path``."""
    return f"{path}[{index}]"


def branch_owner(slots: Iterable[BranchSlot], slot: BranchSlot) -> str:
    """What stands before the names of a branch's own values, where ``slots`` come before it at its site."""
    return owner_prefix(slot.once, sum(before.once == slot.once for before in slots))


def program_value_name(owner: str, name: str) -> str:
    """What a program calls a value that a branch knows by a name."""
    kind, _, rest = name.partition(":")
    return f"{kind}:{owner}.{rest}" if kind in {OWN, PASS} else name


def list_read_values(plans: Iterable[SitePlan]) -> list[str]:
    """Every value that the branches of the plans read, as the program calls it."""
    return list(
        dict.fromkeys(
            program_value_name(_planned_owner(plan, i), name)
            for plan in plans
            for i, branch in enumerate(plan.branches)
            for name in branch.reads
        )
    )


def _planned_owner(plan: SitePlan, i: int) -> str:
    """What stands before the names of the values that one of a plan's branches has to itself."""
    once = plan.site.kind is SiteKind.ONCE
    return owner_prefix(plan.site.path, i) if once else branch_owner(plan.branches[:i], plan.branches[i])


def find_branch(branches: Sequence[BranchSlot], owner: str) -> int | None:
    """Which of a site's branches is that of an adapter, by what stands before the names of its values; None: none."""
    return next((i for i, branch in enumerate(branches) if branch_owner(branches[:i], branch) == owner), None)


def once_path_of(name: str) -> str:
    """The path of the site that computes an own value, by its full name."""
    return parse_value_name(name)[1].partition("[")[0]


def select_once_plans(plans: Mapping[str, SitePlan], around: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Of all plans those of what the branches of ``around`` compute once."""
    paths = (branch.once for plan in around.values() for branch in plan.branches if branch.once)
    return {path: plans[path] for path in dict.fromkeys(paths)}


def list_tapped_modules(plans: Iterable[SitePlan]) -> list[str]:
    """Paths of the modules whose inputs or outputs are read."""
    parsed = [parse_value_name(name) for name in list_read_values(plans)]
    return list(dict.fromkeys(path for kind, path in parsed if kind in _MODULE_KINDS))


def present_weights(values: Mapping[str, torch.Tensor], sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """Values as formulas see them: stored weights as matrices (out, in)."""
    return {
        name: sites[path].present(value) if kind == WEIGHT else value
        for name, value in values.items()
        for kind, path in [parse_value_name(name)]
    }


def first_tensor(tree: Any) -> torch.Tensor:
    """The first tensor in a module's arguments or output: what a block reads and gives."""
    return next(leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def replace_first_tensor(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same output with its first tensor changed; the kind of output stays."""
    leaves, spec = pytree.tree_flatten(tree)
    index = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
    leaves[index] = change(leaves[index])
    return pytree.tree_unflatten(leaves, spec)
