"""A tiny text encoder of CLIP's kind, and a tokenizer of letters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

LENGTH = 24


def make_tokenizer(folder: Path, *, pad: str = "<|endoftext|>", length: int = LENGTH) -> Any:
    """Return CLIP's tokenizer over letters alone; its files are written into a folder."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = ["<|startoftext|>", "<|endoftext|>", "!", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({name: place for place, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
    return transformers.CLIPTokenizer(*files, model_max_length=length, pad_token=pad)


def make_encoder(width: int = 32) -> Any:
    """Return a text encoder with random weights, the same every time, whose pooled vectors are apart."""
    config = transformers.CLIPTextConfig(
        vocab_size=55, hidden_size=width, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=1, initializer_factor=20.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPTextModel(config).eval()
