"""Ops that mark sites in a captured graph: one node per call of a site, until a pass expands or lowers it.

Each op computes the model's layer, so that a graph of such ops runs unchanged. The last operand is the module path of
the site. Each kind of layer is one function here, with a fake function and the aten op to which it is lowered. The
recurrence of state-space models and linear attention is one op too, so that its state can be cached.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._library.custom_ops import CustomOpDef

from lorac.argument_types import Operands

aten = torch.ops.aten
SiteOp = Callable[..., Tensor]
"""An op that computes a layer."""
Lowering = Callable[[Operands], tuple[SiteOp, Operands]]
"""Function that returns the aten op of a site's op, and the operands."""
_CONVOLUTIONS: dict[int, SiteOp] = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}
_LOWERINGS: dict[object, Lowering] = {}
OP_FUNCTIONS: dict[object, Callable[..., Tensor]] = {}
"""Op -> the function that computes it without torch's dispatcher, which takes longer than a small product."""


def _site_op(lower: Lowering) -> Callable[[Callable[..., Tensor]], CustomOpDef]:
    """Register a function as the op of a kind of layer; ``lower`` returns the aten op and its operands."""

    def register(function: Callable[..., Tensor]) -> CustomOpDef:
        op = torch.library.custom_op(f"lorac::{function.__name__}", function, mutates_args=())
        _LOWERINGS[op._opoverload], OP_FUNCTIONS[op._opoverload] = lower, function
        return op

    return register


@_site_op(lambda args: (aten.linear.default, args[:3]))
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    """Compute ``x @ weight.T + bias``."""
    return F.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    inner, expected = x.shape[-1], weight.shape[1]
    torch._check(inner == expected, lambda: f"{site}: the input's last size is {inner}, the weight takes {expected}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@_site_op(lambda args: (aten.embedding.default, (args[1], args[0], args[2])))
def embedding(ids: Tensor, weight: Tensor, padding_idx: int, site: str) -> Tensor:
    """Look up rows of ``weight``; ``padding_idx`` (-1: none) affects only gradients."""
    return F.embedding(ids, weight, padding_idx if padding_idx >= 0 else None)


@embedding.register_fake
def _(ids: Tensor, weight: Tensor, padding_idx: int, site: str) -> Tensor:
    integral = ids.dtype in (torch.int32, torch.int64)
    torch._check_type(integral, lambda: f"{site}: ids must be int32 or int64, not {ids.dtype}")
    return weight.new_empty((*ids.shape, weight.shape[1]))


@_site_op(lambda args: (_CONVOLUTIONS[args[1].meta["val"].dim()], args[:7]))
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    site: str,
) -> Tensor:
    """Convolve in 1, 2 or 3 dimensions, which the rank of ``weight`` decides."""
    result: Tensor = _CONVOLUTIONS[weight.dim()](x, weight, bias, stride, padding, dilation, groups)
    return result


conv.register_fake(OP_FUNCTIONS[conv._opoverload])  # the op has the shapes of torch's op


@_site_op(lambda args: (aten.clone.default, (args[1],)))
def block(x: Tensor, y: Tensor, site: str) -> Tensor:
    """Return the output ``y`` of a block; the input ``x`` is an operand for adapters that read it."""
    return y.clone()


@block.register_fake
def _(x: Tensor, y: Tensor, site: str) -> Tensor:
    return torch.empty_like(y)


@_site_op(lambda args: (aten.clone.default, (args[1],)) if args[2] is None else (aten.add.Tensor, args[1:3]))
def member(x: Tensor, product: Tensor, bias: Tensor | None, site: str) -> Tensor:
    """Return the output of one site of a fused projection, from its part of the fused product with x."""
    return product.clone() if bias is None else product + bias


@member.register_fake
def _(x: Tensor, product: Tensor, bias: Tensor | None, site: str) -> Tensor:
    return torch.empty_like(product)


SITE_OPS = frozenset(_LOWERINGS)
LINEAR, EMBEDDING, BLOCK = linear._opoverload, embedding._opoverload, block._opoverload
MEMBER = member._opoverload


@torch.library.custom_op("lorac::matmul", mutates_args=())
def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """Multiply x (..., K) by a matrix (K, N)."""
    return torch.matmul(x, matrix)


@matmul.register_fake
def _(x: Tensor, matrix: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], matrix.shape[1]))


MATMUL = matmul._opoverload
OP_FUNCTIONS[MATMUL] = torch.matmul
SPLIT = aten.split_with_sizes.default
"""The op that splits the output of a fused projection into the outputs of its sites."""


@torch.library.custom_op("lorac::marker", mutates_args=())
def marker(values: list[Tensor]) -> Tensor:
    """Mark the place of values in a program while a model is traced."""
    raise AssertionError("markers are removed before anything runs")  # pragma: no cover


@marker.register_fake
def _(values: list[Tensor]) -> Tensor:
    return torch.empty(())


