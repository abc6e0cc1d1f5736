"""Arguments of a recipe: each reaches the trainer by its own name, and has its library's effect."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from lorac.trainer import Recipe, train
from tests.letters import CHAT
from tests.trainer.runs import CPU, LORA, TEXTS, recipe, tokenizer, write_rows
from tests.zoo import ZOO

ROWS = [{"text": text} for text in TEXTS]
TURNS = [
    {"messages": [{"role": "user", "content": text[:9]}, {"role": "assistant", "content": text[9:]}]} for text in TEXTS
]


def state(rows: Any, folder: Path, *, chat: str | None = CHAT, **arguments: Any) -> dict[str, Any]:
    """What a run over some rows wrote into trainer_state.json."""
    data = write_rows(folder / "rows.jsonl", rows)
    given = recipe(data, arguments={"save_strategy": "no", **arguments})
    train(ZOO["tiny_llama"].fresh(), tokenizer(chat), given, folder / "run")
    found: dict[str, Any] = json.loads((folder / "run" / "trainer_state.json").read_text())
    return found


def values(found: dict[str, Any], key: str) -> list[float]:
    return [entry[key] for entry in found["log_history"] if key in entry]


def test_a_schedule_has_its_own_settings_and_a_warm_up(tmp_path: Path) -> None:
    settings = {"min_lr_rate": 0.1, "num_cycles": 0.5}
    schedule = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": settings, "warmup_steps": 2}
    found = values(state(ROWS, tmp_path, max_steps=6, learning_rate=1e-2, **schedule), "learning_rate")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-2)
    expected = transformers.get_scheduler(
        "cosine_with_min_lr", optimizer, num_warmup_steps=2, num_training_steps=6, scheduler_specific_kwargs=settings
    )
    rates = []
    for _ in range(6):
        rates += expected.get_last_lr()
        optimizer.step()
        expected.step()
    assert found == rates


@pytest.mark.medium("the other arguments of TRL")
def test_packs_texts_into_rows_of_equal_length(tmp_path: Path) -> None:
    found = []
    for packed in (False, True):
        (tmp_path / str(packed)).mkdir()
        packing = {"packing": packed, "packing_strategy": "wrapped", "max_length": 24}
        epochs = {"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 1}
        found.append(state(ROWS, tmp_path / str(packed), **packing, **epochs))
    tokens = sum(len(text) + 1 for text in TEXTS)
    assert [one["global_step"] for one in found] == [2 * len(ROWS), 2 * -(-tokens // 24)]
    assert [one["epoch"] for one in found] == [2.0, 2.0]


@pytest.mark.medium("test_data.py's labels")
def test_reads_a_chat_template_and_trains_on_answers_only(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    tokens = []
    for chat, arguments in ((CHAT, {}), (None, {"chat_template_path": str(tmp_path / "chat.jinja")})):
        folder = tmp_path / str(len(tokens))
        folder.mkdir()
        found = state(TURNS, folder, chat=chat, max_length=None, **arguments)
        tokens.append((values(found, "loss"), values(found, "num_tokens")))
    assert tokens[0] == tokens[1]


def images(folder: Path, size: int = 8) -> Path:
    """Eight images, of which those of one label are bright."""
    for index, label in itertools.product(range(4), ("dark", "light")):
        (folder / label).mkdir(parents=True, exist_ok=True)
        pixels = np.full((size, size, 3), 40 * index + (100 if label == "light" else 0), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / label / f"{index}.png")
    return folder


def test_images_are_classified_until_nothing_gets_better_and_the_best_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(image_size=8, patch_size=4, **sizes)  # type: ignore[arg-type]
    said = Recipe(
        adapters={"mine": {**LORA, "targets": ["q_proj", "v_proj", "classifier"]}},
        task="image-classification",
        data=str(images(tmp_path / "images")),
        eval_data=str(tmp_path / "images"),
        early_stopping_patience=1,
        arguments={
            **CPU,
            "learning_rate": 0.0,
            "num_train_epochs": 9,
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "load_best_model_at_end": True,
            "metric_for_best_model": "accuracy",
        },
    )
    processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
    train(transformers.ViTForImageClassification(config).eval(), processor, said, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert len(values(found, "eval_accuracy")) == found["epoch"] == 2
    assert Path(found["best_model_checkpoint"]).name == f"checkpoint-{found['best_global_step']}"
    assert Path(found["best_model_checkpoint"]).is_dir()


@pytest.mark.parametrize("library", ["tensorboard", "wandb"])
def test_a_run_is_reported(library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tensorboard"))
    state(ROWS, tmp_path, report_to=library)
    assert [*tmp_path.glob(f"{library}/**/*.wandb"), *tmp_path.glob(f"{library}/**/events.out.tfevents.*")]
