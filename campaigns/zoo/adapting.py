"""The adapter of a model of the zoo, written by PEFT away from its init, and PEFT's own model as what is right."""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorac.testing.parity import CONTRIBUTION, FLOAT32, contribution
from tests.peft_files import load_peft, quiet, wrap

RANK, ALPHA, AIM = 4, 6, 0.2
MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
MAMBA_LEAVES = ("conv1d", "out_proj")
"""Layers of those that PEFT refuses to adapt: their fused kernels would pass the adapter by."""
Outputs = dict[str, Tensor]


class NothingMoves(Exception):
    """No strength of the adapter moves any output by a share that decides something."""


class Wavers(Exception):
    """Rounding moves what PEFT answers by a share of the adapter's that decides nothing any more."""


class LosesTensors(Exception):
    """PEFT does not load all that it saved, and says nothing."""


class PassedBy(Exception):
    """The model calls the layer inside a wrapper of PEFT's directly, for instance from a Python list."""


LOST = 1e-2
"""An adapter that is loaded answers as the one that was saved, but for this share of what it moves: rounding moves a
hundredth of it at most."""


@dataclass(frozen=True)
class Adapted:
    """An adapter on disk.

    Attributes:
        folder: where PEFT wrote it.
        oracle: PEFT's model of that folder.
        outputs: the outputs that it moves by a share that decides something.
    """

    folder: Path
    oracle: nn.Module
    outputs: tuple[str, ...]


def named(answer: Any, path: str = "") -> Outputs:
    """Return the floating-point tensors of an output by name, in any nesting of fields, mappings and sequences."""
    if isinstance(answer, Tensor):
        return {path or "output": answer.detach()} if answer.is_floating_point() else {}
    if isinstance(answer, Mapping):
        pairs = list(answer.items())
    elif isinstance(answer, list | tuple):
        pairs = list(enumerate(answer))
    else:
        pairs = list(vars(answer).items()) if hasattr(answer, "__dataclass_fields__") else []
    found: Outputs = {}
    for key, value in pairs:
        found |= named(value, f"{path}.{key}" if path else str(key))
    return found


@torch.no_grad()
def answer(model: Any, call: Mapping[str, Any], **settings: Any) -> Outputs:
    """Call a model, PEFT's or lorac's; return its outputs by name."""
    return named(model(**call, **settings))


def joined(answers: Sequence[Outputs]) -> Outputs:
    """Several answers as one vector an output: a call by itself may move too little to decide anything."""
    names = set.intersection(*(set(found) for found in answers))
    return {name: torch.cat([found[name].flatten() for found in answers]) for name in answers[0] if name in names}


def lora(model: nn.Module, *, plain: bool = False, kernels: bool = True) -> Any:
    """PEFT's LoRA on every layer that it adapts.

    Args:
        model: the base.
        plain: leave out what is no ordinary layer: packed attention, and convolutions that are padded by name or by a
            mode, or grouped.
        kernels: convolutions too.
    """
    from peft import LoraConfig

    targets = [path for path, module in model.named_modules() if path and _adapts(module, plain, kernels)]
    packed = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    inside = {f"{path}.out_proj" for path in packed}  # PEFT adapts the attention whole, and never its output alone
    left_out = MAMBA_LEAVES if getattr(getattr(model, "config", None), "model_type", "") in MAMBA else ()
    fused = {path for path in targets if path.rpartition(".")[2] in left_out}
    return LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=sorted(set(targets) - inside - fused))


