"""Example inputs of diffusers' models by their configurations, and the axes along which they vary."""

import copy

import pytest
import torch
from torch.export import Dim

import lorac
from examples.pipelines import tiny_unet, tiny_vae
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import make_dynamic_shapes, spread_row_numbers
from tests.refusing import refuses
from tests.zoo import ZOO

diffusers = pytest.importorskip("diffusers")


def test_makes_inputs_from_the_configuration():
    fields = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = tiny_unet(16, **fields, projection_class_embeddings_input_dim=16 + 48, time_cond_proj_dim=5)
    for model in (unet, tiny_vae()):
        inputs = Host.of(model).example_inputs()
        with torch.no_grad():
            assert model(**inputs).sample.shape[2:] == inputs["sample"].shape[2:]
    assert {*Host.of(unet).example_inputs()} == {"sample", "timestep", "encoder_hidden_states", "timestep_cond"} | {
        "added_cond_kwargs"
    }


def test_asks_for_inputs_that_the_configuration_does_not_determine():
    unet = tiny_unet(16, num_class_embeds=3)
    with refuses("example_inputs_needed", match="'encoder_hidden_states': torch.randn"):
        lorac.compile(unet, {"a": lorac.LoRA(r=1, targets=["to_q"])}, target="onnxruntime")


def test_sides_tokens_and_rows_are_dynamic():
    unet = tiny_unet(16)
    shapes = make_dynamic_shapes(Host.of(unet), Host.of(unet).example_inputs())
    assert {name: {*axes} for name, axes in shapes.items()} == {
        "sample": {0, 2, 3},
        "timestep": {0},
        "encoder_hidden_states": {0, 1},
    }
    assert shapes["sample"][2] == Dim.AUTO


def test_a_timestep_is_given_to_each_row_of_an_example():
    unet = tiny_unet(16)
    given = {
        "sample": torch.zeros(3, 4, 16, 16),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.zeros(3, 2, 16),
    }
    inputs, shapes = spread_row_numbers(Host.of(unet), given, {"sample": {0: Dim.AUTO}, "timestep": {}})
    assert torch.equal(inputs["timestep"], torch.full((3,), 7.0))
    assert shapes["timestep"] == {0: Dim.AUTO}
    assert spread_row_numbers(Host.of(ZOO["plain_mlp"].model()), (given,), None) == ((given,), None)


def test_a_timestep_keeps_its_precision_in_a_model_of_half_precision():
    """951.36 is 952 in bfloat16: the model itself computes with what the scheduler gives."""
    unet, dtype = tiny_unet(16), torch.bfloat16
    compiled = lorac.compile(unet, {"a": lorac.LoRA(r=1, targets=["to_q"])}, dtype=dtype, active=None)
    sample, context = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16)
    half = copy.deepcopy(unet).to(dtype)
    with torch.no_grad():
        for timestep in (torch.tensor(951.36), torch.tensor([951.36, 3.7])):
            expected = half(sample.to(dtype), timestep, context.to(dtype)).sample
            assert not torch.equal(half(sample.to(dtype), timestep.to(dtype), context.to(dtype)).sample, expected)
            assert torch.equal(compiled(sample, timestep, context).sample, expected)
            named = compiled(sample=sample, timestep=timestep, encoder_hidden_states=context)
            assert torch.equal(named.sample, expected)
