"""RandLoRA by hand, and the draw of its bases against PEFT's."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import RandLoraConfig, get_peft_model
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.algebra.changes import Delta
from lorac.testing import assert_close
from tests.oracles import randlora as oracle
from tests.parity import assert_parity


class Host(nn.Module):
    """Layers of (20, 100), (80, 50) and (50, 20): both orientations, no two of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(100, 20), nn.Linear(20, 50), nn.Linear(50, 80)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


TARGETS = ("first", "second", "third")


def host(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Host().to(dtype).eval()


@torch.no_grad()
def drawn(variant, model, spread=0.3):
    """A fresh adapter with λ away from zero and γ uneven."""
    found = lorac.compile(model, {"a": variant}).adapters["a"]
    generator = torch.Generator().manual_seed(2)
    for tensors in found.tensors.values():
        for name in ("randlora_lambda", "randlora_gamma"):
            noise = torch.randn(tensors[name].shape, generator=generator, dtype=torch.float64)
            tensors[name].add_(spread * noise / tensors["randlora_gamma"].shape[1])
    return found


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_worked_example():
    p = SimpleNamespace(
        randlora_A=tensor([[[1.0, 2.0]]]),
        randlora_B=tensor([[[1.0], [0.0]], [[0.0], [1.0]]]),
        randlora_lambda=tensor([[3.0, 5.0]]),
        randlora_gamma=tensor([[1.0, 0.5], [2.0, 1.0]]),
    )
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert lorac.RandLoRA(r=1, alpha=1).weight(zero, p).tolist() == [[3.0, 3.0], [10.0, 10.0]]


def test_published_count():
    """Llama-3.2-3B, r = 32 on q and v of 28 layers."""
    total = 0
    for out in (3072, 1024):
        site = Site("site", SiteKind.LINEAR, out, 3072, torch.float32, "site.weight")
        specs = lorac.RandLoRA(r=32).params(site)
        total += 28 * sum(math.prod(spec.shape) for spec in specs.values() if not spec.shared)
    assert total == 9_289_728


@pytest.mark.parametrize(("out", "columns"), [(11, 7), (7, 11)])
def test_rank_is_full_and_the_papers_pairing_another(out, columns):
    generator = torch.Generator().manual_seed(0)
    variant = lorac.RandLoRA(r=3, alpha=3)
    site = Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight")
    p = SimpleNamespace(
        **{
            name: torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            for name, spec in variant.params(site).items()
        }
    )
    delta = variant.weight(torch.zeros(out, columns, dtype=torch.float64), p)
    assert torch.linalg.matrix_rank(delta) == 7
    paper = torch.einsum("Djk,kj,kd,jd->Dd", p.randlora_B, p.randlora_lambda, p.randlora_A[:, 0], p.randlora_gamma)
    found = delta if out > columns else delta.t()
    assert torch.linalg.vector_norm(paper - found) > 0.5 * torch.linalg.vector_norm(found)


@torch.no_grad()
def test_sites_share_a_pair_of_bases():
    model = host()
    adapter = drawn(lorac.RandLoRA(r=6, alpha=30, targets=TARGETS), model)
    held = adapter.tensors.values()
    assert len({id(t["randlora_A"]) for t in held}) == len({id(t["randlora_B"]) for t in held}) == 1
    assert next(iter(held))["randlora_A"].shape == (6, 1, 50)
    assert next(iter(held))["randlora_B"].shape == (100, 9, 6)
    x = torch.randn(5, 100, dtype=torch.float64)
    live, fused = (lorac.compile(model, {"a": adapter}, mode=mode) for mode in ("live", "fused"))
    assert_parity(fused(x), live(x), model(x))
    for value in live.pool["a"].changes.values():
        assert isinstance(value, Delta)
    live.swap(None)
    assert torch.equal(live(x), model(x))


@torch.no_grad()
def test_both_orientations_are_the_dense_sum():
    """100 -> 20 and 20 -> 50 -> 80, every site from its corner of A (6, 1, 50) and B (100, 9, 6)."""
    model = host()
    adapter = drawn(lorac.RandLoRA(r=6, alpha=30, targets=TARGETS), model)
    baked = lorac.compile(model, {"a": adapter}, mode="baked")
    for path, tensors in adapter.tensors.items():
        weight = model.get_submodule(path).weight
        p = SimpleNamespace(**{name: value.numpy() for name, value in tensors.items()})
        expected = torch.from_numpy(oracle.weight(torch.zeros_like(weight).numpy(), p, adapter.variant))
        assert_close(baked.host.get_submodule(path).weight, weight + expected)


@pytest.mark.parametrize(("out", "columns"), [(11, 7), (7, 11)])
def test_gradients(out, columns):
    """∂λ[k, j] = Σᵢ G·A[k, i]·γ[j, i] and ∂γ[j, i] = Σₖ G·A[k, i]·λ[k, j], G[k, j, i] that of λ∘A∘γ."""
    generator = torch.Generator().manual_seed(0)
    variant = lorac.RandLoRA(r=3, alpha=5)
    site = Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight")
    shapes = {name: spec.shape for name, spec in variant.params(site).items()}
    p = SimpleNamespace(
        **{n: torch.randn(shape, generator=generator, dtype=torch.float64) for n, shape in shapes.items()}
    )
    p.randlora_lambda.requires_grad_()
    p.randlora_gamma.requires_grad_()
    upstream = torch.randn(out, columns, generator=generator, dtype=torch.float64)
    variant.weight(torch.zeros(out, columns, dtype=torch.float64), p).backward(upstream)
    tall = upstream if out > columns else upstream.t()
    # Row k·n + j of the scaled A meets that column of the flattened B.
    G = (5 / 3 * p.randlora_B.flatten(1).t() @ tall).reshape(3, 3, 7)
    A = p.randlora_A[:, 0]
    of_lambda = torch.einsum("kji,ki,ji->kj", G, A, p.randlora_gamma)
    of_gamma = torch.einsum("kji,ki,kj->ji", G, A, p.randlora_lambda)
    assert_close(p.randlora_lambda.grad, of_lambda.detach())
    assert_close(p.randlora_gamma.grad, of_gamma.detach())


@pytest.mark.medium("one law", keep=["law0"])
@pytest.mark.parametrize("law", [{}, {"sparse": True}, {"very_sparse": True}, {"sparse": True, "very_sparse": True}])
def test_a_fresh_adapter_equals_pefts(law):
    settings = {"r": 6, "projection_prng_key": 5, **law}
    config = RandLoraConfig(target_modules=["second", "third"], **settings)
    wrapped = get_peft_model(host(torch.float32), config)
    variant = lorac.RandLoRA(targets=("second", "third"), **settings)
    adapter = lorac.compile(host(torch.float32), {"a": variant}).adapters["a"]
    for path, tensors in adapter.tensors.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for name, found in tensors.items():
            assert torch.equal(found, getattr(layer, name)["default"]), (path, name)


def test_an_adapters_file_holds_the_bases_once(tmp_path):
    model = host(torch.float32)
    adapter = lorac.compile(model, {"a": lorac.RandLoRA(r=6, targets=TARGETS)}).adapters["a"]
    lorac.save_adapter(adapter, tmp_path / "a.safetensors", format="native", model=model)
    assert (tmp_path / "a.safetensors").stat().st_size < 4 * adapter.numel() + 8_000
