"""Entanglement entropies of a matrix: the spread of an update or attention map over the digits of its indices.

Chen et al. 2026, arXiv 2601.06788. A matrix (out, in) is flattened into the state of a chain of sites, of which the
first sites count the outputs and the others the inputs. Every cut of the chain has an entropy.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.truncation import find_rank
from lorac.analysis.measures import read_change, require_parts
from lorac.argument_types import check_type
from lorac.errors import AdapterError, not_one_of, translate_import_errors
from lorac.frontend.model_view import Model, ModelView
from lorac.variants.adapter import Adapter

_ORDERS = ("row_major", "interleaved")
_LABELLED = 12
"""Sites that a picture has names for."""


@dataclass(frozen=True)
class EntanglementProfile:
    """The entanglement of one change ΔW (out, in) over its prime sites, outputs first; entropies in nats.

    Attributes:
        out_dims, in_dims: the sites.
        entropies: S(l) at every cut.
        bounds: the largest S(l) of matrices of ΔW's rank.
        spectrum: singular values of ΔW, falling, those above rounding.
    """

    out_dims: tuple[int, ...]
    in_dims: tuple[int, ...]
    entropies: tuple[float, ...]
    bounds: tuple[float, ...]
    spectrum: tuple[float, ...]

    @property
    def centre(self) -> float:
        """S at the cut between outputs and inputs; 0 where either has one entry only."""
        return self.entropies[len(self.out_dims) - 1] if self.out_dims and self.in_dims else 0.0

    @property
    def humps(self) -> tuple[float, float]:
        """The largest S of the cuts inside the outputs and of those inside the inputs; 0 where there are none."""
        middle = len(self.out_dims) - 1
        return max(self.entropies[:middle], default=0.0), max(self.entropies[middle + 1 :], default=0.0)

    @property
    def valley(self) -> float:
        """How far the centre lies below the lower hump; negative where it is a peak."""
        return min(self.humps) - self.centre


@torch.no_grad()
def adapter_entanglement(adapter: Adapter, model: Model | None = None) -> dict[str, EntanglementProfile | None]:
    """Return the entanglement of an adapter's change at every site, at strength 1.

    Args:
        adapter: of a method that edits weights; only read.
        model: the base, or several by name, needed where ``lorac.factors`` needs it.

    Returns:
        Site path -> profile, or None where the adapter changes nothing; the matrices of a stack by path and number.

    Raises:
        CompileError: the method does not edit weights.
        BaseNeeded: only the base, which is not given, tells a change.
    """
    check_type(adapter, Adapter, "the adapter to analyse", next_step="give an adapter: lorac.load_adapter(path)")
    view = None if model is None else add_adapted_modules(adapter, ModelView.of(model))
    found: dict[str, EntanglementProfile | None] = {}
    for path in adapter.tensors:
        change = read_change(adapter, path, view)
        assert change is not None
        b, a = require_parts(path, change, None if view is None else view.base.weight(view.sites[path]).double())
        delta = b if a is None else b @ a  # (out, in), or a stack of them
        matrices = {path: delta} if delta.ndim == 2 else {f"{path}[{i}]": one for i, one in enumerate(delta)}
        for name, one in matrices.items():
            found[name] = None
            if bool(one.any()):
                values = torch.linalg.svdvals(one)
                rank, (out_dims, in_dims) = find_rank(values, 0.0), map(prime_sites, one.shape)
                spreads = internal_entropy(one), rank_bound(rank, out_dims, in_dims), values[:rank]
                found[name] = EntanglementProfile(out_dims, in_dims, *(tuple(spread.tolist()) for spread in spreads))
    return found


def draw_entanglement(profiles: Mapping[str, EntanglementProfile | None], path: Path) -> None:
    """Draw S(l) of every site, and below it the spectra, into an image; its format is that of the file's suffix.

    Raises:
        MissingExtra: matplotlib is not installed.
        OptionError: it writes no such format.
    """
    with translate_import_errors():
        from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 8), layout="constrained")
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix[1:] not in formats:
        raise not_one_of("matplotlib does not write pictures as", path.suffix[1:], formats)
    above, below = figure.subplots(2, 1)
    for name, profile in profiles.items():
        if profile is None:
            continue
        cuts = range(1 - len(profile.out_dims), len(profile.in_dims))
        above.plot(cuts, profile.entropies, label=name, marker=".")
        below.semilogy(range(1, len(profile.spectrum) + 1), profile.spectrum, marker=".")
    above.set(xlabel="cut l; 0 is between outputs and inputs", ylabel="S(l) in nats", title="entanglement of ΔW")
    below.set(xlabel="number", ylabel="singular value of ΔW")
    if above.lines and len(above.lines) <= _LABELLED:
        above.legend(fontsize=7)
    figure.savefig(path)


def prime_sites(size: int) -> tuple[int, ...]:
    """Return the prime factors of a size ≥ 1, largest first: the default sites of a dimension."""
    import sympy

    return tuple(prime for prime, power in sorted(sympy.factorint(size).items(), reverse=True) for _ in range(power))


def internal_entropy(
    M: Tensor, out_dims: Sequence[int] | None = None, in_dims: Sequence[int] | None = None, order: str = "row_major"
) -> Tensor:
    """Return S(l) = −Σ w·ln w in nats at every cut, w = σ²/Σσ²: the internal entropy of arXiv 2601.06788.

    σ are the singular values of M reshaped to (the first l sites, all others). The scale of M does not matter. For a
    softmax attention (heads, T, T) the function is the paper's external entropy, with one row per head.

    Args:
        M: (…, out, in), computed in float64. One singular value decomposition per cut, the largest that of M itself.
        out_dims, in_dims: the sites, slowest digit first; their products are out and in. None: ``prime_sites``.
        order: ``"row_major"``, output sites, then input sites: L sites, the cut after the last output site that of
            the matrix itself. ``"interleaved"``: site l holds the l-th output and the l-th input digit, as in a
            matrix product operator; it takes as many of one as of the other.

    Returns:
        (…, L − 1), S(1) to S(L − 1).

    Raises:
        AdapterError: the sites do not multiply to the matrix's sizes, or are not as many on both sides.
        OptionError: there is no such order.
        AdapterError: an entry is infinite or no number.
        AdapterError: a matrix is all zeros: it is not a state.
    """
    out, columns = M.shape[-2:]
    rows, inputs = _resolve_dims(out, out_dims, "out"), _resolve_dims(columns, in_dims, "in")
    state = M.detach().double()
    if not bool(state.isfinite().all()):
        raise AdapterError(
            "the matrix holds infinities or NaN",
            next_step="look for the training step that made these values",
            code="non_finite",
        )
    if not bool(state.flatten(-2).any(-1).all()):
        raise AdapterError("a matrix of zeros has no entropy", next_step="measure after the first step of training")
    batch = M.shape[:-2]
    if _is_interleaved(rows, inputs, order):
        count, first = len(rows), len(batch)
        digits = [first + side * count + place for place in range(count) for side in (0, 1)]
        state = state.reshape(*batch, *rows, *inputs).permute(*range(first), *digits)
    cuts = []
    for left in _left_sizes(rows, inputs, order):
        weights = torch.linalg.svdvals(state.reshape(*batch, left, out * columns // left)).square()
        cuts.append(torch.special.entr(weights / weights.sum(-1, keepdim=True)).sum(-1))
    return torch.stack(cuts, dim=-1) if cuts else state.new_zeros(*batch, 0)


def rank_bound(rank: int, out_dims: Sequence[int], in_dims: Sequence[int], order: str = "row_major") -> Tensor:
    """Return the largest S(l) in nats of matrices of a rank at every cut, (L − 1,).

    A cut inside the outputs, P rows before and P' after it, has at most min(P, rank·P') singular values; so has one
    inside the inputs, from the other end. For 2ⁿ x 2ⁿ in sites of 2 that is ln 2·min(l, n − l + log₂ rank) up to the
    middle, and ln rank there: two humps and the entanglement valley of arXiv 2601.06788.

    Args:
        rank: of the matrix, at most min(out, in).
        out_dims, in_dims, order: as for ``internal_entropy``.

    Raises:
        AdapterError: interleaved, the sites are not as many on both sides.
        OptionError: there is no such order.
    """
    out, columns = math.prod(out_dims), math.prod(in_dims)
    most = []
    if _is_interleaved(out_dims, in_dims, order):
        for p, q in zip(_cumulative_products(out_dims), _cumulative_products(in_dims), strict=True):
            # Each of the rank terms is a column times a row, whose own cuts multiply.
            factored = rank * min(p, out // p) * min(q, columns // q)
            most.append(min(p * q, out * columns // (p * q), factored))
        most.pop()
    else:
        for left in _left_sizes(out_dims, in_dims, order):
            # Columns of the inputs before the cut and after it.
            near, far = (left, rank * out // left) if left <= out else (rank * left // out, out * columns // left)
            most.append(min(near, far))
    return torch.tensor(most, dtype=torch.float64).log()


def random_entropy(rows: int, columns: int) -> float:
    """Return the limit of S in nats of large Gaussian matrices: ln m − m/(2n) for m ≤ n (Page)."""
    small, large = sorted((rows, columns))
    return math.log(small) - small / (2 * large)


def _resolve_dims(size: int, dims: Sequence[int] | None, side: str) -> tuple[int, ...]:
    found = prime_sites(size) if dims is None else tuple(dims)
    if math.prod(found) != size:
        raise AdapterError(
            f"{side}_dims {' x '.join(map(str, found))} make {math.prod(found)}, and that side of the matrix has "
            f"{size}",
            nearest=" x ".join(map(str, prime_sites(size))),
            next_step=f"give factors of {size}, or None for its primes",
            code="shape_mismatch",
        )
    return found


def _is_interleaved(out_dims: Sequence[int], in_dims: Sequence[int], order: str) -> bool:
    if order not in _ORDERS:
        raise not_one_of("there is no order of sites", order, _ORDERS)
    if order == "interleaved" and len(out_dims) != len(in_dims):
        raise AdapterError(
            f"{len(out_dims)} output sites cannot be interleaved with {len(in_dims)} input sites",
            next_step='give as many out_dims as in_dims, or order="row_major"',
            code="shape_mismatch",
        )
    return order == "interleaved"


def _cumulative_products(dims: Sequence[int]) -> list[int]:
    """Return the products of the first 1, 2, … sizes."""
    return list(itertools.accumulate(dims, lambda product, dim: product * dim))


def _left_sizes(out_dims: Sequence[int], in_dims: Sequence[int], order: str) -> list[int]:
    """Return the size of the left part at every cut."""
    paired = order == "interleaved"
    sites = [p * q for p, q in zip(out_dims, in_dims, strict=True)] if paired else [*out_dims, *in_dims]
    return _cumulative_products(sites)[:-1]
