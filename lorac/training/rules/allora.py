"""ALLoRA: larger rows of the product learn more slowly; no dropout, no scale.

Huang and Balestriero 2024, arXiv 2410.09692.
"""

import functools
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lorac.argument_types import Operands
from lorac.errors import ChoiceError, SiteError
from lorac.frontend.layer_classes import pad_conv_input
from lorac.ir.sites.site import cast_floating
from lorac.ir.slots.layouts import layout_of
from lorac.training.rules.pairs import ABOVE_0, Pair, PairRule, check_settings
from lorac.variants.lora import LoRA


class ALLoRA(PairRule):
    """The factors learn from diag(c)·g instead of g = ∂L/∂(BA): ∇_A = Bᵀ·diag(c)·g, ∇_B = diag(c)·g·Aᵀ.

    c_i = 1/√(‖(BA)_i‖ + 1/η²) for every row, that is for every output. c is computed before the step and is constant in
    it; gradients of the layers below are not scaled. Gradients are scaled during backward, so they accumulate over
    micro-batches, and clipping and DDP see them. An optimizer that normalises every element (Adam) undoes most of the
    effect.

    Args:
        compiled: as ``Rule``'s.
        optimizer: as ``Rule``'s, of any kind.
        eta2: η²; the paper has 1, 2 and 4. While B is 0, the rate is η times the optimizer's.

    Raises:
        Unavailable, AdapterNotFound: as ``Rule``.
        ChoiceError: as ``Rule``; the LoRA has dropout or a scale other than 1; one factor trains without the other;
            η² is not above 0.
        SiteError: a module reads the weight itself, so the site's input is not visible.
    """

    in_residuals: ClassVar[bool] = False
    decides: ClassVar[frozenset[str]] = frozenset({"direction", "rate"})

    def __init__(self, compiled: nn.Module, optimizer: Optimizer, *, eta2: float = 4.0) -> None:
        super().__init__(compiled, optimizer)
        check_settings(type(self).__name__, eta2=(eta2, ABOVE_0))
        self.eta2 = eta2
        for pair in self.pairs:
            variant = pair.term.variant
            assert isinstance(variant, LoRA)
            if variant.dropout or pair.scale != 1:
                what = f"dropout={variant.dropout}" if variant.dropout else f"a scale of {pair.scale:g}"
                raise ChoiceError(
                    f"ALLoRA has neither dropout nor a scale, and {pair.term} has {what}",
                    nearest=f"lorac.LoRA(r={variant.r}, alpha={variant.r})",
                    next_step="compile with that",
                )
            site = self.compiled.sites[pair.term.site]
            if site.within is not None:
                raise SiteError(
                    f"ALLoRA reads the input of a layer, and '{site.path}' has none, since '{site.within}' computes "
                    "with its weight itself",
                    next_step="narrow targets=, or add the module to exclude=",
                )
        self._gathered: dict[int, Tensor] = {}
        self._rates: dict[int, tuple[tuple[int, int], Tensor]] = {}
        self.attach(*self._hooks())

    def rates(self, pair: Pair) -> Tensor:
        """Return c (out,) of a pair."""
        key = (pair.a._version, pair.b._version)
        if self._rates.get(id(pair), (None,))[0] != key:
            a, b = pair.a.detach(), pair.b.detach()
            norms = ((b @ (a @ a.mT)) * b).sum(-1).clamp_min(0).sqrt()
            self._rates[id(pair)] = key, (norms + 1 / self.eta2).rsqrt()
        return self._rates[id(pair)][1]

    def _hooks(self) -> Iterator[RemovableHandle]:
        for pair in self.pairs:
            yield self.compiled.host.get_submodule(pair.term.site).register_forward_hook(
                functools.partial(self._see, pair)
            )
            yield pair.a.register_hook(functools.partial(self._give, pair))
            yield pair.b.register_hook(functools.partial(self._scale, pair))

    def _see(self, pair: Pair, module: nn.Module, args: Operands, output: Tensor) -> None:
        """Wait for the gradient of a site's output, where the adapter is on."""
        how = dict(self.compiled.engine.current_slots().choice).get(pair.term.adapter)
        if how is not None and output.requires_grad and torch.is_grad_enabled():
            output.register_hook(functools.partial(self._gather, pair, args[0].detach(), how.strength))

    def _gather(self, pair: Pair, x: Tensor, strength: float, grad: Tensor) -> None:
        """Add Bᵀ·diag(c)·g of one call of the site, by the branch's own derivative for A."""
        site = self.compiled.sites[pair.term.site]
        layout = layout_of(site)
        with torch.enable_grad():
            a = pair.a.detach().requires_grad_()
            x = cast_floating(pad_conv_input(x, site.conv), a.dtype)
            out = layout.up(layout.down(x, layout.slot_a(a.t())), layout.slot_b(pair.b.detach().t()))
        scaled = strength * grad.to(out.dtype) * layout.per_output(self.rates(pair))
        (found,) = torch.autograd.grad(out, a, scaled)
        before = self._gathered.get(id(pair))
        self._gathered[id(pair)] = found if before is None else before + found

    def _give(self, pair: Pair, grad: Tensor) -> Tensor:
        """Replace A's gradient by the gathered one; all calls of the site have run before."""
        return self._gathered.pop(id(pair), grad)

    def _scale(self, pair: Pair, grad: Tensor) -> Tensor:
        return grad * self.rates(pair).unsqueeze(-1)
