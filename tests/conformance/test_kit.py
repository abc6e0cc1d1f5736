"""The kit itself: a variant with one fault fails the check that is about it, and a sound one passes them all."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

import lorac
from lorac import ParamSpec, Role, SiteKind
from lorac.testing import HOSTS, Host, Oracle, conformance, samples
from lorac.variants import initialisers
from tests.refusing import refuses


@dataclass(frozen=True, kw_only=True)
class Sound(lorac.WeightVariant):
    """W' = W + s·B·A, with one fault if asked for."""

    r: int = 2
    scale: float = 1.0
    fault: str = ""

    name: ClassVar[str] = "kit-sound"
    paper: ClassVar[str] = "none"

    def params(self, site):
        wrong = Role.FROZEN if self.fault == "frozen" else Role.TRAINABLE
        start = initialisers.kaiming_uniform if self.fault == "init" else initialisers.zeros
        specs = {
            "A": ParamSpec((self.r, site.in_features), initialisers.kaiming_uniform, wrong),
            "B": ParamSpec((site.out_features, self.r), start),
        }
        return specs | ({"spare": ParamSpec((3,), initialisers.zeros)} if self.fault == "spare" else {})

    def weight(self, W, p):
        A = p.A.detach() if self.fault == "detached" else p.A
        return W + self.scale * (p.B @ A) * (W if self.fault == "formula" else 1)


@dataclass(frozen=True, kw_only=True)
class Bent(lorac.BranchVariant):
    """A branch that has no weight form."""

    name: ClassVar[str] = "kit-bent"
    paper: ClassVar[str] = "none"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})

    def params(self, site):
        return {"m": ParamSpec((site.out_features,), initialisers.zeros)}

    def branch(self, x, y, p, ctx):
        return y + p.m * torch.tanh(y)


ORACLE = Oracle(
    weight=lambda W, p, variant: W + variant.scale * np.einsum("or,ri->oi", p.B, p.A),
    count=lambda out, columns, variant: variant.r * (out + columns),
)
HOST = {"linear": HOSTS["linear"]}


def failing(variant, oracle=ORACLE):
    """Names of the checks that fail on one host, in eager."""
    found = set()
    for check in conformance(variant, oracle, targets=(), hosts=HOST):
        try:
            check()
        except AssertionError:
            found.add(check.name.rpartition("-")[2])
    return found


def test_a_sound_variant_passes():
    assert failing(Sound(r=3, scale=0.7)) == set()
    assert failing(Sound(r=3, scale=0.7), oracle=None) == set()


@pytest.mark.medium("a fault of the formula and one of training", keep=["formula-*", "frozen-*"])
@pytest.mark.parametrize(
    ("fault", "checks"),
    [
        ("formula", {"formula"}),
        ("init", {"identity_at_init"}),
        ("spare", {"influence", "training", "count"}),
        ("frozen", {"count"}),
        ("detached", {"training"}),
    ],
)
def test_a_fault_is_found(fault, checks):
    assert failing(Sound(r=3, scale=0.7, fault=fault)) == checks


@pytest.mark.medium("a scale of another sign", keep=["-1.0"])
@pytest.mark.parametrize("factor", [1.001, -1.0])
def test_a_wrong_scale_is_found(factor):
    wrong = Oracle(weight=lambda W, p, v: W + factor * v.scale * p.B @ p.A)
    assert failing(Sound(r=3, scale=0.7), wrong) == {"formula"}


def test_a_branch_without_a_weight_form_passes_and_its_weight_is_missed():
    oracle = Oracle(branch=lambda x, y, p, v: y + p.m * np.tanh(y))
    assert failing(Bent(), oracle) == set()
    claims = Oracle(branch=oracle.branch, weight=lambda W, p, v: W)
    assert failing(Bent(), claims) == {"formula", "modes"}


@dataclass(frozen=True, kw_only=True)
class Shared(lorac.WeightVariant):
    """W' = W + V over a V that all layers have in common, and that a layer must take its corner of."""

    sliced: bool = True

    name: ClassVar[str] = "kit-shared"
    paper: ClassVar[str] = "none"

    def params(self, site):
        return {"V": ParamSpec((site.out_features, site.in_features), initialisers.zeros, shared=True)}

    def weight(self, W, p):
        return W + (p.V[: W.shape[0], : W.shape[1]] if self.sliced else p.V)


