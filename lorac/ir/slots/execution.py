"""The computation of an adapted site from its slots, in torch ops.

The eager backend calls ``run_site``, and the other backends trace it (``lorac.ir.graph.adapted_call``), so that the
formula exists once.
"""

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lorac.errors import SiteError
from lorac.ir.algebra import operands
from lorac.ir.algebra.formulas import fake_execution
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites.site import Site, cast_floating, factor_dtype
from lorac.ir.slots.attention import BranchAttention, FullAttention
from lorac.ir.slots.layouts import SiteLayout, layout_of
from lorac.ir.slots.plans import BranchFill, BranchSlot, SitePlan, SiteSlots
from lorac.ir.slots.program_values import OWN, branch_owner, program_value_name
from lorac.ir.slots.roles import ROLES, Stage


class FormulaContext:
    """The context of the branches in one call of a site (``lorac.variants.base.Context``).

    Args:
        training: whether the model trains.
        seed: function () -> seed for random numbers in training; called at most once, when a branch needs it.
        values: program values by the program's names.
        emitted: dict that collects the extra outputs: name -> one tensor per branch that emits it, in the order of
            branches.
        passing: the name of an adapter's own pass (``lorac.ir.slots.program_values``); else empty.
        site_readers: set that collects the path of the site if a formula reads ``site``.

    Attributes:
        own_site: the site, for lorac's code; reading it does not add to ``site_readers``.
        values: every value that may be read, by the program's name.
        emitted: the extra outputs so far.
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
        site_readers: set[str] | None = None,
    ) -> None:
        self.own_site, self.training, self.passing, self.placed = site, training, passing, False
        self._site_readers = site_readers if site_readers is not None else set()
        self.values: Mapping[str, Tensor] = values if values is not None else {}
        self.emitted: dict[str, list[Tensor]] = emitted if emitted is not None else {}
        self._dtype, self._owner = torch.get_default_dtype(), ""
        self._seed: Callable[[], int] | None = None if seed is None else functools.cache(seed)
        self._attention, self._attention_count = attention or FullAttention(), itertools.count()

    @property
    def site(self) -> Site:
        """The site of the branch."""
        self._site_readers.add(self.own_site.path)
        return self.own_site

    @functools.cached_property
    def generator(self) -> torch.Generator | None:
        """A random generator for a training call, with the same seed in every branch; None otherwise."""
        return torch.Generator().manual_seed(self._seed()) if self.training and self._seed is not None else None

    def value(self, name: str) -> Tensor:
        """Return a value of the program, cast to the dtype in which the branch computes."""
        found, path = self.values.get(program_value_name(self._owner, name)), self.own_site.path
        if found is None:
            what = f"the value '{name}' is not computed before '{path}', which reads it"
            step = "list it in `reads`; or adapt later layers, or read 'in:<module>' or 'base:<module>'"
            if self.passing:
                what = f"the formula at '{path}' reads the value '{name}', which does not exist in the pass "
                what += f"'{self.passing}'"
                step = "do not read it where ctx.passing names that pass, from which `once` computes its values"
            raise SiteError(what, next_step=step, code="site_unreached")
        return cast_floating(found, self._dtype)

    def emit(self, name: str, tensor: Tensor) -> None:
        """Record an extra output."""
        self.emitted.setdefault(name, []).append(tensor)

    def positions(self, x: Tensor) -> Tensor:
        """Return the positions of tokens in their sequences."""
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
        """Return attention over a call's tokens."""
        name = f"{self.site.path}:{next(self._attention_count)}"
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return self._attention.attend(name, q, k, v, causal=causal, mask=mask, scale=scale)

    def within(self, dtype: torch.dtype, owner: str = "") -> "FormulaContext":
        """Return this context for a branch that computes in ``dtype``; ``owner`` prefixes the names of its values."""
        inner = copy.copy(self)
        inner._dtype, inner._owner = dtype, owner
        vars(inner).pop("generator", None)
        return inner

    def in_place(self, values: Mapping[str, Tensor]) -> "FormulaContext":
        """Return this context for one of several places that run at once, with the place's values and extra outputs."""
        inner = copy.copy(self)
        inner.values, inner.emitted, inner.placed = values, {}, True
        return inner

    def over(self, values: Mapping[str, Tensor]) -> "FormulaContext":
        """Return this context with other values; extra outputs and cached attention are discarded."""
        other = copy.copy(self)
        other.values, other.emitted = values, {}
        other._attention, other._attention_count = FullAttention(), itertools.count()
        other._seed = None if self._seed is None else lambda: 0
        vars(other).pop("generator", None)
        return other


