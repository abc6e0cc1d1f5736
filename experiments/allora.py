"""Is ALLoRA faster than LoRA under SGD, at an equal rate and at each one's best?

    python -m experiments.allora [--seeds 5] [--steps 50] [--smoke]

A small Llama over characters, trained briefly on Python's own documentation, is adapted to the source of its standard
library by few steps of SGD, with η² in 1, 2 and 4. While B is 0 ALLoRA's rate is η times the optimizer's, so that at an
equal rate a larger η is faster for that reason alone; the best rates are the fair comparison.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import pydoc_data.topics
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import lorac
from experiments._finding import Expected, Finding
from experiments._study import Experiment, Fault, Losses, Question, answer, last, main, trained
from lorac.training import ALLoRA

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
ROWS, LENGTH, R = 8, 32, 4


def _characters(text: str) -> Tensor:
    return torch.tensor([min(ord(c), 127) for c in text])


def _rows(text: Tensor, generator: torch.Generator) -> Tensor:
    starts = torch.randint(0, len(text) - LENGTH, (ROWS,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


@functools.cache
def host() -> Any:
    """Return the Llama, trained on the documentation."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    text = _characters("".join(pydoc_data.topics.topics.values()))
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        ids = _rows(text, generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@functools.cache
def source() -> Tensor:
    return _characters("".join(inspect.getsource(module) for module in (inspect, json.decoder, copy, functools)))


def side(eta2: float | None) -> Callable[..., Losses]:
    """SGD with or without the rule: (rate, seed, steps) -> losses on rows that are not trained on, always the same."""

    def run(rate: float, seed: int, steps: int) -> Losses:
        model = host()
        half = len(source()) // 2
        held = _rows(source()[half:], torch.Generator().manual_seed(12345))
        compiled: Any = lorac.compile(model, {"a": lorac.LoRA(r=R, alpha=R, targets=TARGETS)}).train()  # type: ignore[attr-defined]  # train() is nn.Module's
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for own in compiled.adapters["a"].tensors.values():
                bound = own["lora_A"].shape[1] ** -0.5
                own["lora_A"].uniform_(-bound, bound, generator=generator)
        optimizer = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=rate)
        if eta2 is not None:
            ALLoRA(compiled, optimizer, eta2=eta2)

        def step(index: int) -> float:
            ids = _rows(source()[:half], generator)
            optimizer.zero_grad()
            compiled(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            if index < steps:
                return 0.0
            with torch.no_grad():
                return float(compiled(input_ids=held, labels=held).loss)

        return trained(step, steps)

    return run


QUESTION = Question(
    "SGD",
    {"LoRA": side(None), **{f"ALLoRA, η² = {eta2:g}": side(eta2) for eta2 in (1.0, 2.0, 4.0)}},
    (0.5, 0.7, 1.0, 1.4, 2.0, 2.8),
    last,
    "loss after the last step on text that was not trained on",
    at=0.5,
)


def keep_rate(rule: ALLoRA, pair: Any) -> Tensor:
    """Return the rates of rows that learn alike."""
    return torch.ones(len(pair.b))


EXPECTED = [
    Expected("SGD, at one rate", "ALLoRA, η² = 2", "LoRA", "section 4"),
    Expected("SGD", "ALLoRA, η² = 2", "LoRA"),
]
EXPERIMENT = Experiment(
    claim="With a rate that falls as the rows of B grow, few steps of SGD lower the loss more than with LoRA's.",
    source="Huang et al., ALLoRA, arXiv 2410.09692, section 4",
    find=lambda given: Finding(answer([QUESTION], given), EXPECTED),
    steps=50,
    fails_by="a falling rate that gains no more than a higher rate of LoRA's",
    fault=Fault("gradients are left as they are", lambda: patch.object(ALLoRA, "rates", keep_rate)),
)

if __name__ == "__main__":
    main(EXPERIMENT, "allora", __doc__)
