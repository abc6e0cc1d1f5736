"""GaLore: whole weights are trained, and the optimizer's moments live in a low-rank subspace of their gradients.

Zhao et al., ICML 2024, arXiv 2403.03507; the arithmetic is that of the authors' release, ``galore-torch``.

The weights are those of ``lorac.Full`` adapters, so that the result is an adapter like any other:

    compiled = lorac.compile(model, {"a": lorac.Full(targets="all-linear")})
    optimizer = GaLoreAdamW(galore_groups(compiled, rank=128), lr=1e-2)
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lorac.errors import ChoiceError, Unavailable, not_one_of
from lorac.training.optimizer_state import Group
from lorac.training.rule import State, spans_processes, trained_terms, unwrap_ddp
from lorac.training.rules.eight_bit_moments import EightBitMoments, OptimizerMoment
from lorac.training.rules.pairs import BELOW_1, FROM_0, FROM_1, check_settings, copy_state
from lorac.variants.base_parameters import Full

_SIDES = ("std", "reverse_std", "left", "right", "full")
_PROJECTED = {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
"""The settings of a group whose gradients are projected; a group without ``rank`` is trained as usual."""


def galore_groups(
    compiled: nn.Module, *, rank: int = 128, update_proj_gap: int = 200, scale: float = 0.25, proj_type: str = "std"
) -> list[Group]:
    """Make parameter groups for GaLore's optimizers: weights of ``Full`` adapters projected, other parameters not.

    Args:
        compiled: the result of ``lorac.compile(..., target="eager")``, possibly wrapped in DDP.
        rank: r, of the projected gradients; where a weight has fewer rows or columns, that many.
        update_proj_gap: T, the steps between two projections.
        scale: α, a factor of the update when it is projected back.
        proj_type: ``"std"`` projects the shorter side, of square weights the columns; ``"reverse_std"`` the other one;
            ``"left"``, ``"right"`` and ``"full"`` (both) as they say.

    Raises:
        Unavailable, AdapterNotFound: as a rule; there is no ``Full`` adapter.
    """
    projected = {
        id(term.tensors["weight"]): term.tensors["weight"]
        for term in trained_terms(compiled, (Full,))
        if term.tensors["weight"].requires_grad
    }
    settings = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    groups: list[Group] = [{"params": list(projected.values()), **settings}]
    others = [p for p in unwrap_ddp(compiled).parameters() if p.requires_grad and id(p) not in projected]
    return [*groups, {"params": others}] if others else groups


class GaLore(Optimizer, ABC):
    """Base class of GaLore's optimizers: projection, its refresh, the way back, decay, and steps by layer.

    Of a group with ``rank`` every gradient G (…, m, n) is projected, ``R = G·Qᵀ`` (m, r), ``Pᵀ·G`` (r, n) or both, by
    the first singular vectors of the gradient at every ``update_proj_gap``-th step; moments are of R's shape, and are
    neither turned nor reset when the projector changes. The update N comes back as scale·N·Q or scale·P·N. Decay is
    decoupled, on the whole weight, after the update. State of one weight (m ≤ n, one side): m·r for the projector and
    r·n for each moment.

    Raises:
        ChoiceError: a setting is out of range, or a group with ``rank`` holds a tensor that is not a matrix.
        OptionError: there is no such ``proj_type``.
    """

    def add_param_group(self, param_group: Group) -> None:
        """Add a group as torch does, with the paper's defaults for missing settings of a projected group."""
        if "rank" in param_group:
            param_group = {**_PROJECTED, **param_group}
            check_settings(
                "GaLore",
                rank=(param_group["rank"], FROM_1),
                update_proj_gap=(param_group["update_proj_gap"], FROM_1),
                scale=(param_group["scale"], FROM_0),
            )
            if param_group["proj_type"] not in _SIDES:
                raise not_one_of("there is no proj_type", param_group["proj_type"], _SIDES)
            tensors = param_group["params"]
            for tensor in (tensors,) if isinstance(tensors, Tensor) else tensors:
                if tensor.dim() < 2:
                    raise ChoiceError(
                        f"a gradient of shape {tuple(tensor.shape)} has no singular vectors",
                        next_step="leave it in a group without rank=, as galore_groups does",
                    )
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for tensor in group["params"]:
                self._update(tensor, group)
        return loss

    @contextmanager
    def by_layer(self) -> Iterator[None]:
        """Update each parameter during backward, as soon as its gradient is there, and free the gradient.

        No two layers' gradients are in memory at once. Gradient accumulation and clipping by the global norm are not
        possible, and ``step()`` has nothing left to do.

        Raises:
            Unavailable: several processes train; their gradients are added up only after backward.
        """
        if spans_processes():
            raise Unavailable(
                "by_layer() steps within backward, before the gradients of several processes are added up",
                next_step="call step() after backward() instead",
            )

        @torch.no_grad()
        def step(group: Group, tensor: Tensor) -> None:
            self._update(tensor, group)
            tensor.grad = None

        with ExitStack() as hooks:
            for group in self.param_groups:
                for tensor in [one for one in group["params"] if one.requires_grad]:
                    hooks.enter_context(tensor.register_post_accumulate_grad_hook(functools.partial(step, group)))
            yield

    def load_state_dict(self, state_dict: State) -> None:
        """Load a state as torch does, but keep dtypes: torch would cast 8-bit moments."""
        super().load_state_dict(dict(state_dict))
        order = [tensor for group in self.param_groups for tensor in group["params"]]
        ids = [index for group in state_dict["param_groups"] for index in group["params"]]
        for tensor, index in zip(order, ids, strict=True):
            if index in state_dict["state"]:
                self.state[tensor] = copy_state(state_dict["state"][index], tensor)

    @abstractmethod
    def direction(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        """Return the update, rate included, in the shape of the (projected) gradient.

        Args:
            gradient: projected, where the group is.
            state: of the parameter; ``step`` counts this step already.
            group: its settings.
        """

    def _update(self, tensor: Tensor, group: Group) -> None:
        if tensor.grad is None:
            return
        state, projected = self.state[tensor], "rank" in group
        steps = state.get("step", 0)
        gradient = tensor.grad
        if projected:
            if steps % group["update_proj_gap"] == 0:
                rows, columns = gradient.shape[-2:]
                side = group["proj_type"]
                if side in {"std", "reverse_std"}:
                    side = "right" if (rows >= columns) == (side == "std") else "left"
                wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                u, _, vh = torch.linalg.svd(wide, full_matrices=False)
                found = {"left": u[..., : group["rank"]], "right": vh[..., : group["rank"], :]}
                kept = found if side == "full" else {side: found[side]}
                state["projector"] = {name: vectors.to(gradient.dtype).contiguous() for name, vectors in kept.items()}
            if "left" in state["projector"]:
                gradient = state["projector"]["left"].mT @ gradient
            if "right" in state["projector"]:
                gradient = gradient @ state["projector"]["right"].mT
        state["step"] = steps + 1
        update = self.direction(gradient, state, group)
        if projected:
            projector = state["projector"]
            if "left" in projector:
                update = projector["left"] @ update
            if "right" in projector:
                update = update @ projector["right"]
            update = update * group["scale"]
        tensor.sub_(update.to(tensor.dtype))
        if group["weight_decay"]:
            tensor.mul_(1 - group["lr"] * group["weight_decay"])


class GaLoreAdamW(GaLore):
    """GaLore with AdamW, as released: ε is added to √V before the bias is corrected.

    Args:
        params: parameters, or groups of them; ``galore_groups`` makes these of a compiled model.
        lr: η.
        betas: β₁ and β₂.
        eps: ε.
        weight_decay: λ, decoupled.
        correct_bias: as transformers' AdamW had it.
        bits: 32, or 8: both moments in bitsandbytes' blocks of 8 bits, where a tensor has 4096 entries or more.

    Raises:
        ChoiceError, OptionError: as ``GaLore``; ``bits`` is neither.
        MissingExtra: bits=8 without bitsandbytes.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        bits: int = 32,
    ) -> None:
        check_settings(
            type(self).__name__,
            lr=(lr, FROM_0),
            beta1=(betas[0], BELOW_1),
            beta2=(betas[1], BELOW_1),
            eps=(eps, FROM_0),
            weight_decay=(weight_decay, FROM_0),
        )
        if bits not in {8, 32}:
            raise ChoiceError(f"moments of {bits} bits are not supported", next_step="bits= is 8 or 32")
        self._eight = EightBitMoments() if bits == 8 else None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)

    def direction(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        beta1, beta2 = group["betas"]
        mean, square = (
            OptimizerMoment(state.setdefault(name, torch.zeros_like(gradient)))
            if self._eight is None
            else self._eight.moment(state, name, gradient)
            for name in ("exp_avg", "exp_avg_sq")
        )
        mean.values.mul_(beta1).add_(gradient, alpha=1 - beta1)
        square.values.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        update = mean.values / square.values.sqrt().add_(group["eps"])
        mean.store()
        square.store()
        rate = group["lr"]
        if group["correct_bias"]:
            rate = rate * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        return update * rate


class GaLoreSGD(GaLore):
    """GaLore with SGD and momentum: M ← μ·M + R.

    Args:
        params: as ``GaLoreAdamW``'s.
        lr: η.
        momentum: μ; 0 keeps no moment.
        weight_decay: λ, decoupled.

    Raises:
        ChoiceError, OptionError: as ``GaLore``.
    """

    def __init__(self, params: ParamsT, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        check_settings(
            type(self).__name__, lr=(lr, FROM_0), momentum=(momentum, BELOW_1), weight_decay=(weight_decay, FROM_0)
        )
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def direction(self, gradient: Tensor, state: State, group: Group) -> Tensor:
        if not group["momentum"]:
            return gradient * group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        moment: Tensor = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        return moment * group["lr"]
