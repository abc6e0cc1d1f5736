"""A training loop of one's own, and the same training from a recipe.

    python -m examples.train

SmolLM2 learns the tone of Python's documentation by LoRA: once by a loop over accelerate that fits on a screen, once
from a recipe, as `lorac train CONFIG.yaml` runs it on TRL's trainer.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling

import lorac
from examples.models import smollm2
from lorac.trainer import Recipe, train
from lorac.trainer.data import BUNDLED
from lorac.training import LoRAPlus

console = Console(highlight=False)
LENGTH, BATCH, RATE = 64, 2, 5e-4


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of the optimizer (default: 10)")
    given = parser.parse_args()
    model, tokenizer = smollm2()
    console.rule("1  a loop of one's own")
    by_hand(model, tokenizer, given.steps)
    console.rule("2  from a recipe")
    recipe = Recipe(
        adapters={"docs": {"method": "lora", "r": 8, "alpha": 16, "targets": ["q_proj", "v_proj"]}},
        rules=[{"name": "LoRAPlus", "ratio": 4}],
        arguments={
            "learning_rate": RATE,
            "lr_scheduler_type": "constant",
            "max_steps": given.steps,
            "per_device_train_batch_size": BATCH,
            "max_length": LENGTH,
            "bf16": False,
            "logging_steps": 1,
            "disable_tqdm": True,
        },
    )
    with tempfile.TemporaryDirectory() as folder:
        train(model, tokenizer, recipe, folder)
        history = json.loads(Path(folder, "trainer_state.json").read_text())["log_history"]
    console.print([round(entry["loss"], 3) for entry in history if "loss" in entry])


def by_hand(model: Any, tokenizer: Any, steps: int) -> None:
    """Train without the recipe's trainer; whatever it does not offer goes in here."""
    texts = islice(BUNDLED["python-docs"](), steps * BATCH)
    rows: Any = [tokenizer(text, truncation=True, max_length=LENGTH) for text in texts]
    loader = DataLoader(rows, BATCH, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    accelerator = Accelerator()
    compiled = lorac.compile(model, {"docs": lorac.LoRA(r=8, alpha=16, targets=["q_proj", "v_proj"])})
    optimizer = torch.optim.AdamW((p for p in compiled.parameters() if p.requires_grad), lr=RATE)
    with LoRAPlus(compiled, optimizer, ratio=4):
        trained, held, batches = accelerator.prepare(compiled, optimizer, loader)
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
