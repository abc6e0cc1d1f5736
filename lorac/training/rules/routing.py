"""Losses of routers: MeteoRA's on labels of tokens, and ReMix's on sampled selections.

MeteoRA: Xu, Lai, Huang, ICLR 2025, arXiv 2405.13053. ReMix: Qiu et al. 2026, arXiv 2603.10160.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorac.errors import ChoiceError, Unavailable
from lorac.training.rule import trained_terms, unwrap_ddp
from lorac.variants._mixtures import add_gumbel_noise
from lorac.variants.meteora import MeteoRA


def gate_loss(
    compiled: nn.Module, experts: Tensor, *, weight: float = 50.0, shifted: bool = True, ignore: int = -100
) -> Tensor:
    """``weight`` · the mean cross-entropy of all MeteoRA gates of the last call: a scalar to add to the model's loss.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager", aux=["router"])``, called with gradients recorded.
        experts: the expert of each token, or of each row: (rows, length) or (rows,), integers.
        weight: the paper's 50.
        shifted: compare the logits of a token with the label of the next one, as language models do.
        ignore: label of tokens that do not count, such as padding.

    Raises:
        Unavailable, AdapterNotFound: as a rule; the last call gave no logits of gates.
        ChoiceError: experts do not have the logits' rows, or there is no such expert.
    """
    model = unwrap_ddp(compiled)
    sites = {term.site for term in trained_terms(compiled, (MeteoRA,))}
    found = [z for path, z in model.aux.get("router", {}).items() if path.partition("[")[0] in sites]
    if not found:
        raise Unavailable(
            "the last call gave no logits of MeteoRA's gates",
            next_step='compile with aux=["router"], and swap to the adapter first',
        )
    losses = [_cross_entropy(logits, experts, shifted, ignore) for logits in found]
    return weight * torch.stack(losses).mean()


def _cross_entropy(logits: Tensor, experts: Tensor, shifted: bool, ignore: int) -> Tensor:
    """Return the mean cross-entropy of one gate's logits (rows, …, L)."""
    labels = experts.view(*experts.shape, *(1,) * (logits.dim() - 1 - experts.dim())) if experts.dim() else experts
    if labels.dim() != logits.dim() - 1 or any(
        a not in {1, b} for a, b in zip(labels.shape, logits.shape, strict=False)
    ):
        raise ChoiceError(
            f"experts of shape {tuple(experts.shape)} do not fit logits of shape {tuple(logits.shape)}",
            next_step="give one expert for each row, or for each token",
        )
    labels = labels.expand(logits.shape[:-1]).to(logits.device)
    counted = labels[labels != ignore]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < logits.shape[-1]:
        raise ChoiceError(
            f"there is no expert {int(counted.max())}" if int(counted.max()) > 0 else "an expert is below 0",
            nearest=f"0 to {logits.shape[-1] - 1}",
            next_step=f"label tokens that do not count with {ignore}",
        )
    if shifted and logits.dim() > 2:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, -2), labels.flatten(), ignore_index=ignore)


def draw_ordered(logits: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
    """k distinct experts (…, k) drawn one after the other with probabilities softmax(logits): Gumbel-top-k.

    Args:
        logits: (…, n).
        k: how many.
        generator: draws.
    """
    return add_gumbel_noise(logits, generator).topk(k, dim=-1).indices


def leave_one_out(losses: Tensor, log_probs: Tensor) -> Tensor:
    """Return the REINFORCE loss of M sampled selections, each with the others as baseline, for ``backward()``.

    Its value is the mean loss; its gradient that of the mean loss, plus Σ_m (L_m − L̄)/(M − 1)·∇log Q(selection m),
    an unbiased estimate of the policy's gradient of the expected loss.

    Args:
        losses: (M, …), one for each draw; further axes are samples, each with a baseline of its own.
        log_probs: of the same shape: log Q of the whole selection, of all layers and tokens that the loss depends on.

    Raises:
        ChoiceError: the shapes differ, or there are fewer than two draws.
    """
    if losses.shape != log_probs.shape or losses.dim() == 0 or len(losses) < 2:
        raise ChoiceError(
            f"losses of shape {tuple(losses.shape)} and log-probabilities of shape {tuple(log_probs.shape)} are not "
            "two or more draws",
            next_step="give both in one shape (M, …), where M >= 2 is the number of draws",
        )
    advantage = (losses - losses.mean(0)).detach() / (len(losses) - 1)
    policy = (advantage * log_probs).sum(0)
    return (losses.mean(0) + policy - policy.detach()).mean()


def sum_by_row(emitted: Mapping[str, Tensor]) -> Tensor:
    """Sum an extra output over all sites and tokens: site path -> (rows, …) becomes (rows,)."""
    return torch.stack([value.flatten(1).sum(1) if value.dim() > 1 else value for value in emitted.values()]).sum(0)


def repeat_rows(inputs: Mapping[str, object], draws: int) -> dict[str, Any]:
    """Return a call's arguments with every row ``draws`` times; the first tensor says how many rows there are."""
    rows = _count_rows(inputs)
    return {
        name: torch.cat([value] * draws) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for name, value in inputs.items()
    }


def _count_rows(inputs: Mapping[str, object]) -> int:
    return next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.dim()), 0)


def sampled_selection_loss(
    compiled: nn.Module, inputs: Mapping[str, object], loss_of: Callable[[Any], Tensor], *, draws: int = 2
) -> Tensor:
    """Return ``leave_one_out`` of one call with every row repeated ``draws`` times, for routers that sample.

    Args:
        compiled: compiled with ``aux=["log_prob"]``, in training mode; each router emits log Q of its draws, (rows, …).
        inputs: the call's arguments by name; tensors whose first axis is the rows' are repeated.
        loss_of: the call's output -> the loss of each row (draws·rows,).
        draws: M, 2 or more.

    Raises:
        Unavailable: no router gave log-probabilities.
        ChoiceError: fewer than two draws, no tensor among the inputs, or another number of losses than rows.
    """
    model = unwrap_ddp(compiled)
    rows = _count_rows(inputs)
    if draws < 2 or not rows:
        raise ChoiceError(
            f"{draws} draws of {rows} rows leave nothing to compare with", next_step="give two draws or more of a batch"
        )
    losses = loss_of(model(**repeat_rows(inputs, draws)))
    found = model.aux.get("log_prob", {})
    if not found:
        raise Unavailable(
            "the call gave no 'log_prob'",
            next_step='compile a method that emits it with aux=["log_prob"], and train in training mode',
        )
    if losses.shape != (draws * rows,):
        raise ChoiceError(
            f"losses of shape {tuple(losses.shape)} are not one for each of {draws * rows} rows",
            next_step="have loss_of average over everything but the rows",
        )
    return leave_one_out(losses.view(draws, rows), sum_by_row(found).view(draws, rows))
