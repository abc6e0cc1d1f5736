"""Trans-LoRA: an adapter for another base, without the data it was trained on.

    task = transfer.Task(name="boolean expressions", seeds=("not ( True ) and False is", …))
    source = lorac.compile(old, {"source": path, "discriminator": other})
    target = lorac.compile(new, {"target": lorac.DoRA(r=8)})
    adapter = transfer.transfer(source, target, task).adapter

The target writes prompts, the discriminator filters them, the source answers them, and the target learns the answers.
Wang et al. 2024, arXiv 2405.17258.
"""

from lorac.training.transfer.generation import (
    compare_answers,
    continue_prompts,
    distillation_loss,
    fit,
    make_training_batches,
)
from lorac.training.transfer.pipeline import (
    SyntheticPrompts,
    TransferResult,
    TransferSettings,
    answer_prompts,
    make_prompt_filter,
    make_prompt_source,
    synthesise_prompts,
    train_discriminator,
    transfer,
)
from lorac.training.transfer.task import Task

__all__ = [
    "SyntheticPrompts",
    "Task",
    "TransferResult",
    "TransferSettings",
    "answer_prompts",
    "compare_answers",
    "continue_prompts",
    "distillation_loss",
    "fit",
    "make_prompt_filter",
    "make_prompt_source",
    "make_training_batches",
    "synthesise_prompts",
    "train_discriminator",
    "transfer",
]
