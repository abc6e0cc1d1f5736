"""Trans-LoRA: an adapter for another base, without the data it was trained on.

    task = transfer.Task(name="boolean expressions", seeds=("not ( True ) and False is", …))
    source = lorac.compile(old, {"source": path, "discriminator": other})
    target = lorac.compile(new, {"target": lorac.DoRA(r=8)})
    adapter = transfer.transfer(source, target, task).adapter

The target writes prompts, the discriminator filters them, the source answers them, and the target learns the answers.
Wang et al. 2024, arXiv 2405.17258.
"""

from lorac.training.transfer.speaking import continuations, fit, prefers, taught
from lorac.training.transfer.task import Task
from lorac.training.transfer.transferring import (
    Roles,
    Settings,
    Synthesised,
    Transferred,
    accepted_by,
    answers,
    drawn_by,
    synthesise,
    train_discriminator,
    transfer,
)

__all__ = [
    "Roles",
    "Settings",
    "Synthesised",
    "Task",
    "Transferred",
    "accepted_by",
    "answers",
    "continuations",
    "drawn_by",
    "fit",
    "prefers",
    "synthesise",
    "taught",
    "train_discriminator",
    "transfer",
]
