"""torchvision's models, one per architecture, with few classes and small images."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from campaigns.zoo.entries import Call, Entry, Inputs

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
DETECTION = """
    fasterrcnn_mobilenet_v3_large_fpn fcos_resnet50_fpn maskrcnn_resnet50_fpn retinanet_resnet50_fpn
    ssdlite320_mobilenet_v3_large
"""
VIDEO = "mc3_18 r2plus1d_18 r3d_18 swin3d_t"
"""Those that take clips of less than 224 pixels."""
_FIXED = ("maxvit_t", "vit_b_16")
"""Models of images of one size."""


class Scores(nn.Module):
    """A detector's backbone and head, up to the scores and boxes of all places, without the choice among them."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.head = detector.rpn.head if hasattr(detector, "rpn") else detector.head

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(list(self.backbone(x).values()))


def entries() -> list[Entry]:
    """Image classifiers, at two sizes too, and models of pixels, of objects and of clips."""
    labels = [
        (name, functools.partial(_build, name, num_classes=10, **SMALLER.get(name, {})), _side(name))
        for name in NAMES.split()
    ]
    pixels = [
        (name, functools.partial(_build, name, weights_backbone=None, num_classes=5), 32) for name in SEGMENTATION
    ]
    scores = [(f"{name}-scores", functools.partial(_scores, name), 128) for name in DETECTION.split()]
    fixed = [Entry(f"torchvision/{name}", "torchvision", build, _images(side)) for name, build, side in labels + pixels]
    resized = [
        Entry(f"torchvision/{name}-resized", "torchvision", build, images(max(side, 64)), None, free_sizes)
        for name, build, side in labels + pixels + scores
        if name not in _FIXED
    ]
    clips = [
        Entry(f"torchvision/{name}", "video", functools.partial(_build, name, num_classes=10), _clips)
        for name in VIDEO.split()
    ]
    return fixed + resized + clips


def images(side: int) -> Inputs:
    """Make images of a size, and larger ones in a longer call."""
    return lambda model, batch, length, seed: _call(model, seed, batch, 3, side * (length // 4), side * (length // 4))


def free_sizes(call: Call) -> dict[str, Any]:
    """Leave rows, height and width free."""
    return {name: dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO) for name in call}


def _build(name: str, **settings: Any) -> nn.Module:
    import torchvision

    made: nn.Module = torchvision.models.get_model(name, weights=None, **settings)
    return made.eval()


def _scores(name: str) -> nn.Module:
    return Scores(_build(name, weights_backbone=None, num_classes=5)).eval()


def _side(name: str) -> int:
    return SIDES.get(name, 224 if name == "maxvit_t" else 32)


def _images(side: int) -> Inputs:
    return lambda model, batch, length, seed: _call(model, seed, batch, 3, side, side)


def _clips(model: nn.Module, batch: int, length: int, seed: int) -> Call:
    return _call(model, seed, batch, 3, 8, 32, 32)


def _call(model: nn.Module, seed: int, *shape: int) -> Call:
    name = "x" if "x" in inspect.signature(model.forward).parameters else "input"
    return {name: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))}
