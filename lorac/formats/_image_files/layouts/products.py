"""LoHa and LoKr: Hadamard and Kronecker products of factors.

Source: LyCORIS, lycoris/modules/loha.py and lokr.py. Shapes in a file, where in is the number of channels of a group:

    ====================================  ========  ===================  ===============
    LoHa                                  w1_a …    w1_b …               t1, t2
    ====================================  ========  ===================  ===============
    linear, or convolution                (out, r)  (r, in·kernel)       –
    convolution, use_tucker               (r, out)  (r, in)              (r, r, *kernel)
    ====================================  ========  ===================  ===============

LoKr, with out = l·k and in = m·n:

    w1    (l, m), or w1_a (l, r) and w1_b (r, m)
    w2    (k, n, *kernel), or w2_a (k, r) and w2_b (r, n·kernel), or with t2 (r, r, *kernel) w2_a (r, k), w2_b (r, n)

A LoKr whose w1 and w2 are both whole matrices has the scale 1, regardless of the alpha in its file.
"""

from math import prod

from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import Method, ModuleLayout, StoredModule, Tensors
from lorac.ir.sites.site import Site
from lorac.variants.lokr import LoHa, LoKr, factors

_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_CORES = ("hada_t1", "hada_t2")


class LohaLayout(ModuleLayout[LoHa]):
    """LoHa's four factors, and its two Tucker cores."""

    required = _FACTORS
    optional = _CORES
    variants = (LoHa,)
    rows = ("hada_w1_a", "hada_w2_a")

    def read(self, module: StoredModule) -> Method:
        out, (channels, *kernel) = module.site.out_features, module.columns
        rank, core = module.length("hada_w1_b"), _CORES[0] in module.tensors
        if core != (_CORES[1] in module.tensors):
            raise unsupported_error(
                f"'{module.keys[_FACTORS[0]]}' has only one of two cores",
                next_step="save the adapter again from LyCORIS",
            )
        a, b = ((rank, out), (rank, channels)) if core else ((out, rank), (rank, channels * prod(kernel)))
        tensors = {name: module.matrix(name, *(a if name.endswith("a") else b)) for name in _FACTORS}
        for name in _CORES if core else ():
            tensors[name] = module.matrix(name, rank, rank, *kernel).unflatten(1, (rank, -1))
        alpha = rank if module.alpha is None else module.alpha
        return LoHa(r=rank, alpha=alpha, effective_conv2d=core), tensors

    def write(self, variant: LoHa, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        return {**tensors, **{name: _as_kernel(site, tensors[name]) for name in _CORES if name in tensors}}


class LokrLayout(ModuleLayout[LoKr]):
    """LoKr's two matrices, each stored whole or as factors."""

    optional = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    variants = (LoKr,)
    adds = True

    def read(self, module: StoredModule) -> Method:
        first, second = self._names(module)
        left, middle = module.length(first[0]), module.length(first[-1], 1)
        out, (channels, *kernel) = module.site.out_features, module.columns
        small, columns = out // max(left, 1), channels // max(middle, 1)
        ranked = [name for name in (*first, *second) if name.endswith("_b")]
        rank = module.length(ranked[-1]) if ranked else max(small, columns, 1)
        core = "lokr_t2" in second
        shapes: dict[str, tuple[int, ...]] = {
            "lokr_w1": (left, middle),
            "lokr_w1_a": (left, rank),
            "lokr_w1_b": (rank, middle),
            "lokr_w2": (small, columns, *kernel),
            "lokr_w2_a": (rank, small) if core else (small, rank),
            "lokr_w2_b": (rank, columns) if core else (rank, columns * prod(kernel)),
            "lokr_t2": (rank, rank, *kernel),
        }
        if not core and "lokr_w2_b" in second and module.tensors["lokr_w2_b"].ndim > 2:
            shapes["lokr_w2_b"] = (rank, columns, *kernel)
        tensors = {name: module.matrix(name, *shapes[name]) for name in (*first, *second)}
        if core:
            tensors["lokr_t2"] = tensors["lokr_t2"].unflatten(1, (rank, -1))
        candidates = (-1, left, middle, max(left, middle))  # one for which both sizes split as in the file
        fits = (c for c in candidates if (factors(out, c)[0], factors(channels, c)[0]) == (left, middle))
        variant = LoKr(
            r=rank,
            alpha=rank if module.alpha is None or not ranked else module.alpha,
            decompose_both=len(first) > 1,
            decompose_factor=next(fits, (left, middle)),
            effective_conv2d=core,
        )
        if variant.params(module.site).keys() != tensors.keys():
            raise unsupported_error(
                f"'{module.keys[first[0]]}' belongs to a LoKr that divides or factors '{module.site.path}' in a way "
                f"that rank {rank} does not give",
                next_step="train it without full_matrix and unbalanced_factorization",
            )
        return variant, tensors

    def write(self, variant: LoKr, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        written = dict(tensors)
        if "lokr_t2" in written:
            written["lokr_t2"] = _as_kernel(site, written["lokr_t2"])
        if "lokr_w2" in written and written["lokr_w2"].ndim == 3:
            raise unsupported_error(
                f"LyCORIS does not compute PEFT's product with a whole lokr_w2 at '{site.path}', a Conv1d",
                next_step="use format='peft', or 'native'",
            )
        if "lokr_w2" in written and site.conv is not None:
            written["lokr_w2"] = written["lokr_w2"].reshape(written["lokr_w2"].shape[0], -1, *site.conv.kernel)
        if "lokr_w1" in written and "lokr_w2" in written and variant.scale != 1:
            written["lokr_w1"] = written["lokr_w1"] * variant.scale
        return written

    def _names(self, module: StoredModule) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Return the names of the tensors that make up w1, and of those that make up w2."""
        first = ("lokr_w1",) if "lokr_w1" in module.tensors else ("lokr_w1_a", "lokr_w1_b")
        second: tuple[str, ...] = ("lokr_w2",) if "lokr_w2" in module.tensors else ("lokr_w2_a", "lokr_w2_b")
        if "lokr_t2" in module.tensors:
            second = ("lokr_t2", *second)
        if {*first, *second} != set(module.tensors) or {"lokr_w2", "lokr_t2"} <= {*second}:
            raise unsupported_error(
                f"the LoKr of '{next(iter(module.keys.values()))}' has only the tensors {', '.join(module.tensors)}",
                next_step="save it again from LyCORIS, with lokr_w1 or lokr_w1_a and lokr_w1_b, and the same of "
                "lokr_w2",
            )
        return first, second


def _as_kernel(site: Site, core: Tensor) -> Tensor:
    """Reshape a core (r, r, taps) to (r, r, *kernel)."""
    assert site.conv is not None
    return core.reshape(*core.shape[:2], *site.conv.kernel)
