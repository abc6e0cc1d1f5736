"""Prompt tuning, for one task or several, and prefix tuning: virtual tokens before every sequence.

Lester et al. 2021, arXiv 2104.08691. PEFT's PROMPT_TUNING; P_TUNING (Liu et al. 2021, arXiv 2103.10385), CPT (Blau et
al. 2024, arXiv 2410.17222) and each task of MULTITASK_PROMPT_TUNING have the same form after training.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NoReturn, Self

import torch

from lorac.argument_types import Count
from lorac.errors import AdapterError, BaseNeeded, OptionError, SiteError
from lorac.frontend.model_view import ModelView
from lorac.ir.slots.prefix import Prefix
from lorac.variants.adapter import Adapter, split_tasks
from lorac.variants.base import Params, ParamSpec, PromptVariant, Role, Site, Tensor, Variant
from lorac.variants.initialisers import normal


@dataclass(frozen=True, kw_only=True)
class EmbeddedPromptVariant(PromptVariant):
    """A prompt of embeddings (n, d), as the first layer of the model reads them.

    Attributes:
        embed_scale: factor by which the model's embedding multiplies the rows that it looks up (Gemma 3's), and which a
            prompt has already, as in PEFT; filled in by ``for_model``.
    """

    embed_scale: float = 1.0

    def embeddings(self, p: Params) -> Tensor:
        """Return the prompt (n, d). Default: the only tensor."""
        return super().rows(p)

    def rows(self, p: Params) -> Tensor:
        return self.embeddings(p) if self.embed_scale == 1 else self.embeddings(p) / self.embed_scale

    def for_model(self, view: ModelView, inputs: object = None) -> Self:
        for site in self.named_sites(view):
            scale = torch.as_tensor(getattr(view.module.get_submodule(site.path), "embed_scale", 1.0))
            if scale.is_meta:
                raise BaseNeeded(
                    f"'{site.path}' scales the rows that it looks up, and a loaded program does not tell by how much",
                    next_step="add the adapter that lorac.load_adapter(folder, model) returns",
                )
            return replace(self, embed_scale=float(scale.to(site.dtype)))  # rounded as the model does
        return self


@dataclass(frozen=True, kw_only=True)
class PromptTuning(EmbeddedPromptVariant):
    """``E' = [E; P]``: rows P (n, d) after an input embedding E (V, d), for ids V … V + n − 1 before each sequence.

    Attributes:
        num_virtual_tokens: n.
    """

    num_virtual_tokens: Count = 8

    name = "prompt_tuning"
    paper = "The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691"

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"prompt": ParamSpec((self.num_virtual_tokens, site.out_features), normal(1.0))}


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptTuning(EmbeddedPromptVariant):
    """``E' = [E; P∘(U_t·V_t)]`` for the task t: P (n, d), U (tasks, n, r), V (tasks, r, d).

    Multitask prompt tuning: a prompt that all tasks share, times a low-rank matrix for each task. Wang et al. 2023,
    arXiv 2303.02861. PEFT's MULTITASK_PROMPT_TUNING takes the task of each row in a call; here an adapter is one task
    of its file, so that rows choose tasks as they choose adapters.

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
                next_step="make an adapter for each task by "
                "lorac.MultitaskPromptTuning.by_task(lorac.load_adapter(folder, model)), and name tasks in adapters=",
            )
        rows: Tensor = p.prompt * (p.task_cols[task] @ p.task_rows[task])
        return rows


def _refuse_training(*_: object) -> NoReturn:
    raise SiteError(
        "lorac does not train keys and values before a sequence",
        next_step="train them with PEFT's PrefixTuningConfig, and compile with the folder in adapters=",
    )


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(PromptVariant):
    """``softmax(q·[K_P; K]ᵀ/√s)·[V_P; V]`` at each layer: K_P, V_P (n, heads, s) precede a sequence's keys and values.

    Prefix tuning: trained keys and values precede those of every sequence, at each layer of a decoder. Li and Liang
    2021, arXiv 2101.00190. PEFT's PREFIX_TUNING, and CARTRIDGE (Eyuboglu et al. 2025, arXiv 2506.06266), which differs
    only in training.

    Attributes:
        num_virtual_tokens: n.
        num_layers: layers of the decoder.
        num_attention_heads: number of heads of keys and values.
        token_dim: heads · s.
    """

    num_virtual_tokens: Count = 8
    num_layers: Count
    num_attention_heads: Count
    token_dim: Count

    acts_at_sites = False
    name = "prefix_tuning"
    paper = "Prefix-Tuning: Optimizing Continuous Prompts for Generation, arXiv 2101.00190"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.token_dim % self.num_attention_heads:
            raise OptionError(
                f"num_attention_heads={self.num_attention_heads} does not divide token_dim={self.token_dim}",
                next_step="give a token_dim that is a multiple of num_attention_heads",
            )

    def for_model(self, view: ModelView, inputs: object = None) -> Variant:
        _refuse_training()

    def params(self, site: Site) -> dict[str, ParamSpec]:
        shape = (self.num_virtual_tokens, 2 * self.num_layers * self.token_dim)
        return {"keys_values": ParamSpec(shape, _refuse_training, Role.FROZEN)}

    def prefix(self, site: Site, tensors: Mapping[str, Tensor]) -> Prefix:
        sizes = 2 * self.num_layers, self.num_attention_heads, self.token_dim // self.num_attention_heads
        split = self.rows(Params(**tensors)).reshape(self.num_virtual_tokens, *sizes)
        return Prefix(site, split.permute(1, 2, 0, 3).contiguous(), attends=True)
