"""PEFT type LOKR.

Source: peft.tuners.lokr of PEFT 0.21. Shapes in a file, with out = l·k, and m·n channels in a group:

    w1                 (l, m), or w1_a (l, r) and w1_b (r, m)
    w2, linear         (k, n), or w2_a (k, r) and w2_b (r, n)
    w2, convolution    (k, n, kh, kw), or w2_a (k, r) and w2_b (r, n·kh·kw), or
                       w2_a (r, k), w2_b (r, n) and t2 (r, r, kh, kw), of a Conv1d (r, r, k, 1)

Flat factors do not show whether a site is a convolution, nor its groups. For a Conv1d whose w2 (k, n, kw) is whole,
PEFT multiplies other axes, and the result is not a Kronecker product (``LoKr.conv1d_of_peft``).
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import FormatError
from lorac.formats._config_fields import Applied, TrainingOnly, read_flag, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.fields import LYCORIS
from lorac.formats.peft.layouts import core_shape
from lorac.formats.peft.peft_type import PeftType, Tensors, mismatched_shapes
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.base import Variant
from lorac.variants.lokr import LoKr, factors

W1, W2, CORE = "lokr_w1", "lokr_w2", "lokr_t2"


def read_factor(value: object) -> int:
    """Return a whole number above 0, or −1."""
    return -1 if value == -1 and not isinstance(value, bool) else read_size(value)


def write_factor(value: object) -> object:
    """Return a single factor; a pair is refused.

    Raises:
        FormatError: the value is a pair.
    """
    if not isinstance(value, int):
        raise unsupported_error(
            f"PEFT's LOKR takes one decompose_factor for both sides, not {value}",
            next_step="use format='kohya', or 'native'",
        )
    return value


class LokrType(PeftType[LoKr]):
    """LOKR."""

    peft_type = "LOKR"
    variants = {LoKr: {}}
    fields = {
        **LYCORIS,
        "decompose_both": Applied(False, to="decompose_both", read=read_flag),
        "decompose_factor": Applied(-1, to="decompose_factor", read=read_factor, write=write_factor),
        "rank_dropout_scale": TrainingOnly(False, preserved=True),
    }
    suffixes = (W1, f"{W1}_a", f"{W1}_b", W2, f"{W2}_a", f"{W2}_b", CORE)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D})
    grouped = True

    def read_site(self, variant: LoKr, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        first, second = _factor_names(path, stored)
        w2 = stored.get(W2)
        l, m = stored[first[0]].shape[0], stored[first[-1]].shape[1]
        if w2 is not None:
            k, n, kernel = w2.shape[0], w2.shape[1], tuple(w2.shape[2:])
        elif CORE in second:
            k, n, kernel = stored[f"{W2}_a"].shape[1], stored[f"{W2}_b"].shape[1], tuple(stored[CORE].shape[2:])
        else:
            k, columns = stored[f"{W2}_a"].shape[0], stored[f"{W2}_b"].shape[1]
            n, kernel = _guess_kernel(variant, path, stored, m, columns)
        site = conv_site(path, l * k, m * n, kernel, 1) if kernel else matrix_site(path, l * k, m * n)
        whole = w2 is not None and w2.ndim == 3
        axes = {CORE: 2, W2: 2 if whole else 1}
        return site, {name: stored[name].flatten(axes.get(name, 1)) for name in (*first, *second)}

    def refine_variant(self, variant: LoKr, values: JsonMapping, stored: Mapping[str, Tensors]) -> Variant:
        """Set ``conv1d_of_peft`` where the file has a Conv1d with a whole w2, which PEFT multiplies differently."""
        whole = any(W2 in at_site and at_site[W2].ndim == 3 for at_site in stored.values())
        return replace(variant, conv1d_of_peft=whole)

    def write_site(self, variant: LoKr, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        written = dict(tensors)
        if W2 in tensors and site.conv is not None:
            if site.kind is SiteKind.CONV1D and not variant.conv1d_of_peft:
                raise _misaligned(site.path)
            written[W2] = tensors[W2].reshape(tensors[W2].shape[0], -1, *site.conv.kernel)
        if CORE in tensors:
            written[CORE] = tensors[CORE].reshape(core_shape(site, tensors[CORE]))
        return written


def _factor_names(path: str, stored: Tensors) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the tensors that make up w1, and of the tensors that make up w2."""
    first = (W1,) if W1 in stored else (f"{W1}_a", f"{W1}_b")
    second: tuple[str, ...] = (W2,) if W2 in stored else (f"{W2}_a", f"{W2}_b")
    second = (CORE, *second) if CORE in stored else second
    axes = {W2: (2, 3, 4), CORE: (4,)}
    both = W2 in second and CORE in second
    if both or set(stored) != {*first, *second} or any(t.ndim not in axes.get(n, (2,)) for n, t in stored.items()):
        expected = f"{W1} is (l, m), {W2} (k, n), with out = l·k and in = m·n; or each in two factors"
        raise mismatched_shapes(path, stored, expected)
    return first, second


def _guess_kernel(variant: LoKr, path: str, stored: Tensors, m: int, columns: int) -> tuple[int, tuple[int, ...]]:
    """Return (n, kernel) of a flat w2_b (r, n·taps); assume a linear layer where its sizes fit."""
    for taps in (taps for taps in range(1, columns + 1) if columns % taps == 0):
        n = columns // taps
        if factors(m * n, read_factor(variant.decompose_factor)) == (m, n):
            return n, (taps, 1) if taps > 1 else ()
    expected = f"no layer is so divided by decompose_factor={variant.decompose_factor}"
    raise mismatched_shapes(path, stored, expected)


def _misaligned(path: str) -> FormatError:
    return unsupported_error(
        f"'{path}' is a Conv1d with a whole {W2}: what PEFT computes there is not a Kronecker product",
        next_step="train it with a rank below max(k, n)/2, so that lokr_w2 is factored, with conv1d_of_peft=True, or "
        "exclude the layer",
    )
