"""Weight formulas to analyse, with their values when evaluated as written."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from lorac.ir.algebra.changes import from_outputs, merge_bias, merge_weight
from lorac.ir.algebra.reduction import Params, reduce_weight

OUT, IN = 6, 4
"""Shape of W."""


@dataclass(frozen=True)
class Formula:
    """W' = weight(W, p), with parameters of these shapes and the form it has under all rules."""

    weight: Callable
    shapes: dict[str, tuple[int, ...]]
    form: str
    rank: int = 0
    bias: Callable | None = None
    integers: dict[str, torch.Tensor] = field(default_factory=dict)

    def tensors(self):
        generator = torch.Generator().manual_seed(5)

        def made(shape):
            return torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5  # divisors stay away from 0

        return {name: made(shape) for name, shape in self.shapes.items()} | self.integers

    def base(self):
        generator = torch.Generator().manual_seed(6)
        return torch.randn(OUT, IN, generator=generator, dtype=torch.float64), torch.linspace(-1, 1, OUT).double()

    def reduced(self, *rules):
        def formula(W, b, p):
            return self.weight(W, p), b if self.bias is None else self.bias(b, p)

        return reduce_weight(formula, (OUT, IN), self.tensors(), torch.float64, *rules)

    def direct(self):
        W, b = self.base()
        p = Params(**self.tensors())
        return self.weight(W, p), b if self.bias is None else self.bias(b, p)

    def merged(self, reduction):
        """W' and b' by way of the normal form."""
        W, b = self.base()
        value = from_outputs(reduction.form, reduction(W, b, [self.tensors()[n] for n in reduction.params]), b)
        return merge_weight(value, W), merge_bias(value, b)


def _eye(size):
    return torch.eye(size, dtype=torch.float64)


def _cut(W, change, scale=1.0, groups=1):
    """A change of a third of the rows of each group, its second."""
    cut = W.unflatten(0, (groups, -1)).split([OUT // groups // 3] * 3, 1)
    first, second, third = (part.flatten(0, 1) for part in cut)
    parts = (first, scale * second + change, third)
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], 1).flatten(0, 1)


POSITIONS = {"rows": torch.tensor([0, 3, 5, 3]), "cols": torch.tensor([3, 1, 0, 2])}
AB = {"B": (OUT, 2), "A": (2, IN)}

