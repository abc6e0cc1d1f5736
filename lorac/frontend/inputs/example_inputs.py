"""Example inputs of transformers models, made from their main input and their configuration."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lorac.frontend.host import Host

_BATCH, _LENGTH, _DECODER_LENGTH = 2, 7, 5  # never 0 or 1, which torch.export treats as constants; distinct primes
_IMAGE_TOKENS = ("image_token_id", "image_token_index")
"""Configuration fields for the token id that stands for a patch of an image."""
_PIXELS, _VIDEOS = "pixel_values", "pixel_values_videos"
_IMAGES = (_PIXELS, _VIDEOS)
"""Arguments that take images."""


def make_example_inputs(host: Host) -> dict[str, Any] | None:
    """Make example inputs of a transformers model.

    Returns:
        Inputs by name. None: the main input is not token ids, pixels or sound, or the model does not mark each patch of
            an image by one token id.
    """
    config: Any = host.model.config
    main, names = getattr(host.model, "main_input_name", None), host.parameters
    inputs: dict[str, Tensor] = {}
    if main not in names or main not in ("input_ids", *_IMAGES, *_SOUNDS):
        return None
    if main == "input_ids":
        ids = _make_ids(config, _LENGTH, host.device)
        inputs |= {"input_ids": ids}
        inputs |= {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
    shapes = {name: _image_shape(config, name) for name in _IMAGES if name in names}
    shapes |= {main: _sound_shape(config, main)} if main in _SOUNDS else {}
    inputs |= {name: host.make_wave(shape) for name, shape in shapes.items() if shape is not None}
    if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = _make_ids(config, _DECODER_LENGTH, host.device)
    tokens = (getattr(config, name, None) for name in _IMAGE_TOKENS)
    token = next((token for token in tokens if isinstance(token, int)), None)
    if token is not None and main == "input_ids":
        joined = _insert_image_tokens(host, inputs["input_ids"], inputs[_PIXELS], token) if _PIXELS in inputs else None
        if joined is None:
            return None
        mask = {"attention_mask": torch.ones_like(joined["input_ids"])} if "attention_mask" in inputs else {}
        inputs |= joined | mask
    return inputs if main in inputs else None


@torch.no_grad()
def _insert_image_tokens(host: Host, ids: Tensor, pixels: Tensor, token: int) -> dict[str, Tensor] | None:
    """Return ids and pixels that fit, with one image per row; None if the number of patches is unknown.

    Args:
        host: the model; a copy of it encodes the images.
        ids: (rows, length).
        pixels: (rows, channels, height, width); a model that takes several images per row gets one.
        token: the id that stands for a patch.
    """
    copied: Any = host.copy().model.eval()
    encoders = [one.get_image_features for one in (copied, copied.base_model) if hasattr(one, "get_image_features")]
    for encode, images in itertools.product(encoders, (pixels, pixels.unsqueeze(1))):
        try:
            features = encode(**{_PIXELS: images})
        except Exception:  # the model needs more than pixels of this shape
            continue
        pooled = getattr(features, "pooler_output", features)
        vectors = pooled if isinstance(pooled, list | tuple) else [pooled]  # of all images
        patches, rest = divmod(sum(part.numel() // part.shape[-1] for part in vectors), len(ids))
        if patches and not rest:
            marks = ids.new_full((len(ids), patches), token)
            words = torch.where(ids == token, token - 1 if token else 1, ids)
            return {"input_ids": torch.cat([words[:, :1], marks, words[:, 1:]], 1), _PIXELS: images}
    return None


def describe_processor_call(host: Host) -> str:
    """Return code that makes example inputs with the processor of a transformers model."""
    arguments = {"images": _IMAGES, "audio": _SOUNDS, "text": ("input_ids",)}
    kinds = [kind for kind, inputs in arguments.items() if not host.parameters.keys().isdisjoint(inputs)]
    path = getattr(host.model.config, "name_or_path", "") or "the model's name"
    values = ", ".join(f"{kind}=[..., ...]" for kind in kinds)
    return f"dict(transformers.AutoProcessor.from_pretrained({path!r})({values}, return_tensors='pt', padding=True))"


def _make_ids(config: Any, length: int, device: torch.device | None) -> Tensor:
    """Make varied token ids without a random generator; the last id ends the text (CLIP searches for it)."""
    text = config.get_text_config(decoder=True)
    ids: Tensor = (torch.arange(_BATCH * length, device=device).reshape(_BATCH, length) * 5 + 3) % text.vocab_size
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    return ids


def _image_shape(config: object, name: str) -> tuple[int, ...] | None:
    """Return the configured shape of images or videos; None if no size is configured."""
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    if isinstance(size, Mapping):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else (tuple(size or ()) or (None, None))
    if height is None:
        return None
    frames = getattr(vision, "num_frames", getattr(vision, "frames_per_clip", None))
    if frames is None and name == _VIDEOS:
        return None
    return (_BATCH, *(() if frames is None else (frames,)), getattr(vision, "num_channels", 3), height, width)


_SOUNDS = ("input_values", "input_features")
"""Arguments that take sounds."""


def _sound_shape(config: object, name: str) -> tuple[int, ...] | None:
    """Return the shape of a sound: samples for a stack of convolutions, or a spectrogram; None if it is not configured.

    The last axis of ``input_features`` is time, with two frames per position of the encoder.
    """
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if name == "input_values" and kernels and strides:
        count = _LENGTH
        for kernel, stride in reversed(list(zip(kernels, strides, strict=False))):
            count = (count - 1) * stride + kernel
        return (_BATCH, count)
    fields = ("max_length", "num_mel_bins") if name == "input_values" else ("num_mel_bins", "max_source_positions")
    first, last = (getattr(config, field, None) for field in fields)
    if first is None or last is None:
        return None
    return (_BATCH, first, last if name == "input_values" else 2 * last)
