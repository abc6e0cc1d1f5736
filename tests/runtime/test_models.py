"""Several models compiled together: each is called by its name, and one swap switches them all."""

import pytest
import torch
from torch import nn

import lorac


class Scorer(nn.Module):
    def __init__(self, columns, out):
        super().__init__()
        self.proj = nn.Linear(columns, out, dtype=torch.float64)

    def forward(self, x, *, scale=1.0):
        return {"score": scale * self.proj(x)}


@pytest.fixture
def models():
    torch.manual_seed(0)
    return {"unet": Scorer(6, 5).eval(), "text_encoder": Scorer(6, 3).eval()}


def compiled(models, mode="live"):
    made = lorac.compile(models, {"a": lorac.LoRA(r=2), "b": lorac.DoRA(r=1)}, active=None).adapters
    with torch.no_grad():
        for adapter in made.values():
            for tensor in adapter.parameters():
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    return lorac.compile(models, made, mode=mode, active=None)


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)


@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_one_swap_switches_all(mode, models):
    both = compiled(models, mode)
    assert list(both.sites) == ["unet.proj", "text_encoder.proj"]
    for choice in ("a", {"a": 0.5, "b": 0.5}, None):
        both.swap(choice)
        for name, model in models.items():
            alone = {path.removeprefix(f"{name}."): at for path, at in both.adapters["a"].tensors.items()}
            found, base = both[name](X, scale=2.0)["score"], model(X, scale=2.0)["score"]
            assert torch.equal(found, both(name, X, scale=2.0)["score"])
            if choice == "a":
                p = alone["proj"]
                moved = 2.0 * (X @ p["lora_A"].t() @ p["lora_B"].t())
                torch.testing.assert_close(found, base + moved * both.adapters["a"].variant.scale)
            assert torch.equal(found, base) == (choice is None)


@torch.no_grad()
def test_a_choice_for_one_call(models):
    both = compiled(models)
    chosen = both["unet"](X, adapters="a")["score"]
    assert torch.equal(both["unet"](X)["score"], models["unet"](X)["score"])
    both.swap("a")
    assert torch.equal(both["unet"](X)["score"], chosen)
    rows = both["unet"](X, adapters=[None, "a"])["score"]
    torch.testing.assert_close(rows, torch.stack([models["unet"](X)["score"][0], chosen[1]]))


def test_they_train_together(models):
    both = lorac.compile(models, {"a": lorac.LoRA(r=2)}).train()
    (both["unet"](X)["score"].sum() + both["text_encoder"](X)["score"].sum()).backward()
    assert all(at["lora_B"].grad.abs().sum() > 0 for at in both.adapters["a"].tensors.values())


@pytest.mark.parametrize("call", [lambda both: both["unett"](X), lambda both: both(X)])
def test_no_such_model(call, models):
    with pytest.raises(lorac.ChoiceError, match="none of these models") as error:
        call(compiled(models))
    assert "unet" in str(error.value)


@pytest.mark.parametrize(
    "ask",
    [
        lambda models, tmp: lorac.compile(models, {"a": lorac.LoRA(r=2)}, target="onnxruntime", example_inputs=(X,)),
        lambda models, tmp: compiled(models).graph["main"],
        lambda models, tmp: compiled(models).export(target="onnxruntime"),
    ],
    ids=["onnxruntime", "graph", "export"],
)
def test_they_have_no_one_graph(ask, models, tmp_path):
    with pytest.raises(lorac.Unavailable, match="unet, text_encoder") as error:
        ask(models, tmp_path)
    assert "each of them by itself" in str(error.value)


def test_one_model_is_not_indexed(models):
    with pytest.raises(TypeError):
        lorac.compile(models["unet"], {})["unet"]
