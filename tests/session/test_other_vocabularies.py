"""PEFT's, transformers' and diffusers' ways of managing adapters are refused on every target, with lorac's own."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import peft
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin as DiffusersAdapterMixin
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.modeling_utils import ModelMixin
from peft.mixed_model import PeftMixedModel
from peft.tuners.lora import LoraModel
from peft.tuners.mixed import MixedModel
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.peft import PeftAdapterMixin
from transformers.utils import PushToHubMixin

import lorac
from lorac.session.other_vocabularies import COMPUTING_STEPS, LORAC_STEPS
from lorac.session.presentation import INTERFACE
from tests.mistakes import Tiny, example, lora
from tests.parity import assert_parity
from tests.refusing import refuses
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]
MANAGE_ADAPTERS = (
    peft.PeftModel,
    LoraModel,
    PeftMixedModel,
    MixedModel,
    PeftAdapterMixin,
    PushToHubMixin,
    DiffusersAdapterMixin,
    UNet2DConditionLoadersMixin,
    LoraBaseMixin,
)
PARTS_OF_PIPELINES = (UNet2DConditionModel, AutoencoderKL, FluxTransformer2DModel, SD3Transformer2DModel)
CHANGE_MODELS = (PreTrainedModel, ModelMixin)
CHANGES = re.compile("(set|resize|tie|init|initialize|fuse|dequantize)(_|$)")
ONLY_READ = {
    *("base_model_torch_dtype", "get_model_config", "get_prompt", "get_prompt_embedding_to_save", "lora_scale"),
    *("modules_to_save", "pack_weights", "prefix", "save_pretrained", "set_modules_to_save", "subtract_mutated_init"),
    *("target_module_mapping", "text_encoder_name", "tuner_layer_cls", "unet_name", "uses_shared_state"),
    "write_lora_layers",
}
"""Names that neither change a model of transformers or diffusers, nor say how adapters are managed."""
HOW_IT_COMPUTES = {
    *("set_attention_backend", "set_attn_implementation", "set_experts_implementation", "set_use_kernels"),
    *(
        "init_parallel_plans",
        "set_use_memory_efficient_attention_xformers",
        "set_use_npu_flash_attention",
        "set_use_xla_flash_attention",
    ),
}
"""Methods that choose kernels; the eager model runs the host itself, so they keep their meaning."""


@pytest.fixture(scope="module")
def eager() -> lorac.Compiled:
    return lorac.compile(LLAMA.model(), {"a": lorac.LoRA(r=2, targets=["q_proj"])}, active=None)


@pytest.fixture(scope="module")
def program() -> lorac.Compiled:
    return lorac.compile(
        {"one": Tiny().eval()}, {"a": lora()}, target="onnxruntime", example_inputs={"one": example()}, self_test=False
    )


def public_names(cls: type) -> set[str]:
    return {name for name in dir(cls) if name[0] != "_" and not hasattr(nn.Module, name)}


@pytest.mark.parametrize("cls", MANAGE_ADAPTERS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_every_name_by_which_adapters_are_managed_is_known(cls: type) -> None:
    assert public_names(cls) - LORAC_STEPS.keys() - {*INTERFACE} - ONLY_READ == set()


@pytest.mark.parametrize("cls", CHANGE_MODELS, ids=lambda cls: cls.__name__)
def test_every_method_that_changes_a_model_is_known(cls: type) -> None:
    changes = {name for name in public_names(cls) if CHANGES.match(name)}
    assert changes - LORAC_STEPS.keys() - HOW_IT_COMPUTES == set()


def test_every_target_rejects_names_of_other_libraries(eager: Any, program: Any) -> None:
    for name, step in LORAC_STEPS.items():
        for compiled in (eager, program, program["one"]):
            with refuses("unknown_attribute", match=re.escape(step)):
                getattr(compiled, name)
            assert not hasattr(compiled, name)


@pytest.mark.parametrize("cls", PARTS_OF_PIPELINES, ids=lambda cls: cls.__name__)
def test_rejects_methods_that_change_the_computation(cls: type, program: Any) -> None:
    for name in sorted(name for name in public_names(cls) if re.match("(enable|disable|set|fuse|unfuse)_", name)):
        with refuses("unknown_attribute", match=re.escape({**LORAC_STEPS, **COMPUTING_STEPS}[name])):
            getattr(program["one"], name)


def test_forwards_methods_that_only_read_the_model(eager: Any) -> None:
    assert eager.get_input_embeddings().weight.shape[0] == LLAMA.model().config.vocab_size
    assert eager.num_parameters() > 0


def test_rejects_a_scale_in_cross_attention_kwargs(program: Any) -> None:
    eager = lorac.compile({"one": Tiny().eval()}, {"a": lora()})
    for compiled in (eager, program):
        with refuses("choice_error", match=r"compiled\.swap\(\{'name': 0\.7\}\)"):
            compiled["one"](**example(), cross_attention_kwargs={"scale": 0.5})


def test_the_next_step_for_merged_weights_works(tmp_path: Any) -> None:
    model, inputs = LLAMA.fresh(), LLAMA.inputs()
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["q_proj"])})
    with torch.no_grad():
        for tensor in compiled.adapters["a"].parameters():
            tensor.normal_(0, 0.1)
    compiled.eval()
    with pytest.raises(AttributeError, match=re.escape("lorac.merge_into(model, compiled.adapters, 'name')")):
        compiled.merge_and_unload()
    ours, base = compiled(**inputs).logits, model(**inputs).logits
    lorac.merge_into(model, compiled.adapters, "a").save_pretrained(tmp_path)
    assert_parity(ours, type(model).from_pretrained(tmp_path).eval()(**inputs).logits, base)


def test_a_compiled_model_is_not_copied_or_pickled_but_saved(eager: Any, program: Any) -> None:
    for compiled in (eager, program, program["one"]):
        for attempt in (copy.deepcopy, pickle.dumps):
            with refuses("unavailable", match=r"compiled\.save\(folder\) and lorac\.load\(folder\)"):
                attempt(compiled)
    again = eager.export(target="eager")
    assert again.adapters["a"] is not eager.adapters["a"]
    ours, theirs = eager.adapters["a"].parameters(), again.adapters["a"].parameters()
    assert all(own.data_ptr() != other.data_ptr() for own, other in zip(ours, theirs, strict=True))


def test_a_component_shows_its_modules_as_a_pipeline_looks_at_them(program: Any) -> None:
    component = program["one"]
    assert component.layers[0].q_proj.in_features == 24
    assert sum(isinstance(module, nn.Linear) for module in component.modules()) == 4
    with refuses("unavailable", match="the whole component"):
        component.layers[0].q_proj(torch.randn(1, 24))
    assert "modules" in dir(type(component))
    assert inspect.isgenerator(component.modules())
