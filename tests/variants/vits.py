"""Tiny vision transformers of transformers, timm and torchvision, of many kinds, and where their blocks are."""

import importlib

import torch
import torchvision
import transformers

HF = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SEEN = {**HF, "image_size": 16, "patch_size": 8}
WINDOWS = {"depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "embed_dim": 8, "patch_size": 4, "image_size": 32}
DINO = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2}
TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
SWIN = {"img_size": 32, "patch_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
TV_SWIN = {"patch_size": [4, 4], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": [4, 4]}
PLAIN = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 24}


def _hf(kind, **fields):
    return lambda: getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**fields))


def _timm(kind, **fields):
    # Imported where one is made: torch's tracers look through all classes of modules, most of which would be timm's.
    return lambda: getattr(importlib.import_module("timm.models"), kind)(**fields)


def _two(start):
    return tuple(f"{start}.{i}" for i in range(2))


def _stages(start, inside):
    return tuple(f"{start}.{s}{inside}.{i}" for s in range(2) for i in range(2))


VITS = {
    "transformers-vit": (_hf("ViT", **SEEN), _two("layers"), 16),
    "transformers-deit": (_hf("DeiT", **SEEN), _two("layers"), 16),
    "transformers-beit": (_hf("Beit", **SEEN), _two("layers"), 16),
    "transformers-msn": (_hf("ViTMSN", **SEEN), _two("layers"), 16),
    "transformers-clip": (_hf("CLIPVision", **SEEN), _two("encoder.layers"), 16),
    "transformers-siglip": (_hf("SiglipVision", **SEEN), _two("encoder.layers"), 16),
    "transformers-dinov2": (_hf("Dinov2", **DINO, image_size=16, patch_size=8), _two("encoder.layer"), 16),
    "transformers-dinov3": (_hf("DINOv3ViT", **SEEN), _two("model.layer"), 16),
    "transformers-swin": (_hf("Swin", **WINDOWS), _stages("encoder.layers", ".blocks"), 32),
    "transformers-swinv2": (_hf("Swinv2", **WINDOWS), _stages("encoder.layers", ".blocks"), 32),
    "timm-vit": (_timm("VisionTransformer", **TIMM), _two("blocks"), 16),
    "timm-deit": (_timm("VisionTransformerDistilled", **TIMM), _two("blocks"), 16),
    "timm-beit": (_timm("Beit", **TIMM), _two("blocks"), 16),
    "timm-eva": (_timm("Eva", **TIMM), _two("blocks"), 16),
    "timm-cait": (_timm("Cait", **TIMM), (*_two("blocks"), *_two("blocks_token_only")), 16),
    "timm-swin": (_timm("SwinTransformer", **SWIN, num_classes=3), _stages("layers", ".blocks"), 32),
    "torchvision-vit": (
        lambda: torchvision.models.VisionTransformer(**PLAIN, num_classes=3),
        ("encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"),
        16,
    ),
    "torchvision-swin": (
        lambda: torchvision.models.SwinTransformer(**TV_SWIN, num_classes=3),
        ("features.1.0", "features.1.1", "features.3.0", "features.3.1"),
        32,
    ),
}
"""Name -> how it is made, the paths of its transformer blocks, and the side of its images."""


def vit(name):
    """A model in eval mode, whose output layer, if it starts from zero, does not; and images for it."""
    make, _, side = VITS[name]
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        if parameter.dim() == 2 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))


def answer(output):
    """The tensor to compare."""
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state
