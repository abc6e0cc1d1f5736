"""Arguments of a call of any transformers model, from the names that its forward takes and its configuration.

Text goes to ``length``; images, sounds and everything else have the size that the configuration says. Where a text has
placeholders for what was seen or heard, the model itself is asked how many.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from campaigns.zoo.shrinking import SPECIAL

Call = Mapping[str, Any]
SAMPLES, FRAMES = 2000, 64
"""How many samples a sound has, and how many frames a spectrogram."""
BESIDE = frozenset(
    {
        "attention_mask",
        "decoder_input_ids",
        "bbox",
        "pixel_values",
        "image_grid_thw",
        "image_sizes",
        "mm_token_type_ids",
    }
)
"""Arguments that a call has wherever forward takes them and the configuration says what they are."""
IMAGES = frozenset({"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes"})
"""Arguments from which features of images are made."""


@dataclass
class Context:
    """What a maker of an argument knows.

    Attributes:
        model, batch, length: of the call.
        generator: where its numbers come from.
        made: the arguments that are made already.
    """

    model: Any
    batch: int
    length: int
    generator: torch.Generator
    made: dict[str, Any]

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def text(self) -> Any:
        with contextlib.suppress(Exception):
            return self.config.get_text_config(decoder=True)
        return self.config

    @property
    def vision(self) -> Any:
        inner = [getattr(self.config, name, None) for name in ("vision_config", "encoder", "backbone_config")]
        return next((found for found in inner if hasattr(found, "to_dict")), self.config)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def call(model: nn.Module, batch: int, length: int, seed: int, **given: Callable[[Context], Any]) -> Call:
    """Arguments by name.

    Args:
        model: a transformers model.
        batch, length, seed: of the call.
        given: makers of arguments that are made otherwise, or besides; what is None is left out.
    """
    parameters = inspect.signature(model.forward).parameters
    required = {n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    main = str(getattr(model, "main_input_name", "input_ids"))
    context = Context(model, batch, length, torch.Generator().manual_seed(seed), {})
    wanted = ({main} | required | BESIDE) & parameters.keys()
    makers = {name: maker for name, maker in MAKERS.items() if name in wanted} | given
    for name in sorted(makers, key=_order):
        value = makers[name](context)
        if value is not None:
            context.made[name] = value
    return context.made


def _order(name: str) -> tuple[bool, bool, bool, str]:
    """Pixels, what describes them, the text with their placeholders, and what describes the text."""
    late = name.startswith("decoder") or name in ("attention_mask", "bbox", "mm_token_type_ids", "token_type_ids")
    return (late, name == "input_ids", name != "pixel_values", name)


# ── Text ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def ids(context: Context) -> Tensor:
    """Words, with the placeholders of what was seen in front."""
    vocabulary = min(getattr(context.text, "vocab_size", SPECIAL), SPECIAL)
    words = context.integers(3, vocabulary, context.batch, context.length)
    token = placeholder(context.config)
    if token is not None:
        words[words == token] = 3  # what stands for an image is no word
    if token is not None and (count := seen(context)):
        marks = torch.full((context.batch, count), token, dtype=torch.int64)
        words = torch.cat([words[:, :2], marks, words[:, 2:]], 1)
    end = getattr(context.text, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:  # where CLIP reads its sentence
        words[:, -1] = end
    return words


def placeholder(config: Any) -> int | None:
    """Return the id that stands for a piece of an image."""
    found = (
        getattr(config, name, None) for name in ("image_token_id", "image_token_index", "media_placeholder_token_id")
    )
    return next((token for token in found if isinstance(token, int)), None)


def seen(context: Context) -> int:
    """How many placeholders each row needs: as many as there are features of its images."""
    images = {n: v for n, v in context.made.items() if n in IMAGES}
    look = _look(context.model)
    if "pixel_values" not in images or look is None:
        return 0
    accepted = inspect.signature(look).parameters
    with torch.no_grad():
        found = look(**{name: value for name, value in images.items() if name in accepted})
    found = getattr(found, "pooler_output", found)
    pieces = list(found) if isinstance(found, list | tuple) else [found]
    return sum(piece.numel() // piece.shape[-1] for piece in pieces) // context.batch


def _look(model: Any) -> Callable[..., Any] | None:
    """Return the model's function that makes features of images."""
    owners = (one for one in (model, model.base_model) if hasattr(one, "get_image_features"))
    return next((owner.get_image_features for owner in owners), None)


