"""A training of a base in parts, by one of several processes: ``python -m tests.trainer.sharded FOLDER [--kill]``."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

import lorac
from lorac.testing import assert_close
from lorac.trainer import train
from lorac.trainer.run import leave_process_group
from lorac.trainer.trainer import AdapterTrainer
from lorac.training import gather_base, shard_base
from tests.refusing import refuses
from tests.trainer.runs import TEXTS, recipe, tokenizer, write_rows
from tests.zoo import ZOO

KILLED_AT, ROWS = 3, 4


class Killed(TrainerCallback):
    """Kills the process in a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, processes: int, *, resume: bool = False, **arguments: Any) -> Any:
    """Train by a recipe, with a rule and a method that reads the base's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder.parent / "rows.jsonl"
    if not rows.exists():
        write_rows(rows, [{"text": text} for text in (*TEXTS, TEXTS[0][::-1])])
    steps = {"per_device_train_batch_size": ROWS // processes, "max_steps": 4, "save_steps": 2, **arguments}
    adapters = {"mine": {"method": "dora", "r": 2, "targets": ["q_proj", "down_proj", "lm_head"]}}
    said = recipe(rows, adapters=adapters, rules=[{"name": "LoRAPlus", "ratio": 4.0}], arguments=steps)
    return train(ZOO["tiny_llama"].fresh(), tokenizer(), said, folder, resume=resume)


def check(compiled: Any, folder: Path) -> None:
    """Check a compiled model whose base is in parts, and save its adapter from whole weights."""
    whole, base = ZOO["tiny_llama"].model(), compiled.session.view.module
    numbers = sum(tensor.to_local().numel() for tensor in base.parameters())
    assert numbers <= sum(tensor.numel() for tensor in whole.parameters()) * 0.6
    ids = torch.tensor([[97, 101, 5, 116]])
    with torch.no_grad():
        logits = compiled(input_ids=ids).logits
    for refused in (
        lambda: lorac.compile(base, {"a": lorac.LoRA(r=2)}),
        lambda: lorac.save_adapter(compiled.adapters["mine"], folder / "no", model=base),
        lambda: lorac.merge_into(base, compiled.adapters),
    ):
        with pytest.raises(lorac.CompileError, match="weights lie in parts"):
            refused()
    with refuses("unavailable", match="cannot be split between processes: it is already"):
        shard_base(compiled)
    with pytest.raises(lorac.Unavailable, match="was replaced by another"):
        compiled.export(target="onnxruntime")
    with gather_base(compiled):
        again = lorac.compile(base, dict(compiled.adapters), active="mine").eval()
        with torch.no_grad():
            assert_close(again(input_ids=ids).logits, logits)
    with torch.no_grad():
        assert torch.equal(compiled(input_ids=ids).logits, logits)


def main() -> None:
    """Train in parts, and check what comes of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    patch = pytest.MonkeyPatch()
    if given.kill:
        init = AdapterTrainer.__init__

        def begin(self: Any, **settings: Any) -> None:
            init(self, **settings)
            self.add_callback(Killed())

        patch.setattr(AdapterTrainer, "__init__", begin)
    processes = int(os.environ["WORLD_SIZE"])
    compiled = run(given.folder, processes, resume=given.resume, fsdp="full_shard")
    check(compiled, given.folder)
    leave_process_group()


if __name__ == "__main__":
    main()
