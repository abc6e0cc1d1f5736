"""Stable Diffusion XL's pipeline, which looks into its parts, and a LoRA that diffusers has loaded into a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import lorac
from examples.pipelines import TOKENS, WIDTH, build
from tests.end_to_end.test_pipeline import SAME, SIZE, replaced
from tests.pipelines import paint

pytestmark = pytest.mark.medium("diffusion/test_compiling.py, and formats/test_diffusers.py reads such files")

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline of a few thousand weights, with a LoRA in its U-Net as diffusers' loader puts it there."""
    made = build("stable_diffusion_xl", tmp_path_factory.mktemp("tokenizer"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
    return made


def image(pipeline: Any, **parts: Any) -> np.ndarray:
    with replaced(pipeline, parts):
        return paint(pipeline, steps=2, height=2 * SIZE, width=2 * SIZE)


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
    with replaced(pipeline, parts), pytest.raises(AttributeError, match=r"compiled\.add_adapter\(path, name="):
        pipeline.unet.load_lora_adapter(tmp_path)
