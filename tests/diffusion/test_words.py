"""diffusers' methods about adapters, on a pipeline whose models are compiled: they act, or are refused with lorac's."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
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
LORA = re.compile("(?!ip_).*(lora|adapter_(name|weight)|attention_kwargs).*")
"""Parameters that hold a LoRA, or its strength."""
READ_ONLY = {"lora_state_dict", "pack_weights", "write_lora_layers"}
"""Functions of files and tensors, which change no pipeline."""


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
    scaled = [p.encode_prompt("a cat", "cpu", 1, False, lora_scale=0.3)[0] for p in (pipeline, loaded)]
    assert torch.equal(*scaled)
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


def find_words(cls: type) -> set[str]:
    """The public methods of a pipeline that take or change a LoRA."""
    found = set()
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and (name[0] != "_" or name == "__call__"):
            parameters = inspect.signature(function).parameters
            at_loaders = function.__module__.startswith("diffusers.loaders.lora")
            found |= {name} if at_loaders or any(map(LORA.fullmatch, parameters)) else set()
    return found - READ_ONLY


def check_words(cls: type) -> None:
    """Check that lorac has a method of its own for each of them."""
    assert find_words(cls) <= {*vars(make_pipeline_class(cls)), *vars(CompiledPipeline)}


@pytest.mark.parametrize("kind", ["StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "LTX"])
def test_every_method_that_changes_models_acts_or_is_rejected(kind: str) -> None:
    cls = getattr(diffusers, f"{kind}Pipeline")
    check_words(cls)
    own = {*vars(make_pipeline_class(cls)), *vars(CompiledPipeline)}
    changing = {n for n in dir(cls) if CHANGES.match(n) and inspect.isfunction(inspect.getattr_static(cls, n))}
    assert changing - own == {"set_progress_bar_config"}


@pytest.mark.medium("five pipelines of all")
def test_every_word_of_loras_acts_or_is_rejected() -> None:
    code = """
import diffusers, inspect, warnings
from tests.diffusion.test_words import check_words, find_words
warnings.simplefilter("ignore")
words = 0
for name in dir(diffusers):
    try:
        cls = getattr(diffusers, name)
    except Exception:  # one that this environment lacks a library for
        continue
    if inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline):
        check_words(cls)
        words += len(find_words(cls))
assert words > 2000, words
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_methods_for_models_of_diffusers_are_rejected(pipeline: Any) -> None:
    for name in ("fuse_lora", "set_lora_device", "save_lora_weights", "load_lora_into_unet", "from_pipe"):
        with refuses("unavailable", match=f"'{name}' is for models of diffusers"):
            getattr(pipeline, name)()


def test_words_of_loras_on_parts_are_rejected(pipeline: Any) -> None:
    from diffusers.loaders import UNet2DConditionLoadersMixin
    from diffusers.loaders.peft import PeftAdapterMixin
    from transformers.integrations.peft import PeftAdapterMixin as TextMixin

    parts = {PeftAdapterMixin: "unet", UNet2DConditionLoadersMixin: "unet", TextMixin: "text_encoder"}
    for mixin, part in parts.items():
        for name in (name for name in dir(mixin) if name[0] != "_" and callable(getattr(mixin, name))):
            for owner in (getattr(pipeline, part), pipeline.components[part]):
                with pytest.raises(AttributeError, match=r"compile|lorac\.") as caught:
                    getattr(owner, name)
                assert isinstance(caught.value, lorac.LoracError)
    states = torch.randn(2, 12, 16)
    with refuses("choice_error", match="compiled.swap"):
        pipeline.unet(torch.randn(2, 4, 16, 16), 1, states, cross_attention_kwargs={"scale": 0.5})


def test_the_strength_of_loras_in_encode_prompt_acts(pipeline: Any, file: Path) -> None:
    def encode(*rest: Any, **options: Any) -> torch.Tensor:
        states: torch.Tensor = pipeline.encode_prompt("a cat", "cpu", 1, False, *rest, **options)[0]
        return states

    pipeline.load_lora_weights(file)
    whole, named, placed = encode(), encode(lora_scale=0.3), encode(None, None, None, 0.3)
    assert pipeline.lora_scale == 0.3 and pipeline.compiled.active == {"style": 1.0}
    pipeline.set_adapters("style", 0.3)
    assert torch.equal(encode(lora_scale=np.float32(0.5)), encode(lora_scale=0.5))
    assert torch.equal(named, encode()) and torch.equal(placed, named) and not torch.equal(named, whole)
    with refuses("choice_error", match="the strength of 'scale' is 'x', which is not a number"):
        encode(lora_scale="x")
    with refuses("choice_error", match="the strength of 'scale' is 'x', which is not a number"):
        paint(pipeline, cross_attention_kwargs={"scale": "x"})


def test_a_compiled_part_is_rejected_in_another_pipeline(original: Any, pipeline: Any) -> None:
    with refuses("unknown_attribute", match=r"place_parts\(other, pipeline.compiled\)"):
        diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    with refuses("unknown_attribute", match="'vae' is compiled, and works in only one pipeline"):
        diffusers.AutoPipelineForImage2Image.from_pipe(pipeline)
    with refuses("unknown_attribute", match="place_parts"):
        diffusers.StableDiffusionPipeline(**pipeline.components)
    kept = original.unet
    with refuses("unknown_attribute", match="'unet' is compiled"):
        original.unet = pipeline.unet
    assert original.unet is kept and pipeline.config["unet"] == ("diffusers", "UNet2DConditionModel")
    other = diffusers.StableDiffusionImg2ImgPipeline(**original.components)
    assert isinstance(lorac.diffusion.place_parts(other, pipeline.compiled), CompiledPipeline)


def test_rejects_changes_of_the_computation_after_compiling(pipeline: Any) -> None:
    for name in ("enable_freeu", "enable_attention_slicing", "enable_xformers_memory_efficient_attention"):
        with refuses("unavailable", match=f"'{name}' is for models of diffusers"):
            getattr(pipeline, name)()
    with pytest.raises(AttributeError, match=r"parts=\[\.\.\.\]\) leaves a model to PyTorch"):
        pipeline.vae.enable_tiling()
    with pytest.raises(AttributeError, match=r"compiled\.add_adapter is that of all"):
        pipeline.unet.add_adapter()


def test_rejects_unsupported_methods_and_names_the_alternative(pipeline: Any, file: Path, tmp_path: Path) -> None:
    with refuses("unavailable", match="mode='fused'"):
        pipeline.fuse_lora()
    with refuses("unavailable", match=r"pipeline\.compiled by its save\(folder\)"):
        pipeline.save_pretrained(tmp_path)
    with refuses("option_error", match="save_file"):
        pipeline.load_lora_weights({"unet.x": torch.zeros(1)})
    with refuses("adapter_not_found", match="none"):
        pipeline.set_adapters("none")
    pipeline.load_lora_weights(file)
    with refuses("choice_error", match="1 strengths for 2 adapters"):
        pipeline.set_adapters(["style", "style"], [1.0])
    with refuses("choice_error", match="'style' is given a strength for each model"):
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
