"""A training loop of one's own, and the same training from a recipe.

    python -m examples.train

SmolLM2 learns the tone of Python's documentation by LoRA: once by a loop over accelerate that fits on a screen, once
from a recipe, as `lorac train CONFIG.yaml` runs it.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

import lorac
from examples.models import smollm2
from lorac.trainer import Recipe, train
from lorac.trainer.data import TrainingData
from lorac.training import LoRAPlus

console = Console(highlight=False)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of the optimizer (default: 10)")
    given = parser.parse_args()
    recipe = Recipe(
        adapters={"docs": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}},
        rule={"name": "LoRAPlus", "ratio": 4},
        learning_rate=5e-4,
        lr_scheduler_type="constant",
        max_steps=given.steps,
        batch_size=2,
        max_length=64,
        eval_rows=8,
        logging_steps=1,
    )
    model, tokenizer = smollm2()
    console.rule("1  a loop of one's own")
    by_hand(model, tokenizer, recipe)
    console.rule("2  from a recipe")
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenizer, recipe, folder)
        with open(f"{folder}/log.jsonl") as log:
            console.print(log.read())


def by_hand(model: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Train without the recipe's loop; whatever it does not offer goes in here."""
    data, accelerator = TrainingData(recipe, tokenizer), Accelerator()
    variant = lorac.LoRA(r=8, alpha=16, targets=["q_proj", "v_proj"])
    compiled = lorac.compile(model, {"docs": variant})
    optimizer = torch.optim.AdamW((p for p in compiled.parameters() if p.requires_grad), lr=recipe.learning_rate)
    with LoRAPlus(compiled, optimizer, ratio=4):
        trained, held, batches = accelerator.prepare(compiled, optimizer, data.loader(0, recipe.max_steps))
        trained.train()
        for step, batch in enumerate(batches, 1):
            loss = trained(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained.parameters(), 1.0)
            held.step()
            held.zero_grad()
            console.print(f"step {step}, loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
