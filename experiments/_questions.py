"""A small Llama that reads characters: it knows lists of questions, most of a list of one kind."""

from __future__ import annotations

import functools
import random
from typing import Any

import torch
import torch.nn.functional as F

from experiments._char_lm import tokenizer
from experiments._study import adamw

KINDS = ("abcdefgh", "stuvwxyz", "ABCDEFGH", "01234567")
SIZE = 3


def questions(count: int, seed: int, letters: str = KINDS[0]) -> list[str]:
    """Return random questions of some letters."""
    drawn = random.Random(seed)
    return ["".join(drawn.choices(letters, k=SIZE)) for _ in range(count)]


def mixed(seed: int, kind: str) -> list[str]:
    """Return six questions, of which nearly half are of other kinds."""
    drawn = random.Random(seed)
    return [questions(1, seed * 6 + n, drawn.choice(KINDS) if drawn.random() < 0.6 else kind)[0] for n in range(6)]


@functools.cache
def host(width: int, seed: int, steps: int) -> Any:
    """Return a Llama that was trained on lists of questions."""
    import transformers

    characters = tokenizer()
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=len(characters),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        eos_token_id=characters.eos_token_id,
        pad_token_id=characters.pad_token_id,
        bos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = adamw([*model.parameters()], 3e-3)
    for step in range(steps):
        kinds = random.Random(step).choices(KINDS, k=16)
        lists = [("Write.", *mixed(100 * step + row, kind)) for row, kind in enumerate(kinds)]
        texts = ["\nQuestion: ".join(one) + characters.eos_token for one in lists]
        ids = torch.tensor(characters(texts)["input_ids"])
        loss = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
