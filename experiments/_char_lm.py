"""A small Llama that writes characters: it knows Python's manual, and is to learn the standard library's code."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lorac
from experiments._reader import ALPHABET, Task, tasks
from experiments._study import Losses, adamw, trained

LENGTH, ROWS, HELD, WIDTH, HEADS = 128, 4, 32, 64, 4
KNOWN = 500
"""Steps that the manual is learned in."""
TARGETS = ("q_proj", "v_proj")


def untrained() -> Any:
    """Return the Llama as transformers draws it: two layers of 64, four heads."""
    import transformers

    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=len(ALPHABET), use_cache=False, max_position_embeddings=1024, **sizes)
    )


def pieces(text: Task, rows: int, seed: int, length: int = LENGTH) -> Tensor:
    """Return pieces of a text (rows, length), drawn by a seed."""
    starts = torch.randint(len(text.text) - length, (rows,), generator=torch.Generator().manual_seed(seed))
    return text.text[starts[:, None] + torch.arange(length)]


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Return the loss of the next character."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@functools.cache
def host(steps: int = KNOWN) -> Any:
    """Return a Llama that knows the manual."""
    torch.manual_seed(0)
    model = untrained().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model, pieces(tasks()[0], ROWS, step)).backward()
        optimizer.step()
    return model.eval()


def learn(base: Any, method: Any, rate: float, seed: int, steps: int) -> tuple[Any, Losses]:
    """Let a method learn the code; return the compiled model and the losses, the last on pieces that stay the same."""
    torch.manual_seed(seed)
    compiled: Any = lorac.compile(base, {"a": method}, example_inputs={"input_ids": pieces(tasks()[1], 2, 0)})
    compiled.train()
    optimizer = adamw([p for p in compiled.parameters() if p.requires_grad], rate)

    def step(index: int) -> float:
        if index == steps:
            return held_loss(compiled)
        loss = loss_of(compiled, pieces(tasks()[1], ROWS, 10_000 * (seed + 1) + index))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    found = trained(step, steps)
    compiled.eval()
    return compiled, found


@torch.no_grad()
def held_loss(model: Any) -> float:
    """Return the loss on pieces of the code that are always the same."""
    return float(loss_of(model, pieces(tasks()[1], HELD, 0)))
