"""torchvision's classifiers, one per architecture, with ten classes and small images."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from campaigns.zoo.entries import Call, Entry

SIDES = {  # what an architecture needs at least, or a multiple of
    "googlenet": 64,
    "inception_v3": 96,
    "alexnet": 64,
}
SMALLER: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
    "vit_b_16": {"image_size": 32},
}
NAMES = """
    alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t mnasnet0_5
    mobilenet_v2 mobilenet_v3_small mobilenet_v3_large regnet_x_400mf regnet_y_400mf resnet18 resnet50
    resnext50_32x4d shufflenet_v2_x0_5 squeezenet1_1 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16 wide_resnet50_2
"""
SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")


def entries() -> list[Entry]:
    """Image classifiers, and models that label pixels."""
    images = [Entry(f"torchvision/{n}", "torchvision", functools.partial(_build, n), _images(n)) for n in NAMES.split()]
    pixels = [
        Entry(f"torchvision/{n}", "torchvision", functools.partial(_build_pixels, n), _images(n)) for n in SEGMENTATION
    ]
    return images + pixels


def _build(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, num_classes=10, **SMALLER.get(name, {})).eval()


def _build_pixels(name: str) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, weights_backbone=None, num_classes=5).eval()


def _images(name: str) -> Any:
    side = SIDES.get(name, 224 if name == "maxvit_t" else 32)

    def inputs(model: nn.Module, batch: int, length: int, seed: int) -> Call:
        return {"x" if "x" in _arguments(model) else "input": _noise(seed, batch, 3, side, side)}

    return inputs


def _arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
