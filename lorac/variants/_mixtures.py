"""Mixtures of LoRAs: the base class of routed methods, their gates, and the conversion of LoRAs to experts."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.errors import AdapterError, OptionError, shape_error
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base import BranchVariant, Variant
from lorac.variants.low_rank import ScaledRank
from lorac.variants.params import InitContext

Factors = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r) of one LoRA at one site; B includes the scale."""


class RoutedVariant(BranchVariant):
    """``y' = y + s∘Σ_i w_i·B_i·A_i·x`` with weights w (…, L) that a router gives each token.

    The factors of the L experts are stacked as ``lora_A`` (L·k, in) and ``lora_B`` (out, L·k). A method defines the
    number of its experts and the scale of their sum, so that ``lorac.freeze_router`` works for every method.
    """

    emits: ClassVar[tuple[str, ...]] = ("router",)
    scales: tuple[float, ...] = ()
    """Scales of the experts that are not folded into B."""
    instead: ClassVar[str] = (
        "lorac.freeze_router(adapter, weights) makes a LoRA of it, with the same expert weights for all tokens"
    )

    @property
    @abstractmethod
    def routes(self) -> int:
        """The number L of experts."""

    @abstractmethod
    def output_scale(self, p: Params) -> float | Tensor:
        """Return the scale s of the output, a number or a tensor (out,)."""

    def mix(self, hidden: Tensor, weights: Tensor, p: Params) -> Tensor:
        """Return Σ_i w_i·B_i·h_i (…, out) for h = A·x (…, L·k) and w (…, L); the experts' scales are folded into w."""
        weights = weights * weights.new_tensor(self.scales) if self.scales else weights
        gated = (hidden.unflatten(-1, (self.routes, -1)) * weights.unsqueeze(-1)).flatten(-2)
        return F.linear(gated, p.lora_B)


def top_k_mask(logits: Tensor, k: int) -> Tensor:
    """Return a mask (…, L) of the k largest logits; ties go to the lowest index, on every backend.

    ``torch.topk`` and ONNX's TopK break ties differently, so that they compute only the k-th largest value. Greater
    values are chosen, then equal values by index: O(L), where comparing all pairs is O(L²).
    """
    if k >= logits.shape[-1]:
        return torch.ones_like(logits, dtype=torch.bool)
    threshold = torch.topk(logits, k, dim=-1).values[..., -1:]
    above, equal = logits > threshold, logits == threshold
    remaining = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.to(torch.int64).cumsum(-1) <= remaining))


def top_k_softmax(logits: Tensor, k: int, temperature: float = 1.0) -> Tensor:
    """Return weights (…, L): softmax(logits / temperature) over the k largest logits, zero elsewhere."""
    scaled = logits if temperature == 1 else logits / temperature
    return torch.softmax(scaled.masked_fill(~top_k_mask(logits, k), -torch.inf), dim=-1)


def add_gumbel_noise(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """Add Gumbel noise to logits (…, n), in float64.

    The k largest results, in order, are distributed as k draws without replacement from softmax(logits) (Gumbel-top-k).
    """
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64).to(logits.device)
    noise = -torch.log(-torch.log(uniform.clamp(torch.finfo(torch.float64).tiny, 1 - torch.finfo(torch.float64).eps)))
    return logits.double() + noise


