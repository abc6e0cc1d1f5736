"""diffusers' methods about adapters, on a pipeline whose models are compiled: they act, or are refused with lorac's."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorac
import lorac.diffusion
from examples.pipelines import build
from lorac.diffusion import CompiledPipeline
from lorac.diffusion.pipeline import make_pipeline_class
from tests.pipelines import paint
from tests.refusing import refuses

diffusers = pytest.importorskip("diffusers")
CHANGES = re.compile("(enable|disable|set|fuse|unfuse|load|unload)_")
READ_ONLY = {"lora_scale", "lora_state_dict", "pack_weights", "save_lora_weights", "write_lora_layers"}
"""Names that change no pipeline: a number, and functions of files and tensors."""
HELPERS = {"load_lora_into_unet", "load_lora_into_text_encoder", "load_lora_into_transformer"}
"""Functions of models, which ``load_lora_weights`` calls; compiled models refuse what these do."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build("stable_diffusion", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def file(original: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of kohya's for the U-Net and the text encoder."""
    models = {"unet": original.unet, "text_encoder": original.text_encoder}
    made = lorac.compile(models, {"style": lorac.LoRA(r=2, alpha=4, targets=["to_q", "to_v", "q_proj"])})
    with torch.no_grad():
        for tensor in made.adapters["style"].parameters():
            tensor.normal_(0, 0.3, generator=torch.Generator().manual_seed(tensor.numel()))
    path = tmp_path_factory.mktemp("files") / "style.safetensors"
    lorac.save_adapter(made.adapters["style"], path, format="kohya", model=models)
    return path


@pytest.fixture
def pipeline(original: Any) -> Any:
    room = lorac.Reserve(targets=["to_q", "to_v", "q_proj"], rank=2, adapters=2)
    return lorac.diffusion.compile(original, reserve=room)


def test_a_file_is_loaded_activated_and_unloaded(original: Any, pipeline: Any, file: Path, tmp_path: Path) -> None:
    base = paint(original)
    pipeline.load_lora_weights(file)
    assert pipeline.get_active_adapters() == ["style"]
    assert pipeline.get_list_adapters() == {"unet": ["style"], "text_encoder": ["style"]}
    styled = paint(pipeline)
    pipeline.load_lora_weights(file.parent, "other", weight_name=file.name)
    assert pipeline.get_active_adapters() == ["other"], "as diffusers activates the one that was loaded last"
    assert np.array_equal(paint(pipeline), styled)
    pipeline.set_adapters(["style", "other"], [0.25, 0.25])
    assert pipeline.compiled.active == {"other": 0.25, "style": 0.25}
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:-1])
    with refuses("corrupt_file"):
        pipeline.load_lora_weights(tmp_path / "broken.safetensors", "style", hotswap=True)
    assert pipeline.compiled.active == {"other": 0.25, "style": 0.25}
    pipeline.load_lora_weights(file, "style", hotswap=True)
    assert pipeline.compiled.active == {"style": 1.0}
    pipeline.delete_adapters("other")
    assert [*pipeline.compiled.adapters] == ["style"]
    pipeline.unload_lora_weights()
    assert not pipeline.compiled.adapters
    assert np.array_equal(paint(pipeline), base)


@pytest.mark.medium("test_a_file_is_loaded_activated_and_unloaded")
def test_samples_as_diffusers_with_the_file(original: Any, pipeline: Any, file: Path, tmp_path: Path) -> None:
    loaded = build("stable_diffusion", tmp_path)
    for name in ("unet", "text_encoder", "vae"):
        getattr(loaded, name).load_state_dict(getattr(original, name).state_dict())
    swapped = lorac.load_adapter(file, {"unet": original.unet, "text_encoder": original.text_encoder})
    lorac.save_adapter(
        swapped,
        tmp_path / "style.safetensors",
        format="diffusers",
        model={"unet": loaded.unet, "text_encoder": loaded.text_encoder},
    )
    loaded.load_lora_weights(tmp_path / "style.safetensors", adapter_name="style")
    pipeline.load_lora_weights(file)
    for scale in (1.0, 0.5):
        ours, theirs = (paint(p, cross_attention_kwargs={"scale": scale}) for p in (pipeline, loaded))
        assert np.array_equal(ours, theirs)


def test_adapters_are_switched_off_and_on(original: Any, pipeline: Any, file: Path) -> None:
    pipeline.load_lora_weights(file)
    pipeline.set_adapters("style", 0.5)
    styled = paint(pipeline)
    pipeline.disable_lora()
    pipeline.disable_lora()
    assert np.array_equal(paint(pipeline), paint(original))
    pipeline.enable_lora()
    assert np.array_equal(paint(pipeline), styled)
    assert pipeline.compiled.active == {"style": 0.5}
    assert pipeline.num_fused_loras == 0
    assert pipeline.fused_loras == set()


