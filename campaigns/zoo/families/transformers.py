"""Every architecture of transformers that its own tables of automatic classes name, made tiny by rule."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from campaigns.zoo import calls, exceptions, shrinking
from campaigns.zoo.entries import Call, Entry

TASKS = (  # (family, the table of transformers that names its models); a model is counted under the first that has it
    ("seq2seq", "SEQ_TO_SEQ_CAUSAL_LM"),
    ("vision-language", "IMAGE_TEXT_TO_TEXT"),
    ("CTC", "CTC"),
    ("speech", "SPEECH_SEQ_2_SEQ"),
    ("masked", "MASKED_LM"),
    ("causal", "CAUSAL_LM"),
    ("CLIP-like", "ZERO_SHOT_IMAGE_CLASSIFICATION"),
    ("image", "IMAGE_CLASSIFICATION"),
    ("speech", "AUDIO_CLASSIFICATION"),
    ("video", "VIDEO_CLASSIFICATION"),
    ("depth and detection", "DEPTH_ESTIMATION"),
    ("depth and detection", "OBJECT_DETECTION"),
    ("depth and detection", "SEMANTIC_SEGMENTATION"),
    ("depth and detection", "UNIVERSAL_SEGMENTATION"),
    ("vision base", "IMAGE"),
    ("time series", "TIME_SERIES_PREDICTION"),
)
EXPERTS = re.compile(
    r".*moe|.*moe_\w+|mixtral|olmoe|dbrx|deepseek_v\d+|gpt_oss|jetmoe|flex_olmo|dots1|ernie4_5_moe|longcat_flash|"
    r"minimax\w*|afmoe|nllb-moe|switch_transformers|solar_open|sarvam_mla|zaya|mimo_v2_flash|laguna"
)
STATE_SPACE = """
    bailing_hybrid bamba falcon_h1 falcon_mamba granitemoehybrid jamba kimi_linear lfm2 lfm2_moe lfm3 mamba mamba2
    nemotron_h olmo_hybrid qwen3_5_text qwen3_next recurrent_gemma rwkv xlstm zamba zamba2
"""


def entries() -> list[Entry]:
    """One entry a model type."""
    return [
        Entry(
            f"transformers/{kind}",
            _family(family, kind),
            functools.partial(build, kind, table),
            functools.partial(_inputs, kind),
            exceptions.experts_too if EXPERTS.fullmatch(kind) else None,
            exceptions.SHAPES.get(kind, exceptions.FAMILY_SHAPES.get(family)),
        )
        for kind, (family, table) in sorted(_kinds())
    ]


def _kinds() -> Iterator[tuple[str, tuple[str, str]]]:
    from transformers.models.auto import modeling_auto

    found: set[str] = set(exceptions.LEFT_OUT)
    for family, table in TASKS:
        for kind in getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES"):
            if kind not in found:
                yield kind, (family, table)
            found.add(kind)


def _family(family: str, kind: str) -> str:
    if kind in STATE_SPACE.split():
        return "state-space"
    return "experts" if EXPERTS.fullmatch(kind) and family in ("causal", "seq2seq") else family


def build(kind: str, table: str) -> nn.Module:
    """Return the model of a type and a task, tiny."""
    import transformers
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    named = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES")[kind]
    model = getattr(transformers, named if isinstance(named, str) else named[0])
    config = shrinking.tiny(CONFIG_MAPPING[kind](), **exceptions.SETTINGS.get(kind, {}))
    config.use_cache = False
    built: nn.Module = model(config)
    return built.eval()


def _inputs(kind: str, model: nn.Module, batch: int, length: int, seed: int) -> Call:
    special: dict[str, Any] = dict(exceptions.CALLS.get(kind, {}))
    return calls.call(model, batch, length, seed, **special)
