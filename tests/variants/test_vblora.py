"""VB-LoRA by hand: the pieces of a vector, ties, and one bank for all sites."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.ir.algebra.changes import LowRank
from lorac.testing import assert_close, conformance
from tests.oracles import vblora as oracle
from tests.refusing import refuses

SMALL = {"num_vectors": 5, "vector_length": 2}


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def test_worked_example():
    """Softmax over logits 0 and ln 3 weighs 1/4 and 3/4, whatever lies below."""
    p = SimpleNamespace(
        vblora_vector_bank=tensor([[4.0, 0.0], [0.0, 4.0], [100.0, 100.0]]),
        vblora_logits_A=tensor([[[0.0, math.log(3), -1.0]]]),
        vblora_logits_B=tensor([[[math.log(3), 0.0, -9.0]]]),
    )
    delta = lorac.VBLoRA(r=1, num_vectors=3, vector_length=2).weight(torch.zeros(2, 2, dtype=torch.float64), p)
    assert_close(delta, tensor([[3.0, 9.0], [1.0, 3.0]]))


def test_prefers_the_first_of_equal_logits():
    p = SimpleNamespace(
        vblora_vector_bank=tensor([[1.0], [2.0], [3.0]]),
        vblora_logits_A=torch.zeros(1, 1, 3, dtype=torch.float64),
        vblora_logits_B=torch.zeros(1, 1, 3, dtype=torch.float64),
    )
    delta = lorac.VBLoRA(r=1, num_vectors=3, vector_length=1).weight(torch.zeros(1, 1, dtype=torch.float64), p)
    assert delta.tolist() == [[2.25]]


@pytest.mark.medium("the kit's hosts")
@pytest.mark.parametrize(
    "check",
    [
        check
        for check in conformance(lorac.VBLoRA(r=2, num_vectors=5, vector_length=1, topk=3), oracle, targets=())
        if check.name.endswith(("-formula", "-modes", "-refused", "-training"))
    ],
    ids=str,
)
def test_vectors_of_length_1_fit_every_kind_of_site(check):
    check()


def test_shapes():
    """90 vectors of 256 at a layer of 1024 x 1024: four pieces per row of A and column of B."""
    site = Site("site", SiteKind.LINEAR, 1024, 1024, torch.float32, "site.weight")
    shapes = {name: spec.shape for name, spec in lorac.VBLoRA(num_vectors=90).params(site).items()}
    assert shapes == {
        "vblora_vector_bank": (90, 256),
        "vblora_logits_A": (4, 4, 90),
        "vblora_logits_B": (4, 4, 90),
    }


class Host(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def host():
    return Host().double().eval()


def test_all_sites_train_a_shared_bank(tmp_path):
    model, x = host(), torch.randn(5, 8, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": lorac.VBLoRA(r=2, targets=("up", "down"), **SMALL)})
    adapter = compiled.adapters["a"]
    bank = adapter.tensors["up"]["vblora_vector_bank"]
    assert bank is adapter.tensors["down"]["vblora_vector_bank"]
    assert sum(p is bank for p in compiled.parameters()) == 1
    assert adapter.numel() == 5 * 2 + 5 * 2 * (8 + 12 + 12 + 6) // 2
    compiled(x).square().sum().backward()
    assert bank.grad is not None and bank.grad.any()
    values = compiled.pool["a"].changes
    assert all(isinstance(value, LowRank) and value.rank == 2 and not value.scales for value in values.values())
    lorac.save_adapter(adapter, tmp_path / "a.safetensors", format="native", model=model)
    loaded = lorac.load_adapter(tmp_path / "a.safetensors", model)
    assert loaded.tensors["up"]["vblora_vector_bank"] is loaded.tensors["down"]["vblora_vector_bank"]


@torch.no_grad()
def test_a_trained_bank_shows_at_every_site():
    model, x = host(), torch.randn(5, 8, dtype=torch.float64)
    compiled = lorac.compile(model, {"a": lorac.VBLoRA(r=2, targets=("up", "down"), **SMALL)}, active="a")
    compiled.adapters["a"].tensors["up"]["vblora_vector_bank"].mul_(-10)
    assert torch.equal(compiled(x), lorac.compile(model, {"a": compiled.adapters["a"]})(x))


@pytest.mark.parametrize(
    ("fields", "code"), [({"vector_length": 5}, "site_unsupported"), ({"topk": 6}, "option_error")]
)
def test_sizes_that_do_not_fit(fields, code):
    (name, value), *_ = fields.items()
    with refuses(code, match=f"{name}={value}"):
        lorac.compile(host(), {"a": lorac.VBLoRA(targets=("up",), **{**SMALL, **fields})})


def test_a_bank_wider_than_the_vectors_is_taken_in_part() -> None:
    """What all sites share may be larger in every axis than one of them asks."""
    variant = lorac.VBLoRA(r=1, num_vectors=3, vector_length=2, topk=2)
    p = SimpleNamespace(vblora_logits_A=torch.randn(1, 2, 3), vblora_logits_B=torch.randn(3, 1, 3))
    W, bank = torch.randn(6, 4), torch.randn(3, 5)
    wide = variant.weight(W, SimpleNamespace(vblora_vector_bank=bank, **vars(p)))
    assert torch.equal(wide, variant.weight(W, SimpleNamespace(vblora_vector_bank=bank[:, :2], **vars(p))))
