"""PEFT types LOHA and LOKR."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_flag, read_size
from lorac.formats._errors import unsupported_error
from lorac.formats._site_layouts import conv_site, matrix_site
from lorac.formats.peft.fields import LYCORIS
from lorac.formats.peft.peft_type import PeftType, Tensors, core_shape, mismatched_shapes, take_tensors
from lorac.ir.sites.site import Site, SiteKind
from lorac.limits import check_time
from lorac.variants.base import Variant
from lorac.variants.lokr import LoHa, LoKr, factors

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
CORES = ("hada_t1", "hada_t2")
_EXPECTED = "hada_w1_a is (out, r), hada_w1_b (r, in); with hada_t1 (r, r, kh, kw) (r, out)"


class LohaType(PeftType[LoHa]):
    """LOHA.

    Source: peft.tuners.loha and peft.tuners.lycoris_utils of PEFT 0.21, which rounds alpha/r to float32. Shapes in a
    file, where in is the number of channels of a group:

        ===========================================  ========  ==================  =================
        site                                         w1_a …    w1_b …              t1, t2
        ===========================================  ========  ==================  =================
        linear, or convolution                       (out, r)  (r, in·kh·kw)       –
        convolution, kernel of more than one tap     (r, out)  (r, in)             (r, r, kh, kw)
        and use_effective_conv2d                                                   or (r, r, k, 1)
        ===========================================  ========  ==================  =================

    Flat factors do not show whether a site is a convolution, nor its groups.
    """

    peft_type = "LOHA"
    variants = {LoHa: {}}
    fields = LYCORIS
    suffixes = (*FACTORS, *CORES)
    kinds = frozenset({SiteKind.LINEAR, SiteKind.CONV1D, SiteKind.CONV2D})
    grouped = True

    def read_site(self, variant: LoHa, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        axes = dict.fromkeys(FACTORS, 2) | (dict.fromkeys(CORES, 4) if CORES[0] in stored else {})
        tensors = take_tensors(path, stored, axes, _EXPECTED)
        a, b = (tensors[name] for name in FACTORS[:2])
        if CORES[0] not in tensors:
            return matrix_site(path, a.shape[0], b.shape[1]), tensors
        site = conv_site(path, a.shape[1], b.shape[1], tuple(tensors[CORES[0]].shape[2:]), 1)
        return site, tensors | {name: tensors[name].flatten(2) for name in CORES}

    def write_site(self, variant: LoHa, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        cores = {name: tensors[name].reshape(core_shape(site, tensors[name])) for name in CORES if name in tensors}
        return {**tensors, **cores}


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
    """LOKR.

    Source: peft.tuners.lokr of PEFT 0.21. Shapes in a file, with out = l·k, and m·n channels in a group:

        w1                 (l, m), or w1_a (l, r) and w1_b (r, m)
        w2, linear         (k, n), or w2_a (k, r) and w2_b (r, n)
        w2, convolution    (k, n, kh, kw), or w2_a (k, r) and w2_b (r, n·kh·kw), or
                           w2_a (r, k), w2_b (r, n) and t2 (r, r, kh, kw), of a Conv1d (r, r, k, 1)

    Flat factors do not show whether a site is a convolution, nor its groups. For a Conv1d whose w2 (k, n, kw) is whole,
    PEFT multiplies other axes, and the result is not a Kronecker product (``LoKr.conv1d_of_peft``).
    """

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
            for taps in range(1, columns + 1):  # a linear layer, where its sizes fit
                check_time(taps)
                n, rest = divmod(columns, taps)
                if not rest and factors(m * n, read_factor(variant.decompose_factor)) == (m, n):
                    break
            else:
                expected = f"no layer is so divided by decompose_factor={variant.decompose_factor}"
                raise mismatched_shapes(path, stored, expected)
            kernel = (taps, 1) if taps > 1 else ()
        site = conv_site(path, l * k, m * n, kernel, 1) if kernel else matrix_site(path, l * k, m * n)
        axes = {CORE: 2, W2: 2 if w2 is not None and w2.ndim == 3 else 1}
        return site, {name: stored[name].flatten(axes.get(name, 1)) for name in (*first, *second)}

    def refine_variant(self, variant: LoKr, values: JsonMapping, stored: Mapping[str, Tensors]) -> Variant:
        """Set ``conv1d_of_peft`` where the file has a Conv1d with a whole w2, which PEFT multiplies differently."""
        whole = any(W2 in at_site and at_site[W2].ndim == 3 for at_site in stored.values())
        return replace(variant, conv1d_of_peft=whole)

    def write_site(self, variant: LoKr, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        written = dict(tensors)
        if W2 in tensors and site.conv is not None:
            if site.kind is SiteKind.CONV1D and not variant.conv1d_of_peft:
                raise unsupported_error(
                    f"'{site.path}' is a Conv1d with a whole {W2}: what PEFT computes there is not a Kronecker product",
                    next_step="train it with a rank below max(k, n)/2, so that lokr_w2 is factored, with "
                    "conv1d_of_peft=True, or exclude the layer",
                )
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
    # A tensor without values may have any number of columns, which the search for a kernel would go through.
    odd = (t.ndim not in axes.get(n, (2,)) or not t.numel() for n, t in stored.items())
    if both or set(stored) != {*first, *second} or any(odd):
        expected = f"{W1} is (l, m), {W2} (k, n), with out = l·k and in = m·n; or each in two factors"
        raise mismatched_shapes(path, stored, expected)
    return first, second
