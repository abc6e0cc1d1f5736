"""DECOR: a prompt's embeddings without the meaning of unwanted words, in three places.

    span = unwanted_span(encode("a dog in a garden"), rows=find_rows(tokenizer, "a dog in a garden").select("words"))
    project(context, span)                                    # between compiled parts, on tensors
    compiled.add_adapter(at_text_encoder(text_encoder, span)) # in the text encoder, once per prompt
    chain_after(lora, span, unet)                             # in the layers that read the embeddings

arXiv 2412.09169 gives the formula X' = X − αX·V·Vᵀ, and no code is public. The rows that span V and those that are
projected, the limit of the rank and the way of mixing are lorac's own choices.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorac.errors import ChoiceError, SiteError, missing_site_error
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.patterns import is_named
from lorac.variants.adapter import Adapter
from lorac.variants.chain import Chain
from lorac.variants.decor import DECOR, DECORWeight

Rows = Literal["words", "words+padding", "padding"]


@dataclass(frozen=True)
class PromptRows:
    """Masks (batch, length) of the rows of a prompt's embeddings.

    Attributes:
        words: those of words.
        padding: the end of the text and everything after it; a causal encoder has read all words by then.
    """

    words: Tensor
    padding: Tensor

    def select(self, rows: Rows) -> Tensor:
        """Return the mask of some rows, True where they are meant.

        Raises:
            ChoiceError: there are no such rows.
        """
        known = {"words": self.words, "padding": self.padding, "words+padding": self.words | self.padding}
        if rows not in known:
            raise ChoiceError(f"a prompt has no rows '{rows}'", next_step=f"give {', '.join(known)}")
        return known[rows]


def find_rows(tokenizer: Any, prompt: str | Sequence[str]) -> PromptRows:
    """Find words and padding by the tokenizer's own masks, since padding has another id in each text encoder.

    Args:
        tokenizer: of CLIP's or T5's kind; prompts are padded to ``model_max_length`` as pipelines pad them.
        prompt: one or several.
    """
    given = [prompt] if isinstance(prompt, str) else list(prompt)
    options: dict[str, Any] = {"max_length": tokenizer.model_max_length, "return_special_tokens_mask": True}
    encoded = tokenizer(given, padding="max_length", truncation=True, **options)
    words = torch.tensor(encoded["attention_mask"]).bool() & ~torch.tensor(encoded["special_tokens_mask"]).bool()
    later = words.flip(1).cumsum(1).flip(1)
    return PromptRows(words, (later == 0) & (torch.arange(words.shape[1]) > 0))


def unwanted_span(
    embeddings: Tensor, *, rows: Tensor | None = None, max_rank: int | None = None, epsilon: float = 1e-5
) -> Tensor:
    """Return an orthonormal basis V (d, ρ) of the rows of unwanted embeddings.

    Args:
        embeddings: (…, d).
        rows: a mask (…) of those that are unwanted (``PromptRows.select``, or the unwanted words of the prompt itself);
            default: all.
        max_rank: only so many of the largest directions; 8, say, for rows of padding, which span most of a prompt.
        epsilon: directions with a singular value below this share of the largest are left out.
    """
    chosen = embeddings.reshape(-1, embeddings.shape[-1]) if rows is None else embeddings[rows]
    found = torch.linalg.svd(chosen.to(torch.promote_types(chosen.dtype, torch.float32)), full_matrices=False)
    rank = int((epsilon * found.S.max() < found.S).sum()) if len(chosen) else 0
    return found.Vh[: rank if max_rank is None else min(rank, max_rank)].mT.to(embeddings.dtype)


def project(context: Tensor, span: Tensor, alpha: float = 1.0, *, rows: Tensor | None = None) -> Tensor:
    """Return X' = X − αk∘(X·V·Vᵀ) for a prompt's embeddings X.

    Args:
        context: X (…, length, d).
        span: V (d, ρ), orthonormal columns or zeros.
        alpha: the part of the span that is taken away, from 0 to 1.
        rows: k (…, length), the rows that are projected; default: all but the first, which no word has reached yet.
    """
    _check_alpha(alpha)
    keep = context.new_ones(context.shape[-2]) if rows is None else rows.to(context.dtype)
    if rows is None:
        keep[0] = 0
    return context - keep[..., None] * (context @ (alpha * span) @ span.mT)


def at_text_encoder(
    text_encoder: nn.Module,
    span: Tensor,
    alpha: float = 1.0,
    *,
    rows: Tensor | None = None,
    capacity: int | None = None,
    targets: str | Sequence[str] = ("final_layer_norm",),
    name: str = "decor",
) -> Adapter:
    """Return an adapter that projects a text encoder's embeddings: ``DECOR`` at its last norm, for any target.

    The strength of a call multiplies α. ``write`` gives the adapter another prompt's span while it runs.

    Args:
        text_encoder: the model whose config says the largest length of a prompt.
        span, alpha, rows: as ``project`` takes them; rows (length,) are those of all prompts of a call.
        capacity: columns that a later span may have; default: those of this one.
        targets: the name of the last norm, or a pattern.
        name: the adapter's name.

    Raises:
        SiteError: ``targets`` does not name one norm.
    """
    view = ModelView.of(text_encoder)
    paths = [path for path in view.callable_paths if is_named(targets, path)]
    if len(paths) != 1:
        raise missing_site_error(
            f"targets={targets!r} names {len(paths)} modules of {type(text_encoder).__name__}, not only its last norm",
            next_step="give targets= the path of one norm",
        )
    config = getattr(text_encoder, "config", None)
    length = getattr(config, "max_position_embeddings", None) or (None if rows is None else len(rows))
    if length is None:
        raise ChoiceError(
            f"{type(text_encoder).__name__}'s config does not say how long a prompt may be",
            next_step="give rows=, with one number for each token",
        )
    tokens = int(length)
    variant = DECOR(targets=re.escape(paths[0]), r=capacity or max(1, span.shape[1]), tokens=tokens)
    own = {"span": span.new_zeros(len(span), variant.r), "rows": span.new_ones(tokens)}
    adapter = Adapter(name, variant, {paths[0]: own})
    write(adapter, span, alpha, rows=rows)
    return adapter


@torch.no_grad()
def write(adapter: Adapter, span: Tensor, alpha: float = 1.0, *, rows: Tensor | None = None) -> None:
    """Write another span into an adapter of ``at_text_encoder``; the next call projects it, on every target.

    Raises:
        ChoiceError: it has more columns than the adapter, or α is out of range.
    """
    _check_alpha(alpha)
    [own] = adapter.tensors.values()
    if span.shape[1] > own["span"].shape[1]:
        raise ChoiceError(
            f"the span has {span.shape[1]} columns, and '{adapter.name}' was made for {own['span'].shape[1]}",
            next_step="give max_rank= to unwanted_span, or a larger capacity= to at_text_encoder",
        )
    own["span"].zero_()
    own["span"][:, : span.shape[1]] = alpha**0.5 * span
    own["rows"].fill_(1)
    own["rows"][0] = 0
    if rows is not None:
        own["rows"][: len(rows)] = rows.to(own["rows"].dtype)


def at_cross_attention(
    unet: nn.Module,
    span: Tensor,
    alpha: float = 1.0,
    *,
    targets: str | Sequence[str] = ("attn2.to_k", "attn2.to_v"),
    name: str = "decor",
) -> Adapter:
    """Return the projection merged into the layers that read the embeddings, in factors of the span's rank.

    It projects all rows of all prompts, including the first row and guidance's empty prompt.

    Args:
        unet: the model that reads the embeddings.
        span, alpha: as ``project`` takes them.
        targets: names of the layers, or a pattern.
        name: the adapter's name.

    Raises:
        SiteError: no layer, or one of another width than the embeddings.
    """
    _check_alpha(alpha)
    variant = DECORWeight(targets=targets, r=max(1, span.shape[1]))
    sites = variant.named_sites(ModelView.of(unet))
    for site in sites:
        variant.check(site)
        if site.in_features != len(span):
            raise SiteError(
                f"'{site.path}' reads {site.in_features} features, and the span has embeddings of {len(span)}",
                next_step="give targets= the layers that read this text encoder's embeddings",
            )
    scaled = alpha**0.5 * span if span.shape[1] else span.new_zeros(len(span), 1)
    return Adapter(name, variant, {site.path: {"span": scaled.clone()} for site in sites})


def chain_after(lora: Adapter, span: Tensor, unet: nn.Module, alpha: float = 1.0, *, name: str = "decor") -> Adapter:
    """Return a LoRA with a projection before it; all layers that read the embeddings read them projected.

    A sum of the two would not project the LoRA's own input.

    Args:
        lora: an adapter of a method that edits weights.
        span, alpha: as ``project`` takes them.
        unet: the model that reads the embeddings.
        name: the result's name.
    """
    return Chain.of(lora, at_cross_attention(unet, span, alpha), name=name)


def mix(content: Tensor, style: Tensor, *, how: Literal["mean", "concat"] = "mean") -> Tensor:
    """Return one context from two: their mean, or both for cross-attention to read.

    For content and style each is projected first: the style's prompt against the content's words, and the other way
    round.

    Args:
        content, style: (…, length, d).
        how: ``"mean"`` or ``"concat"``, along the length.
    """
    if how not in {"mean", "concat"}:
        raise ChoiceError(f"how='{how}' is not a way to mix contexts", next_step="give mean or concat")
    return (content + style) / 2 if how == "mean" else torch.cat([content, style], dim=-2)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ChoiceError(f"alpha={alpha} is out of range", next_step="give a number from 0 to 1")
