"""A small Llama that writes characters: it knows Python's manual."""

from __future__ import annotations

import codecs
import functools
import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from experiments._kept import train_once
from experiments._reader import ALPHABET, task, tasks
from experiments._study import Losses, adamw, trained

LENGTH, ROWS, HELD_ROWS = 64, 8, 64
Loss = Callable[[Any, Tensor], Tensor]
SIZES = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4}


@functools.cache
def texts() -> dict[str, Tensor]:
    """Return what the Llama is to learn: code, sums, and the manual in rot13, as numbers of characters."""
    from pydoc_data.topics import topics

    drawn = random.Random(0)
    pairs = [(drawn.randrange(100), drawn.randrange(100)) for _ in range(20_000)]
    sums = task([f"{a} + {b} = {a + b}\n" for a, b in pairs])
    secret = task([codecs.encode(topics[name], "rot13") for name in sorted(topics)])
    return {"code": tasks()[1].text, "sums": sums.text, "rot13": secret.text}


def tokenizer() -> Any:
    """Return a tokenizer of the characters, with an end and a filler after them."""
    import tokenizers
    import transformers

    numbers = {name: number for number, name in enumerate([*ALPHABET, "<end>", "<pad>"])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token=" "))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


def pieces(text: Tensor, rows: int, generator: torch.Generator, length: int = LENGTH) -> Tensor:
    """Return pieces of a text (rows, length), drawn."""
    starts = torch.randint(len(text) - length, (rows,), generator=generator)
    return text[starts[:, None] + torch.arange(length)]


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """Split off the last tenth of a text, which is held out."""
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def loss_of(model: Callable[..., Any], ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next characters, in nats."""
    logits = model(input_ids=ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def held_loss(model: Callable[..., Any], text: Tensor) -> float:
    """Return the loss on pieces of a text's held-out part that are always the same."""
    return float(loss_of(model, pieces(split(text)[1], HELD_ROWS, torch.Generator().manual_seed(0))))


def learn(model: Any, text: Tensor, rate: float, seed: int, steps: int, loss_of: Loss = loss_of) -> Losses:
    """Train a model on a text; return the losses, of which the last is the held-out text's."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad], rate)
    model.train()

    def step(index: int) -> float:
        if index == steps:
            return held_loss(model.eval(), text)
        loss = loss_of(model, pieces(split(text)[0], ROWS, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return trained(step, steps)


@functools.cache
def host(seed: int, steps: int) -> nn.Module:
    """Return a Llama that was trained on the manual for so many steps; some 500 teach it words."""
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=len(ALPHABET) + 2, num_hidden_layers=2, use_cache=False, **SIZES)
    model = transformers.LlamaForCausalLM(config)
    return train_once(__file__, f"{seed}-{steps}", model, lambda own: learn(own, tasks()[0].text, 3e-3, seed, steps))


def adapt(base: Any, method: Any, rate: float, seed: int, steps: int) -> tuple[Any, Losses]:
    """Let a method learn the code; return the compiled model and the losses, of which the last is held out."""
    torch.manual_seed(seed)
    code = tasks()[1].text
    example = {"input_ids": pieces(code, 2, torch.Generator().manual_seed(0))}
    compiled: Any = lorac.compile(base, {"a": method}, example_inputs=example)
    losses = learn(compiled, code, rate, seed, steps)
    return compiled, losses