@dataclass(frozen=True, eq=False)
class SiteCall:
    """One call of a site; the active adapters are not part of it.

    Attributes:
        x: its input (ids for embeddings).
        ctx: the context of branches; it also decides whether dropout acts.
        weight: the stored base weight; None for a block, and where ``product`` is known.
        bias: the base bias.
        block: the output of the block, for a block site.
        product: the base's product W·x, if a fused projection computed it.
        acting: name of an adapter with invocation tokens -> the tokens of x (…,) on which it acts, as booleans.
    """

    x: Tensor
    ctx: FormulaContext
    weight: Tensor | None = None
    bias: Tensor | None = None
    block: Tensor | None = None
    product: Tensor | None = None
    acting: Mapping[str, Tensor] = field(default_factory=dict)

    @functools.cached_property
    def layout(self) -> SiteLayout:
        """The layout of the site."""
        return layout_of(self.ctx.own_site)

    @property
    def base_weight(self) -> Tensor:
        """The stored base weight of a site that has one."""
        assert self.weight is not None
        return self.weight

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return the base's product with an input."""
        return self.layout.base(x, self.base_weight, bias)

    def base(self) -> Tensor:
        """Return the output of the site without adapters."""
        return self.multiply(self.x, self.bias) if self.block is None else self.block


def run_site(plan: SitePlan, slots: SiteSlots, call: SiteCall) -> Tensor:
    """Return the output of an adapted site.

    Args:
        plan: the site's slots.
        slots: the tensors in these slots.
        call: the site's input, weights and context.
    """
    if call.block is not None:
        return add_branches(plan, slots, call, call.block, call.block)
    if slots.stages[Stage.VIRTUAL]:
        own = replace(slots, tensors={n: t for n, t in slots.tensors.items() if n != operands.VIRTUAL})
        return embed_virtual(slots, call, lambda real: run_site(plan, own, real))
    layout, linear = call.layout, call.product
    if layout.keeps_bias_inside and not plan.branches and slots.leaves_base:
        return _add_pair(layout, slots, call.x, call.base())
    if linear is None and plan.branches:
        linear = call.multiply(call.x)
    x, product = call.x, linear
    if slots.stages[Stage.INPUT]:
        x, product = apply_stage(Stage.INPUT, layout, slots, x), None
    if slots.stages[Stage.PRODUCT]:
        product = apply_stage(Stage.PRODUCT, layout, slots, x)
    elif product is None:
        product = call.multiply(x)
    y = _add_pair(layout, slots, call.x, apply_stage(Stage.OUTPUT, layout, slots, product))
    # The bias is added last, where ONNX Runtime's fusions expect it.
    y = add_bias(layout, y, slots.tensors.get(operands.BIAS, call.bias))
    if not plan.branches:
        return y
    assert linear is not None
    return add_branches(plan, slots, call, y, add_bias(layout, linear, call.bias))


def embed_virtual(slots: SiteSlots, call: SiteCall, run: Callable[[SiteCall], Tensor]) -> Tensor:
    """Compute an embedding's output: ``run`` looks up the vocabulary's ids, the rows in a slot are for virtual ids."""
    y = run(replace(call, x=call.x.clamp(max=call.layout.site.in_features - 1)))
    rows = apply_stage(Stage.VIRTUAL, call.layout, slots, call.x).to(y.dtype)
    return torch.where((call.x >= call.layout.site.in_features)[..., None], rows, y)


def read_weight_slots(site: Site, slots: SiteSlots) -> tuple[Tensor | None, Tensor | None]:
    """Return the weight, in its module's layout, and the bias from a site's slots; None for a missing slot.

    For sites whose weight is read ``within`` a module's forward, where only weight and bias can be replaced.
    """
    weight = slots.tensors.get(operands.WEIGHT)
    stored = None if weight is None else layout_of(site).stored(weight)
    return stored, slots.tensors.get(operands.BIAS)


def apply_stage(stage: Stage, layout: SiteLayout, slots: SiteSlots, value: Tensor) -> Tensor:
    """Apply the roles of one stage that have tensors."""
    for role, tensor in slots.stages[stage]:
        value = role.apply(layout, value, tensor)
    return value


def _add_pair(layout: SiteLayout, slots: SiteSlots, x: Tensor, y: Tensor) -> Tensor:
    """Return y + h∘(((x·A)∘g)·B) in the dtype of y; the pair is computed in the factors' dtype (PEFT's rule)."""
    # torch cannot convolve with an empty tensor; a traced size is unknown and counts as nonzero.
    sizes = [tensor.numel() for _, tensor in slots.stages[Stage.UP]]
    if not sizes or any(isinstance(size, int) and size == 0 for size in sizes):
        return y
    return y + multiply_pair(layout, slots, x).to(y.dtype)


def multiply_pair(layout: SiteLayout, slots: SiteSlots, x: Tensor) -> Tensor:
    """Return h∘(((x·A)∘g)·B)."""
    for stage in (Stage.DOWN, Stage.BETWEEN, Stage.UP, Stage.AFTER):
        x = apply_stage(stage, layout, slots, x)
    return x


