"""ReLoRA: restarts of a low-rank update, whose sum has a higher rank.

Lialin et al., ICLR 2024, arXiv 2307.05695. The base's weights are read-only here, so each restart folds the update
into a second adapter.
"""

import math
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lorac.errors import AdapterNotFound, ChoiceError
from lorac.training.rule import State, unwrap_ddp
from lorac.training.rules.pairs import FROM_1, SHARE, Pair, PairRule, SettingRange, check_settings
from lorac.variants.adapter import Adapter
from lorac.variants.base_parameters import Full
from lorac.variants.lora import LoRA

_ROUNDING = 1e-9
"""Keeps a quantile that falls on an entry from falling below it."""


class ReLoRA(PairRule):
    """At every restart s·B·A is added to the adapter ``into``, A is drawn again, B becomes 0, and moments are pruned.

    Compile with both, active together: ``{"a": lorac.LoRA(r=8), "sum": lorac.LoRA(r=40, alpha=40)}`` with
    ``active={"a": 1, "sum": 1}``. A LoRA of rank R takes ⌊R/r⌋ restarts and stays a LoRA;
    a ``lorac.Full`` takes any number. A restart changes the model's outputs by rounding only. ``fold()`` at the end
    leaves the whole result in ``into``.

    ``into`` itself does not train: its ``requires_grad`` is turned off. After a restart the rate warms up again, by
    ``restart_schedule``. The released code restarts one step later, after the step whose rate that schedule makes 0.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s, of any kind; it holds the factors of the adapter that trains.
        into: name of the adapter that the updates are folded into.
        every: steps between restarts.
        prune: quantile of the sizes of a moment's entries up to which they become 0 at a restart; the paper's is 0.99.
        seed: of the new A's; the same in all processes that train together.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``; ``into`` is not there, or is neither a LoRA nor ``Full``.
        ChoiceError: as ``Rule``; ``into`` lacks a site or has less rank than one restart needs; a setting is out of
            range; before a step that ends with a restart: ``into`` has no room left, or the two are not active with
            strength 1.
    """

    decides: ClassVar[frozenset[str]] = frozenset({"factors"})
    saved: ClassVar[str] = "relora"

    def __init__(
        self, compiled: nn.Module, optimizer: Optimizer, *, into: str, every: int, prune: float = 0.99, seed: int = 0
    ) -> None:
        adapters = getattr(unwrap_ddp(compiled), "adapters", {})
        target = adapters.get(into)
        if target is None or not isinstance(target.variant, LoRA | Full):
            there = "there is none" if target is None else f"it is {target.variant.name}"
            raise AdapterNotFound(
                f"'{into}' must be a LoRA or Full to fold into, and {there}",
                next_step="compile with one: {'a': lorac.LoRA(r=8), 'sum': lorac.Full()}",
            )
        before = [(tensor, tensor.requires_grad) for tensor in target.parameters()]
        try:
            for tensor, _ in before:
                tensor.requires_grad_(False)
            super().__init__(compiled, optimizer)
            check_settings(type(self).__name__, every=(every, FROM_1), prune=(prune, SHARE))
            self.room = self._room(target)
        except BaseException:
            for tensor, trains in before:
                tensor.requires_grad_(trains)
            raise
        self.into, self.every, self.prune = into, every, prune
        self.steps = self.restarts = 0
        self._target = target
        self.generator = torch.Generator().manual_seed(seed)
        self.attach()

    def before(self) -> None:
        """Refuse a restart that cannot be made, before anything of its step is done."""
        if (self.steps + 1) % self.every == 0:
            self._require_ready()

    def after(self) -> None:
        """Count the step, and fold and restart where the period is over."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.fold()

    @torch.no_grad()
    def fold(self) -> None:
        """Add the trained update to ``into`` now, and begin anew.

        Raises:
            ChoiceError: there is no room left, or the two adapters are not active with strength 1.
        """
        self._require_ready()
        for pair in self.pairs:
            self._add(pair)
            bound = 1 / math.sqrt(pair.a.shape[-1])
            drawn = torch.empty(pair.a.shape).uniform_(-bound, bound, generator=self.generator)
            pair.a.copy_(drawn)
            pair.b.zero_()
            for tensor in pair.factors:
                self._prune(tensor)
        self.restarts += 1

    def state(self) -> State:
        return {"steps": self.steps, "restarts": self.restarts, "draws": self.generator.get_state()}

    def load_state(self, state: State) -> None:
        self.steps, self.restarts = state["steps"], state["restarts"]
        self.generator.set_state(state["draws"].cpu())

    def _add(self, pair: Pair) -> None:
        own, variant = self._target.tensors[pair.term.site], self._target.variant.at_path(pair.term.site)
        if isinstance(variant, LoRA):
            rank = pair.a.shape[-2]
            first = self.restarts * rank
            own["lora_A"].narrow(-2, first, rank).copy_(pair.a)
            own["lora_B"].narrow(-1, first, rank).copy_(pair.b * (pair.scale / variant.scale))
        else:
            own["weight"].add_(pair.scale * (pair.b @ pair.a))

    def _prune(self, tensor: Tensor) -> None:
        """Zero the entries of every moment of a tensor that are not above the quantile of their sizes."""
        moments = [value for value in self.optimizer.state.get(tensor, {}).values() if isinstance(value, Tensor)]
        for moment in moments if self.prune else ():
            if moment.shape == tensor.shape:
                sizes = moment.abs().to(torch.promote_types(moment.dtype, torch.float32))
                place = int(self.prune * (moment.numel() - 1) + _ROUNDING) + 1
                moment.masked_fill_(sizes <= sizes.flatten().kthvalue(place).values, 0)

    def _room(self, target: Adapter) -> float:
        """Return the number of restarts that ``into`` takes."""
        room = math.inf
        for pair in self.pairs:
            own = target.tensors.get(pair.term.site)
            if own is None:
                raise ChoiceError(
                    f"'{target.name}' does not adapt '{pair.term.site}', and '{pair.term.adapter}' does",
                    next_step="give both adapters the same targets=",
                )
            if "lora_A" in own:
                room = min(room, own["lora_A"].shape[-2] // pair.a.shape[-2])
        if room < 1:
            raise ChoiceError(
                f"'{target.name}' has a smaller rank than one restart adds",
                next_step="give it r= (number of restarts) times that, or compile with lorac.Full",
            )
        return room

    def _require_ready(self) -> None:
        if self.restarts >= self.room:
            raise ChoiceError(
                f"'{self.into}' has taken {self.restarts} restarts and has no rank left",
                next_step="compile with a larger r= there, or with lorac.Full",
            )
        wanted = {self.into, *(pair.term.adapter for pair in self.pairs)}
        active = self.compiled.active
        if any(active.get(name) != 1 for name in wanted):
            raise ChoiceError(
                f"a restart needs both adapters active at strength 1, and active is {active}",
                next_step=f"swap to {dict.fromkeys(sorted(wanted), 1)}",
            )


def restart_schedule(
    steps: int, every: int, *, restart_warmup: int, warmup: int = 0, least: float = 0.1
) -> Callable[[int], float]:
    """Return the released code's schedule for ``torch.optim.lr_scheduler.LambdaLR``: step -> factor of the rate.

    A cosine falls from 1 to ``least`` over all steps; it is approached linearly from 0 at first and after each restart.

    Args:
        steps: of the whole training.
        every: steps between restarts.
        restart_warmup: steps of the warm-up after a restart.
        warmup: steps of the first warm-up.
        least: factor at the end.

    Raises:
        ChoiceError: a setting is out of range, or a warm-up is longer than ``every``.
    """
    within = SettingRange(f"from 0 to every={every}", lambda value: 0 <= value <= every)
    check_settings(
        "restart_schedule",
        steps=(steps, FROM_1),
        every=(every, FROM_1),
        restart_warmup=(restart_warmup, within),
        warmup=(warmup, within),
        least=(least, SHARE),
    )

    def fall(step: int) -> float:
        progress = (step - warmup) / max(1, steps - warmup)
        return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * progress))

    def factor(step: int) -> float:
        since = step % every
        if step < warmup:
            return step / warmup
        if step >= every and since < restart_warmup:
            return since / restart_warmup * fall(step - since + restart_warmup)
        return fall(step)

    return factor
