"""The axes of tokens in values, and the ops that compute each token separately.

A graph with a cache takes tokens as (batch, length). An op is token-wise if selecting tokens before it gives the same
result as selecting them after it: it does not mix tokens, and reads nothing else that differs between them.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lorac.backends.onnx.passes import read_numbers

_MICROSOFT = "com.microsoft"
Dim = int | str | None
"""A size, the name of one that varies, or None for an unknown one."""


@dataclass(frozen=True)
class TokenAxes:
    """The axes of a value along which its tokens are arranged.

    Attributes:
        axes: counted from the end: batch and length, places and tokens of a segment, or one axis for both.
        segments: whether the first axis is the axis of places (``lorac.ir.slots.places``).
        repeats: the number of items per token along a single axis.
    """

    axes: tuple[int, ...]
    segments: bool = False
    repeats: int = 1

    def places(self, rank: int) -> list[int]:
        """Return the axes counted from the beginning."""
        return [axis + rank for axis in self.axes]

    def leads(self, rank: int) -> bool:
        """Return whether they are the first axes, so the tokens of a row are contiguous."""
        return self.places(rank) == list(range(len(self.axes)))


class TokenLayouts:
    """The axes of tokens in the values of a graph, inferred from the names of sizes.

    Args:
        ids: the token ids (batch, length).
        cuts: segments of tokens (places, tokens, …).
    """

    def __init__(self, ids: ir.Value, cuts: Collection[ir.Value]) -> None:
        self.batch, self.length = dims_of(ids)
        self._segments = {tuple(dims_of(cut)[:2]) for cut in cuts}
        self._varying = {self.batch, self.length, *(size for pair in self._segments for size in pair)}
        self._known: dict[tuple[Dim, ...], TokenAxes | None] = {}

    def of(self, value: ir.Value | None) -> TokenAxes | None:
        """Return the axes of a value's tokens; None for a value without tokens."""
        dims = tuple(dims_of(value))
        if dims not in self._known:
            self._known[dims] = self._find(dims)
        return self._known[dims]

    def _find(self, dims: tuple[Dim, ...]) -> TokenAxes | None:
        rank = len(dims)
        if dims[:2] in self._segments and not self._varies(dims[2:]):
            return TokenAxes((-rank, 1 - rank), segments=True)
        repeats = self._count_repeats(dims[0]) if dims else 0
        if repeats and not self._varies(dims[1:]):
            return TokenAxes((-rank,), repeats=repeats)
        if dims.count(self.batch) != 1 or dims.count(self.length) != 1:
            return None
        axes = (dims.index(self.batch), dims.index(self.length))
        rest = [dim for axis, dim in enumerate(dims) if axis not in axes]
        return TokenAxes((axes[0] - rank, axes[1] - rank)) if axes[0] < axes[1] and not self._varies(rest) else None

    def is_plain(self, value: ir.Value | None) -> bool:
        """Return whether a value has no axis of rows or tokens."""
        return value is None or (value.shape is not None and not self._varies(dims_of(value)))

    def is_token_wise(self, node: ir.Node) -> bool:
        """Return whether an op is known to compute each token separately."""
        rule = _RULES.get((node.domain, node.op_type))
        outputs = [value for value in node.outputs if value.uses() or value.is_graph_output()]
        return rule is not None and all(self.of(value) is not None for value in outputs) and rule(self, node)

    def _varies(self, dims: Sequence[Dim]) -> bool:
        return any(dim is None or dim in self._varying or self._count_repeats(dim) for dim in dims)

    def _count_repeats(self, dim: Dim) -> int:
        """Return the factor of the number of tokens, including padding, in a size; 0 if it is not a multiple."""
        factors = str(dim).split("*")
        numbers = [factor for factor in factors if factor.isdecimal()]
        if sorted(factors) != sorted([str(self.batch), str(self.length), *numbers]) or len(numbers) > 1:
            return 0
        return int(numbers[0]) if numbers else 1


def dims_of(value: ir.Value | None) -> list[Dim]:
    """Return the sizes of a value; an empty list if its shape is unknown."""
    if value is None or value.shape is None:
        return []
    return [dim if isinstance(dim, int) else None if dim.value is None else str(dim.value) for dim in value.shape]


# ── Token-wise ops ───────────────────────────────────────────────────────────────────────────────────────────────────
_Rule = Callable[[TokenLayouts, ir.Node], bool]


def _is_elementwise(layouts: TokenLayouts, node: ir.Node) -> bool:
    found = layouts.of(node.outputs[0])
    assert found is not None
    tokens = [value for value in node.inputs if layouts.of(value) is not None]
    others = [value for value in node.inputs if layouts.of(value) is None]
    plain = all(layouts.is_plain(value) and _is_one_along(value, found.axes) for value in others)
    return bool(tokens) and plain and all(layouts.of(value) == found for value in tokens)


def _is_one_along(value: ir.Value | None, axes: Sequence[int]) -> bool:
    """Return whether a value is broadcast along the given axes."""
    dims = dims_of(value)
    return all(-axis > len(dims) or dims[axis] == 1 for axis in axes)


def _multiplies_rows(layouts: TokenLayouts, node: ir.Node) -> bool:
    """Return whether one matrix multiplies all tokens, or each token's matrix another matrix of that token."""
    x, other = layouts.of(node.inputs[0]), node.inputs[1]
    if x is None or x != layouts.of(node.outputs[0]):
        return False
    if node.op_type == "Gemm":
        plain = all(map(layouts.is_plain, node.inputs[1:])) and _is_one_along([*node.inputs, None][2], (-2,))
        return plain and x.axes == (-2,) and not node.attributes.get_int("transA", 0)
    if layouts.is_plain(other):
        return len(dims_of(other)) == 2 and -1 not in x.axes
    return x.axes == (-3,) and layouts.of(other) == x


