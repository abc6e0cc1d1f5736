"""Program values: the values that a branch can read by name through ``ctx.value``.

    =====================  ============================================================================================
    name                   value
    =====================  ============================================================================================
    ``<path>``             the output of that module in this pass, adapted as it is; ``<path>[1]``: its second tensor
    ``in:<path>``          its input in this pass
    ``base:<path>``        its output in a pass of the unadapted model over the same inputs, without gradients
    ``pass:<name>:<path>`` its output in another pass over the same inputs, without gradients, in which only the
                           branches of the adapter that reads it act, at full strength
    ``weight:<path>``      the base weight W (out, in) of that site
    ``param:<name>``       a parameter or buffer of the model, as the base has it
    ``input:<argument>``   an argument of this call of the model's forward
    ``own:<name>``         a result of the method's ``once`` for this call
    =====================  ============================================================================================

Any module may be read. If it takes or returns several tensors, the first is read, or another one by its number. If the
module is called repeatedly, the last call's value is read.

Only ``once`` reads an adapter's own pass. Each branch computes y' in this pass with ``ctx.passing`` set to the pass's
name, and without ``own:`` values, which are computed from the pass. The pass does not depend on the adapter's strength
or on other active adapters, and each adapter has its own pass.

The results of ``once`` belong to a site without a module (``SiteKind.ONCE``). Its plan has a branch for every adapter
that may compute them, and branches at modules refer to it (``BranchSlot.once``). Adapters of equal structure are
distinguished by their order: a program names such a value ``own:<path>[<index>].<name>``, and a value of an own pass
``pass:<path>[<index>].<name>:<module>``.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

from lorac.errors import SiteError, check_known, nearest_name
from lorac.ir.sites.site import Site, SiteKind
from lorac.ir.slots.plans import BranchSlot, SitePlan

T = TypeVar("T")
OUTPUT, IN, BASE, WEIGHT, PARAM, INPUT, OWN = "", "in", "base", "weight", "param", "input", "own"
PASS = "pass"
_MODULE_KINDS = (OUTPUT, IN, BASE, PASS)
_KNOWN_AT_START = (BASE, PASS, WEIGHT, PARAM, INPUT)
"""Kinds of values that exist when a call begins."""
ONCE_PREFIX = "once:"
"""Prefix of the path of the site that stands for an adapter's ``once``; the site has no module."""


def parse_value_name(name: str) -> tuple[str, str]:
    """Split a value's name into its kind (one of the table above) and the rest: a path, tensor, argument or name."""
    kind, colon, rest = name.partition(":")
    if not colon:
        return OUTPUT, name
    return kind, rest.rpartition(":")[2] if kind == PASS else rest


def split_output(path: str) -> tuple[str, int]:
    """Split the path of a value into the module's path and the index of a tensor in its output, by default 0."""
    found = re.fullmatch(r"(.+)\[(\d{1,4})\]", path)
    return (found[1], int(found[2])) if found else (path, 0)


def pass_name_of(name: str) -> str:
    """Return the name of the adapter's own pass in which a value is read; empty for other values."""
    kind, _, rest = name.partition(":")
    return rest.rpartition(":")[0] if kind == PASS else ""


def modules_by_pass(names: Iterable[str]) -> dict[str, list[str]]:
    """Map each own pass among value names to the paths of the modules read in it."""
    found: dict[str, list[str]] = {}
    for name in names:
        if pass_name := pass_name_of(name):
            found.setdefault(pass_name, []).append(parse_value_name(name)[1])
    return found


def pass_value_name(name: str, path: str) -> str:
    """Return the name of a module's output in an own pass."""
    return f"{PASS}:{name}:{path}"


def make_once_site(path: str, dtype: torch.dtype) -> Site:
    """Return the site of values that are computed once per call, in the dtype of the sites that read them."""
    return Site(path, SiteKind.ONCE, 0, 0, dtype, None)


@dataclass(frozen=True)
class ReadableValues:
    """The values of a model that branches may read.

    Attributes:
        modules: paths of the model's modules.
        tensors: names of the model's parameters and buffers.
        arguments: names of the arguments of forward; None if forward is unknown.
    """

    sites: Mapping[str, Site]
    modules: frozenset[str]
    tensors: frozenset[str]
    arguments: frozenset[str] | None

    def check(self, names: Iterable[str], *, once: bool = False, owns: bool = False) -> None:
        """Refuse names that are not values of the program.

        Args:
            names: names of values.
            once: whether ``once`` reads them, at the beginning of a call.
            owns: whether the method defines ``once``.

        Raises:
            SiteError: a value does not exist, or ``once`` reads a value that is computed later.
        """
        known: dict[str, Iterable[str]] = dict.fromkeys(_MODULE_KINDS, self.modules)
        known |= {PARAM: self.tensors, INPUT: self.arguments or ()}
        known[WEIGHT] = {path for path, site in self.sites.items() if site.weight is not None}
        for name in names:
            kind, rest = parse_value_name(name)
            rest = split_output(rest)[0] if kind == OUTPUT else rest
            exists = (kind == OWN and owns) or rest in known.get(kind, ()) or (kind == INPUT and self.arguments is None)
            if kind == PASS and not once:
                raise SiteError(
                    f"the value '{name}' is from the adapter's own pass, which only `once` reads",
                    next_step="list it in `reads_once`, and have `once` return what the branches need",
                    code="site_unreached",
                )
            if once and kind not in _KNOWN_AT_START:
                kinds = " or ".join(f"'{known}:...'" for known in _KNOWN_AT_START)
                raise SiteError(
                    f"`once` reads the value '{name}', which is not known when a call begins",
                    next_step=f"read {kinds} instead",
                    code="site_unreached",
                )
            if not exists or (kind == PASS and not pass_name_of(name)):
                raise SiteError(
                    f"'{name}' is not a value of the program",
                    nearest=nearest_name(rest, known.get(kind, ())),
                    next_step="name values <module>, in:<module>, base:<module>, pass:<name>:<module>, weight:<site>, "
                    "param:<tensor>, input:<argument> or own:<what once computes>; lorac.sites(model) lists the sites",
                    code="site_not_found",
                )


