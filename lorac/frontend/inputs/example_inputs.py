"""Example inputs for a capture, made from a model's main input and its configuration."""

import inspect
import itertools
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import ExampleInputsNeeded
from lorac.frontend.copying import copy_structure
from lorac.frontend.hugging_face import is_hugging_face
from lorac.frontend.inputs.diffusers_models import make_image_inputs, make_wave

_FIELDS = ("image_token_id", "image_token_index")
"""Names in configurations of the id that stands for a patch of an image."""
PIXEL_VALUES = "pixel_values"


def get_image_token(config: object) -> int | None:
    """Return the id that stands for a patch of an image; None for models without one."""
    tokens = (getattr(config, name, None) for name in _FIELDS)
    return next((token for token in tokens if isinstance(token, int)), None)


@torch.no_grad()
def insert_image_tokens(model: nn.Module, ids: Tensor, pixels: Tensor, token: int) -> dict[str, Tensor] | None:
    """Return ids and pixels that fit each other, of one image a row; None where the number of patches cannot be found.

    Args:
        model: left unchanged; a copy encodes the images.
        ids: (rows, length).
        pixels: (rows, channels, height, width); a model that takes several images a row gets a list of one.
        token: the id that stands for a patch.
    """
    copied: Any = copy_structure(model).eval()
    encoders = [one.get_image_features for one in (copied, copied.base_model) if hasattr(one, "get_image_features")]
    for encode, images in itertools.product(encoders, (pixels, pixels.unsqueeze(1))):
        patches, rest = divmod(_count_features(encode, images), len(ids))
        if patches and not rest:
            marks = ids.new_full((len(ids), patches), token)
            words = torch.where(ids == token, token - 1 if token else 1, ids)
            return {"input_ids": torch.cat([words[:, :1], marks, words[:, 1:]], 1), PIXEL_VALUES: images}
    return None


