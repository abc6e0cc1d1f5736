"""The ops that mark sites in a captured graph: one node per call of a site, until a pass expands or lowers it.

Each op computes what the host's layer computes, so a graph that still holds them runs as it is. Their last argument is
the site: its module path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten
_CONVOLUTIONS: dict[int, Any] = {3: aten.conv1d.default, 4: aten.conv2d.default, 5: aten.conv3d.default}


@torch.library.custom_op("lorac::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    """``x @ weight.T + bias``."""
    return F.linear(x, weight, bias)


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, site: str) -> Tensor:
    inner, wanted = x.shape[-1], weight.shape[1]
    torch._check(inner == wanted, lambda: f"{site}: the input's last size is {inner}, the weight takes {wanted}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("lorac::embedding", mutates_args=())
def embedding(ids: Tensor, weight: Tensor, padding_idx: int, site: str) -> Tensor:
    """Rows of ``weight``; ``padding_idx`` is -1 where the module has none (it only matters to gradients)."""
    return F.embedding(ids, weight, padding_idx if padding_idx >= 0 else None)


@embedding.register_fake
def _(ids: Tensor, weight: Tensor, padding_idx: int, site: str) -> Tensor:
    integral = ids.dtype in (torch.int32, torch.int64)
    torch._check_type(integral, lambda: f"{site}: ids must be int32 or int64, not {ids.dtype}")
    return weight.new_empty((*ids.shape, weight.shape[1]))


@torch.library.custom_op("lorac::conv", mutates_args=())
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
    """A 1-, 2- or 3-d convolution, by the rank of ``weight``."""
    return _CONVOLUTIONS[weight.dim()](x, weight, bias, stride, padding, dilation, groups)


@conv.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    site: str,
) -> Tensor:
    return _CONVOLUTIONS[weight.dim()](x, weight, bias, stride, padding, dilation, groups)


@torch.library.custom_op("lorac::block", mutates_args=())
def block(x: Tensor, y: Tensor, site: str) -> Tensor:
    """A marker at a block's exit: ``y``, with the block's input at hand for an adapter that needs it."""
    return y.clone()


@block.register_fake
def _(x: Tensor, y: Tensor, site: str) -> Tensor:
    return torch.empty_like(y)


LINEAR, EMBEDDING, BLOCK = linear._opoverload, embedding._opoverload, block._opoverload


@torch.library.custom_op("lorac::matmul", mutates_args=())
def matmul(x: Tensor, matrix: Tensor) -> Tensor:
    """x (..., K) times a matrix (K, N)."""
    return torch.matmul(x, matrix)


@matmul.register_fake
def _(x: Tensor, matrix: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], matrix.shape[1]))


MATMUL = matmul._opoverload


@torch.library.custom_op("lorac::noted", mutates_args=())
def marker(values: list[Tensor]) -> Tensor:
    """While a model is traced: stands for what these values were at this place in the program."""
    raise AssertionError("notes are gone before anything runs")  # pragma: no cover


@marker.register_fake
def _(values: list[Tensor]) -> Tensor:
    return torch.empty(())


@torch.library.custom_op("lorac::again", mutates_args=())
def repeated_layer(
    given: list[Tensor], answered: list[Tensor], notes: list[Tensor], path: str, first: str
) -> list[Tensor]:
    """While a model is traced: what the layer at ``path`` answers, which computes what the one at ``first`` did.

    Args:
        given: what it is called with.
        answered: what the first answered, whose sizes are this one's.
        notes: of what the first was called with, and of what it answered.
        path, first: the paths of both.
    """
    raise AssertionError("the nodes of the first are put in its place before anything runs")  # pragma: no cover


@repeated_layer.register_fake
def _(given: list[Tensor], answered: list[Tensor], notes: list[Tensor], path: str, first: str) -> list[Tensor]:
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in answered]


MARKER, REPEATED_LAYER = marker._opoverload, repeated_layer._opoverload
SPLIT = aten.split_with_sizes.default
"""What cuts the output of a pack into those of its sites."""
SITE_OPS = frozenset(op._opoverload for op in (linear, embedding, conv, block))
OP_FUNCTIONS: Mapping[Any, Callable[..., Tensor]] = {
    op._opoverload: op._init_fn for op in (linear, embedding, conv, block, matmul)
}
"""Ops that run -> what they compute, to be called without torch's dispatcher."""


def adapted(op: Any, host_args: tuple[Any, ...], slots: dict[str, Tensor], site: str) -> Tensor:
    """A call of a touched site, at level adapted: the host's op and operands, and the tensors in the site's slots.

    Its meaning is ``lorac.ir.slots.execution.run_site``; the ``expand`` pass puts that in its place: this is never
    executed.
    """
    raise AssertionError("an adapted op is expanded before anything runs")  # pragma: no cover


SITE_CALLS = SITE_OPS | {adapted}
"""The ops that are a call of a site, adapted or not; the last argument of each is the site's path."""


def site_of(node: fx.Node) -> str:
    """Module path of the site that ``node``, a call of one of ``CALLS``, stands for."""
    return str(node.args[-1])


def operands_of(node: fx.Node) -> tuple[Any, ...]:
    """What the host's layer is called with: the arguments of a call of one of ``OPS``, without the site's path."""
    return node.args[:-1]


def _lower_conv(args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    return _CONVOLUTIONS[args[1].meta["val"].dim()], args[:7]


_LOWERINGS: dict[Any, Callable[[tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]] = {
    linear._opoverload: lambda args: (aten.linear.default, args[:3]),
    embedding._opoverload: lambda args: (aten.embedding.default, (args[1], args[0], args[2])),
    conv._opoverload: _lower_conv,
    block._opoverload: lambda args: (aten.clone.default, (args[1],)),
}


def lower_sites(module: fx.GraphModule) -> bool:
    """Turn every site's op into the aten op it stands for, in place; say whether anything changed.

    Nodes keep their identity, name and meta, so an ExportedProgram's signature stays valid. The module's code does not
    follow its graph: it takes long to write, and programs are read and run node by node.
    """
    changed = False
    for node in module.graph.nodes:
        if node.op == "call_function" and (lowering := _LOWERINGS.get(node.target)) is not None:
            node.target, node.args = lowering(node.args)
            changed = True
    if changed:
        module.graph.lint()
    return changed


def make_call_key(op: Any, given: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, ...]:
    """Equal for calls whose values are described alike: tensors by dtype, device, sizes and strides.

    Args:
        op: what is called.
        given, named: what it is called with; tensors without values. A string that an op of lorac's own is given names
            a module, which changes nothing that is computed.
    """
    own = getattr(op, "namespace", None) == "lorac"
    told = [value for value in given if not (own and isinstance(value, str))]
    return (op, _described(told), *named.items())


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.device, *map(_described, (value.shape, value.stride())))
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return (value.node.expr,) if isinstance(value, torch.SymInt) else (type(value), value)
