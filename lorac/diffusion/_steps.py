"""The steps of an optimizer, as the trainings of this package take them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lorac.progress import progress


def take_steps(
    module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterable[Tensor], title: str, total: int | None
) -> list[float]:
    """Take a step for each loss, with a module in training mode, and return the losses.

    Args:
        module: gets back into eval mode.
        losses: each is computed after the step before it.
        title, total: the name and length of the progress bar.
    """
    taken = []
    module.train()
    with progress(title, total=total) as report:
        for loss in losses:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            taken.append(loss.item())
            report.step(f"loss {taken[-1]:.3f}")
    module.eval()
    return taken
