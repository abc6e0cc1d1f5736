"""Break-for-Make: a content and a style learned apart, each in its half of a LoRA's factors, then joined and tuned.

    compiled = lorac.compile(unet, {"content": lorac.PLP(r=64), "style": lorac.PLP(r=64)})
    share_bases(compiled.adapters["content"], compiled.adapters["style"])
    learn_half(compiled, "content", content_loss, style_losses)
    learn_half(compiled, "style", style_loss, content_losses)
    joined = lorac.PLP.join(compiled.adapters["content"], compiled.adapters["style"], name="both")
    tuned = lorac.compile(unet, {"both": joined})
    learn_both(tuned, "both", content_loss, style_loss)

arXiv 2403.19456 and ACM TOG 44(2), 2025. Halves that were trained against the same frozen bases join as they are. Other
bases are seeded by the adapters' names, and a LoRA joined of those needs the second stage.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lorac.argument_types import Bounds, Count, Positive, check_fields
from lorac.errors import ChoiceError
from lorac.progress import progress
from lorac.session.compiled import CompiledModule
from lorac.training.rules.preconditioned import Preconditioned
from lorac.variants.adapter import Adapter
from lorac.variants.plp import PLP

Loss = Callable[[torch.Generator], Tensor]
"""Generator, of one seed for all losses of a step -> the loss on some images at the noise and timestep it draws."""
Half = Literal["content", "style"]
_LEARNED = {"content": "down_learned", "style": "up_learned"}
"""Half -> the factor that its own data train; its partners' data train the other."""
_FROZEN = ("up_frozen", "down_frozen")


@dataclass(frozen=True, kw_only=True)
class HalfSettings:
    """How halves are trained; the defaults are the authors' code's.

    Attributes:
        steps: number of steps.
        rate: of the factor that a half's own data train, and of both factors in the second stage.
        partner_rate: of the factor that the partners' data train.
        partners: number of partners in a step's mean.
        clip: the largest norm of the gradients.
        decay: AdamW's, of the learned halves alone.
        seed: of draws.
    """

    steps: Count = 1000
    rate: Positive = 1e-4
    partner_rate: Positive = 1e-5
    partners: Count = 3
    clip: Positive = 1.0
    decay: Annotated[float, Bounds(0)] = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


@torch.no_grad()
def share_bases(adapter: Adapter, *others: Adapter) -> None:
    """Give adapters the frozen halves of one of them, so that contents and styles join in any pair.

    Args:
        adapter: a fresh ``lorac.PLP``, whose frozen halves are copied.
        others: fresh ones of the same sites, rank and basis, changed in place.

    Raises:
        ChoiceError, SiteError: as ``lorac.PLP.join``.
    """
    for other in others:
        PLP.join(adapter, other, name=other.name)
        for path, key in itertools.product(other.tensors, _FROZEN):
            other.tensors[path][key].copy_(adapter.tensors[path][key])


def learn_half(
    compiled: CompiledModule,
    name: str,
    own: Loss,
    partners: Sequence[Loss],
    settings: HalfSettings | None = None,
    *,
    half: Half | None = None,
) -> list[float]:
    """Train one half: its own loss teaches its factor, the mean of some partners' losses the other one.

    A content learns the down factor, with styles as partners; a style the up factor, with contents.

    Args:
        compiled: of target eager; the adapter is made its choice.
        name: the adapter's, of ``lorac.PLP``.
        own: the loss on its own images, by ``compiled``.
        partners: losses on others' images, three at least where the settings take three.
        settings: of the training.
        half: ``"content"`` or ``"style"``; default: the name.

    Returns:
        The own loss at each step.

    Raises:
        ChoiceError: the half, the adapter's method or the number of partners is wrong.
    """
    given, kind = settings or HalfSettings(), half or name
    if kind not in _LEARNED:
        raise ChoiceError(f"'{kind}' is not a half of a LoRA", next_step="give half= content or style")
    if len(partners) < given.partners:
        raise ChoiceError(
            f"there are {len(partners)} partners, and a step takes {given.partners}",
            next_step="give more losses, or partners= in HalfSettings",
        )
    mine = _find_learned(compiled, name, _LEARNED[kind])
    theirs = _find_learned(compiled, name, *(set(_LEARNED.values()) - {_LEARNED[kind]}))
    optimizers = [
        torch.optim.AdamW(tensors, lr=rate, weight_decay=given.decay)
        for tensors, rate in ((mine, given.rate), (theirs, given.partner_rate))
    ]

    def take_step(chosen: random.Random) -> float:
        draw = chosen.getrandbits(32)
        found = _step(own(_make_generator(draw)), mine, optimizers[0], given.clip)
        drawn = chosen.sample(list(partners), given.partners)
        mean = torch.stack([loss(_make_generator(draw)) for loss in drawn]).mean()
        _step(mean, theirs, optimizers[1], given.clip)
        return found

    return _learn(compiled, name, kind, given, take_step)


def learn_both(
    compiled: CompiledModule,
    name: str,
    content: Loss,
    style: Loss,
    settings: HalfSettings | None = None,
    *,
    preconditioned: bool = True,
    reg: float = 0.0,
) -> list[float]:
    """Tune a joined adapter on content and style together: the second stage.

    Args:
        compiled: of target eager; the adapter is made its choice.
        name: the joined adapter's.
        content, style: the losses on their images, by ``compiled``.
        settings: of the training; ``rate`` is that of both factors.
        preconditioned: as in the journal's version (``lorac.training.Preconditioned``); the first has AdamW alone.
        reg: added to the diagonals by the preconditioner; above 0 where factors are not of full rank.

    Returns:
        The sum of both losses at each step.
    """
    given = settings or HalfSettings()
    tensors = _find_learned(compiled, name, *_LEARNED.values())
    optimizer = torch.optim.AdamW(tensors, lr=given.rate, weight_decay=given.decay)
    rule = Preconditioned(compiled, optimizer, reg=reg) if preconditioned else None

    def take_step(chosen: random.Random) -> float:
        draw = chosen.getrandbits(32)
        both = content(_make_generator(draw)) + style(_make_generator(draw))
        return _step(both, tensors, optimizer, given.clip)

    losses = _learn(compiled, name, "content and style", given, take_step)
    if rule is not None:
        rule.remove()
    return losses


def _learn(
    compiled: CompiledModule, name: str, title: str, given: HalfSettings, take_step: Callable[[random.Random], float]
) -> list[float]:
    chosen, losses = random.Random(given.seed), []
    compiled.swap(name)
    compiled.train()
    with progress(title, total=given.steps) as report:
        for _ in range(given.steps):
            losses.append(take_step(chosen))
            report.step(f"loss {losses[-1]:.3f}")
    compiled.eval()
    return losses


def _find_learned(compiled: CompiledModule, name: str, *keys: str) -> list[Tensor]:
    adapter: Adapter = compiled.adapters[name]
    if not isinstance(adapter.variant, PLP):
        raise ChoiceError(
            f"'{name}' ({adapter.variant.name}) has no halves", next_step="compile with {'content': lorac.PLP(r=64)}"
        )
    return [own[key] for own in adapter.tensors.values() for key in keys]


def _make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _step(loss: Tensor, tensors: list[Tensor], optimizer: torch.optim.Optimizer, clip: float) -> float:
    """Move these tensors alone by one step, whatever else the loss depends on; return the loss."""
    for tensor, grad in zip(tensors, torch.autograd.grad(loss, tensors), strict=True):
        tensor.grad = grad
    torch.nn.utils.clip_grad_norm_(tensors, clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()
