"""Multitask prompt tuning: a prompt that all tasks share, times a low-rank matrix for each task.

Wang et al. 2023, arXiv 2303.02861. PEFT's MULTITASK_PROMPT_TUNING takes the task of each row in a call; here an adapter
is one task of its file, so that rows choose tasks as they choose adapters.
"""

from dataclasses import dataclass

from lorac.argument_types import Count
from lorac.errors import AdapterError
from lorac.variants._embedded_prompts import EmbeddedPromptVariant
from lorac.variants._tasks import split_tasks
from lorac.variants.adapter import Adapter
from lorac.variants.base import Params, ParamSpec, Site, Tensor
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(EmbeddedPromptVariant):
    """``E' = [E; P∘(U_t·V_t)]`` for the task t: P (n, d), U (tasks, n, r), V (tasks, r, d).

    ``by_task`` makes an adapter for each task over the same tensors.

    Attributes:
        num_virtual_tokens: n.
        num_tasks: tasks of the file.
        num_ranks: r.
        task: t, from 0; may be None if there is one task.
    """

    num_virtual_tokens: Count = 8
    num_tasks: Count = 1
    num_ranks: Count = 1
    task: int | None = None

    name = "multitask_prompt_tuning"
    paper = "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning, arXiv 2303.02861"

    @staticmethod
    def by_task(adapter: Adapter) -> dict[str, Adapter]:
        """Return an adapter for each task of one of this method, named ``<adapter>-<task>``, over the same tensors."""
        return split_tasks(adapter, MultitaskPromptTuning, "num_tasks")

    def params(self, site: Site) -> dict[str, ParamSpec]:
        n, tasks, r, d = self.num_virtual_tokens, self.num_tasks, self.num_ranks, site.out_features
        shapes = {"prompt": (n, d), "task_cols": (tasks, n, r), "task_rows": (tasks, r, d)}
        return {name: ParamSpec(shape, normal(1.0)) for name, shape in shapes.items()}

    def embeddings(self, p: Params) -> Tensor:
        task = 0 if self.task is None and self.num_tasks == 1 else self.task
        if task is None or not 0 <= task < self.num_tasks:
            raise AdapterError(
                f"the file has prompts of {self.num_tasks} tasks, and the adapter takes task={task}",
                next_step="lorac.MultitaskPromptTuning.by_task(lorac.load_adapter(folder, model)) makes an adapter of "
                "each task; rows get theirs by adapters=",
            )
        rows: Tensor = p.prompt * (p.task_cols[task] @ p.task_rows[task])
        return rows