def _adapts(module: nn.Module, plain: bool, kernels: bool) -> bool:
    """Whether PEFT's LoRA adapts a layer rightly: it knows no dilation, and groups only where they divide the rank."""
    if isinstance(module, nn.MultiheadAttention):
        return not plain and module._qkv_same_embed_dim
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        ordinary = not isinstance(module.padding, str) and module.padding_mode == "zeros" and module.groups == 1
        fits = RANK % module.groups == 0 and set(module.dilation) == {1}
        return kernels and fits and (ordinary or not plain)
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def written(model: nn.Module, config: Any, folder: Path, calls: Sequence[Mapping[str, Any]], seed: int) -> Adapted:
    """Have PEFT write an adapter that moves the outputs of some calls, as their geometric mean, by a fifth.

    Raises:
        NothingMoves: no strength does.
        LosesTensors: what PEFT loads of the file answers otherwise.
        PassedBy: some of what PEFT adapts is never called.
        Wavers: what moves is not steady enough to be compared.
    """
    base = {name: value for name, value in joined([answer(model, call) for call in calls]).items() if bool(value.any())}
    wrapped = wrap(model, config, seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    # PEFT trains AdaLoRA's ranknum, a scale's denominator, by mistake, and does not save it.
    trained = [p for name, p in wrapped.named_parameters() if p.requires_grad and "ranknum" not in name]
    moves = [(p, p.detach().clone(), torch.randn(p.shape, generator=generator) * p.shape[-1] ** -0.5) for p in trained]

    def shares(strength: float) -> dict[str, float]:
        for parameter, start, noise in moves:
            parameter.data.copy_(start + strength * noise)
        return contribution(joined([answer(wrapped, call) for call in calls]), base, list(base))

    strength = _strength(shares)
    shares(strength)
    with quiet():
        wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    saved, oracle = joined([answer(wrapped, call) for call in calls]), load_peft(model, folder)
    shares_lost = _shares(joined([answer(oracle, call) for call in calls]), saved, base)
    lost = {name: share for name, share in shares_lost.items() if LOST < share < math.inf}
    if lost:
        raise LosesTensors(f"loaded, PEFT's outputs are off by {lost} of what the saved adapter moves")
    if passed_by := _find_passed_by(oracle, calls[0]):
        raise PassedBy(f"the model calls '{passed_by[0]}' without PEFT's wrapper, and {len(passed_by) - 1} more")
    if any(getattr(module, "padding_mode", "zeros") != "zeros" for module in model.modules()):
        oracle.merge_adapter()  # unmerged, PEFT pads what it runs beside such a layer with zeros
    found = contribution(joined([answer(oracle, call) for call in calls]), base, list(base))
    low, high = CONTRIBUTION
    outputs = tuple(name for name, share in found.items() if low <= share <= high)
    if not outputs:
        raise NothingMoves(f"at strength {strength:.3g} the outputs move by {found}")
    wavering = _wavering(oracle, calls, base)
    steady = tuple(name for name in outputs if 2 * wavering[name] <= FLOAT32)
    if not steady:
        raise Wavers(f"where inputs are rounded once, PEFT's outputs move by {wavering} of what the adapter moves")
    return Adapted(folder, oracle, steady)


def _find_passed_by(oracle: nn.Module, call: Mapping[str, Any]) -> list[str]:
    """List the layers under a wrapper of PEFT's that are called more often than it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    counts, handles = Counter[nn.Module](), []
    wrapped = {n: (m, m.get_base_layer()) for n, m in oracle.named_modules() if isinstance(m, BaseTunerLayer)}
    for module in dict.fromkeys(itertools.chain.from_iterable(wrapped.values())):  # a layer of two wrappers once
        handles.append(module.register_forward_pre_hook(lambda module, _: counts.update([module])))
    answer(oracle, call)
    for handle in handles:
        handle.remove()
    return [name for name, (wrapper, layer) in wrapped.items() if counts[layer] > counts[wrapper]]


def _wavering(oracle: nn.Module, calls: Sequence[Mapping[str, Any]], base: Outputs) -> dict[str, float]:
    """By output, how far PEFT's own answers move where their inputs are rounded, as a share of what the adapter moves.

    Two programs that compute the same in float32 differ by as much each.
    """
    right, worst = joined([answer(oracle, call) for call in calls]), dict.fromkeys(base, 0.0)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        found = joined([answer(oracle, _rounded(call, generator)) for call in calls])
        worst = {name: max(worst[name], share) for name, share in _shares(found, right, base).items()}
    return worst


def _shares(found: Outputs, right: Outputs, base: Outputs) -> dict[str, float]:
    """Return the error of each output as a share of what an adapter moves in it; infinite where it moves nothing."""
    moved = {name: (right[name] - value).double().norm() for name, value in base.items()}
    return {
        name: float((found[name] - right[name]).double().norm() / move) if move else math.inf
        for name, move in moved.items()
    }


def _rounded(call: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
    """Return a call whose numbers are off in their last bit."""
    return {
        name: value * (1 + torch.finfo(value.dtype).eps / 2 * torch.randn(value.shape, generator=generator))
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }


def _strength(shares: Any) -> float:
    """Where what moves at all moves by ``AIM``."""
    low, high, strength = 0.0, 1e4, 0.2
    for _ in range(40):
        moved = [share for share in shares(strength).values() if share > 0]
        found = statistics.geometric_mean(moved) if moved else 0.0
        if abs(found - AIM) <= 0.2 * AIM:
            break
        low, high = (strength, high) if found < AIM else (low, strength)
        step = 0.1 if math.isnan(found) else (AIM / max(found, 1e-3 * AIM)) ** (2 / 3)
        strength = strength * step if low < strength * step < high else (low + high) / 2
    return strength


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Everything that compiling must leave as it was, but for the bits of the host's weights."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, id(t), t.dtype, tuple(t.shape), t.requires_grad) for name, t in tensors],
        [(n, type(m), m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()],
        str(getattr(model, "config", "")),
        torch.get_rng_state().tolist(),
    )


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every tensor of a model."""
    return {name: copy.deepcopy(value.detach()) for name, value in model.state_dict().items()}
