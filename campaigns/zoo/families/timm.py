"""One model of every module of timm that has one small enough, random, with ten classes."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from campaigns.zoo.entries import Call, Entry
from campaigns.zoo.families.torchvision import free_sizes, images

NAMES = """
    eca_botnext26ts_256 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32 test_convnext
    cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny deit_tiny_patch16_224
    densenet121 dla34 dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 test_efficientnet
    efficientvim_m1 efficientvit_b0 efficientvit_m0 vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8
    focalnet_tiny_srf gcvit_xxtiny ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny
    hrnet_w18_small iformer_t inception_next_atto inception_v3 lcnetv2_small levit_256 lowformer_b0 test_mambaout
    test_coatnet poolformer_s12 gmlp_ti16_224 lcnet_035 mobilevit_xxs mvitv2_tiny nest_tiny test_nfnet pit_ti_224
    pvt_v2_b0 rdnet_tiny regnetx_004_tv repghostnet_050 repvit_m1 res2net50_48w_2s resnest14d test_resnet rexnet_100
    selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs
    swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224
    tresnet_m twins_svt_small visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos vitamin_small_224
    volo_d1_224 ese_vovnet19b_slim_dw xception xception41p xcit_nano_12_p8_224
"""  # the smallest of each module; those of more than 30 million parameters are left out
SIDE = 96
"""Of the images, where a model takes any."""


def entries() -> list[Entry]:
    """One entry a module of timm, and another at two sizes of images where the model takes any."""
    import timm  # type: ignore[import-not-found]  # published without types

    names = NAMES.split()
    free = [name for name in names if not getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False)]
    resized = [
        Entry(f"timm/{name}-resized", "timm", functools.partial(build, name), images(SIDE), None, free_sizes)
        for name in free
    ]
    return [Entry(f"timm/{name}", "timm", functools.partial(build, name), _images) for name in names] + resized


def build(name: str) -> nn.Module:
    """Return the model, for small images where it admits them."""
    import timm

    made: nn.Module = timm.create_model(name, pretrained=False, num_classes=10)
    return made.eval()


def _images(model: nn.Module, batch: int, length: int, seed: int) -> Call:
    config: dict[str, Any] = model.default_cfg  # type: ignore[assignment]  # timm's own attribute
    side = config["input_size"][-1] if config.get("fixed_input_size") else SIDE
    return {"x": torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))}
