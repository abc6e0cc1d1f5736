"""Branches that the algebra finds affine, by their ops and never by their numbers, and those that it does not."""

import pytest
import torch
import torch.nn.functional as F

import lorac
from lorac.ir.algebra.changes import from_outputs, merge_bias, merge_weight
from lorac.ir.algebra.reduction import BRANCH, Params, reduce_branch
from lorac.ir.slots.execution import FormulaContext
from lorac.testing import HOSTS, Case, assert_close, assert_parity

OUT, IN = 6, 5


def tensors(shapes):
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


AFFINE = {
    "parallel": (lambda x, y, p: y + F.linear(F.linear(x, p.D), p.U), {"D": (2, IN), "U": (OUT, 2)}, "low-rank"),
    "parallel, as products": (lambda x, y, p: y + x @ p.D @ p.U, {"D": (IN, 2), "U": (2, OUT)}, "low-rank"),
    "sequential with biases": (
        lambda x, y, p: y - 0.3 * F.linear(F.linear(y, p.D, p.c), p.U, p.e),
        {"D": (2, OUT), "U": (OUT, 2), "c": (2,), "e": (OUT,)},
        "low-rank",
    ),
    "scaled and shifted": (lambda x, y, p: p.m * y + p.e, {"m": (OUT,), "e": (OUT,)}, "low-rank"),
    "number": (lambda x, y, p: y * p.t, {"t": ()}, "low-rank"),
    "without the base": (lambda x, y, p: F.linear(x, p.M), {"M": (OUT, IN)}, "dense"),
    "copied": (lambda x, y, p: y.clone() + F.linear(x.clone(), p.M), {"M": (OUT, IN)}, "delta"),
}
NOT = {
    "squared": (lambda x, y, p: y + y * y * p.m, {"m": (OUT,)}),
    "gelu": (lambda x, y, p: y + F.linear(F.gelu(F.linear(y, p.D)), p.U), {"D": (2, OUT), "U": (OUT, 2)}),
    "normalised": (lambda x, y, p: F.layer_norm(y, (OUT,), p.m), {"m": (OUT,)}),
    "gated": (lambda x, y, p: y + torch.sigmoid(F.linear(x, p.g)) * y, {"g": (1, IN)}),
    "over tokens": (lambda x, y, p: y - p.m * y.mean(0), {"m": (OUT,)}),
    "as a weight": (lambda x, y, p: y + F.linear(x, p.M) * F.linear(x, p.M), {"M": (OUT, IN)}),
    "vector": (lambda x, y, p: y + (x @ p.v)[:, None], {"v": (IN,)}),
}


@pytest.mark.parametrize(("branch", "shapes", "form"), AFFINE.values(), ids=AFFINE)
def test_affine(branch, shapes, form):
    p = tensors(shapes)
    reduction = reduce_branch(branch, (OUT, IN), p, torch.float64)
    assert reduction.form == form, reduction.reasons
    w, b, x = tensors({"W": (OUT, IN), "b": (OUT,), "x": (3, 4, IN)}).values()
    expected = branch(x, F.linear(x, w, b), Params(**p))
    for table in ((), None):
        chosen = reduction if table is None else reduce_branch(branch, (OUT, IN), p, torch.float64, table)
        value = from_outputs(chosen.form, chosen(w, b, [p[n] for n in chosen.params]), b)
        found = F.linear(x, merge_weight(value, w), merge_bias(value, b))
        assert_close(found, expected)


@pytest.mark.parametrize(("branch", "shapes"), NOT.values(), ids=NOT)
@pytest.mark.parametrize("zero", [False, True], ids=["away", "zero"])
def test_not_affine(branch, shapes, zero):
    """Also where every parameter is zero and the branch happens to be the identity."""
    p = {name: t * (0 if zero else 1) for name, t in tensors(shapes).items()}
    reduction = reduce_branch(branch, (OUT, IN), p, torch.float64)
    assert reduction.form == BRANCH
    assert reduction.reasons == ("not affine in x and y",)


@pytest.mark.medium("layers with a bias and without", keep=["linear-True", "no_bias-False"])
@pytest.mark.parametrize("branch_bias", [False, True])
@pytest.mark.parametrize("host", ["linear", "no_bias"])
def test_hydra_is_found_affine(branch_bias, host):
    variant = lorac.Hydra(r=3, r_sequential=2, scale=0.7, branch_bias=branch_bias)
    case = Case(variant, HOSTS[host])
    p, site = case.a.tensors["site"], case.site
    reduction = reduce_branch(
        lambda x, y, p: variant.branch(x, y, p, FormulaContext(site)),
        (site.out_features, site.in_features),
        p,
        torch.float64,
    )
    assert (reduction.form, reduction.rank) == ("low-rank", 5)
    assert set(reduction.outputs) == {"a", "b", "bias"}


@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_hydra_and_lora_add_up(mode):
    """Under Sum, Hydra's sequential half reads the base's output, not the LoRA's."""
    hydra = Case(lorac.Hydra(r=3, r_sequential=2, scale=0.7), HOSTS["linear"])
    lora = Case(lorac.LoRA(r=2, alpha=3), HOSTS["linear"])
    x, base = hydra.x, hydra.base(hydra.x)
    delta = lora.live(x) - base
    one, other = lora.a, hydra.b
    compiled = lorac.compile(hydra.model, {"a": one, "b": other}, mode=mode, active={"a": 1.0, "b": 1.0})

    alone = hydra.compiled(other)(x)

    assert_parity(compiled(x), alone + delta, base)
    p = other.tensors["site"]
    chained = compiled(x) + 0.7 * F.linear(F.linear(delta, p["sequential_down"]), p["sequential_up"])
    with pytest.raises(AssertionError, match="off by"):
        assert_parity(chained, alone + delta, base)


class OfItsSite(lorac.BranchVariant):
    """y' = y + n·s∘x, n the number of the layer."""

    name = "affine_at_its_site"

    def params(self, site):
        return {"s": lorac.ParamSpec((1,), lambda context: torch.full(context.shape, 0.3))}

    def branch(self, x, y, p, ctx):
        return y + (1 + int(ctx.site.path)) * p.s * x


def test_a_formula_that_reads_its_site_has_no_form_for_others():
    host, x = torch.nn.Sequential(*(torch.nn.Linear(OUT, OUT) for _ in range(2))), torch.randn(3, OUT)
    first = host[0](x) + 0.3 * x
    compiled = lorac.compile(host, {"a": OfItsSite(targets=["0", "1"])})
    assert_close(compiled(x), host[1](first) + 0.6 * first)
    assert "reads which site it is at" in str(compiled.explain())