FORMULAS = {
    "sum of a factor": Formula(lambda W, p: W + 0.7 * p.B @ p.A, AB, "low-rank", 2),
    "difference": Formula(lambda W, p: W - p.B @ p.A, AB, "low-rank", 2),
    "difference the other way": Formula(lambda W, p: p.B @ p.A - W, AB, "low-rank", 2),
    "alpha of an addition": Formula(lambda W, p: torch.add(p.B @ p.A, W, alpha=0.3), AB, "low-rank", 2),
    "base untouched": Formula(lambda W, p: W.clone(), AB, "low-rank"),
    "copies": Formula(lambda W, p: (W.clone() + p.B @ p.A).clone(), AB, "low-rank", 2),
    "several factors": Formula(
        lambda W, p: W + p.B @ p.A - p.b @ p.a, {**AB, "b": (OUT, 1), "a": (1, IN)}, "low-rank", 3
    ),
    "entries of two factors multiplied": Formula(
        lambda W, p: W + (p.B @ p.A) * (p.b @ p.a), {**AB, "b": (OUT, 1), "a": (1, IN)}, "low-rank", 2
    ),
    "sum of bases": Formula(lambda W, p: W + W + p.B @ p.A, AB, "low-rank", 2),
    "sum of scaled bases": Formula(lambda W, p: p.m * W + W + 0.5 * W, {"m": (OUT, 1)}, "low-rank"),
    "number": Formula(lambda W, p: p.t * (W + p.B @ p.A) * 2, {**AB, "t": ()}, "low-rank", 2),
    "number of one entry": Formula(lambda W, p: (W + p.B @ p.A) * p.t, {**AB, "t": (1, 1)}, "low-rank", 2),
    "rows": Formula(lambda W, p: p.m[:, None] * (W + p.B @ p.A), {**AB, "m": (OUT,)}, "low-rank", 2),
    "columns": Formula(lambda W, p: (W + p.B @ p.A) * p.d, {**AB, "d": (IN,)}, "low-rank", 2),
    "rows and columns": Formula(
        lambda W, p: p.c * W * p.d + p.B @ p.A, {**AB, "c": (OUT, 1), "d": (1, IN)}, "low-rank", 2
    ),
    "division": Formula(lambda W, p: (W + p.B @ p.A / 3) / p.t, {**AB, "t": ()}, "low-rank", 2),
    "division by rows": Formula(lambda W, p: (W + p.B @ p.A) / p.m[:, None], {**AB, "m": (OUT,)}, "low-rank", 2),
    "division by columns": Formula(lambda W, p: (W + p.B @ p.A) / p.d, {**AB, "d": (IN,)}, "low-rank", 2),
    "negation": Formula(lambda W, p: -(-W + p.B @ p.A), AB, "low-rank", 2),
    "transpose": Formula(lambda W, p: W + (p.a.t() @ p.b.t()).t(), {"a": (2, IN), "b": (OUT, 2)}, "low-rank", 2),
    "addmm": Formula(lambda W, p: torch.addmm(W, p.B, p.A, beta=0.8, alpha=1.7), AB, "low-rank", 2),
    "zeros": Formula(lambda W, p: torch.zeros_like(W) + W + p.B @ p.A, AB, "low-rank", 2),
    "reflection": Formula(lambda W, p: (_eye(OUT) - 2 * p.u @ p.u.t()) @ W, {"u": (OUT, 1)}, "low-rank", 1),
    "two reflections": Formula(
        lambda W, p: (_eye(OUT) - p.u @ p.u.t()) @ ((_eye(OUT) - p.v @ p.v.t()) @ W),
        {"u": (OUT, 1), "v": (OUT, 1)},
        "low-rank",
        2,
    ),
    "scaled reflection": Formula(
        lambda W, p: (p.c * _eye(OUT) + p.u @ p.u.t()) @ (W + p.B @ p.A),
        {**AB, "u": (OUT, 1), "c": (OUT, 1)},
        "low-rank",
        3,
    ),
    "transposed reflection": Formula(
        lambda W, p: (p.c * _eye(OUT) + p.u @ p.v.t()).t() @ W,
        {"u": (OUT, 1), "v": (OUT, 1), "c": (1, OUT)},
        "low-rank",
        1,
    ),
    "identities of two sizes": Formula(
        lambda W, p: (_eye(OUT) * 0.5) @ W + p.B @ ((_eye(2) * 3) @ p.C @ p.A), {**AB, "C": (2, 2)}, "low-rank", 2
    ),
    "factor of a factor": Formula(
        lambda W, p: W + p.M @ (p.B @ p.A) + (p.B @ p.A) @ p.N, {**AB, "M": (OUT, OUT), "N": (IN, IN)}, "low-rank", 4
    ),
    "blocks": Formula(lambda W, p: W @ torch.block_diag(*p.T), {"T": (2, 2, 2)}, "low-rank"),
    "blocks, scales and a factor": Formula(
        lambda W, p: ((p.c * W * p.d) + p.B @ p.A) @ torch.block_diag(*p.T) / p.d + p.B @ p.A,
        {**AB, "c": (OUT, 1), "d": (1, IN), "T": (2, 2, 2)},
        "low-rank",
        4,
    ),
    "blocks of blocks": Formula(
        lambda W, p: W @ (torch.block_diag(*p.S).t() @ torch.block_diag(p.T[1], p.T[0])),
        {"S": (2, 2, 2), "T": (2, 2, 2)},
        "low-rank",
    ),
    "blocks as large as the input": Formula(lambda W, p: W @ torch.block_diag(p.T), {"T": (IN, IN)}, "dense"),
    "blocks of two sizes": Formula(lambda W, p: W @ torch.block_diag(p.T, p.S), {"T": (1, 1), "S": (3, 3)}, "dense"),
    "blocks of the output": Formula(lambda W, p: torch.block_diag(*p.T) @ W, {"T": (3, 2, 2)}, "dense"),
    "sum of blocks": Formula(
        lambda W, p: W @ torch.block_diag(*p.T) + W @ torch.block_diag(*p.S), {"T": (2, 2, 2), "S": (2, 2, 2)}, "dense"
    ),
    "reads the base": Formula(lambda W, p: W + p.U @ (p.D @ W), {"U": (OUT, 2), "D": (2, OUT)}, "low-rank", 2),
    "norm of the result": Formula(
        lambda W, p: p.m[:, None] * (W + p.B @ p.A) / torch.linalg.vector_norm(W + p.B @ p.A, dim=1)[:, None].detach(),
        {**AB, "m": (OUT,)},
        "low-rank",
        2,
    ),
    "new bias": Formula(lambda W, p: W + p.B @ p.A, {**AB, "e": (OUT,)}, "low-rank", 2, lambda b, p: 2 * b + p.e),
    "new bias of scaled rows": Formula(
        lambda W, p: p.e[:, None] * W, {"e": (OUT,)}, "low-rank", 0, lambda b, p: b - p.e
    ),
    "rows of a part": Formula(lambda W, p: _cut(W, p.B @ p.A), {"B": (2, 1), "A": (1, IN)}, "low-rank", 1),
    "rows of groups, scaled": Formula(
        lambda W, p: _cut(W, p.B @ p.A, p.c, groups=2), {"B": (2, 1), "A": (1, IN), "c": (2, 1)}, "low-rank", 1
    ),
    "rows of groups, scattered": Formula(
        lambda W, p: _cut(W, torch.index_put(W.new_zeros(2, IN), (p.rows, p.cols), p.v, accumulate=True), groups=2),
        {"v": (2,)},
        "sparse",
        integers={"rows": torch.tensor([0, 1]), "cols": torch.tensor([3, 1])},
    ),
    "rows in another order": Formula(lambda W, p: torch.cat([W[2:], W[:2]]) + p.B @ p.A, AB, "dense"),
    "rows whose inputs are scaled": Formula(
        lambda W, p: _cut(W * 1.0, p.B @ p.A, p.d), {"B": (2, 1), "A": (1, IN), "d": (1, IN)}, "dense"
    ),
    "scatter": Formula(
        lambda W, p: torch.index_put(W, (p.rows, p.cols), p.v, accumulate=True),
        {"v": (4,)},
        "sparse",
        integers=POSITIONS,
    ),
    "scaled scatters": Formula(
        lambda W, p: (
            W
            + p.t * torch.index_put(torch.zeros_like(W), (p.rows, p.cols), p.v, accumulate=True)
            + p.m * torch.index_put(torch.zeros_like(W), (p.rows, p.cols), p.w, accumulate=True) * p.d
        ),
        {"v": (4,), "w": (4,), "t": (1, 1), "m": (OUT, 1), "d": (IN,)},
        "sparse",
        integers=POSITIONS,
    ),
    "transposed scatter": Formula(
        lambda W, p: W + torch.index_put(W.new_zeros(IN, OUT), (p.cols, p.rows), p.v, accumulate=True).t(),
        {"v": (4,)},
        "sparse",
        integers=POSITIONS,
    ),
    "scatter and factor": Formula(
        lambda W, p: torch.index_put(W + p.B @ p.A, (p.rows, p.cols), p.v, accumulate=True),
        {**AB, "v": (4,)},
        "dense",
        integers=POSITIONS,
    ),
    "one value at many positions": Formula(
        lambda W, p: torch.index_put(W, (p.rows, p.cols), p.v, accumulate=True),
        {"v": (1,)},
        "dense",
        integers=POSITIONS,
    ),
    "assignment": Formula(
        lambda W, p: torch.index_put(W, (p.rows, p.cols), p.v), {"v": (4,)}, "dense", integers=POSITIONS
    ),
    "product of entries": Formula(lambda W, p: W * (1 + p.B @ p.A), AB, "dense"),
    "wide factor": Formula(lambda W, p: W + p.B @ p.A, {"B": (OUT, 4), "A": (4, IN)}, "delta"),
    "matrix": Formula(lambda W, p: 0.5 * p.M + W, {"M": (OUT, IN)}, "delta"),
    "matrix of the base": Formula(lambda W, p: W + p.M * W, {"M": (OUT, IN)}, "dense"),
    "two matrices": Formula(lambda W, p: (W + p.M) + p.N, {"M": (OUT, IN), "N": (OUT, IN)}, "dense"),
    "from the right": Formula(lambda W, p: W @ p.N, {"N": (IN, IN)}, "dense"),
    "without the base": Formula(lambda W, p: p.B @ p.A, AB, "dense"),
    "shifted": Formula(lambda W, p: W + 1.0, AB, "dense"),
    "third axis": Formula(lambda W, p: (p.t * W)[0], {"t": (1, 1, 1)}, "dense"),
}
"""Name -> formula."""
