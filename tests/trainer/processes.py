"""A training in a process of its own, or one of two: ``python -m tests.trainer.processes FOLDER``."""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

import lorac
from lorac.trainer import checkpoints
from lorac.trainer.run import leave_process_group
from tests.trainer.trainings import compiled_of, plan, trainer_of

KILLED_AT = 3


class Killed(TrainerCallback):
    """Kills the process in a step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing() -> None:
    """Kill the process when it has written a part of a checkpoint."""
    finish = checkpoints.finish_checkpoint

    def finished(folder: Path, step: int, run: Any) -> None:
        if step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(folder, step, run)

    checkpoints.finish_checkpoint = finished


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    if given.kill == "checkpoint":
        kill_while_writing()
    recipe = plan()
    compiled = compiled_of({"a": lorac.LoRA(r=4, alpha=8, dropout=0.2, targets=["q_proj", "v_proj"])}, recipe)
    callbacks = [Killed()] if given.kill == "step" else None
    settings = {"per_device_train_batch_size": 1}
    trainer = trainer_of(compiled, recipe, given.folder, callbacks=callbacks, **settings)
    trainer.train(given.resume)
    leave_process_group()


if __name__ == "__main__":
    main()
