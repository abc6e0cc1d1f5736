"""AutoLoRA's gated fusion: the oracles of its paper, and gates that follow the token, the layer and the timestep."""

import pytest
import torch
from safetensors.torch import save_file

import lorac
from lorac.testing import assert_close
from tests.limits import decimals
from tests.parity import assert_parity
from tests.refusing import refuses
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


def test_closed_gates_add_nothing():
    compiled, held = hand()
    held["weight_out"].data.zero_()
    assert torch.equal(answer(compiled), O)
    held["weight_out"].data.fill_(0.5)
    held["bias"].data.fill_(1)
    held["lora_B"].data.zero_()
    assert torch.equal(answer(compiled), O)


@torch.no_grad()
def test_the_order_of_loras_and_zero_loras_do_not_matter():
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


@pytest.mark.medium("fused", cases=["baked"])
@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_gates_have_no_weight_form(mode):
    model = host()
    with refuses("not_mergeable", match=r"no weight form[\s\S]*lorac\.freeze_router"):
        lorac.compile(model, {"a": lorac.AutoLoRA.from_loras(loras(model, (X,)))}, mode=mode)


def test_only_plain_loras_are_fused():
    model = host()
    with pytest.raises(lorac.AdapterError, match="AutoLoRA routes between plain LoRAs"):
        lorac.AutoLoRA.from_loras([drawn(lorac.DoRA(r=2, targets=["line"]), model, "d")])
    with pytest.raises(lorac.AdapterError, match="none is given"):
        lorac.AutoLoRA.from_loras([])


def merger(adapter, *, base=True):
    """The gates of an adapter as the authors' merger keeps them."""
    names = {"norm_base_weight": "norm_base.weight", "norm_base_bias": "norm_base.bias"}
    names |= {"norm_lora_weight": "norm_lora.weight", "norm_lora_bias": "norm_lora.bias"}
    return {
        f"model_dict.{path.replace('.', '___')}.{names.get(key, key)}": tensor.detach().clone()
        for path, own in adapter.tensors.items()
        for key, tensor in own.items()
        if not key.startswith("lora_") and (base or key != "weight_base")
    }


@pytest.mark.medium("the other", cases=["True"])
@pytest.mark.parametrize("base", [True, False])
def test_the_gates_of_the_authors_merger_are_taken(base):
    model = host()
    given = loras(model, (X,))
    trained = drawn(lorac.AutoLoRA.from_loras(given, base=base), model, "a")
    found = lorac.AutoLoRA.from_loras(given, gates=merger(trained, base=base))
    assert found.variant == trained.variant
    for key, tensor in found.tensors["line"].items():
        assert key.startswith("lora_") or torch.equal(tensor, trained.tensors["line"][key])


def test_gates_that_do_not_read_the_layer_keep_its_norm():
    """The authors' ``no_cross`` gates have a norm of the layer's output, which their forward pass does not use."""
    model = host()
    given = loras(model, (X,))
    trained = drawn(lorac.AutoLoRA.from_loras(given, base=False, cross=False), model, "a")
    gates = merger(trained) | {f"model_dict.line.norm_base.{kind}": torch.ones(5) for kind in ("weight", "bias")}
    found = lorac.AutoLoRA.from_loras(given, gates=gates)
    assert found.variant == trained.variant
    assert set(found.tensors["line"]) == set(trained.tensors["line"])


def test_rejects_a_merger_that_does_not_fit(tmp_path):
    model = host()
    given = loras(model, (X,))
    gates = merger(lorac.AutoLoRA.from_loras(given))
    one = "model_dict.line.weight_lora"
    wrong = [
        ({"embedder.x": X}, lorac.FormatError, "not a tensor of an AutoLoRA gate"),
        ({"model_dict.other___line.bias": X}, lorac.FormatError, "a gate for 'other.line'"),
        ({one: None}, lorac.FormatError, "lacks 'weight_lora'"),
        ({one: torch.ones(3)}, lorac.AdapterError, r"is \(3,\), and the layer's is \(5,\)"),
    ]
    for changed, error, text in wrong:
        held = {key: tensor for key, tensor in (gates | changed).items() if tensor is not None}
        with pytest.raises(error, match=text):
            lorac.AutoLoRA.from_loras(given, gates=held)
    save_file(gates, tmp_path / "merger.safetensors")
    with refuses("unsupported_field", match="gates of AutoLoRA's merger"):
        lorac.load_adapter(tmp_path / "merger.safetensors")
