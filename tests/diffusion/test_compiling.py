"""Pipelines whose models are compiled: the same images, whatever the target, the sizes and the adapters."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lorac
import lorac.diffusion
from examples.pipelines import KINDS, build
from tests.pipelines import TARGETS, paint
from tests.refusing import refuses

diffusers = pytest.importorskip("diffusers")
SAME = 1e-4
"""Of pixels from 0 to 1: a 39th of the smallest step that an 8-bit image knows."""
EMITTED = [pytest.param("onnxruntime", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Any:
    yield
    original.cache_clear()
    compiled.cache_clear()


@functools.cache
def original(kind: str, folder: Path) -> Any:
    return build(kind, folder)


@functools.cache
def compiled(kind: str, folder: Path, target: str) -> Any:
    """Two adapters away from their init, of the denoiser and of CLIP; none is active."""
    absent = {"conv1"} if hasattr(original(kind, folder), "transformer") else {"add_q_proj"}
    variant = lorac.LoRA(r=3, alpha=6, targets=[name for name in TARGETS if name not in absent])
    if target != "eager":
        adapters = compiled(kind, folder, "eager").compiled.adapters
        return lorac.diffusion.compile(original(kind, folder), adapters, target, active=None)
    made = lorac.diffusion.compile(original(kind, folder), {"one": variant, "two": variant}, active=None)
    with torch.no_grad():
        for seed, adapter in enumerate(made.compiled.adapters.values()):
            generator = torch.Generator().manual_seed(seed)
            for tensor in adapter.parameters():
                tensor.normal_(0, 0.2, generator=generator)
    return made


@pytest.mark.medium("test_prompts_sizes_and_their_own_adapters, where one prompt has no adapter")
@pytest.mark.parametrize("kind", KINDS)
def test_off_is_the_base_bit_for_bit(kind: str, folder: Path) -> None:
    made, base = compiled(kind, folder, "eager"), paint(original(kind, folder))
    for name in ("one", "two"):
        made.compiled.swap(name)
        assert abs(paint(made) - base).max() > 50 * SAME
    made.compiled.swap(None)
    assert np.array_equal(paint(made), base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_parts_match_eager_parts_over_ten_steps(kind: str, folder: Path) -> None:
    eager, made = (compiled(kind, folder, target) for target in ("eager", "onnxruntime"))
    made.compiled.swap(None)
    off = paint(made, steps=10)
    assert abs(off - paint(original(kind, folder), steps=10)).max() <= SAME
    for name in ("one", "two", "one"):
        for each in (eager, made):
            each.compiled.swap(name)
        assert abs(paint(made, steps=10) - paint(eager, steps=10)).max() <= SAME
    made.compiled.swap(None)
    assert np.array_equal(paint(made, steps=10), off)


@pytest.mark.medium("FLUX", keep=["flux-eager"])
@pytest.mark.parametrize("target", ["eager", *EMITTED])
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_sizes_and_their_own_adapters(kind: str, target: str, folder: Path) -> None:
    made, prompts = compiled(kind, folder, target), ["a cat", "two dogs", "o"]
    choices = [{"one": 1.0}, None, {"one": 0.5, "two": 0.5}]
    options = {"height": 16, "width": 48, "steps": 2, "num_images_per_prompt": 2}
    together = paint(made, prompts, adapters=choices, seeds=range(6), **options)
    for row, (prompt, choice) in enumerate(zip(prompts, choices, strict=True)):
        alone = paint(made, prompt, adapters=choice, seeds=(2 * row, 2 * row + 1), **options)
        assert abs(together[2 * row : 2 * row + 2] - alone).max() <= SAME
    assert made.compiled.active == {}


@pytest.mark.medium("test_prompts_sizes_and_their_own_adapters, which has strengths")
def test_a_scale_in_the_call_multiplies_all_strengths(folder: Path) -> None:
    made = compiled("stable_diffusion", folder, "eager")
    made.compiled.swap("one")
    halved = paint(made, cross_attention_kwargs={"scale": 0.5})
    assert np.array_equal(halved, paint(made, adapters={"one": 0.5}))
    assert not np.array_equal(halved, paint(made))
    assert made.compiled.active == {"one": 1.0}
    flux = compiled("flux", folder, "eager")
    flux.compiled.swap("two")
    assert np.array_equal(paint(flux, joint_attention_kwargs={"scale": 0.0}), paint(original("flux", folder)))


@pytest.mark.filterwarnings("ignore:.upcast_vae. is deprecated:FutureWarning")  # diffusers' pipeline calls it itself
def test_a_vae_that_overflows_in_half_precision_is_computed_in_float32(folder: Path) -> None:
    half = build("stable_diffusion_xl", folder).to(torch.float16)
    made = lorac.diffusion.compile(half)
    assert made.unet.dtype == half.vae.dtype == torch.float16 and made.vae.dtype == torch.float32
    assert abs(paint(made) - paint(half)).max() <= torch.finfo(torch.float16).eps
    assert made.to(torch.float16) is made
    with refuses("unavailable", match="compiled for torch.float16"):
        made.to(torch.float32)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    repaint = diffusers.StableDiffusionXLImg2ImgPipeline(**half.components)
    again = lorac.diffusion.place_parts(repaint, made.compiled)
    found, wanted = (paint(one, image=image, strength=0.7, height=None, width=None) for one in (again, repaint))
    assert abs(found - wanted).max() <= torch.finfo(torch.float16).eps
    with refuses("option_error", match="overflows in float16"):
        lorac.diffusion.compile(original("stable_diffusion_xl", folder), dtype="float16")


def test_rejects_a_wrong_number_of_choices(folder: Path) -> None:
    made = compiled("stable_diffusion", folder, "eager")
    with refuses("choice_error", match="2 choices of adapters for 3 rows"):
        paint(made, ["a", "b", "c"], adapters=["one", None])


def test_rejects_models_and_unknown_parts(folder: Path) -> None:
    made = original("stable_diffusion", folder)
    with refuses("compile_error", match="lorac.compile takes models"):
        lorac.diffusion.compile(made.unet)
    with refuses("compile_error", match="compiled already"):
        lorac.diffusion.compile(compiled("stable_diffusion", folder, "eager"))
    with refuses("option_error", match="nearest: unet"):
        lorac.diffusion.compile(made, parts=["unett"])
    with refuses("choice_error", match="nearest: unet"):
        lorac.diffusion.compile(made, parts=["unet"], example_inputs={"unett": {}})
    other = lorac.compile({"net": made.unet}, {"one": lorac.LoRA(r=1, targets=["to_q"])})
    with refuses("choice_error", match="no place for 'net'"):
        lorac.diffusion.place_parts(made, other)
