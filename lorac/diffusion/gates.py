"""The training of AutoLoRA's gates, one for each layer, whichever LoRAs act there.

    adapter = lorac.AutoLoRA.from_loras([*loras[:2], global_expert(*loras[:2])], base=False)
    compiled = lorac.compile(unet, {"gates": adapter})
    train_gates(compiled, "gates", loras, error)
    fused = lorac.AutoLoRA.from_loras(chosen, gates=read_gates(compiled.adapters["gates"]))

arXiv 2508.02107, and its code lzws/AutoLoRA: each step fuses two of the LoRAs and a third of low rank made from both.
"""

import functools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lorac.adapters.rank_reduction import reduce_rank
from lorac.argument_types import Bounds, Count, Positive, check_fields
from lorac.diffusion._steps import take_steps
from lorac.errors import ChoiceError, shape_error
from lorac.session.compiled import CompiledModule
from lorac.variants.adapter import Adapter
from lorac.variants.autolora import AutoLoRA
from lorac.variants.lora import LoRA

Error = Callable[[int | None, int, torch.Generator], Tensor]
"""(the LoRA whose prompt is given, None for the empty prompt; the LoRA whose image is noised; a generator) -> the mean
squared error of the compiled model's prediction."""
_NORMS = ("norm_base_weight", "norm_base_bias", "norm_lora_weight", "norm_lora_bias")


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """How gates are trained; the defaults are the authors'.

    Attributes:
        steps: number of steps; their 20 epochs have 400 each.
        rate: AdamW's.
        period: of the rate's cosine, in steps.
        margin: an image's error under another LoRA's prompt is raised up to this.
        dropped: share of steps with the empty prompt in place of the image's own.
        rank: of the third LoRA.
        seed: of all draws.
    """

    steps: Count = 8000
    rate: Positive = 1e-4
    period: Count = 20_000
    margin: float = 0.5
    dropped: Annotated[float, Bounds(0, 1)] = 0.3
    rank: Count = 2
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


def global_expert(*loras: Adapter, rank: int = 2, name: str = "global") -> Adapter:
    """Return the LoRA of a low rank that is nearest to the sum of some LoRAs at each site.

    Args:
        loras: plain LoRAs.
        rank: its rank; sites whose LoRAs have less keep theirs.
        name: its name.

    Raises:
        AdapterError: as ``lorac.AutoLoRA.from_loras``.
    """
    stacked = AutoLoRA.from_loras(loras)
    total = stacked.variant.r * len(loras) if isinstance(stacked.variant, AutoLoRA) else 0
    tensors = {path: {key: own[key] for key in ("lora_A", "lora_B")} for path, own in stacked.tensors.items()}
    summed = Adapter(name, LoRA(r=total, alpha=total, targets=tuple(tensors)), tensors)
    return reduce_rank(summed, min(rank, total), name=name)


@torch.no_grad()
def write_loras(adapter: Adapter, loras: Sequence[Adapter]) -> None:
    """Write other LoRAs into a gated adapter; the next call of a compiled model fuses them.

    Args:
        adapter: of ``lorac.AutoLoRA.from_loras``, changed in place.
        loras: as many as it has, of its sites and no higher rank.

    Raises:
        AdapterError: they do not fit.
    """
    variant, given = adapter.variant, AutoLoRA.from_loras(loras)
    assert isinstance(variant, AutoLoRA) and isinstance(given.variant, AutoLoRA)
    extra = next((path for path in given.tensors if path not in adapter.tensors), None)
    if extra is not None or given.variant.r > variant.r or len(loras) != variant.experts:
        reason = f"one adapts '{extra}'" if extra is not None else f"these are {len(loras)} of rank {given.variant.r}"
        raise shape_error(
            f"'{adapter.name}' fuses {variant.experts} LoRAs of rank {variant.r} on its own sites, and {reason}",
            next_step="make another one with lorac.AutoLoRA.from_loras",
        )
    for path, own in adapter.tensors.items():
        for key in ("lora_A", "lora_B"):
            own[key].zero_()
        if path not in given.tensors:
            continue
        stacked, rank = given.tensors[path], given.variant.r
        factors = zip(stacked["lora_A"].split(rank), stacked["lora_B"].split(rank, dim=1), strict=True)
        for to, (a, b) in enumerate(factors):
            at = slice(to * variant.r, to * variant.r + len(a))
            own["lora_A"][at], own["lora_B"][:, at] = a, b


def train_gates(
    compiled: CompiledModule, name: str, loras: Sequence[Adapter], error: Error, settings: GateSettings | None = None
) -> list[float]:
    """Train the gates of a fused adapter on pairs of LoRAs, and return the losses.

    A step draws two LoRAs and noises an image of the first. Its loss is the error under the first one's prompt, and the
    margin minus the error under the second one's, where that is above 0.

    Args:
        compiled: of target eager.
        name: the fused adapter's, of three LoRAs, the highest rank of ``loras`` and all their sites.
        loras: two at least.
        error: calls ``compiled``.
        settings: of the training; default: the authors'.

    Raises:
        ChoiceError: there is only one LoRA.
        AdapterError: as ``write_loras``.
    """
    given = GateSettings() if settings is None else settings
    if len(loras) < 2:
        raise ChoiceError("gates are trained on pairs of LoRAs", next_step="give loras= two adapters or more")
    adapter, chosen = compiled.adapters[name], random.Random(given.seed)
    generator = torch.Generator().manual_seed(given.seed)
    parameters = [tensor for tensor in compiled.parameters() if tensor.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=given.rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, given.period)

    @functools.cache
    def third(one: int, other: int) -> Adapter:
        return global_expert(loras[one], loras[other], rank=given.rank)

    def compute_losses() -> Iterator[Tensor]:
        for _ in range(given.steps):
            own, other = chosen.sample(range(len(loras)), 2)
            write_loras(adapter, [loras[own], loras[other], third(*sorted((own, other)))])
            prompt = None if chosen.random() < given.dropped else own
            right = error(prompt, own, generator)
            yield right + (given.margin - error(other, own, generator)).clamp(min=0)
            cosine.step()

    compiled.swap(name)
    return take_steps(compiled, optimizer, compute_losses(), "gates", given.steps)


def read_gates(adapter: Adapter) -> dict[str, Tensor]:
    """Return the gates of a fused adapter under the keys of the authors' merger, for ``from_loras(gates=)``."""
    names = {name: ".".join(name.rsplit("_", 1)) for name in _NORMS}
    return {
        f"model_dict.{path.replace('.', '___')}.{names.get(key, key)}": tensor.detach().clone()
        for path, own in adapter.tensors.items()
        for key, tensor in own.items()
        if not key.startswith("lora_")
    }
