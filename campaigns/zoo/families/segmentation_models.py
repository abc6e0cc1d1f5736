"""The architectures of segmentation-models-pytorch, each on a small encoder, where that package is installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

from torch import nn

from campaigns.zoo.entries import Entry
from campaigns.zoo.families.torchvision import free_sizes, images

NAMES = "DeepLabV3 DeepLabV3Plus DPT FPN Linknet MAnet PAN PSPNet Segformer UPerNet Unet UnetPlusPlus"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "DPT": {"encoder_name": "tu-vit_tiny_patch16_224", "dynamic_img_size": True},
}
"""DPT reads the layers of a transformer, all others the stages of a convolutional network."""


def entries() -> list[Entry]:
    """One entry an architecture."""
    if importlib.util.find_spec("segmentation_models_pytorch") is None:
        return []
    return [
        Entry(f"smp/{name}", "segmentation", functools.partial(_build, name), images(64), None, free_sizes)
        for name in NAMES.split()
    ]


def _build(name: str) -> nn.Module:
    import segmentation_models_pytorch as smp  # type: ignore[import-not-found]  # no package of this environment

    made: nn.Module = getattr(smp, name)(
        **{"encoder_name": "resnet18", "encoder_weights": None, "classes": 3, **SETTINGS.get(name, {})}
    )
    return made.eval()