def test_a_shared_tensor_that_is_not_cut_to_size_is_found():
    hosts = {name: HOSTS[name] for name in ("linear", "two_linear")}
    whole = Shared(sliced=False)
    for check in conformance(Shared(), targets=(), hosts=hosts):
        check()
    for check in conformance(whole, targets=(), hosts={"linear": HOSTS["linear"]}):
        check()
    (check,) = (c for c in conformance(whole, targets=(), hosts=hosts) if str(c).endswith("two_linear-sizes"))
    with refuses("formula_failed", match="kit-shared at 'first' raises RuntimeError") as raised:
        check()
    assert "W + (p.V[" in str(raised.value)


def test_samples():
    assert [(s.r, s.scale) for s in samples(Sound)] == [(3, 0.7), (1, 0.7)]
    hydra = [(s.r, s.r_sequential, s.scale, s.branch_bias) for s in samples(lorac.Hydra)]
    assert hydra == [(3, 1, 0.7, False), (1, 3, 0.7, False), (3, 1, 0.7, True)]
    assert [(s.r, s.rslora, s.lora_bias) for s in samples(lorac.LoRA, r=2)] == [
        (2, False, False),
        (2, True, False),
        (2, False, True),
    ]
    assert samples(lorac.LoRA(r=5)) == [lorac.LoRA(r=5)]


def test_check_names_are_unique_and_name_the_check():
    names = [str(check) for check in conformance(lorac.LoRA, targets=("onnxruntime",))]
    assert len(set(names)) == len(names)
    assert {"lora,r=3,alpha=5-conv-swapping", "lora,r=3,alpha=5-linear-onnxruntime-live"} < set(names)
    assert "lora,r=3,alpha=5-block-refused" in names
    assert "lora,r=3,alpha=5-two_linear-half" in names
    assert "lora,r=3,alpha=5-two_linear-onnxruntime-other_sizes" in names


@dataclass(frozen=True, kw_only=True)
class Named(lorac.BranchVariant):
    """y' = y + tanh(h)·mᵀ, h what the module ``lower`` returns."""

    name: ClassVar[str] = "kit-named"
    paper: ClassVar[str] = "none"

    def reads(self, site):
        return ("lower",)

    def params(self, site):
        return {"m": ParamSpec((site.out_features, 5), initialisers.zeros)}

    def branch(self, x, y, p, ctx):
        return y + torch.tanh(ctx.value("lower")) @ p.m.T


class Upper(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.upper = torch.nn.Linear(7, 5), torch.nn.Linear(5, 6)

    def forward(self, x):
        return self.upper(torch.tanh(self.lower(x)))


def test_a_method_that_names_a_module_is_given_a_host():
    (admitted, *_) = conformance(Named(), targets=())
    with pytest.raises(AssertionError, match="or hosts= a Host with the modules that it names"):
        admitted()
    host = Host("upper", SiteKind.LINEAR, Upper, (7,), path="upper")
    checks = conformance(Named(), targets=(), hosts={"upper": host})
    assert len(checks) > 5
    for check in checks:
        check()


class Inner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lower, self.upper = torch.nn.Linear(12, 6), torch.nn.Linear(6, 5)

    def forward(self, x):
        return self.upper(torch.tanh(self.lower(x)))


@pytest.mark.parametrize("method", [lorac.LoRA(), lorac.Hydra()], ids=lambda method: method.name)
def test_a_host_may_compute_more_after_its_site(method):
    """A branch and a weight: what is compared is the model's output with the site's as the formula has it."""
    host = Host("inner", SiteKind.LINEAR, Inner, (12,), path="lower")
    for check in conformance(method, targets=(), hosts={"inner": host}):
        check()


def test_rejects_a_host_that_does_not_say_how_its_site_computes():
    host = Host("conv", SiteKind.CONV2D, HOSTS["conv"].make, (3, 6, 5), batches=((4,),))
    with refuses("option_error", match="apply="):
        for check in conformance(lorac.LoRA(), targets=(), hosts={"conv": host}):
            check()
