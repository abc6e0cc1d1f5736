"""Stable Diffusion XL's pipeline, which looks into its parts, and a LoRA that diffusers has loaded into a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import lorac
from tests.end_to_end.test_pipeline import SAME, SIZE, TOKENS, WIDTH, _replaced, _text_config, _tokenizer
from tests.zoo import tiny_unet, tiny_vae

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of a few thousand weights, with a LoRA in its U-Net as diffusers' loader puts it there."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = tiny_unet(
            2 * WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=WIDTH + 6 * 8,
        )
        vae = tiny_vae()
        tokenizer, vocabulary = _tokenizer(tmp_path_factory.mktemp("tokenizer"))
        config = _text_config(vocabulary)
        config.projection_dim = WIDTH
        texts = [transformers.CLIPTextModel(config), transformers.CLIPTextModelWithProjection(config)]
        made = diffusers.StableDiffusionXLPipeline(
            vae=vae,
            text_encoder=texts[0].eval(),
            text_encoder_2=texts[1].eval(),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=unet,
            scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
            add_watermarker=False,
        )
        made.set_progress_bar_config(disable=True)
        made.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    return made


def image(pipeline: Any, **parts: Any) -> np.ndarray:
    with _replaced(pipeline, parts):
        generator = torch.Generator().manual_seed(0)
        size = {"height": 2 * SIZE, "width": 2 * SIZE}
        return pipeline("a cat", num_inference_steps=2, output_type="np", generator=generator, **size).images


@torch.no_grad()
@pytest.mark.parametrize("target", ["eager", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_its_parts_are_compiled_with_the_lora_that_was_loaded(pipeline: Any, target: str, tmp_path: Path) -> None:
    expected = image(pipeline)
    compiled = lorac.compile(
        {"unet": pipeline.unet},
        target=target,
        **({} if target == "eager" else {"self_test": False}),
        example_inputs={
            "unet": {
                "sample": torch.randn(2, 4, SIZE, SIZE),
                "timestep": torch.tensor(1.0),
                "encoder_hidden_states": torch.randn(2, TOKENS, 2 * WIDTH),
                "added_cond_kwargs": {"text_embeds": torch.randn(2, WIDTH), "time_ids": torch.randn(2, 6)},
            }
        },
    )
    assert compiled.active == {"style": 1.0}
    parts = {"unet": compiled["unet"]}
    assert parts["unet"].add_embedding.linear_1.in_features == WIDTH + 6 * 8
    assert abs(image(pipeline, **parts) - expected).max() <= (0 if target == "eager" else SAME)
    compiled.swap(None)
    assert abs(image(pipeline, **parts) - expected).max() > 10 * SAME
    with _replaced(pipeline, parts), pytest.raises(AttributeError, match=r"compiled\.add_adapter\(path, name="):
        pipeline.unet.load_lora_adapter(tmp_path)
