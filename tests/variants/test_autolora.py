"""AutoLoRA's gated fusion: the oracles of its paper, and gates that follow the token, the layer and the timestep."""

import pytest
import torch

import lorac
from lorac.testing.checks import assert_close
from tests.limits import decimals
from tests.parity import assert_parity
from tests.variants.away import away, drawn
from tests.variants.routers import X, host, loras

O = torch.tensor([1.0, -1, 0, 2], dtype=torch.float64)
L = torch.tensor([[0.5, 0.5, -1, 0], [1, 0, 0, -1]], dtype=torch.float64)


def hand(**fields):
    """A layer that answers O, and two LoRAs that answer the rows of L, to the input 1."""
    model = torch.nn.Sequential(torch.nn.Linear(1, 4)).double().eval()
    model[0].weight.data.zero_()
    model[0].bias.data.copy_(O)
    compiled = lorac.compile(model, {"a": lorac.AutoLoRA(r=1, targets=["0"], **fields)})
    held = compiled.adapters["a"].tensors["0"]
    held["lora_A"].data.fill_(1)
    held["lora_B"].data.copy_(L.T)
    for name in held.keys() & {"weight_base", "weight_lora", "weight_cross", "bias"}:
        held[name].data.zero_()
    return compiled, held


def answer(compiled):
    with torch.no_grad():
        return compiled(torch.ones(1, 1, dtype=torch.float64))[0]


def test_the_hand_computed_answers():
    compiled, held = hand(base=False, cross=False)
    assert held.keys() == {
        *("lora_A", "lora_B", "weight_lora", "bias", "weight_out", "norm_lora_weight", "norm_lora_bias")
    }
    assert decimals(answer(compiled), 3) == [1.384, -0.872, -0.256, 1.744]
    held["weight_lora"].data.fill_(1)
    assert decimals(answer(compiled), 4) == [1.5894, -0.8225, -0.0837, 1.8999]


def test_nothing_is_let_out_or_nothing_is_added():
    compiled, held = hand()
    held["weight_out"].data.zero_()
    assert torch.equal(answer(compiled), O)
    held["weight_out"].data.fill_(0.5)
    held["bias"].data.fill_(1)
    held["lora_B"].data.zero_()
    assert torch.equal(answer(compiled), O)


@torch.no_grad()
def test_the_order_of_the_loras_does_not_matter_and_one_of_zeros_adds_nothing():
    model = host()
    given = loras(model, (X,))[:3]
    zeros = lorac.Adapter("z", given[0].variant, {"line": {k: 0 * t for k, t in given[0].tensors["line"].items()}})
    base = model(X)
    reference = lorac.compile(model, {"a": lorac.AutoLoRA.from_loras(given)})(X)
    assert not torch.equal(reference, base)
    for other in (given[::-1], [*given, zeros]):
        fused = lorac.AutoLoRA.from_loras(other)
        assert fused.variant.experts == len(other)
        assert_parity(lorac.compile(model, {"a": fused})(X), reference, base)


@torch.no_grad()
def test_the_size_of_a_lora_hardly_moves_its_gate():
    compiled, held = hand()
    for name in ("weight_base", "weight_lora", "weight_cross"):
        held[name].data.copy_(torch.tensor([0.3, -0.5, 0.7, 0.2]))
    held["lora_B"].data[:, 1] = 0
    once = answer(compiled) - O
    held["lora_B"].data.mul_(3)
    assert decimals(answer(compiled) - O, 3) == decimals(3 * once, 3)


class Denoiser(torch.nn.Module):
    """Two layers over tokens to which a timestep is added."""

    def __init__(self):
        super().__init__()
        self.up, self.down = torch.nn.Linear(7, 6), torch.nn.Linear(6, 7)

    def forward(self, x, timestep):
        return self.down(torch.tanh(self.up(x + torch.sin(timestep)[:, None, None])))


@torch.no_grad()
def test_gates_follow_the_token_the_layer_and_the_timestep():
    model = Denoiser().double().eval()
    inputs = (X[:1].expand(2, -1, -1), torch.tensor([0.1, 1.4], dtype=torch.float64))
    adapter = away(lorac.AutoLoRA(r=2, targets=["up", "down"]), model, inputs, "a")
    compiled = lorac.compile(model, {"a": adapter}, aux=["router"])
    compiled(*inputs)
    gates = compiled.aux["router"]
    assert gates["up"].shape == gates["down"].shape == (2, 4, 2)
    assert bool(((gates["up"] > 0) & (gates["up"] < 1)).all())
    early, late = (decimals(of_row, 3) for of_row in gates["up"].flatten(1))
    assert early != late
    assert len({tuple(decimals(token, 3)) for token in gates["up"][0]}) == 4
    assert early != decimals(gates["down"][0].flatten(), 3)
    for row in range(2):  # and nothing else of the batch
        compiled(*(value[row : row + 1] for value in inputs))
        assert_close(compiled.aux["router"]["up"], gates["up"][row : row + 1])


@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_gates_have_no_weight_form(mode):
    model = host()
    with pytest.raises(lorac.NotMergeable, match="no weight form"):
        lorac.compile(model, {"a": lorac.AutoLoRA.from_loras(loras(model, (X,)))}, mode=mode)


def test_only_plain_loras_are_fused():
    model = host()
    with pytest.raises(lorac.AdapterError, match="AutoLoRA routes between plain LoRAs"):
        lorac.AutoLoRA.from_loras([drawn(lorac.DoRA(r=2, targets=["line"]), model, "d")])
    with pytest.raises(lorac.AdapterError, match="at least one"):
        lorac.AutoLoRA.from_loras([])