def test_every_method_of_adapters_acts_or_is_rejected(pipeline: Any) -> None:
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    names = {name for cls in StableDiffusionLoraLoaderMixin.__mro__[:-1] for name in vars(cls) if name[0] != "_"}
    methods = {name for name in names if callable(inspect.getattr_static(StableDiffusionLoraLoaderMixin, name))}
    own = {name for cls in type(pipeline).__mro__[:2] for name in vars(cls)}
    assert names - own - READ_ONLY - HELPERS - {"unet_name", "text_encoder_name"} == set()
    for name in methods & {*vars(type(pipeline))}:
        with refuses("unavailable", match=f"'{name}' changes models of diffusers"):
            getattr(pipeline, name)()


@pytest.mark.parametrize("kind", ["StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux"])
def test_every_method_that_changes_models_acts_or_is_rejected(kind: str) -> None:
    cls = make_pipeline_class(getattr(diffusers, f"{kind}Pipeline"))
    own = {*vars(cls), *vars(CompiledPipeline)}
    changing = {
        name for name in dir(cls) if CHANGES.match(name) and inspect.isfunction(inspect.getattr_static(cls, name))
    }
    assert changing - own == {"set_progress_bar_config"}


def test_rejects_changes_of_the_computation_after_compiling(pipeline: Any) -> None:
    for name in ("enable_freeu", "enable_attention_slicing", "enable_xformers_memory_efficient_attention"):
        with refuses("unavailable", match=f"'{name}' changes models of diffusers"):
            getattr(pipeline, name)()
    with pytest.raises(AttributeError, match=r"parts=\[\.\.\.\]\) leaves a model to PyTorch"):
        pipeline.vae.enable_tiling()
    with pytest.raises(AttributeError, match=r"compiled\.add_adapter is that of all"):
        pipeline.unet.add_adapter()


def test_rejects_unsupported_methods_and_names_the_alternative(pipeline: Any, file: Path, tmp_path: Path) -> None:
    with refuses("unavailable", match="mode='fused'"):
        pipeline.fuse_lora()
    with refuses("unavailable", match=r"compiled\.save\(folder\)"):
        pipeline.save_pretrained(tmp_path)
    with refuses("option_error", match="save_file"):
        pipeline.load_lora_weights({"unet.x": torch.zeros(1)})
    with refuses("adapter_not_found", match="none"):
        pipeline.set_adapters("none")
    pipeline.load_lora_weights(file)
    with refuses("choice_error", match="1 strengths for 2 adapters"):
        pipeline.set_adapters(["style", "style"], [1.0])
    with refuses("choice_error", match="strength of 'style' is given per model"):
        pipeline.set_adapters("style", [{"unet": 0.5}])
    for other in ({"dtype": torch.float16}, {"device": "cuda"}):
        with refuses("unavailable", match="dtype= or device="):
            pipeline.to(**other)
    assert pipeline.to("cpu") is pipeline
    with pytest.raises(AttributeError, match=r"compiled\.add_adapter"):
        pipeline.unet.load_lora_adapter(file)


def test_leaves_the_original_pipeline_unchanged(original: Any, pipeline: Any) -> None:
    assert type(original) is diffusers.StableDiffusionPipeline
    assert isinstance(pipeline, diffusers.StableDiffusionPipeline)
    assert isinstance(original.unet, torch.nn.Module)
    assert original.config["unet"] == ("diffusers", "UNet2DConditionModel")
    assert pipeline.scheduler is original.scheduler


def test_the_vae_encodes_and_decodes_as_before(original: Any, pipeline: Any) -> None:
    images = torch.randn(2, 3, 16, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = original.vae.encode(images).latent_dist.mean
        assert torch.equal(pipeline.vae.encode(images).latent_dist.mean, latents)
        decoded = pipeline.vae.decode(latents, return_dict=False, generator=None)
        assert torch.equal(decoded[0], original.vae.decode(latents).sample)
    assert pipeline.vae.config.latent_channels == 4


@pytest.mark.slow
def test_places_a_loaded_artifact_in_a_pipeline(original: Any, file: Path, tmp_path: Path) -> None:
    made = lorac.diffusion.compile(original, {"style": file}, target="onnxruntime", parts=["unet", "text_encoder"])
    styled = paint(made)
    made.compiled.save(tmp_path / "compiled")
    again = lorac.diffusion.place_parts(original, lorac.load(tmp_path / "compiled"))
    assert np.array_equal(paint(again), styled)
    again.compiled.swap(None)
    assert abs(paint(again) - styled).max() > 0.01
    for one in (made, again):
        one.load_lora_weights(file, "later")
        assert one.get_active_adapters() == ["later"]
        assert np.array_equal(paint(one), styled)
    assert isinstance(again.vae, torch.nn.Module)
