"""The one function that computes an adapted site from its slots, in torch ops.

The eager backend calls it, the other backends trace it (``lorac.ir.graph.adapted_call``), so no backend has a formula
of its own.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from lorac.errors import SiteError
from lorac.ir.algebra import operands as letters
from lorac.ir.algebra.formulas import fake_execution
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, factor_dtype
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.layouts import SiteLayout, layout_of
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan, SiteSlots
from lorac.ir.slots.program_values import OWN, branch_owner, program_value_name
from lorac.ir.slots.role import Stage
from lorac.ir.slots.roles import ROLES

Tensor = torch.Tensor


class FormulaContext:
    """What the branches of one call of a site see of their surroundings (``lorac.variants.base.Context``).

    Args:
        site: the site.
        training: whether the host trains.
        seed: () -> that of the randomness of a call that trains; it is asked once, where a branch wants it.
        values: program values by the names the program has for them.
        emitted: takes the extra outputs: name -> one tensor per branch that gives it, in the order the branches ran.
        attention: what the branches attend by.
        passing: the name of the pass, where it is one that an adapter has to itself
        (``lorac.ir.slots.program_values``).
    """

    def __init__(
        self,
        site: Site,
        *,
        training: bool = False,
        seed: Callable[[], int] | None = None,
        values: Mapping[str, Tensor] | None = None,
        emitted: dict[str, list[Tensor]] | None = None,
        attention: BranchAttention | None = None,
        passing: str = "",
    ) -> None:
        self.site, self.training, self.passing = site, training, passing
        self._values = values if values is not None else {}
        self._emitted = emitted if emitted is not None else {}
        self._dtype, self._owner = torch.get_default_dtype(), ""
        self._seed: Callable[[], int] | None = None if seed is None else functools.cache(seed)
        self._attention, self._attended = attention or FullAttention(), itertools.count()

    @functools.cached_property
    def generator(self) -> torch.Generator | None:
        """One stream per call that trains, which begins alike in every branch; None where nothing trains."""
        return torch.Generator().manual_seed(self._seed()) if self.training and self._seed is not None else None

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Every value that may be read, as the program has it."""
        return self._values

    def value(self, name: str) -> Tensor:
        """A value of the program, in the dtype the branch computes in."""
        found = self._values.get(program_value_name(self._owner, name))
        if found is None and self.passing:
            raise SiteError(
                f"the value '{name}' is not there in the pass '{self.passing}', in which the formula at "
                f"'{self.site.path}' asks for it",
                next_step="have the formula do without it where ctx.passing names that pass: what `once` computes, it "
                "computes of what that pass gives",
                code="site_unreached",
            )
        if found is None:
            raise SiteError(
                f"the value '{name}' is not computed before '{self.site.path}', which reads it",
                next_step="a variant's `reads` names what its formula reads; 'base:<site>' is there from the start",
                code="site_unreached",
            )
        return found.to(self._dtype) if found.is_floating_point() else found

    def emit(self, name: str, tensor: Tensor) -> None:
        """An extra output."""
        self._emitted.setdefault(name, []).append(tensor)

    def positions(self, x: Tensor) -> Tensor:
        """Where tokens are in their texts."""
        return self._attention.positions(x)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = True,
        mask: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attention of a call's tokens."""
        place, scale = f"{self.site.path}:{next(self._attended)}", q.shape[-1] ** -0.5 if scale is None else scale
        return self._attention.attend(place, q, k, v, causal=causal, mask=mask, scale=scale)

    def within(self, dtype: torch.dtype, owner: str = "") -> FormulaContext:
        """The same surroundings for a branch that computes in ``dtype`` and whose own values are ``owner``'s."""
        inner = copy.copy(self)
        inner._dtype, inner._owner = dtype, owner
        vars(inner).pop("generator", None)
        return inner

    def over(self, values: Mapping[str, Tensor]) -> FormulaContext:
        """The same surroundings with other values; what is emitted and attended to there is dropped."""
        other = copy.copy(self)
        other._values, other._emitted = values, {}
        other._attention, other._attended = FullAttention(), itertools.count()
        other._seed = None if self._seed is None else _zero_seed
        vars(other).pop("generator", None)
        return other