@torch.library.custom_op("lorac::repeated_layer", mutates_args=())
def repeated_layer(
    given: list[Tensor], answered: list[Tensor], notes: list[Tensor], path: str, first: str
) -> list[Tensor]:
    """Stand for the layer at ``path`` during a trace; it computes the same as the layer at ``first``.

    Args:
        given: the layer's inputs.
        answered: the first layer's outputs, which have the sizes of this layer's outputs.
        notes: markers of the first layer's inputs and outputs.
        path, first: the paths of the two layers.
    """
    raise AssertionError("the nodes of the first layer replace this op before anything runs")  # pragma: no cover


@repeated_layer.register_fake
def _(given: list[Tensor], answered: list[Tensor], notes: list[Tensor], path: str, first: str) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in answered]


MARKER, REPEATED_LAYER = marker._opoverload, repeated_layer._opoverload


def adapted(op: SiteOp, host_args: Operands, slots: dict[str, Tensor], site: str) -> Tensor:
    """Mark a call of a touched site at level adapted: the model's op and operands, and the tensors in the slots.

    It computes ``lorac.ir.slots.execution.run_site``; the ``expand`` pass replaces the op by this computation.
    """
    raise AssertionError("an adapted op is expanded before anything runs")  # pragma: no cover


SITE_CALLS = SITE_OPS | {adapted}
"""The ops that call a site, adapted or not; the last operand of each is the site's path."""


def site_of(node: fx.Node) -> str:
    """Return the path of the site that a node calls."""
    return str(node.args[-1])


def group_calls(nodes: Iterable[fx.Node]) -> dict[str, list[fx.Node]]:
    """Group calls of sites by the site's path."""
    calls: dict[str, list[fx.Node]] = {}
    for node in nodes:
        calls.setdefault(site_of(node), []).append(node)
    return calls


def operands_of(node: fx.Node) -> Operands:
    """Return the operands of the model's layer: all operands of the site's op except the path."""
    return node.args[:-1]


def lower_sites(module: fx.GraphModule) -> bool:
    """Replace each site's op by its aten op, in place; return whether anything changed.

    Nodes keep their identity, name and meta, so that an ExportedProgram's signature stays valid. The module's code is
    not updated: generating it takes long, and programs are read and run node by node.
    """
    changed = False
    for node in module.graph.nodes:
        if node.op == "call_function" and (lower := _LOWERINGS.get(node.target)) is not None:
            node.target, node.args = lower(node.args)
            changed = True
    if changed:
        module.graph.lint()
    return changed


def make_call_key(op: object, operands: Sequence[object], named: Mapping[str, object]) -> Operands:
    """Return a key that is equal for calls on tensors of equal dtypes, devices, sizes and strides.

    Args:
        operands, named: the call; tensors need no values. A string in a call of one of lorac's ops names a module, and
            does not count.
    """
    ours = getattr(op, "namespace", None) == "lorac"
    return (op, _make_key([value for value in operands if not (ours and isinstance(value, str))]), *named.items())


def _make_key(value: object) -> Operands:
    if isinstance(value, Tensor):
        return (value.dtype, value.device, *map(_make_key, (value.shape, value.stride())))
    if isinstance(value, list | tuple):
        return tuple(map(_make_key, value))
    return (value.node.expr,) if isinstance(value, torch.SymInt) else (type(value), value)


@torch.library.custom_op("lorac::recurrence", mutates_args=())
def recurrence(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor | None, beta: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute ``S = exp(decay · rate) S + k ⊗ v`` and ``y = q S`` token by token.

    Args:
        q, k: queries and keys (batch, length, heads, size).
        v: values (batch, length, heads, width).
        decay: logarithms (batch, length, heads, size or 1, width or 1).
        rate: (heads, size, width): factor of the logarithms; None: 1.
        beta: (batch, length, heads): the gated delta rule (arXiv:2412.06464): the value is ``beta (v - k S)``, with
            the decayed state; None: ``v``.
        state: (batch, heads, size, width) before the first token; None: zeros.

    Returns:
        y (batch, length, heads, width), and the state behind the last token.
    """
    held = v.new_zeros(*k.shape[:1], *k.shape[2:], v.shape[3]) if state is None else state
    outputs = []
    for token in range(k.shape[1]):
        key, value, logarithm = k[:, token, :, :, None], v[:, token, :, None], decay[:, token]
        held = held * torch.exp(logarithm if rate is None else logarithm * rate)
        if beta is not None:
            value = (value - key.transpose(2, 3) @ held) * beta[:, token, :, None, None]
        held = held + key * value
        outputs.append((q[:, token, :, None] @ held)[:, :, 0])
    return torch.stack(outputs, 1), held.clone()


@recurrence.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), v.new_empty((k.shape[0], *k.shape[2:], v.shape[3]))


RECURRENCE = recurrence._opoverload
STATE_OPERAND = 6
"""Index of the operand ``state`` of a recurrence."""
