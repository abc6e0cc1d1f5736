"""Several models compiled together: each is called by its name, and one swap switches them all, on every target."""

import numpy as np
import pytest
import torch
from torch import nn

import lorac
from lorac.runtime.traits import ModelTraits, StoredConfig
from lorac.testing import assert_close
from tests.runtime.artifacts import alone


class Scorer(nn.Module):
    def __init__(self, columns, out):
        super().__init__()
        self.proj = nn.Linear(columns, out, dtype=torch.float64)
        self.config = StoredConfig(columns=columns)

    def forward(self, x, scale=1.0, *, return_dict=True):
        score = scale * self.proj(x)
        return {"score": score} if return_dict else (score,)


@pytest.fixture
def models():
    torch.manual_seed(0)
    return {"unet": Scorer(6, 5).eval(), "text_encoder": Scorer(4, 3).eval()}


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6)
Y = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
INPUTS = {"unet": X, "text_encoder": Y}


def compiled(models, mode="live", target="eager"):
    made = lorac.compile(models, {"a": lorac.LoRA(r=2), "b": lorac.DoRA(r=1)}, active=None).adapters
    with torch.no_grad():
        for adapter in made.values():
            for tensor in adapter.parameters():
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    examples = {"unet": (X,), "text_encoder": {"x": Y}}
    return lorac.compile(models, made, target=target, mode=mode, active=None, example_inputs=examples)


@pytest.mark.medium("live", cases=["fused-onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@torch.no_grad()
def test_a_swap_switches_all_components(mode, target, models, tmp_path):
    both = compiled(models, mode, target)
    assert list(both.sites) == ["unet.proj", "text_encoder.proj"]
    base = {name: both[name](x)["score"] for name, x in INPUTS.items()}
    for choice in ("a", {"a": 0.5, "b": 0.5}, None, "a"):
        report = both.swap(choice)
        for name, model in models.items():
            found = both[name](INPUTS[name])["score"]
            if choice == "a":
                p = both.adapters["a"].tensors[f"{name}.proj"]
                moved = INPUTS[name] @ p["lora_A"].t() @ p["lora_B"].t()
                assert_close(found, model(INPUTS[name])["score"] + moved * both.adapters["a"].variant.scale)
            assert torch.equal(found, base[name]) == (choice is None)
        assert choice is None or report.sites == 2
    if target == "onnxruntime":
        both.save(tmp_path / "it")
        for name in models:  # each program runs alone, and an adapter has a file for each
            model, adapter = tmp_path / f"it/graphs/{name}/model.onnx", tmp_path / f"it/adapters/a.{name}.onnx_adapter"
            answer = alone(model, {"x": INPUTS[name]}, adapter)
            assert torch.equal(answer["score"], both[name](INPUTS[name])["score"])


@torch.no_grad()
def test_off_is_the_host_bit_for_bit_in_eager(models):
    both = compiled(models)
    for name, model in models.items():
        assert torch.equal(both[name](INPUTS[name], scale=2.0)["score"], model(INPUTS[name], scale=2.0)["score"])


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@torch.no_grad()
def test_a_component_answers_as_its_model(target, models):
    both = compiled(models, target=target)
    for name, model in models.items():
        component = both[name]
        assert component.config.columns == model.config.columns
        assert (component.dtype, component.device) == (torch.float64, torch.device("cpu"))
        (score,) = component(INPUTS[name], return_dict=False)
        assert torch.equal(score, component(x=INPUTS[name], return_dict=True)["score"])
        if target != "eager":
            assert isinstance(component(INPUTS[name].numpy())["score"], np.ndarray)


@torch.no_grad()
def test_accepts_a_choice_for_one_call(models):
    both = compiled(models)
    chosen = both["unet"](X, adapters="a")["score"]
    assert torch.equal(both["unet"](X)["score"], models["unet"](X)["score"])
    both.swap("a")
    assert torch.equal(both["unet"](X)["score"], chosen)
    rows = both["unet"](X, adapters=[None, "a"])["score"]
    assert_close(rows, torch.stack([models["unet"](X)["score"][0], chosen[1]]))


def test_they_train_together(models):
    both = lorac.compile(models, {"a": lorac.LoRA(r=2)}).train()
    (both["unet"](X)["score"].sum() + both["text_encoder"](Y)["score"].sum()).backward()
    assert all(at["lora_B"].grad.abs().sum() > 0 for at in both.adapters["a"].tensors.values())


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@torch.no_grad()
def test_saved_and_loaded_they_answer_the_same(target, models, tmp_path):
    both = compiled(models, target=target)
    both.swap("b")
    both.save(tmp_path / "both")
    again = lorac.load(tmp_path / "both")
    for name, x in INPUTS.items():
        assert_close(again[name](x)["score"], both[name](x)["score"])
        assert again[name].config.columns == models[name].config.columns
    again.swap(None)
    both.swap(None)
    assert_close(again["unet"](X)["score"], both["unet"](X)["score"])


@pytest.mark.medium("test_a_swap_switches_all_components")
def test_every_component_has_a_graph_of_its_own(models):
    both = compiled(models, target="onnxruntime")
    assert list(both.graph) == ["unet", "text_encoder"]
    assert "unet.proj" in str(both.graph["unet"].after("insert"))
    assert "text_encoder" not in str(both.graph["unet"])


def test_a_component_without_adapters_runs_unchanged(models):
    only = lorac.compile(
        models,
        {"a": lorac.LoRA(r=2, targets=["unet.proj"])},
        target="onnxruntime",
        example_inputs={"unet": (X,), "text_encoder": (Y,)},
    )
    assert_close(only["text_encoder"](Y)["score"], models["text_encoder"](Y)["score"].detach())
    assert [slot.site for slot in only.engine.graphs["text_encoder"].slots.values()] == []


@pytest.mark.medium("training/initialisation/test_everywhere.py exports a model")
def test_exported_they_run_elsewhere(models):
    exported = compiled(models).export(target="onnxruntime", example_inputs={"unet": (X,), "text_encoder": (Y,)})
    assert_close(exported["unet"](X)["score"], models["unet"](X)["score"].detach())


@pytest.mark.medium("eager", cases=["*-onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
@pytest.mark.parametrize(
    ("call", "what"),
    [
        (lambda both: both["unett"](X), "'unett' is not the name of a component"),
        (lambda both: both(X), "the call names none of them"),
        (lambda both: both[0](X), "0 is not the name of a component"),
    ],
)
def test_rejects_calls_without_a_component(call, what, target, models):
    with pytest.raises(lorac.ChoiceError, match=what) as error:
        call(compiled(models, target=target))
    assert "compiled['unet'](...)" in str(error.value)


def test_a_single_model_has_no_components(models):
    with pytest.raises(lorac.ChoiceError, match="a single model has no component 'unet'"):
        lorac.compile(models["unet"], {})["unet"]


def test_examples_are_by_component(models):
    with pytest.raises(lorac.ChoiceError, match="example_inputs= is needed by component") as error:
        lorac.compile(models, {"a": lorac.LoRA(r=2)}, target="onnxruntime", example_inputs=(X,))
    assert "unet, text_encoder" in str(error.value)


def test_rejects_invalid_names_of_components(models):
    with pytest.raises(lorac.OptionError, match="cannot name a component"):
        lorac.compile({"../unet": models["unet"]}, {})


def test_stores_numbers_that_json_lacks_as_none():
    traits = ModelTraits({"time_step_limit": [0.0, float("inf")]}, torch.float32, torch.device("cpu"))
    assert traits.to_json()["config"] == {"time_step_limit": [0.0, None]}
