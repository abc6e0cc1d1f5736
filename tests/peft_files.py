"""PEFT checkpoints made by PEFT itself, away from their initialisation, with PEFT's model as their oracle."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.machinery
import importlib.util
import json
import statistics
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from packaging.version import Version
from peft import PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils.import_utils import is_sklearn_available

from tests import parity
from tests.oracles.adamss import KMeans
from tests.zoo import ZOO

IS_OLDER = Version(peft.__version__) < Version("0.21")
of_peft_0_21 = pytest.mark.skipif(IS_OLDER, reason="it states what PEFT 0.21 does")
"""A mark of tests that older releases of PEFT, which lorac reads as well, fail for reasons of their own."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None
is_sklearn_available()  # it is remembered, so that no stand-in changes the answer
NOISE = (  # what PEFT says of targets and settings that the tests choose on purpose
    "LoRA adapter added to ConvNd layer with groups > 1",
    "fan_in_fan_out is set to ",
    "`lora_bias=True` was passed but the targeted layer of type .* has no bias",
    "(PiSSA|OLoRA) changes the base weights of the model",  # it is converted, which is what the warning asks for
    "lora with eva initialization used with low_cpu_mem_usage=False",
    "Model has `tie_word_embeddings=True`",
    "Model with `tie_word_embeddings=True`",
    "Setting `save_embedding_layers` to `True`",
    "Could not find a config file in ",
    r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape",  # it takes lora_bias for a shard
    "The following rank_pattern keys did not match",  # of every AdaLoRA that it pruned; it applies the pattern
    "The symmetric initialization can NOT be performed",  # HRA of odd r
    "Detected that the base layer has no bias term",  # BEFT, which PEFT then cannot merge
    "Specified to not (save projection tensors P|load tinylora_P)",
    "Unsupported layer type",  # LN tuning asks every norm for its features
    "Invalid `(r|oft_block_size)`",  # OFT takes the next that divides
    "save_precomputed_indices=False",
    "Specified to not save (p?vera|basis)_A and (p?vera|basis)_B",
    "Specified to not load p?vera_A and p?vera_B",
    # lorac writes A and B of RandLoRA once; PEFT reads them and misses the copies that it makes at every site.
    "Found missing adapter keys while loading the checkpoint. .*randlora_A",
)
SMALL: Mapping[str, Mapping[str, Any]] = {
    "ADAMSS": {"r": 4, "num_subspaces": 3, "subspace_rank": 2},
    "ADALORA": {"init_r": 3, "target_r": 2, "lora_alpha": 5, "total_step": 10},
    "BEFT": {},
    "BOFT": {"boft_block_size": 2},
    "C3A": {"block_size": 2, "init_weights": True},
    "DELORA": {"r": 2},
    # From zeros: what PEFT draws at first moves the output far more than decides anything.
    "DEFT": {"r": 2, "decomposition_method": "qr"},
    "FOURIERFT": {"n_frequency": 9, "scaling": 30, "init_weights": True},
    "GLORA": {"r": 2},
    "GRALORA": {"r": 2, "alpha": 3},
    "HIRA": {"r": 2},
    "HRA": {"r": 2},
    "IA3": {"feedforward_modules": ["down"]},
    "LILY": {"r": 2},
    "LN_TUNING": {},
    "LOHA": {"r": 2, "alpha": 3},
    "LOKR": {"r": 2, "alpha": 3, "decompose_both": True, "decompose_factor": 2},
    "LORA": {"r": 2},
    "MISS": {"r": 2},
    "OFT": {"oft_block_size": 2},
    "OSF": {"effective_rank": 2},
    "PVERA": {"r": 2},
    "PEANUT": {"r": 2, "depth": 1},
    "PSOFT": {"r": 2, "psoft_alpha": 3},
    "FROD": {"sparse_rate": 0.1, "progressbar": False},
    "RANDLORA": {"r": 2, "randlora_alpha": 4},
    "ROAD": {"group_size": 2},
    "SHIRA": {"r": 2},
    "SUPERTUNING": {"sparsity": 0.9},
    "TINYLORA": {"r": 2, "u": 5},
    "UNILORA": {"r": 2, "theta_d_length": 11},
    "VBLORA": {"r": 2, "num_vectors": 6, "vector_length": 2},
    "VERA": {"r": 2},
    "WAVEFT": {"n_frequency": 9},
}
"""Settings that make an adapter of plain_mlp's `up` and `down` small, by PEFT type."""


