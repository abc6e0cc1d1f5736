"""Whole models: SmolLM2 as it is, a U-Net of diffusers' whose convolutions are adapted too, and parts of pipelines."""

from __future__ import annotations

import pytest
import torch

import lorac
from examples import pipelines
from lorac.diffusion.parts import make_part_inputs
from lorac.frontend.host import Host
from lorac.testing import assert_close
from tests.backends.tensorrt.building import away, compile_recorded
from tests.limits import assert_apart
from tests.zoo import ZOO

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_smollm2(dtype):
    found = compile_recorded(
        model=ZOO["smollm2"].model(), adapters={"a": lorac.LoRA(r=8, targets="all-linear")}, dtype=dtype
    )
    away(found.compiled.adapters["a"], 0)
    found.compiled.swap(None)
    (base, *_), _ = found.answers(None)
    (y, *_), (wanted, *_) = found.answers("a")
    assert_close(y, wanted)
    assert_apart(y, base)
    for name in found.network:
        assert name.encode() in found.plan


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_small_unet(mode):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    blocks = {"down": ("CrossAttnDownBlock2D", "DownBlock2D"), "up": ("UpBlock2D", "CrossAttnUpBlock2D")}
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        norm_num_groups=8,
        down_block_types=blocks["down"],
        up_block_types=blocks["up"],
    ).eval()
    example = (torch.randn(2, 4, 16, 16), torch.tensor(7), torch.randn(2, 5, 32))
    low = lorac.LoRA(r=4, targets=["to_q", "to_v", "conv1"])
    found = compile_recorded(model=unet, adapters={"a": low}, example_inputs=example, mode=mode, active=None)
    away(found.compiled.adapters["a"], 0)
    (base, *_), _ = found.answers(None)
    (y, *_), (wanted, *_) = found.answers("a")
    assert_close(y, wanted)
    assert_apart(y, base)


PARTS = {
    "stable_diffusion": ("vae", "text_encoder"),
    "stable_diffusion_xl": ("unet", "text_encoder_2"),
    "stable_diffusion_3": ("transformer", "vae", "text_encoder_3"),
    "flux": ("transformer",),
}


@pytest.mark.parametrize(("kind", "part"), [(kind, part) for kind, parts in PARTS.items() for part in parts])
def test_a_part_of_a_pipeline(kind, part, tmp_path):
    """Compiled with the inputs and the forward that ``lorac.diffusion.compile`` gives it."""
    model = Host.of(pipelines.build(kind, tmp_path).components[part]).decoder()
    low = lorac.LoRA(r=2, targets="all-linear")
    found = compile_recorded(model=model, adapters={"a": low}, example_inputs=make_part_inputs(model), active=None)
    away(found.compiled.adapters["a"], 0)
    (base, *_), _ = found.answers(None)
    (y, *_), (wanted, *_) = found.answers("a")
    assert_close(y, wanted)
    assert_apart(y, base)
    for name in found.network:
        assert name.encode() in found.plan
