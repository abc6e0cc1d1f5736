"""Sound files of every kind, tiny, for campaigns to damage: adapters of all methods and artifacts of all targets."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

import lorac
from lorac.errors import LoracError
from lorac.testing.hosts import HOSTS, Host

INDEX = "sound.json"
HOST_NAMES = ("divisible", "conv", "embedding", "block", "linear")
SIZES = {
    "r": 2, "block_size": 3, "vector_length": 3, "num_vectors": 4, "n_frequency": 5, "transform_rank": 2, "mini_r": 1,
}  # fmt: skip
"""Hyper-parameters that suit hosts of a dozen features."""
OWN: Mapping[str, Mapping[str, object]] = {
    "chain": {"parts": (lorac.LoRA(r=2), lorac.BAT(r=2))},
    "oft": {"block_size": 3},
}
"""Those of methods that take not all of them together."""
QUICK = ("lora", "shira", "vera", "chain")
ARTEFACTS = (
    ("eager", "live"), ("onnxruntime", "fused"), ("onnxruntime", "live"), ("eager", "fused"), ("onnxruntime", "baked"),
)  # fmt: skip


@dataclass(frozen=True)
class Sound:
    """One file, or folder, that loads.

    Attributes:
        kind: "native", "peft", "bin" or "artifact".
        what: its method, or its target and mode.
        place: where it lies, below the folder of all.
        host: the name of the host it is for.
    """

    kind: str
    what: str
    place: str
    host: str


class Two(nn.Module):
    """What artifacts are compiled from; its weights are large enough to lie beside an ONNX model."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y (…, 24) from x (…, 24)."""
        return self.down(torch.tanh(self.up(x)))


def model(host: str) -> nn.Module:
    """Return a host by name, in float32."""
    return HOSTS[host].model(torch.float32)


def write(folder: Path, *, quick: bool = False, artifacts: bool = True) -> None:
    """Write everything, or in a hurry what a few methods and targets give, and a list of it."""
    methods, targets = (QUICK, ARTEFACTS[:2]) if quick else (lorac.variants(), ARTEFACTS)
    found = [*_adapters(folder, methods), *_artifacts(folder, targets if artifacts else ())]
    (folder / INDEX).write_text(json.dumps([dataclasses.asdict(sound) for sound in found]))


def read(folder: Path) -> list[Sound]:
    """Return the list of what ``write`` wrote."""
    return [Sound(**entry) for entry in json.loads((folder / INDEX).read_text())]


def _adapters(folder: Path, keys: Iterable[str]) -> Iterator[Sound]:
    for key in keys:
        kind = lorac.variants()[key]
        variant, host = _configured(key, kind)
        here = model(host.name)
        adapter = lorac.compile(here, {key: variant}).adapters[key]
        lorac.save_adapter(adapter, folder / "native" / f"{key}.safetensors", "native", here)
        yield Sound("native", key, f"native/{key}.safetensors", host.name)
        try:
            lorac.save_adapter(adapter, folder / "peft" / key, "peft", here)
        except LoracError:  # PEFT has no such type, or not for this layer
            continue
        yield Sound("peft", key, f"peft/{key}", host.name)
        _pickled(folder / "peft" / key, folder / "bin" / key)
        yield Sound("bin", key, f"bin/{key}", host.name)


def _configured(key: str, kind: type) -> tuple[lorac.WeightVariant | lorac.BranchVariant, Host]:
    """Return a variant, and the first host that it adapts."""
    own = {field.name: SIZES[field.name] for field in dataclasses.fields(kind) if field.name in SIZES}
    own = OWN.get(key, own)
    for fields, name in itertools.product((own, {}), HOST_NAMES):
        variant = kind(**{**fields, "targets": (HOSTS[name].path,)})
        if HOSTS[name].admits(variant):
            return variant, HOSTS[name]
    raise AssertionError(f"no host for {key}")


def _pickled(source: Path, target: Path) -> None:
    """Return the same PEFT folder with its tensors in a .bin file."""
    target.mkdir(parents=True)
    (target / "adapter_config.json").write_bytes((source / "adapter_config.json").read_bytes())
    torch.save(load_file(source / "adapter_model.safetensors"), target / "adapter_model.bin")


def _artifacts(folder: Path, wanted: Iterable[tuple[str, str]]) -> Iterator[Sound]:
    torch.manual_seed(0)
    host, x = Two().eval(), torch.randn(3, 24)
    adapters = {"a": lorac.LoRA(r=2, targets=["up", "down"]), "b": lorac.DoRA(r=1, targets=["up"])}
    for target, mode in wanted:
        compiled = lorac.compile(host, adapters, target, {"x": x}, mode=mode, active={"a": 0.7})
        compiled.save(folder / "artifacts" / f"{target}-{mode}")
        yield Sound("artifact", f"{target} {mode}", f"artifacts/{target}-{mode}", "")
