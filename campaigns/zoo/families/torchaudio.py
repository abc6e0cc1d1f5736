"""torchaudio's models of sounds, tiny, where that package is installed."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from campaigns.zoo.entries import Call, Entry

WAVEFORM = {
    "extractor_mode": "group_norm", "extractor_conv_layer_config": [(32, 10, 5), (32, 3, 2)],
    "extractor_conv_bias": False, "encoder_embed_dim": 32, "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 4, "encoder_num_layers": 2, "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 48, "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": 10,
}  # fmt: skip
Settings = Mapping[str, Any]
Axes = Mapping[str, tuple[int, ...]]
MODELS: Mapping[str, tuple[str, Settings, Callable[..., Call], Axes]] = {
    "conformer": (
        "Conformer",
        {"input_dim": 32, "num_heads": 4, "ffn_dim": 48, "num_layers": 2, "depthwise_conv_kernel_size": 3},
        lambda noise, batch, length: {"input": noise(batch, length, 32), "lengths": torch.full((batch,), length)},
        {"input": (0, 1), "lengths": (0,)},
    ),
    "conv_tasnet": (
        "ConvTasNet",
        {
            "enc_num_feats": 32,
            "msk_num_feats": 16,
            "msk_num_hidden_feats": 32,
            "msk_num_layers": 2,
            "msk_num_stacks": 2,
        },
        lambda noise, batch, length: {"input": noise(batch, 1, 64 * length)},
        {"input": (0, 2)},
    ),
    "deepspeech": (
        "DeepSpeech",
        {"n_feature": 16, "n_hidden": 32, "n_class": 10},
        lambda noise, batch, length: {"x": noise(batch, 1, length, 16)},
        {"x": (0, 2)},
    ),
    "wav2letter": (
        "Wav2Letter",
        {"num_classes": 10, "input_type": "mfcc", "num_features": 13},
        lambda noise, batch, length: {"x": noise(batch, 13, 64 + length)},
        {"x": (0, 2)},
    ),
    "wav2vec2": (
        "wav2vec2_model",
        WAVEFORM,
        lambda noise, batch, length: {"waveforms": noise(batch, 400 + 40 * length)},
        {"waveforms": (0, 1)},
    ),
}
"""name: (its maker, settings, arguments of a call, axes of rows and time)."""


def entries() -> list[Entry]:
    """One entry an architecture."""
    if importlib.util.find_spec("torchaudio") is None:
        return []
    return [
        Entry(
            f"torchaudio/{name}",
            "speech",
            functools.partial(_build, maker, settings),
            functools.partial(_call, made),
            shapes=functools.partial(_shapes, axes),
        )
        for name, (maker, settings, made, axes) in MODELS.items()
    ]


def _build(maker: str, settings: Settings) -> nn.Module:
    import torchaudio  # type: ignore[import-not-found]  # no package of this environment

    made: nn.Module = getattr(torchaudio.models, maker)(**settings)
    return made.eval()


def _call(made: Callable[..., Call], model: nn.Module, batch: int, length: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    return made(lambda *shape: torch.randn(*shape, generator=generator), batch, length)


def _shapes(axes: Axes, call: Call) -> dict[str, Any]:
    return {name: dict.fromkeys(axes[name], torch.export.Dim.AUTO) for name in call}