def _zero_seed() -> int:
    """The seed where nothing is computed in earnest."""
    return 0


def run_site(
    plan: SitePlan,
    slots: SiteSlots,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    ctx: FormulaContext | None = None,
    block: Tensor | None = None,
) -> Tensor:
    """The output of an adapted site.

    Args:
        plan, slots: what the site has and what fills it.
        x: its input (ids for embeddings).
        weight: its stored base weight; bias: its base bias.
        block: the output of a block, where the site is one.
        ctx: handed to branches.
    """
    layout = layout_of(plan.site)
    if block is not None:
        return _add_branches(plan, slots, x, block, block, ctx)
    if layout.keeps_bias_inside and not plan.branches and slots.leaves_base:
        assert weight is not None
        return _add_pair(layout, slots, x, layout.base(x, weight, bias))
    linear = layout.base(x, weight, None) if weight is not None and (slots.leaves_base or plan.branches) else None
    y = _add_pair(layout, slots, x, _base_product(layout, slots, x, weight, linear))
    # The bias comes last, where ONNX Runtime's fusions look for it.
    y = _add_bias(layout, y, slots.tensors.get(letters.BIAS, bias))
    if not plan.branches:
        return y
    assert linear is not None
    return _add_branches(plan, slots, x, y, _add_bias(layout, linear, bias), ctx)


def read_weight_slots(site: Site, slots: SiteSlots) -> tuple[Tensor | None, Tensor | None]:
    """The weight, as its module stores it, and the bias that a site's slots hold; None for what has no slot.

    For sites whose weight is read ``within`` a module's forward: it is all that can be replaced there.
    """
    weight = slots.tensors.get(letters.WEIGHT)
    stored = None if weight is None else layout_of(site).stored(weight)
    return stored, slots.tensors.get(letters.BIAS)


def _apply_slots(stage: Stage, layout: SiteLayout, slots: SiteSlots, value: Tensor) -> Tensor:
    """A value behind the roles of a stage."""
    for role, tensor in slots.stages[stage]:
        value = role.apply(layout, value, tensor)
    return value


def _base_product(
    layout: SiteLayout, slots: SiteSlots, x: Tensor, weight: Tensor | None, linear: Tensor | None
) -> Tensor:
    """c∘(W·((d∘x)·T)), without a bias; ``linear`` is W·x where it is known."""
    if slots.stages[Stage.INPUT]:
        x, linear = _apply_slots(Stage.INPUT, layout, slots, x), None
    if slots.stages[Stage.PRODUCT]:
        linear = _apply_slots(Stage.PRODUCT, layout, slots, x)
    elif linear is None:
        assert weight is not None
        linear = layout.base(x, weight, None)
    return _apply_slots(Stage.OUTPUT, layout, slots, linear)


def _add_pair(layout: SiteLayout, slots: SiteSlots, x: Tensor, y: Tensor) -> Tensor:
    """y + h∘(((x·A)∘g)·B) in the dtype of y; the pair is computed in the factors' dtype (PEFT's rule)."""
    if not slots.stages[Stage.UP] or any(_is_empty(tensor) for _, tensor in slots.stages[Stage.UP]):
        return y
    u = x
    for stage in (Stage.DOWN, Stage.BETWEEN, Stage.UP, Stage.BEHIND):
        u = _apply_slots(stage, layout, slots, u)
    return y + u.to(y.dtype)


def _is_empty(tensor: Tensor) -> bool:
    """Whether a tensor is known to hold nothing: a traced rank is not, and torch convolves with no empty kernel."""
    size = tensor.numel()
    return isinstance(size, int) and size == 0