def save_small(folder: Path, kind: str, model: str = "plain_mlp", **settings: Any) -> Path:
    """Save a checkpoint of a PEFT type for a model of the zoo, in float32: by `settings`, then `SMALL`, then PEFT."""
    skip_absent(*({kind} - PEFT_TYPE_TO_CONFIG_MAPPING.keys()))
    made, fields = PEFT_TYPE_TO_CONFIG_MAPPING[kind], {"target_modules": ["up", "down"], **SMALL[kind], **settings}
    skip_absent(*sorted(fields.keys() - {field.name for field in dataclasses.fields(made)}))
    if kind == "ADAMSS" and Version(peft.__version__) < Version("0.20"):
        pytest.skip("PEFT 0.19 groups the rows of a weight in another way")
    with quiet():
        config = made(**fields)
    entry = ZOO[model]
    make_peft(entry.model(), folder, config, inputs=entry.inputs(), outputs=entry.outputs)
    return folder


def make_config(name: str, **fields: Any) -> Any:
    """Return a configuration of a class of PEFT's; None of one that the installed release does not have yet."""
    found = getattr(peft, name, None)
    return None if found is None else found(**fields)


def skip_absent(*names: str) -> None:
    """Skip a test of types or fields that an older release of PEFT does not have yet, if there are any."""
    if names and IS_OLDER:
        pytest.skip(f"PEFT {peft.__version__} has no {' and '.join(names)}")


def configure(folder: Path, **changes: Any) -> None:
    """Change fields of a checkpoint's configuration."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, tensors: Mapping[str, Tensor | None]) -> None:
    """Replace or add tensors of a checkpoint, or remove those given as None; names lack the `base_model.` in front."""
    stored = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        stored.pop(f"base_model.{name}", None)
        if tensor is not None:
            stored[f"base_model.{name}"] = tensor
    save_file(stored, folder / WEIGHTS)


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
        inputs: The inputs that the contribution is measured on.
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

    wrapped = wrap(model, config, seed)
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
    """Return PEFT's model of a folder, on a copy of `model`, in eval mode."""
    # PeftModel takes any module; its annotation names transformers' only.
    copied: Any = copy.deepcopy(model)
    with quiet():
        return PeftModel.from_pretrained(copied, str(folder)).eval()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence PEFT's remarks on what the tests choose on purpose; build no extension of BOFT, and write no card.

    Where PEFT cannot build that CUDA extension, it tries anew at every layer, and warns of it each time. A card takes
    longer than the checkpoint. Where scikit-learn is not installed, ADAMSS gets its k-means from the tests.
    """
    card = mock.patch.object(PeftModel, "create_or_update_model_card", _write_empty_card)
    cuda = mock.patch("peft.tuners.boft.layer.get_fbd_cuda", lambda: None)
    with warnings.catch_warnings(), cuda, card, _k_means():
        for message in NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


@contextlib.contextmanager
def _k_means() -> Iterator[None]:
    """Stand in for scikit-learn's k-means where it is not installed."""
    names = () if _HAS_SKLEARN or "sklearn" in sys.modules else ("sklearn", "sklearn.cluster")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
        sys.modules[name].KMeans = KMeans  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def _write_empty_card(peft_model: PeftModel, folder: str) -> None:
    (Path(folder) / "README.md").touch()


def wrap(model: nn.Module, config: PeftConfig, seed: int = 0) -> PeftModel:
    """Return PEFT's fresh model of a configuration, on a copy of `model`."""
    copied: Any = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        return get_peft_model(copied, copy.deepcopy(config))  # type: ignore[return-value]


def _moves(wrapped: PeftModel, seed: int) -> list[tuple[nn.Parameter, Callable[[float], Tensor]]]:
    """Return every trained tensor as a function of one strength: PEFT's initialisation at 0 and far from it at 1."""
    generator = torch.Generator().manual_seed(seed + 1)
    # PEFT 0.21 trains AdaLoRA's ranknum, a scale's denominator, by mistake, and does not save it.
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad and p.numel() and "ranknum" not in n]
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

    low, high, strength = 0.0, 1e4, 0.2
    for _ in range(60):
        found = at(strength)
        if abs(found - aim) <= 0.1 * aim:
            return
        low, high = (strength, high) if found < aim else (low, strength)
        # Contributions grow as the strength or, where two tensors are multiplied, as its square.
        step = (aim / max(found, 1e-3 * aim)) ** (2 / 3)
        strength = strength * step if low < strength * step < high else (low + high) / 2
    raise AssertionError(f"found no strength that contributes {aim:.0%}: {low} does less, {high} more")


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