def mask(context: Context) -> Tensor | None:
    """Ones; the last of several rows ends in padding, where nothing stands but words."""
    words = context.made.get("input_ids")
    if words is None:
        return None
    made = torch.ones_like(words)
    if placeholder(context.config) is None and not getattr(context.config, "is_encoder_decoder", False):
        made[-1, -1:] = 0 if context.batch > 1 and "pixel_values" not in context.made else 1
    return made


def answers(context: Context) -> Tensor | None:
    """Words of the decoder."""
    if not getattr(context.config, "is_encoder_decoder", False):
        return None
    return context.integers(
        3, min(getattr(context.text, "vocab_size", SPECIAL), SPECIAL), context.batch, max(2, context.length - 2)
    )


def prefix(context: Context) -> Tensor:
    """0 for every word of a question, which all see one another."""
    return torch.zeros_like(context.made["input_ids"])


def kinds(context: Context) -> Tensor | None:
    """1 where an image stands, 0 where words do."""
    if "pixel_values" not in context.made:
        return None
    return (context.made["input_ids"] == placeholder(context.config)).to(torch.int64)


def boxes(context: Context) -> Tensor:
    """Left, top, right and bottom of every word."""
    words = context.made["input_ids"]
    corners = context.integers(1, 16, *words.shape, 4)
    return torch.cat([corners[..., :2], corners[..., :2] + corners[..., 2:]], -1)


# ── Images and sounds ────────────────────────────────────────────────────────────────────────────────────────────────
def side(config: Any) -> tuple[int, int]:
    """Height and width of an image."""
    size = getattr(config, "image_size", None)
    if isinstance(size, Mapping):
        return size["height"], size["width"]
    if isinstance(size, list | tuple):
        return size[0], size[-1]
    return (size, size) if isinstance(size, int) else (64, 64)


def pixels(context: Context) -> Tensor | None:
    """Images; as patches of all rows one after another where forward takes grids of them."""
    vision = context.vision
    if vision is context.config and getattr(context.model, "main_input_name", "") == "input_ids":
        return None
    channels = getattr(vision, "num_channels", getattr(vision, "in_channels", 3))
    if "image_grid_thw" in inspect.signature(context.model.forward).parameters:
        volume = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
        return context.noise(context.batch * 16, volume)
    return context.noise(context.batch, channels, *side(vision))


def video(context: Context) -> Tensor:
    """Return video frames, time before channels."""
    frames = getattr(context.vision, "num_frames", 4)
    return context.noise(context.batch, frames, getattr(context.vision, "num_channels", 3), *side(context.vision))


def grid(context: Context) -> Tensor | None:
    """One image of four by four patches a row."""
    return torch.tensor([[1, 4, 4]] * context.batch) if "pixel_values" in context.made else None


def sizes(context: Context) -> Tensor | None:
    """Height and width of every image, where its features cannot be had without."""
    look = _look(context.model)
    named = {} if look is None else inspect.signature(look).parameters
    if "pixel_values" not in context.made or "image_sizes" not in named:
        return None
    needed = named["image_sizes"].default is inspect.Parameter.empty
    return torch.tensor([list(side(context.vision))] * context.batch) if needed else None


def sound(context: Context) -> Tensor:
    """Return audio samples."""
    return context.noise(context.batch, SAMPLES + 160 * context.length)


def spectrum(context: Context) -> Tensor:
    """Frames of a spectrogram, channels last."""
    inner = [getattr(context.config, name, None) for name in ("encoder_config", "audio_config", "encoder")]
    names = ("num_mel_bins", "feature_size", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
    found = (getattr(config, name, None) for config in (context.config, *inner) for name in names)
    return context.noise(context.batch, FRAMES, next((bins for bins in found if bins), 80))


def spectrum_channels_first(context: Context) -> Tensor:
    """Frames of a spectrogram as Whisper takes them: bins, then twice as many frames as it has positions."""
    audio = getattr(context.config, "audio_config", context.config)
    return context.noise(context.batch, audio.num_mel_bins, 2 * audio.max_source_positions)


MAKERS: Mapping[str, Callable[[Context], Any]] = {
    "input_ids": ids,
    "attention_mask": mask,
    "decoder_input_ids": answers,
    "bbox": boxes,
    "mm_token_type_ids": kinds,
    "pixel_values": pixels,
    "pixel_values_videos": video,
    "image_grid_thw": grid,
    "image_sizes": sizes,
    "input_values": sound,
    "input_features": spectrum,
}