def ordered_log_prob(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return the log-probability of drawing experts in order, without replacement: Σ_j log(q_j / (1 − Σ_{i<j} q_i)).

    Args:
        logits: (…, n); q is their softmax.
        chosen: (…, k) distinct indices, in the order of the draws.

    Returns:
        (…), differentiable in the logits.
    """
    picked = logits.gather(-1, chosen)
    remaining, total = logits, torch.zeros_like(picked[..., 0])
    for j in range(chosen.shape[-1]):
        total = total + picked[..., j] - remaining.logsumexp(-1)
        remaining = remaining.scatter(-1, chosen[..., j : j + 1], -torch.inf)
    return total


def read_factors(adapter: Adapter, method: str) -> dict[str, Factors]:
    """Return the factors of a plain LoRA by site path.

    Raises:
        AdapterError: the adapter is not a plain LoRA of two factors.
    """
    if adapter.variant.name != "lora" or adapter.replaced:
        found = f"replaces {next(iter(adapter.replaced))}" if adapter.replaced else f"is {adapter.variant.name}"
        raise AdapterError(
            f"'{adapter.name}' {found}; {method} routes between plain LoRAs",
            next_step="give adapters of lorac.LoRA without modules_to_save",
        )
    factors = {}
    for path, tensors in adapter.tensors.items():
        if tensors.keys() != {"lora_A", "lora_B"}:
            raise AdapterError(
                f"'{adapter.name}' at '{path}' has the tensors {sorted(tensors)}; {method} routes lora_A and lora_B "
                "only",
                next_step="give adapters of lorac.LoRA without a bias",
            )
        # torch can neither multiply nor concatenate 8-bit tensors.
        both = (tensors["lora_A"].detach(), tensors["lora_B"].detach())
        a, b = (tensor.float() if tensor.itemsize == 1 else tensor for tensor in both)
        variant = adapter.variant.at_path(path)
        assert isinstance(variant, ScaledRank)
        factors[path] = a, b * variant.scale
    return factors


def stack_factors(path: str, factors: Sequence[Factors | None], rank: int, method: str) -> Factors:
    """Return A (L·rank, in) and B (out, L·rank) of L experts at one site; smaller ranks are padded with zeros.

    Raises:
        AdapterError: two LoRAs were made for layers of different sizes.
    """
    present = [pair for pair in factors if pair is not None]
    shapes = {(b.shape[0], a.shape[1]) for a, b in present}
    if len(shapes) > 1:
        raise shape_error(
            f"the LoRAs at '{path}' are for layers (out, in) of {' and '.join(map(str, sorted(shapes)))}",
            next_step=f"give {method} LoRAs of one base model",
        )
    a, b = present[0]
    empty = (a.new_zeros(0, a.shape[1]), b.new_zeros(b.shape[0], 0))
    pairs = [empty if pair is None else pair for pair in factors]
    down = torch.cat([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
    return down, torch.cat([F.pad(b, (0, rank - b.shape[1])) for _, b in pairs], dim=1)


class LoraMixture(Variant):
    """A method that consists of LoRAs, whose factors are stacked as in ``RoutedVariant``.

    The field ``r`` is the rank of each LoRA, ``experts`` is their number, and no initialiser reads the base.
    """

    experts: int
    rank_fields: ClassVar[tuple[str, ...]] = ("r",)
    """The fields that are set to the rank, since the LoRAs' scales are folded in."""

    @property
    def routes(self) -> int:
        """The number of LoRAs."""
        return self.experts

    @classmethod
    def from_loras(
        cls,
        adapters: Sequence[Adapter],
        *,
        name: str | None = None,
        seed: int = 0,
        sites: Sequence[str] = (),
        **fields: object,
    ) -> Adapter:
        """Make one adapter from several LoRAs, in their order; all other tensors are freshly initialised.

        Each LoRA's scale is folded into its B, and smaller ranks are padded with zeros (both exact). Where only some of
        the LoRAs adapt a site, the others' factors are zero.

        Args:
            adapters: plain LoRAs.
            name: the new adapter's name; default: the method's.
            seed: seed of the fresh tensors.
            sites: paths in the order of the new adapter; other paths follow in the LoRAs' order.
            **fields: fields of the method, except targets, ranks and the number of experts.

        Raises:
            AdapterError: there is no LoRA, an adapter is not a plain LoRA on linear layers, or two were made for
                different models.
            OptionError: a field is decided by the LoRAs.
        """
        name, method = name or cls.name, cls.__name__
        if not adapters:
            raise AdapterError(
                f"{method} is made of LoRAs, and none is given", next_step="give one adapter of lorac.LoRA or more"
            )
        sources = [read_factors(adapter, method) for adapter in adapters]
        rank = max(a.shape[0] for source in sources for a, _ in source.values())
        known = dict.fromkeys(path for source in sources for path in source)
        paths = tuple(dict.fromkeys([*(path for path in sites if path in known), *known]))
        found = {"targets": paths, "experts": len(sources), **dict.fromkeys(cls.rank_fields, rank)}
        if own := [field for field in fields if field in found]:
            raise OptionError(f"{method}.from_loras takes '{own[0]}' from the LoRAs", next_step=f"leave {own[0]}= out")
        variant = cls(**found, **fields)  # type: ignore[arg-type]  # checked by the class
        generator, shared = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        tensors = {}
        for path in paths:
            a, b = stack_factors(path, [source.get(path) for source in sources], rank, method)
            site = Site(path, SiteKind.LINEAR, b.shape[0], a.shape[1], a.dtype, None)
            made = tensors[path] = {"lora_A": a, "lora_B": b, **shared}
            for key, spec in variant.params(site).items():
                if key not in made:
                    context = InitContext(spec.shape, site, _refuse_base, Params(**made), generator, name)
                    made[key] = spec.init(context).to(a.dtype)
                    shared |= {key: made[key]} if spec.shared else {}
        return Adapter(name, variant, tensors, provenance={"experts": [adapter.name for adapter in adapters]})


def _refuse_base() -> Tensor:
    raise AssertionError("a router starts without looking at the base")
