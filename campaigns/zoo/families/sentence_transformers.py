"""Sentence encoders of sentence-transformers, tiny: a model of transformers, and what makes one vector of its words."""

from __future__ import annotations

import functools
import importlib.util
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from campaigns.zoo.entries import Call, Entry
from campaigns.zoo.shrinking import SPECIAL, WIDTH, tiny

POOLINGS = ("mean", "cls", "max", "weightedmean", "lasttoken")
KINDS = ("bert", "mpnet", "distilbert", "xlm-roberta", "qwen3")


class Encoder(nn.Module):
    """A SentenceTransformer with its features as arguments: tensors alone can be freed of their sizes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        found: Tensor = self.model({"input_ids": input_ids, "attention_mask": attention_mask})["sentence_embedding"]
        return found


def entries() -> list[Entry]:
    """One entry a way of pooling, and one a kind of encoder."""
    if importlib.util.find_spec("sentence_transformers") is None:
        return []
    return [
        Entry(f"sentence-transformers/{kind}-{pooling}", "sentences", functools.partial(_build, kind, pooling), _words)
        for kind, pooling in [*(("bert", pooling) for pooling in POOLINGS), *((kind, "mean") for kind in KINDS[1:])]
    ]


def _build(kind: str, pooling: str) -> nn.Module:
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]  # not in this environment
    from sentence_transformers.sentence_transformer import modules  # type: ignore[import-not-found]  # see above

    with tempfile.TemporaryDirectory() as folder:
        _save(kind, folder)
        words = modules.Transformer(folder)
    parts = [words, modules.Pooling(WIDTH, pooling), modules.Dense(WIDTH, 24), modules.Normalize()]
    return Encoder(SentenceTransformer(modules=parts, device="cpu")).eval()


def _save(kind: str, folder: str) -> None:
    """Write a tiny encoder and a tokenizer, as a hub would give them."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModel, PreTrainedTokenizerFast
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config: Any = tiny(CONFIG_MAPPING[kind]())
    AutoModel.from_config(config).save_pretrained(folder)
    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def _words(model: nn.Module, batch: int, length: int, seed: int) -> Call:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, -1] = 0
    return {"input_ids": torch.randint(3, SPECIAL, (batch, length), generator=generator), "attention_mask": mask}
