"""Loss terms of routed methods, named like the functions of ``lorac.training`` that compute them."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lorac import training
from lorac.argument_types import JsonMapping
from lorac.errors import ChoiceError, Unavailable
from lorac.session.compiled import CompiledModule
from lorac.trainer.data import Row
from lorac.training.initialisation.activations import IGNORED

Losses = Mapping[str, JsonMapping]
"""Name -> keywords."""
GATES, PENALTY, SAMPLED = "gate_loss", "gate_penalty", "sampled_selection_loss"
LOSSES: Mapping[str, tuple[str | None, JsonMapping]] = {
    GATES: ("router", {"weight": 50.0, "shifted": True}),
    PENALTY: (None, {"weight": 1e-3}),
    SAMPLED: ("log_prob", {"draws": 2}),
}
"""Loss -> the extra output that it reads, and its keywords with their defaults."""
EXPERTS = "experts"
"""The column of the data with the expert of each row, or of each token."""


def extra_outputs(losses: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the extra outputs that losses read, for ``lorac.compile(..., aux=)``."""
    return tuple(sorted(output for output in (LOSSES[name][0] for name in losses) if output is not None))


def check_learning(compiled: Any, losses: Collection[str]) -> None:
    """Check that losses and extra outputs go together.

    Raises:
        ChoiceError: a tensor learns from an extra output alone that none of the losses reads.
        Unavailable: a loss reads an output that the model does not give.
    """
    read, names = extra_outputs(losses), {output: name for name, (output, _) in LOSSES.items()}
    for module in compiled.adapter_tensors.values():
        for tensor, output in module.find_untrained(read):
            raise ChoiceError(
                f"'{tensor}' of adapter '{module.adapter.name}' learns only from '{output}', which no loss reads",
                next_step=f"add loss: [{names.get(output, 'one that does')}]",
            )
    for name in {*read} - {*compiled.session.options.aux}:
        what = f"a loss of the recipe reads '{name}', which the model does not give"
        raise Unavailable(what, next_step=f'compile with aux=["{name}"]')


def check_gradients(compiled: CompiledModule, losses: Collection[str]) -> None:
    """Raise ``Unavailable`` if no gradient passes through an extra output that one of the losses reads."""
    for output in extra_outputs(losses):
        if not any(tensor.requires_grad for tensor in compiled.aux.get(output, {}).values()):
            raise Unavailable(
                f"no gradient passes through '{output}' of the call",
                next_step="swap to the adapter, and leave out label_smoothing_factor and use_reentrant: true",
            )


def mean_terms(compiled: CompiledModule, losses: Losses, experts: Tensor | None) -> Tensor | float:
    """Return the sum of the losses that are means over a call, which has just run.

    Raises:
        Unavailable: the data has no column of experts, and a loss reads it.
    """
    total: Tensor | float = 0.0
    if GATES in losses:
        if experts is None:
            raise Unavailable(
                f"{GATES} needs the expert of each row, and the data has no column '{EXPERTS}'",
                next_step=f"give '{EXPERTS}' a number for each row, or a list with one for each token",
            )
        total = training.gate_loss(compiled, experts, **losses[GATES])
    return total + training.gate_penalty(compiled, **losses[PENALTY]) if PENALTY in losses else total


def policy_term(compiled: Any, draws: int, loss: Tensor, output: Any, labels: object, shifted: bool) -> Tensor:
    """Return a scalar of value 0 whose gradient is that of ``sampled_selection_loss`` for the routers.

    The draws of a row are compared by its share of the batch's cross-entropy.

    Args:
        compiled: the model that was called, each row ``draws`` times (``repeat_rows``).
        draws: two or more.
        loss, output, labels: the trainer's and the model's, of that call.
        shifted: whether a token's logits are compared with the next one's label.

    Raises:
        Unavailable: there is not one label for each of the logits.
    """
    found = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    logits, fused = found.get("logits"), found.get("log_probs")
    if isinstance(labels, Tensor) and isinstance(fused, Tensor):
        rows = -fused.sum(dim=-1)
    elif isinstance(labels, Tensor) and isinstance(logits, Tensor) and logits.shape[:-1] == labels.shape:
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        flat = logits.flatten(0, -2).float(), labels.flatten()
        rows = F.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view(len(labels), -1).sum(1)
    else:
        raise Unavailable(
            f"{SAMPLED} compares the draws of a row by labels, and needs one for each of the model's logits",
            next_step="train a language model on texts, or a classifier of rows or tokens",
        )
    rows = rows.detach().view(draws, -1)
    share = loss.detach() / rows.sum().clamp_min(torch.finfo(rows.dtype).tiny)
    chances = training.sum_by_row(compiled.aux[LOSSES[SAMPLED][0]]).view(draws, -1).to(rows.dtype)
    drawn = training.leave_one_out(share * rows.numel() * rows, chances)
    return drawn - drawn.detach()


def collate_experts(collate: Callable[[list[Row]], Row]) -> Callable[..., Row]:
    """Return a collator that keeps the column ``experts``; lists are padded on the right."""

    def collated(rows: list[Row]) -> Row:
        found = [torch.as_tensor(row[EXPERTS]).view(-1) for row in rows if EXPERTS in row]
        batch = collate([{name: value for name, value in row.items() if name != EXPERTS} for row in rows])
        padded = {EXPERTS: pad_sequence(found, True, IGNORED).squeeze(1)} if found else {}
        return {**batch, **padded}

    return collated