def _add_bias(layout: SiteLayout, y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else ROLES[letters.BIAS].apply(layout, y, bias)


def _add_branches(
    plan: SitePlan, slots: SiteSlots, x: Tensor, y: Tensor, base: Tensor, ctx: FormulaContext | None
) -> Tensor:
    """y plus t·(y'ᵢ − base) of every active branch."""
    for i, (slot, fill) in enumerate(zip(plan.branches, slots.branches, strict=True)):
        if fill is not None:
            y = y + compute_branch_delta(plan.site, slot, fill, x, base, ctx, branch_owner(plan.branches[:i], slot))
    return y


def compute_branch_delta(
    site: Site, slot: BranchSlot, fill: BranchFill, x: Tensor, y: Tensor, ctx: FormulaContext | None, owner: str = ""
) -> Tensor:
    """t·(y' − y) of one branch, computed in the factors' dtype and cast to that of y, as a low-rank pair's is.

    Args:
        site: the site.
        slot, fill: the branch.
        x, y: the site's input, and its output in the base.
        ctx: handed to it.
        owner: whose ``own:`` values are its (``lorac.ir.slots.program_values.branch_owner``).

    Raises:
        AdapterError: the formula does what none may (``lorac.ir.algebra.formulas``); nothing was written.
    """
    answer, wide = _run_branch(slot, fill.params, x, y, ctx or FormulaContext(site), owner)
    return (fill.strength * (answer - wide)).to(y.dtype)


def run_branch_alone(slot: BranchSlot, params: Sequence[Tensor], x: Tensor, y: Tensor, ctx: FormulaContext) -> Tensor:
    """y' of one branch by itself and whole, in the dtype of y: what a site answers in a pass of the adapter's own.

    Args:
        slot, params: the branch.
        x, y: the site's input in that pass, and what the base makes of it.
        ctx: handed to it; names the pass.

    Raises:
        AdapterError: the formula does what none may; nothing was written.
    """
    return _run_branch(slot, params, x, y, ctx, "")[0].to(y.dtype)


def _run_branch(
    slot: BranchSlot, given: Sequence[Tensor], x: Tensor, y: Tensor, ctx: FormulaContext, owner: str
) -> tuple[Tensor, Tensor]:
    """What a branch answers in the factors' dtype, and y in it."""
    params = Params(**dict(zip(slot.params, given, strict=True)))
    dtype = next((t.dtype for t in given if t.is_floating_point()), factor_dtype(y.dtype))
    around = ctx.within(dtype, owner)
    x, wide = x.to(dtype), y.to(dtype)
    _check_formula_once(slot, x, wide, params, around)
    return slot.formula(x, wide, params, around, like=wide, read=around.values), wide


def compute_once_values(
    slot: BranchSlot, params: Sequence[Tensor], ctx: FormulaContext, owner: str
) -> dict[str, Tensor]:
    """What an adapter computes once per call, by the names the program has for it.

    Raises:
        AdapterError: the formula does what none may; nothing was written.
    """
    given = Params(**dict(zip(slot.params, params, strict=True)))
    dtype = next((t.dtype for t in params if t.is_floating_point()), factor_dtype(ctx.site.dtype))
    found = slot.formula.several(given, ctx.within(dtype, owner), read=ctx.values)
    return {program_value_name(owner, f"{OWN}:{name}"): tensor for name, tensor in found.items()}


_CHECKED_FORMULAS: set[object] = set()
"""Structures that were imagined, by the number of axes of x and y, whether it was in training, and by the pass."""
_MAX_CHECKED = 512


def _check_formula_once(slot: BranchSlot, x: Tensor, y: Tensor, params: Params, ctx: FormulaContext) -> None:
    """Before a formula first reads memory: call it with tensors of these shapes and none, which no formula can hurt."""
    function = slot.formula.function
    key = (slot.key, getattr(function, "__func__", function), x.dim(), y.dim(), ctx.training, ctx.passing)
    if key in _CHECKED_FORMULAS or isinstance(y, FakeTensor):
        return
    with fake_execution() as imagined:
        values = {name: imagined(value) for name, value in ctx.values.items()}
        own = Params(**{name: imagined(tensor) for name, tensor in vars(params).items()})
        like = imagined(y)
        slot.formula(imagined(x), like, own, ctx.over(values), like=like, read=values)
    if len(_CHECKED_FORMULAS) >= _MAX_CHECKED:
        _CHECKED_FORMULAS.clear()
    _CHECKED_FORMULAS.add(key)
