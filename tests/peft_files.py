"""PEFT checkpoints made by PEFT itself, away from init, and PEFT's own model as their oracle."""

from __future__ import annotations

import contextlib
import copy
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests import parity

WEIGHTS = "adapter_model.safetensors"
NOISE = (  # what PEFT says of targets that the tests choose on purpose
    "LoRA adapter added to ConvNd layer with groups > 1",
    "fan_in_fan_out is set to ",
    "Model has `tie_word_embeddings=True`",
    "Model with `tie_word_embeddings=True`",
    "Setting `save_embedding_layers` to `True`",
    "Could not find a config file in ",
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # it takes lora_bias for a shard
)


def make_peft(
    model: nn.Module,
    folder: Path | str,
    config: PeftConfig,
    *,
    inputs: Mapping[str, Tensor],
    seed: int = 0,
    contribution: float = 0.2,
    dtype: torch.dtype | None = None,
    outputs: Sequence[str] | None = None,
    save_embedding_layers: bool | str = "auto",
) -> PeftModel:
    """Save a PEFT checkpoint of `config` for `model` into `folder`; return PEFT's model of it.

    The model returned is read back from the file, so it is what PEFT makes of that file, on a copy
    of `model` and in eval mode. `model` itself is left alone.

    Args:
        model: The base.
        folder: Where adapter_config.json and adapter_model.safetensors go.
        config: The adapter's PEFT config. It is not changed.
        inputs: What the contribution is measured on.
        seed: Every seed gives other tensors.
        contribution: ‖y_ref − y_base‖ / ‖y_base‖ aimed at as the geometric mean of the outputs;
            each of them is asserted to lie within 5 to 50 %.
        dtype: The file's dtype (its floating-point tensors), the model's if not given.
        outputs: The names of the outputs that count, all if not given.
        save_embedding_layers: As in PEFT's `save_pretrained`.
    """
    folder = Path(folder)
    base = _call(model, inputs)

    def shares(peft_model: PeftModel) -> dict[str, float]:
        return parity.contribution(_call(peft_model, inputs), base, outputs)

    wrapped = _wrap(model, config, seed)
    _search(wrapped, seed, lambda: statistics.geometric_mean(shares(wrapped).values()), contribution)
    with quiet():
        wrapped.save_pretrained(str(folder), save_embedding_layers=save_embedding_layers)
    if dtype is not None:
        _cast(folder / WEIGHTS, dtype)

    oracle = load_peft(model, folder)
    low, high = parity.CONTRIBUTION
    found = shares(oracle)
    assert all(low <= share <= high for share in found.values()), f"contributions {found}"
    return oracle


def load_peft(model: nn.Module, folder: Path | str) -> PeftModel:
    """What PEFT itself makes of a folder, on a copy of `model`, in eval mode."""
    # PeftModel takes any module; its annotation names transformers' only.
    copied: Any = copy.deepcopy(model)
    with quiet():
        return PeftModel.from_pretrained(copied, str(folder)).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without PEFT's remarks on targets that the tests choose on purpose."""
    with warnings.catch_warnings():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def _wrap(model: nn.Module, config: PeftConfig, seed: int) -> PeftModel:
    copied: Any = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        return get_peft_model(copied, copy.deepcopy(config))  # type: ignore[return-value]


def _moves(wrapped: PeftModel, seed: int) -> list[tuple[nn.Parameter, Callable[[float], Tensor]]]:
    """Every trained tensor as a function of one strength, PEFT's init at 0 and far from it at 1."""
    generator = torch.Generator().manual_seed(seed + 1)
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained, "PEFT made nothing trainable"
    return [(p, _move(name, p, generator)) for name, p in trained]


def _move(name: str, parameter: nn.Parameter, generator: torch.Generator) -> Callable[[float], Tensor]:
    start = parameter.detach().clone()
    noise = torch.randn(start.shape, generator=generator, dtype=torch.float64).to(start.dtype)
    if "magnitude" in name:  # DoRA's m stays positive, and off the norm it starts at
        return lambda strength: start * torch.exp(0.1 * min(strength, 5.0) * noise.clamp(-2, 2))
    spread = float(start.double().std(correction=0))
    if spread == 0:  # a constant init: zeros, as lora_B, or ones, as (IA)3's vectors
        spread = 0.3 * float(start.double().abs().mean()) or start.shape[-1] ** -0.5
    return lambda strength: start + strength * spread * noise


def _search(wrapped: PeftModel, seed: int, share: Callable[[], float], aim: float) -> None:
    """Leave the model at a strength whose contribution is within a tenth of the aim."""
    moves = _moves(wrapped, seed)

    def at(strength: float) -> float:
        for parameter, move in moves:
            # In place, since PEFT ties an lm_head's factors to the embedding's as views of them.
            parameter.data.copy_(move(strength))
        return share()

    low, high = 0.0, 0.05
    while at(high) < aim:
        low, high = high, 2 * high
        assert high < 1e4, "the adapter hardly moves the output, whatever its strength"
    for _ in range(40):
        middle = (low + high) / 2
        found = at(middle)
        if abs(found - aim) <= 0.1 * aim:
            return
        low, high = (middle, high) if found < aim else (low, middle)
    raise AssertionError(f"found no strength that contributes {aim:.0%}")


def _cast(file: Path, dtype: torch.dtype) -> None:
    def cast(name: str, tensor: Tensor) -> Tensor:
        # PEFT loads a copy of a base weight over the base, and would round the base with it.
        keep = name.endswith("base_layer.weight") or not tensor.is_floating_point()
        return tensor if keep else tensor.to(dtype)

    tensors = {name: cast(name, tensor) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def _call(model: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    mode = model.training
    try:
        return model.eval()(**inputs)
    finally:
        model.train(mode)
