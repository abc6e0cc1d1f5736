"""Properties of every rule: it resumes bit for bit; micro-batches, recomputing, ``Trainer``, DDP change nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac import training
from lorac.testing import assert_close
from lorac.training.rule import Rule
from tests.limits import assert_apart
from tests.training.every_rule import ROWS, RULES, batch, copies, tensors_of, through_a_file, train

STEPS, SAVED = 7, 3
each = pytest.mark.parametrize("name", RULES)


def ran(name: str, steps: int = 5, *, parts: int = 1, **host: Any) -> list[torch.Tensor]:
    compiled = RULES[name].compiled(**host)
    train(compiled, RULES[name].started(compiled), range(steps), parts=parts)
    return tensors_of(compiled)


def test_every_public_rule_is_tested() -> None:
    public = {getattr(training, name) for name in training.__all__}
    rules = {one for one in public if isinstance(one, type) and issubclass(one, Rule | torch.optim.Optimizer)}
    used = set()
    for ruled in RULES.values():
        compiled = ruled.compiled()
        optimizer = ruled.optimizer(compiled)
        used.add(type(optimizer) if ruled.rule is None else type(ruled.rule(compiled, optimizer)))
    assert used == rules


@pytest.mark.slow("test_checkpoints.py resumes one")
@each
def test_a_resumed_run_equals_an_uninterrupted_one(name: str) -> None:
    """To the bit, through a file that holds nothing but tensors and plain values."""
    ruled = RULES[name]
    compiled = ruled.compiled()
    optimizer = ruled.started(compiled)
    train(compiled, optimizer, range(SAVED))
    saved, adapters = through_a_file(optimizer.state_dict()), copies(compiled)
    train(compiled, optimizer, range(SAVED, STEPS))
    resumed = ruled.compiled(adapters)
    other = ruled.started(resumed)
    other.load_state_dict(saved)
    train(resumed, other, range(SAVED, STEPS))
    assert all(map(torch.equal, tensors_of(resumed), tensors_of(compiled)))
    forgetful = ruled.compiled(adapters)
    other = ruled.started(forgetful)
    train(forgetful, other, range(SAVED, STEPS))
    stateless = {"preconditioned", "allora"}  # SGD without momentum, and no state of the rule
    same = all(map(torch.equal, tensors_of(forgetful), tensors_of(compiled)))
    assert same == (name in stateless), "the state says nothing"


@pytest.mark.medium("two rules", keep=["squeeze", "allora"])
@each
def test_micro_batches_and_recomputing_change_nothing(name: str) -> None:
    whole = ran(name)
    for other in (ran(name, parts=2), ran(name, checkpointing=True), ran(name, checkpointing="reentrant")):
        for found, expected in zip(other, whole, strict=True):
            assert_close(found, expected)


@each
def test_the_rule_does_something(name: str) -> None:
    ruled = RULES[name]
    plain = ruled.compiled()
    optimizer = ruled.optimizer(plain) if ruled.rule is not None else torch.optim.SGD(plain.parameters(), lr=0.05)
    train(plain, optimizer, range(5))
    pairs = list(zip(ran(name), tensors_of(plain), strict=True))
    other = [(one, another) for one, another in pairs if one.shape != another.shape or not torch.equal(one, another)]
    assert other
    for found, expected in other:
        if found.shape == expected.shape:
            assert_apart(expected, found)


def by_trainer(compiled: Any, ruled: Any, folder: Path, *, resume: str | None = None, **settings: Any) -> None:
    """Five steps of two micro-batches with transformers' Trainer."""
    from transformers import Trainer, TrainingArguments

    rows = [{key: value[i] for key, value in batch(0).items()} for i in range(ROWS)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        per_device_train_batch_size=ROWS // 2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **{"save_strategy": "no", **settings},
    )
    trainer = Trainer(compiled, arguments, train_dataset=rows, optimizers=(ruled.started(compiled), None))
    trainer.train(resume_from_checkpoint=resume)


@pytest.mark.slow("one rule", keep=["lora_plus"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in {"altlora_plus_skipping", "allora", "lora_plus"} else pytest.mark.slow)
        for name in RULES
    ],
)
def test_trainer_is_the_plain_loop(name: str, tmp_path: Path) -> None:
    """With its accumulation, clipping and schedule; every step is over all rows, in whatever order they come."""
    ruled = RULES[name]
    compiled = ruled.compiled()
    by_trainer(compiled, ruled, tmp_path)
    plain = ruled.compiled()
    optimizer = ruled.started(plain)
    for _ in range(5):
        train(plain, optimizer, [0])
    for found, expected in zip(tensors_of(compiled), tensors_of(plain), strict=True):
        assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RULES if name != "squeeze"])  # whose tensors change their shapes
def test_trainers_checkpoints_are_gone_on_from_to_the_bit(name: str, tmp_path: Path) -> None:
    ruled = RULES[name]
    compiled, other = ruled.compiled(), ruled.compiled()
    by_trainer(compiled, ruled, tmp_path, save_strategy="steps", save_steps=3)
    by_trainer(other, ruled, tmp_path, resume=str(tmp_path / "checkpoint-3"))
    assert all(map(torch.equal, tensors_of(other), tensors_of(compiled)))


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """accelerate's DDP over gloo, each process with half of the rows."""
    file = tmp_path / "found.pt"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-W", "ignore", "-m", "tests.training.two_processes", str(file)]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[1].decode()[-2000:] for process in both]
    assert all(process.returncode == 0 for process in both), "\n".join(said)
    found = torch.load(file, weights_only=True)
    assert found.keys() == {name for name, ruled in RULES.items() if not ruled.alone}
    for name, tensors in found.items():
        for one, expected in zip(tensors, ran(name), strict=True):
            assert_close(one, expected)


def test_rejects_training_a_replaced_adapter() -> None:
    ruled = RULES["lora_pro"]
    compiled = ruled.compiled()
    optimizer = ruled.started(compiled)
    train(compiled, optimizer, [0])
    adapter = copies(compiled)["a"]
    compiled.remove_adapter("a")
    compiled.add_adapter(adapter, "a")
    with pytest.raises(lorac.Unavailable, match="'a' has changed since LoRAPro was attached"):
        optimizer.step()
