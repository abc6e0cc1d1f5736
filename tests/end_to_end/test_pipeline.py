"""A pipeline of diffusers whose U-Net and text encoder are compiled: the same images, swapped between prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch.export import Dim

import lorac
from examples.pipelines import TOKENS, WIDTH, build

pytest.importorskip("diffusers")
SIZE = 16
SAME = 1e-4
"""Of pixels from 0 to 1: a 39th of the smallest step that an 8-bit image knows."""
TARGETS = ("to_q", "to_v", "conv1", "q_proj", "fc1")


def images(made: Any, prompt: str, **parts: Any) -> np.ndarray:
    """What a pipeline paints, with some of its parts replaced for the while."""
    with replaced(made, parts):
        generator = torch.Generator().manual_seed(0)
        return made(prompt, num_inference_steps=3, output_type="np", generator=generator).images


@contextlib.contextmanager
def replaced(made: Any, parts: dict[str, Any]) -> Iterator[None]:
    own = {name: getattr(made, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(made, name, part)
        yield
    finally:
        for name, part in own.items():
            setattr(made, name, part)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return build("stable_diffusion", tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def adapters(original: Any) -> dict[str, lorac.Adapter]:
    models = {"unet": original.unet, "text_encoder": original.text_encoder}
    variant = lorac.LoRA(r=3, alpha=6, targets=TARGETS)
    made = dict(lorac.compile(models, {"one": variant, "two": variant}, active=None).adapters)
    with torch.no_grad():
        for seed, adapter in enumerate(made.values()):
            generator = torch.Generator().manual_seed(seed)
            for tensor in adapter.parameters():
                tensor.normal_(0, 0.2, generator=generator)
    return made


@pytest.fixture(scope="module")
def eager(original: Any, adapters: dict[str, lorac.Adapter]) -> lorac.Compiled:
    return compiled(original, adapters, "eager")


@pytest.fixture(scope="module")
def emitted(original: Any, adapters: dict[str, lorac.Adapter]) -> lorac.Compiled:
    return compiled(original, adapters, "onnxruntime")


def compiled(original: Any, adapters: dict[str, lorac.Adapter], target: str) -> lorac.Compiled:
    anything = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    return lorac.compile(
        {"unet": original.unet, "text_encoder": original.text_encoder},
        adapters,
        target=target,
        active=None,
        example_inputs={
            "unet": {
                "sample": torch.randn(2, 4, SIZE, SIZE),
                "timestep": torch.tensor(1),
                "encoder_hidden_states": torch.randn(2, TOKENS, WIDTH),
            }
        },
        dynamic_shapes={
            "unet": {"sample": anything, "timestep": {}, "encoder_hidden_states": {0: Dim.AUTO, 1: Dim.AUTO}}
        },
    )


def with_peft(original: Any, adapter: lorac.Adapter, folder: Path) -> Any:
    """The pipeline with PEFT's LoRA layers in place, holding an adapter's tensors."""
    made = build("stable_diffusion", folder)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS))
    for name in ("unet", "text_encoder"):
        model = getattr(made, name)
        model.load_state_dict(getattr(original, name).state_dict())
        peft.inject_adapter_in_model(config, model)
        for path, tensors in adapter.tensors.items():
            component, _, inner = path.partition(".")
            if component == name:
                layer = model.get_submodule(inner)
                for key in ("lora_A", "lora_B"):
                    weight = getattr(layer, key)["default"].weight
                    weight.data.copy_(tensors[key].reshape(weight.shape))
        model.eval()
    return made


def parts(made: lorac.Compiled) -> dict[str, Any]:
    return {name: made[name] for name in ("unet", "text_encoder")}


@pytest.mark.medium("diffusion/test_compiling.py: off is the base bit for bit")
@torch.no_grad()
def test_eager_parts_paint_the_same_bits(
    original: Any, adapters: dict[str, lorac.Adapter], eager: lorac.Compiled, tmp_path: Path
) -> None:
    base = images(original, "a cat")
    for name in ("one", "two"):
        eager.swap(name)
        found = images(original, "a cat", **parts(eager))
        assert np.array_equal(found, images(with_peft(original, adapters[name], tmp_path), "a cat"))
        assert not np.array_equal(found, base)
    eager.swap(None)
    assert np.array_equal(images(original, "a cat", **parts(eager)), base)


@pytest.mark.slow("eager parts paint the same bits")
@torch.no_grad()
def test_emitted_parts_paint_the_same_images(original: Any, eager: lorac.Compiled, emitted: lorac.Compiled) -> None:
    emitted.swap(None)
    off = {prompt: images(original, prompt, **parts(emitted)) for prompt in ("a cat", "two dogs")}
    for name, prompt in (("one", "a cat"), ("two", "two dogs"), ("one", "two dogs")):
        for each in (eager, emitted):
            each.swap(name)
        found, wanted = (images(original, prompt, **parts(each)) for each in (emitted, eager))
        assert abs(found - wanted).max() <= SAME
        assert abs(found - off[prompt]).max() > 100 * SAME
    emitted.swap(None)
    assert all(np.array_equal(images(original, prompt, **parts(emitted)), image) for prompt, image in off.items())


@pytest.mark.slow("eager parts, and test_host.py has programs of other sizes")
@torch.no_grad()
def test_a_pipeline_takes_other_sizes_and_batches(
    original: Any, eager: lorac.Compiled, emitted: lorac.Compiled
) -> None:
    options = {"num_inference_steps": 2, "output_type": "np", "height": 48, "width": 24, "num_images_per_prompt": 3}
    pair = []
    for each in (eager, emitted):
        each.swap({"one": 0.5, "two": 0.5})
        with replaced(original, parts(each)):
            pair.append(original("a cat", generator=torch.Generator().manual_seed(0), **options).images)
    assert pair[0].shape == (3, 48, 24, 3)
    assert abs(pair[0] - pair[1]).max() <= SAME
