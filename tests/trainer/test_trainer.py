"""``AdapterTrainer``: what it trains, what it goes on from, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.trainer import checkpoints
from lorac.trainer.checkpoints import find_checkpoint, open_checkpoint
from tests.refusing import refuses
from tests.trainer.trainings import STEPS, Plan, Stop, compiled_of, same, tensors_of, trainer_of

TARGETS = ("q_proj", "v_proj")
LORA = lorac.LoRA(r=4, alpha=8, dropout=0.2, targets=TARGETS)
PLAN = Plan()
SAMPLED = Plan(loss=("sampled_selection_loss",))
CASES: dict[str, tuple[dict[str, Any], Plan]] = {
    "two": ({"z": LORA, "a": lorac.LoRA(r=2, dropout=0.1, targets=["q_proj", "down_proj"])}, PLAN),
    "two, in the other order": ({"a": lorac.LoRA(r=2, targets=["q_proj", "down_proj"]), "z": LORA}, PLAN),
    "modules_to_save": ({"a": dataclasses.replace(LORA, modules_to_save=["lm_head"])}, PLAN),
    "bottleneck": ({"a": lorac.Bottleneck(dropout=0.2, reduction_factor=4.0)}, PLAN),
    "remix": ({"a": lorac.ReMix(r=2, experts=3, top_k=1, dropout=0.1, targets=TARGETS)}, SAMPLED),
    "names": ({"../a": LORA, "a/b": lorac.VeRA(r=2, targets=TARGETS)}, PLAN),
}


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_is_one_that_never_stopped(name: str, tmp_path: Path) -> None:
    adapters, plan = CASES[name]
    whole = compiled_of(adapters, plan)
    trainer_of(whole, plan, tmp_path / "whole").train()
    stopped = compiled_of(adapters, plan)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(stopped, plan, tmp_path / "run", callbacks=[Stop(3)]).train()
    found = find_checkpoint(tmp_path / "run")
    assert found is not None and found.step == 2
    torch.manual_seed(99)
    resumed = compiled_of(found.adapters(stopped.session.view.module), plan)
    assert not same(whole, resumed)
    trainer_of(resumed, plan, tmp_path / "run").train(resume_from_checkpoint=True)
    assert same(whole, resumed)