def owner_prefix(path: str, index: int) -> str:
    """Return the prefix of the names of one adapter's own values, which the ``once`` site ``path`` computes."""
    return f"{path}[{index}]"


def branch_owner(slots: Iterable[BranchSlot], slot: BranchSlot) -> str:
    """Return the prefix of the names of a branch's own values; ``slots`` are the branches before it at its site."""
    return owner_prefix(slot.once, sum(before.once == slot.once for before in slots))


def program_value_name(owner: str, name: str) -> str:
    """Return the program's name for the value that a branch calls ``name``."""
    kind, _, rest = name.partition(":")
    return f"{kind}:{owner}.{rest}" if kind in {OWN, PASS} else name


def list_read_values(plans: Iterable[SitePlan]) -> list[str]:
    """Return the program's names of all values that the plans' branches read."""
    names: dict[str, None] = {}
    for plan in plans:
        once = plan.site.kind is SiteKind.ONCE
        for i, branch in enumerate(plan.branches):
            owner = owner_prefix(plan.site.path, i) if once else branch_owner(plan.branches[:i], branch)
            names |= dict.fromkeys(program_value_name(owner, name) for name in branch.reads)
    return list(names)


def find_branch(branches: Sequence[BranchSlot], owner: str) -> int | None:
    """Return the index of a site's branch whose own values have the prefix ``owner``; None if there is none."""
    return next((i for i, branch in enumerate(branches) if branch_owner(branches[:i], branch) == owner), None)


def once_path_of(name: str) -> str:
    """Return the path of the site that computes an own value, given the value's name in the program."""
    return parse_value_name(name)[1].partition("[")[0]


def select_once_plans(plans: Mapping[str, SitePlan], around: Mapping[str, SitePlan]) -> dict[str, SitePlan]:
    """Return the plans of the ``once`` sites that the branches of ``around`` refer to."""
    paths = (branch.once for plan in around.values() for branch in plan.branches if branch.once)
    return {path: plans[path] for path in dict.fromkeys(paths)}


def list_tapped_modules(plans: Iterable[SitePlan]) -> list[str]:
    """Return the paths of the modules whose inputs or outputs are read, with ``[number]`` after the first tensor."""
    parsed = [parse_value_name(name) for name in list_read_values(plans)]
    return list(dict.fromkeys(path for kind, path in parsed if kind in _MODULE_KINDS))


def present_weights(values: Mapping[str, torch.Tensor], sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """Convert values to the form that formulas see: stored weights as matrices (out, in)."""
    return {
        name: sites[path].present(value) if kind == WEIGHT else value
        for name, value in values.items()
        for kind, path in [parse_value_name(name)]
    }


def first_tensor(tree: object, number: int = 0) -> torch.Tensor:
    """Return the first tensor in a module's arguments or output, or the tensor with this number.

    Args:
        number: index of the tensor among all tensors.

    Raises:
        SiteError: there are fewer tensors.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    if number >= len(tensors):
        raise SiteError(
            f"an adapter reads tensor {number} of a module that gives {len(tensors)}",
            next_step="count from 0 in the names of `reads`, as in '<module>[1]' for the second",
        )
    return tensors[number]


def replace_first_tensor(tree: T, change: Callable[[torch.Tensor], torch.Tensor], number: int = 0) -> T:
    """Replace a module's first output tensor, or the one with this number, by ``change`` of it; keep the structure."""
    leaves, spec = pytree.tree_flatten(tree)
    index = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)][number]
    leaves[index] = change(leaves[index])
    replaced: T = pytree.tree_unflatten(leaves, spec)
    return replaced


def record_extra_outputs(aux: dict[str, dict[str, T]], path: str, emitted: Mapping[str, Sequence[T]]) -> None:
    """Add one call's extra outputs to ``aux``: name -> site path -> tensor.

    If several active branches of a site emit an output of the same name, the second has the key ``<path>[1]``.
    """
    for name, tensors in emitted.items():
        for i, tensor in enumerate(tensors):
            aux.setdefault(name, {})[path if i == 0 else f"{path}[{i}]"] = tensor


def check_extra_outputs(aux: Sequence[str], plans: Iterable[SitePlan]) -> None:
    """Raise ``OptionError`` for a requested extra output that no branch emits."""
    known = {name for plan in plans for branch in plan.branches for name in branch.emits}
    check_known(aux, sorted(known), "no adapter gives the extra output")