def _count_features(encode: Callable[..., Any], pixels: Tensor) -> int:
    """Count the feature vectors of all images; 0 where pixels of this shape alone do not suffice."""
    try:
        features = encode(**{PIXEL_VALUES: pixels})
    except Exception:
        return 0
    pooled = getattr(features, "pooler_output", features)
    parts = pooled if isinstance(pooled, list | tuple) else [pooled]
    return sum(part.numel() // part.shape[-1] for part in parts)


_BATCH, _LENGTH, _DECODER_LENGTH = 2, 7, 5  # never 0 or 1, which torch.export takes for constants; distinct primes


def make_example_inputs(model: nn.Module) -> dict[str, Any]:
    """Make example inputs from the model's main input and configuration; of a diffusers model from its configuration.

    Raises:
        ExampleInputsNeeded: the main input is not token ids, pixels or sound, or the model joins them in another way
            than by one id for each patch of an image.
    """
    if images := make_image_inputs(model):
        return images
    config, names = getattr(model, "config", None), list(inspect.signature(model.forward).parameters)
    main = getattr(model, "main_input_name", None) if is_hugging_face(model) else None
    inputs: dict[str, Tensor] = {}
    if main in ("input_ids", *_IMAGES, *_SOUNDS) and main in names:
        device = next((p.device for p in model.parameters()), None)
        if main == "input_ids":
            ids = _make_ids(config, _LENGTH, device)
            inputs |= {"input_ids": ids}
            inputs |= {"attention_mask": torch.ones_like(ids)} if "attention_mask" in names else {}
        shapes = {name: _image_shape(config, name) for name in _IMAGES if name in names}
        shapes |= {name: shape(config) for name, shape in _SOUNDS.items() if name == main}
        inputs |= {name: make_wave(model, shape) for name, shape in shapes.items() if shape is not None}
        if "decoder_input_ids" in names and getattr(config, "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = _make_ids(config, _DECODER_LENGTH, device)
    token = get_image_token(config)
    if token is not None and main == "input_ids":
        inputs = _join_images(model, inputs, token)
    if main not in inputs:
        raise ExampleInputsNeeded(
            f"example inputs cannot be made for {type(model).__name__}; its forward takes ({', '.join(names)})",
            next_step=f"{_example_code(model, names)}, batch and lengths of 2 or more",
        )
    return inputs


def _join_images(model: nn.Module, inputs: dict[str, Tensor], token: int) -> dict[str, Tensor]:
    """Put placeholders for the images among the ids; return nothing where their number cannot be found."""
    if PIXEL_VALUES not in inputs:
        return {}
    joined = insert_image_tokens(model, inputs["input_ids"], inputs[PIXEL_VALUES], token)
    if joined is None:
        return {}
    mask = {"attention_mask": torch.ones_like(joined["input_ids"])} if "attention_mask" in inputs else {}
    return {**inputs, **joined, **mask}


def _example_code(model: nn.Module, names: Collection[str]) -> str:
    """Return code that makes example inputs: by the processor of a transformers model, else a tensor per argument."""
    if is_hugging_face(model):
        arguments = {"images": _IMAGES, "audio": tuple(_SOUNDS), "text": ("input_ids",)}
        kinds = [kind for kind, inputs in arguments.items() if set(inputs) & set(names)]
        path = getattr(model.config, "name_or_path", "") or "the model's name"
        values = ", ".join(f"{kind}=[..., ...]" for kind in kinds)
        processor = f"transformers.AutoProcessor.from_pretrained({path!r})"
        return f"pass example_inputs=dict({processor}({values}, return_tensors='pt', padding=True))"
    parameters = inspect.signature(model.forward).parameters
    needed = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD] or names
    numbers = [n for n in needed if re.search(r"\b(int|float)\b", str(parameters[n].annotation))]
    values = ", ".join(f"{n!r}: torch.tensor(1.0)" if n in numbers else f"{n!r}: torch.randn(2, ...)" for n in needed)
    return f"pass example_inputs={{{values}}}, with the shapes that the model takes"


def _make_ids(config: Any, length: int, device: torch.device | None) -> Tensor:
    """Make distinct-looking token ids without a random generator; the last one ends the text (CLIP looks for it)."""
    text = config.get_text_config(decoder=True)
    ids: Tensor = (torch.arange(_BATCH * length, device=device).reshape(_BATCH, length) * 5 + 3) % text.vocab_size
    end = getattr(text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < text.vocab_size:
        ids[:, -1] = end
    return ids


def _image_shape(config: object, name: str) -> tuple[int, ...] | None:
    """Return the shape of images, or of videos, of the configured size; None where no size is configured."""
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


def _samples_shape(config: object) -> tuple[int, ...] | None:
    """Return the shape of a sound: samples for a stack of convolutions, or a spectrogram of a fixed size."""
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if kernels and strides:
        count = _LENGTH
        for kernel, stride in reversed(list(zip(kernels, strides, strict=False))):
            count = (count - 1) * stride + kernel
        return (_BATCH, count)
    return _configured_shape(config, "max_length", "num_mel_bins")


def _spectrogram_shape(config: object) -> tuple[int, ...] | None:
    """Return the shape of a spectrogram with time last, two frames for each position of the encoder."""
    shape = _configured_shape(config, "num_mel_bins", "max_source_positions")
    return None if shape is None else (*shape[:2], 2 * shape[2])


def _configured_shape(config: object, *names: str) -> tuple[int, ...] | None:
    sizes = [getattr(config, name, None) for name in names]
    return None if None in sizes else (_BATCH, *(size for size in sizes if size is not None))


_VIDEOS = "pixel_values_videos"
_IMAGES = (PIXEL_VALUES, _VIDEOS)
"""Arguments that hold images."""
_SOUNDS: Mapping[str, Callable[[object], tuple[int, ...] | None]] = {
    "input_values": _samples_shape,
    "input_features": _spectrogram_shape,
}
"""Arguments that hold sounds -> their shapes."""
