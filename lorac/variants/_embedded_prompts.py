"""Prompts that are embeddings, next to those that the model looks up."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from lorac.errors import BaseNeeded
from lorac.frontend.model_view import ModelView
from lorac.variants.base import Params, PromptVariant, Tensor


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
