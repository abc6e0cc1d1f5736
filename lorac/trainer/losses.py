"""What routed methods add to a model's loss, by the names of ``lorac.training``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from lorac import training
from lorac.argument_types import Count
from lorac.errors import ChoiceError, Unavailable
from lorac.variants.base import BranchVariant

Tensor = torch.Tensor
IGNORED_LABEL = -100
EXPERTS = "experts"
"""The column of the data with the expert of each row, or of each token."""


@dataclass(frozen=True, eq=False)
class LossCall:
    """A call of a model that trains, and its results.

    Attributes:
        compiled: the model.
        inputs: of the call, as it was made.
        output: the model's.
        loss: the trainer's.
        experts: the data's column of that name.
        share: what a mean over the call counts in the step, of which it may be one of several.
        shifted: whether a token's logits are compared with the next one's label.
    """

    compiled: Any
    inputs: Mapping[str, Any]
    output: Any
    loss: Tensor
    experts: Tensor | None
    share: float
    shifted: bool


class AddedLoss(ABC):
    """One loss that is added to a trainer's."""

    emitted: ClassVar[str | None] = None
    """The extra output that it reads, which the model is compiled with."""
    draws: int = 1
    """How often each row of a call passes through it."""

    @abstractmethod
    def term(self, call: LossCall) -> Tensor:
        """Return what is added to the loss of a call: a scalar."""

    def read_emitted(self, call: LossCall) -> Mapping[str, Tensor]:
        """Return the extra output by site path.

        Raises:
            Unavailable: gradients do not reach it.
        """
        found: Mapping[str, Tensor] = call.compiled.aux.get(self.emitted, {})
        if not found or not all(tensor.requires_grad for tensor in found.values()):
            raise Unavailable(
                f"no gradient of '{self.emitted}' reaches the model",
                next_step="swap to the adapter, and leave out label_smoothing_factor and use_reentrant: true",
            )
        return found


@dataclass(frozen=True, kw_only=True)
class GateLoss(AddedLoss):
    """``lorac.training.gate_loss``, of the data's column ``experts``."""

    weight: float = 50.0
    shifted: bool = True
    emitted: ClassVar[str] = "router"

    def term(self, call: LossCall) -> Tensor:
        if call.experts is None:
            raise Unavailable(
                f"gate_loss needs the expert of each row, and the data has no column '{EXPERTS}'",
                next_step=f"give '{EXPERTS}' a number for each row, or a list with one for each token",
            )
        self.read_emitted(call)
        return call.share * training.gate_loss(
            call.compiled, call.experts, weight=self.weight, shifted=self.shifted, ignore=IGNORED_LABEL
        )


@dataclass(frozen=True, kw_only=True)
class GatePenalty(AddedLoss):
    """``lorac.training.gate_penalty``."""

    weight: float

    def term(self, call: LossCall) -> Tensor:
        return call.share * training.gate_penalty(call.compiled, self.weight)


@dataclass(frozen=True, kw_only=True)
class SampledSelectionLoss(AddedLoss):
    """``lorac.training.sampled_selection_loss`` over the trainer's own loss, of rows with labels.

    Each row passes ``draws`` times. The draws of a row are compared by its share of the batch's cross-entropy.
    """

    draws: Count = 2
    emitted: ClassVar[str] = "log_prob"

    def term(self, call: LossCall) -> Tensor:
        """Return a scalar of value 0 whose gradient is the routers'."""
        rows = _row_losses(call).detach().view(self.draws, -1)
        share = call.loss.detach() / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)
        chances = training.sum_by_row(self.read_emitted(call)).view(self.draws, -1)
        drawn = training.leave_one_out(share * rows.numel() * rows, chances.to(rows.dtype))
        return drawn - drawn.detach()


LOSSES: Mapping[str, type[AddedLoss]] = {
    "gate_loss": GateLoss,
    "gate_penalty": GatePenalty,
    "sampled_selection_loss": SampledSelectionLoss,
}


def check_learning(compiled: Any, losses: Sequence[AddedLoss]) -> None:
    """Check that each tensor that learns from an extra output alone has a loss of it.

    Raises:
        ChoiceError: one has none.
    """
    given, names = {loss.emitted for loss in losses}, {kind.emitted: name for name, kind in LOSSES.items()}
    methods = [(one, one.variant.method_at(path)) for one in compiled.adapters.values() for path in one.tensors]
    learning = (
        (adapter, method, tensor, output)
        for adapter, method in methods
        for tensor, output in (method.learns_from.items() if isinstance(method, BranchVariant) else ())
    )
    for adapter, method, tensor, output in learning:
        if output not in given:
            raise ChoiceError(
                f"'{tensor}' of adapter '{adapter.name}' ({method.name}) learns from '{output}' alone, and no loss "
                "reads it",
                next_step=f"add loss: [{names.get(output, 'one that does')}]",
            )


def _row_losses(call: LossCall) -> Tensor:
    """Return the summed cross-entropy of each row (rows,)."""
    found = call.output if isinstance(call.output, Mapping) else getattr(call.output, "__dict__", {})
    labels, logits, fused = call.inputs.get("labels"), found.get("logits"), found.get("log_probs")
    if isinstance(labels, Tensor) and isinstance(fused, Tensor):
        return -fused.sum(dim=-1)
    if not isinstance(labels, Tensor) or not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape:
        raise Unavailable(
            "sampled_selection_loss compares the draws of a row by labels, one for each of the model's logits",
            next_step="train a language model on texts, or a classifier of rows or tokens",
        )
    if call.shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(len(labels), -1).sum(1)


def collate_experts(collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Return a collator that keeps the column ``experts``, lists padded on the right to the longest."""

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        found = [row[EXPERTS] for row in rows if EXPERTS in row]
        batch = collate([{name: value for name, value in row.items() if name != EXPERTS} for row in rows])
        if found:
            tensors = [torch.as_tensor(value) for value in found]
            batch[EXPERTS] = (
                torch.stack(tensors)
                if not tensors[0].dim()
                else torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=IGNORED_LABEL)
            )
        return batch

    return collated
