"""What methods that route have in common: experts of low rank side by side, whose sum each token weighs for itself."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.errors import AdapterError
from lorac.ir.algebra.reduction import Params
from lorac.variants._experts import Factors, linear_site_of, read_factors, stack_factors
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant
from lorac.variants.params import InitContext

Tensor = torch.Tensor


class RoutedVariant(BranchVariant):
    """``y' = y + s∘Σ_i w_i·B_i·A_i·x`` with weights w (…, L) that a router gives each token.

    The factors of the L experts are called ``lora_A`` (L·k, in) and ``lora_B`` (out, L·k), stacked. So that a router
    can be frozen (``lorac.freeze_router``), a method says how many experts it has and what scales their sum.
    """

    instead: ClassVar[str] = (
        "lorac.freeze_router(adapter, weights) makes a LoRA of it, by which all tokens weigh its experts alike"
    )

    @property
    @abstractmethod
    def routes(self) -> int:
        """L, between how many experts it routes."""

    @abstractmethod
    def output_scale(self, p: Params) -> float | Tensor:
        """s: a number, or (out,)."""

    def mixture(self, hidden: Tensor, weights: Tensor, p: Params) -> Tensor:
        """Σ_i w_i·B_i·h_i (…, out) of h = A·x (…, L·k) and w (…, L); where s is a number it is least work in w."""
        gated = (hidden.unflatten(-1, (self.routes, -1)) * weights.unsqueeze(-1)).flatten(-2)
        return F.linear(gated, p.lora_B)


def from_loras(
    adapters: Sequence[Adapter],
    method: str,
    make: Callable[[tuple[str, ...], int, int], BranchVariant],
    *,
    name: str,
    seed: int,
) -> Adapter:
    """One routed adapter of several LoRAs, in their order; whatever is not the LoRAs' starts fresh.

    Each LoRA's scale is folded into its B, smaller ranks are padded with zeros (both exact), and a site that only some
    of them adapt gets zeros for the others.

    Args:
        adapters: plain LoRAs.
        method: the method's name, for messages.
        make: (site paths, rank, number of LoRAs) -> the variant, whose other tensors start without the base.
        name: the new adapter's name.
        seed: of what starts fresh.

    Raises:
        AdapterError: no LoRA, or one that is more than its two factors on linear layers.
        AdapterError: two were made for different models.
    """
    if not adapters:
        raise AdapterError(f"{method} needs at least one LoRA", next_step="give adapters of lorac.LoRA")
    sources = [read_factors(adapter, method) for adapter in adapters]
    rank = max(a.shape[0] for source in sources for a, _ in source.values())
    paths = tuple(dict.fromkeys(path for source in sources for path in source))
    variant = make(paths, rank, len(sources))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for path in paths:
        pair = stack_factors(path, [source.get(path) for source in sources], rank, method)
        tensors[path] = _initialise_site(variant, path, pair, generator, name)
    return Adapter(name, variant, tensors, provenance={"experts": [adapter.name for adapter in adapters]})


def _initialise_site(
    variant: BranchVariant, path: str, pair: Factors, generator: torch.Generator, name: str
) -> dict[str, Tensor]:
    """The tensors of one site: the experts' factors, and the rest as it starts."""
    site, made = linear_site_of(path, *pair), dict(zip(("lora_A", "lora_B"), pair, strict=True))
    for key, spec in variant.params(site).items():
        context = InitContext(spec.shape, site, _refuse_base, Params(**made), generator, name)
        made[key] = made[key] if key in made else spec.init(context).to(pair[0].dtype)
    return made


def _refuse_base() -> Tensor:
    raise AssertionError("a router starts without looking at the base")
