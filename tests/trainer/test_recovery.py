"""Recipes that train a smaller copy of a model and write LoRAs for the large one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.trainer import train
from lorac.training import loram
from tests.refusing import refuses
from tests.trainer.runs import LORA, TEXTS, recipe, tokenizer, write_rows
from tests.zoo import ZOO

LLAMA = ZOO["tiny_llama"]


@pytest.fixture
def pruned(tmp_path: Path) -> tuple[Any, loram.PrunedModel]:
    """A large model, saved in ``large``, and its smaller copy, with what was removed in both kinds of files."""
    large = LLAMA.fresh()
    smaller = loram.prune(large)
    large.save_pretrained(tmp_path / "large")
    loram.write_removed_units(smaller.kept, tmp_path / "removed", large)
    loram.write_pruning_record(smaller.kept, tmp_path / "kept.safetensors")
    return large, smaller


def run(folder: Path, model: Any, pruned: str, **fields: Any) -> Any:
    data = write_rows(folder / "rows.jsonl", [{"text": text} for text in TEXTS])
    recover = {"model": str(folder / "large"), "pruned": str(folder / pruned)}
    said = recipe(data, arguments={"save_strategy": "no", "max_steps": 2}, **{"recover": recover, **fields})
    return train(model, tokenizer(), said, folder / "run")


@pytest.mark.medium("the positions that were kept, in a file", cases=["removed"])
@pytest.mark.parametrize("files", ["removed", "kept.safetensors"])
def test_writes_a_lora_for_the_large_model(files: str, pruned: Any, tmp_path: Path) -> None:
    large, smaller = pruned
    trained = run(tmp_path, smaller.model, files)
    expected = loram.recover(trained.adapters["mine"], smaller.kept, large)
    found = lorac.load_adapter(tmp_path / "run" / "mine", large)
    assert all(map(torch.equal, found.parameters(), expected.parameters()))
    assert any(tensor.any() for own in found.tensors.values() for key, tensor in own.items() if key == "lora_B")


def test_rejects_unrecoverable_runs_before_training(pruned: Any, tmp_path: Path) -> None:
    large, smaller = pruned
    with pytest.raises(lorac.AdapterNotFound, match="lorac recovers LoRAs alone"):
        run(tmp_path, smaller.model, "removed", adapters={"mine": {**LORA, "method": "dora"}})
    with refuses("shape_mismatch", match="and the smaller model"):
        run(tmp_path, large, "removed")
    with refuses("unreadable"):
        run(tmp_path, smaller.model, "nowhere")
    with pytest.raises(lorac.OptionError, match="recover has the fields model"):
        run(tmp_path, smaller.model, "removed", recover={"model": "large"})
    assert not (tmp_path / "run").exists()