def add_bias(layout: SiteLayout, y: Tensor, bias: Tensor | None) -> Tensor:
    """Add the bias of a site's outputs to y; return y unchanged without one."""
    return y if bias is None else ROLES[operands.BIAS].apply(layout, y, bias)


def add_branches(plan: SitePlan, slots: SiteSlots, call: SiteCall, y: Tensor, base: Tensor) -> Tensor:
    """Return y plus t·(y'ᵢ − base) for every active branch.

    Args:
        y: the site's output without branches.
        base: the site's output in the base.
    """
    for i, (slot, fill) in enumerate(zip(plan.branches, slots.branches, strict=True)):
        if fill is not None:
            y = y + compute_branch_delta(slot, fill, call, base, branch_owner(plan.branches[:i], slot))
    return y


def compute_branch_delta(slot: BranchSlot, fill: BranchFill, call: SiteCall, y: Tensor, owner: str) -> Tensor:
    """Return t·(y' − y) of one branch, computed in the factors' dtype and cast to y's, as a low-rank pair is.

    Args:
        fill: the branch's strength and parameters.
        y: the site's output in the base.
        owner: the prefix of the branch's ``own:`` values (``lorac.ir.slots.program_values.branch_owner``).

    Raises:
        AdapterError: the formula is not allowed (``lorac.ir.algebra.formulas``); nothing was written.
    """
    output, wide = run_formula(slot, fill.params, call.x, y, call.ctx, owner)
    return (fill.strength * (output - wide)).to(y.dtype)


def run_branch_alone(slot: BranchSlot, params: Sequence[Tensor], x: Tensor, y: Tensor, ctx: FormulaContext) -> Tensor:
    """Return y' of one branch at full strength, in y's dtype: a site's output in an adapter's own pass.

    Args:
        params: the branch's parameters.
        x: the site's input in that pass.
        y: the base's output for x.
        ctx: the branch's context, with the name of the pass.

    Raises:
        AdapterError: the formula is not allowed; nothing was written.
    """
    return run_formula(slot, params, x, y, ctx, "")[0].to(y.dtype)


def run_formula(
    slot: BranchSlot, tensors: Sequence[Tensor], x: Tensor, y: Tensor, ctx: FormulaContext, owner: str
) -> tuple[Tensor, Tensor]:
    """Return a branch's output in the factors' dtype, and y in that dtype."""
    params, dtype = _bind_params(slot, tensors), _compute_dtype(tensors, y.dtype)
    inner = ctx.within(dtype, owner)
    x, wide = x.to(dtype), y.to(dtype)
    _check_formula_once(slot, x, wide, params, inner)
    return slot.formula(x, wide, params, inner, like=wide, read=inner.values), wide


def _bind_params(slot: BranchSlot, tensors: Sequence[Tensor]) -> Params:
    return Params(**dict(zip(slot.params, tensors, strict=True)))


def _compute_dtype(tensors: Sequence[Tensor], base: torch.dtype) -> torch.dtype:
    """Return the dtype in which a branch computes: its parameters', or without parameters that of factors."""
    return next((t.dtype for t in tensors if t.is_floating_point()), factor_dtype(base))


def compute_once_values(
    slot: BranchSlot, params: Sequence[Tensor], ctx: FormulaContext, owner: str
) -> dict[str, Tensor]:
    """Return the results of an adapter's ``once``, by the program's names.

    Raises:
        AdapterError: the formula is not allowed; nothing was written.
    """
    inner = ctx.within(_compute_dtype(params, ctx.own_site.dtype), owner)
    results = slot.formula.several(_bind_params(slot, params), inner, read=ctx.values)
    return {program_value_name(owner, f"{OWN}:{name}"): tensor for name, tensor in results.items()}


_CHECKED_FORMULAS: set[object] = set()
"""Keys of checked formulas: structure, ranks of x and y, training, and the pass."""
_MAX_CHECKED = 512


def _check_formula_once(slot: BranchSlot, x: Tensor, y: Tensor, params: Params, ctx: FormulaContext) -> None:
    """Run a formula on fake tensors before its first real call, so that a faulty formula writes nothing."""
    key = (*slot.structure, x.dim(), y.dim(), ctx.training, ctx.passing)
    if key in _CHECKED_FORMULAS or isinstance(y, FakeTensor) or ctx.placed:
        return
    with fake_execution() as fake:
        values = {name: fake(value) for name, value in ctx.values.items()}
        fake_params = Params(**{name: fake(tensor) for name, tensor in vars(params).items()})
        like = fake(y)
        slot.formula(fake(x), like, fake_params, ctx.over(values), like=like, read=values)
    if len(_CHECKED_FORMULAS) >= _MAX_CHECKED:
        _CHECKED_FORMULAS.clear()
    _CHECKED_FORMULAS.add(key)
