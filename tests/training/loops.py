"""Hosts with a loss, their data, and the two ways of training them: a plain loop and transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from tests.zoo import ZOO

Batch = Mapping[str, Tensor]

TARGETS = {
    "tiny_llama": ("q_proj", "v_proj", "down_proj"),
    "tiny_bert": ("query", "value"),
    "plain_conv": ("stem", "grouped", "dilated", "line"),
    "minilm": ("query", "value"),
    "smollm2": ("q_proj", "v_proj"),
}


class Classifier(nn.Module):
    """A model that answers with its output alone, given a loss; of ten times its logits, for as drawn they are even."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, image: Tensor, labels: Tensor) -> SimpleNamespace:
        return SimpleNamespace(loss=F.cross_entropy(10 * self.body(image), labels))


def host(name: str) -> nn.Module:
    """A host of its own that answers with a loss; MiniLM's encoder gets a classifier, which stays as drawn."""
    if name != "minilm":
        model = ZOO[name].fresh()
        return Classifier(model).eval() if name == "plain_conv" else model
    from transformers import BertForSequenceClassification

    encoder: Any = ZOO[name].fresh()
    encoder.config.num_labels = 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(encoder.config).eval()
    model.bert = encoder
    return model


def variant(method: str, name: str, **fields: Any) -> Any:
    """A fresh variant of a method, on a host's targets."""
    made = {
        "lora": lambda: lorac.LoRA(r=4, alpha=8, targets=TARGETS[name], **fields),
        "dora": lambda: lorac.DoRA(r=4, alpha=8, targets=TARGETS[name], **fields),
        "shira": lambda: lorac.SHiRA(r=8, targets=TARGETS[name], **fields),
        "hydra": lambda: lorac.Hydra(r=2, r_sequential=2, targets=TARGETS[name], **fields),
    }
    return made[method]()


def data(name: str, steps: int, *, rows: int = 2, length: int = 8, distinct: bool = True) -> list[Batch]:
    """One batch per step with its labels; the same one each time unless ``distinct``."""
    return [_batch(name, step if distinct else 0, rows, length) for step in range(steps)]


def _batch(name: str, seed: int, rows: int, length: int) -> Batch:
    inputs = dict(ZOO[name].inputs(seed=seed, batch=rows, length=length))
    if "llama" in name or "smollm" in name:
        inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    else:
        inputs["labels"] = torch.arange(seed, seed + rows) % 5
    return inputs


def trained(model: Any) -> list[Tensor]:
    """What an optimizer gets."""
    return [p for p in model.parameters() if p.requires_grad]


def plain_loop(
    model: Any, batches: Iterable[Batch], *, lr: float = 1e-3, decay: float = 0.0, optimizer: Any = None
) -> list[float]:
    """AdamW, or an optimizer, over the batches; the loss of every step. The random stream starts anew in each step."""
    model.train()
    optimizer = optimizer or torch.optim.AdamW(trained(model), lr=lr, weight_decay=decay)
    losses = []
    for step, batch in enumerate(batches):
        torch.manual_seed(step)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


def by_trainer(
    model: Any,
    batches: list[Batch],
    folder: Path,
    *,
    lr: float = 1e-3,
    checkpointing: bool = False,
    optimizer: Any = None,
) -> list[float]:
    """The same with transformers' Trainer; the dataset has a column that no model takes."""
    from transformers import Trainer, TrainingArguments

    rows = [
        {**{key: value[i] for key, value in batch.items()}, "note": "not for the model"}
        for batch in batches
        for i in range(len(batch["labels"]))
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=len(batches),
        per_device_train_batch_size=len(batches[0]["labels"]),
        per_device_eval_batch_size=len(batches[0]["labels"]),
        learning_rate=lr,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        activation_checkpointing=checkpointing,
    )
    given = {"train_dataset": rows, "eval_dataset": rows[:2], "optimizers": (optimizer, None)}
    trainer = Trainer(model=model, args=arguments, **given)
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    model.eval()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