def _acts_along_features(layouts: TokenLayouts, node: ir.Node) -> bool:
    """Return whether an op along some axes leaves the axes of tokens alone; its operands must agree."""
    count = _OPERANDS.get(node.op_type, 1)
    others = [] if count is None else node.inputs[count:]
    axes: Sequence[int] = [node.attributes.get_int("axis", _AXES.get(node.op_type, 0))]
    if node.op_type not in _AXES:
        operand = [*node.inputs, None, None, None][_LISTED.get(node.op_type, 1)]
        axes = node.attributes.get_ints("axes") or read_numbers(operand)
    same = len({layouts.of(value) for value in node.inputs[:count]}) == 1
    return bool(axes) and same and all(map(layouts.is_plain, others)) and _keeps_tokens(layouts, node, axes)


def _keeps_tokens(layouts: TokenLayouts, node: ir.Node, axes: Sequence[int]) -> bool:
    """Return whether an op's axes come after the tokens' axes, which do not move."""
    x, y = node.inputs[0], node.outputs[0]
    before, after = layouts.of(x), layouts.of(y)
    if before is None or after is None or before.repeats != after.repeats or before.segments != after.segments:
        return False
    rank = max(len(dims_of(x)), len(dims_of(y)))
    behind = all(axis % rank > max(before.places(len(dims_of(x)))) for axis in axes)
    return behind and before.places(len(dims_of(x))) == after.places(len(dims_of(y)))


def _is_lookup(layouts: TokenLayouts, node: ir.Node) -> bool:
    """Return whether each token looks up a row, or takes a part of its features."""
    data, index = node.inputs[:2]
    if layouts.of(data) is not None:
        return layouts.is_plain(index) and _keeps_tokens(layouts, node, [node.attributes.get_int("axis", 0)])
    found, made = layouts.of(index), layouts.of(node.outputs[0])
    if found is None or made is None or not layouts.is_plain(data) or node.attributes.get_int("batch_dims", 0) != 0:
        return False
    first = node.attributes.get_int("axis", 0) == 0
    whole = node.op_type == "Gather" or -1 not in found.axes
    same = found.places(len(dims_of(index))) == made.places(len(dims_of(node.outputs[0])))
    return first and whole and same and found.repeats == made.repeats


def _rearranges(layouts: TokenLayouts, node: ir.Node) -> bool:
    """Return whether an op that moves or repeats values keeps those of each token together."""
    x, y = node.inputs[0], node.outputs[0]
    before, after = layouts.of(x), layouts.of(y)
    if before is None or after is None:
        return False
    if node.op_type == "Transpose":
        order = node.attributes.get_ints("perm")
        same = before.segments == after.segments and before.repeats == after.repeats
        return bool(order and same) and [order.index(i) for i in before.places(len(order))] == after.places(len(order))
    if node.op_type == "Reshape":  # no other size is unknown
        pairs = ((before, dims_of(x)), (after, dims_of(y)))
        known = all(isinstance(dim, int) for found, dims in pairs for dim in dims[len(found.axes) :])
        return known and all(found.leads(len(dims)) for found, dims in pairs)
    dims = dims_of(y)
    rest = [dim for axis, dim in enumerate(dims) if axis - len(dims) not in after.axes]
    return before == after and all(isinstance(dim, int) for dim in rest)


def _rotates(layouts: TokenLayouts, node: ir.Node) -> bool:
    x, positions, *tables = node.inputs
    found = layouts.of(x)
    return (
        found == layouts.of(node.outputs[0])
        and layouts.of(positions) == TokenAxes((-2, -1))
        and all(map(layouts.is_plain, tables))
    )


# fmt: off
_ELEMENTWISE = (
    "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor",
    "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
    "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod", "Mul", "Neg", "Not", "Or", "Pow",
    "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Sum",
    "Tanh", "Where", "Xor",
)
# fmt: on
_AXES = {
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"), -1),
    **dict.fromkeys(("Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "TopK"), -1),
    **dict.fromkeys(("Split", "Concat", "GatherElements", "ScatterElements", "ArgMax", "ArgMin"), 0),
}
"""Op -> the axis along which, or from which on, it acts by default."""
_OPERANDS = {"Concat": None, "ScatterElements": None, "GatherElements": 2}
"""Op -> how many operands have tokens, where it is not the first alone; None for all."""
_LISTED = {"Slice": 3}
"""Op -> the operand that lists its axes, where it is not the second."""
_REDUCTIONS = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2")
_OVER_LISTED_AXES = (*_REDUCTIONS, "ReduceSumSquare", "Slice", "Squeeze", "Unsqueeze", "CumSum")
_OTHERS: dict[str, _Rule] = {
    "MatMul": _multiplies_rows,
    "Gemm": _multiplies_rows,
    "Gather": _is_lookup,
    "GatherND": _is_lookup,
    "Transpose": _rearranges,
    "Reshape": _rearranges,
    "Expand": _rearranges,
}
_RULES: dict[tuple[str, str], _Rule] = {
    **{("", op): _is_elementwise for op in _ELEMENTWISE},
    **{("", op): _acts_along_features for op in (*_AXES, *_OVER_LISTED_AXES)},
    **{("", op): rule for op, rule in _OTHERS.items()},
    (_MICROSOFT, "RotaryEmbedding"): _rotates,
    **{(_MICROSOFT, op): _is_elementwise for op in ("Gelu", "QuickGelu", "FastGelu")},
}
