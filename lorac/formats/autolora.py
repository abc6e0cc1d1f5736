"""The gates of AutoLoRA's merger: a file of them is told by name, for without its LoRAs it is no adapter.

Source: the authors' repository; keys are ``model_dict.<path of a layer, ___ for its dots>.weight_lora`` and so on.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lorac.errors import FormatError
from lorac.formats._files import read_header
from lorac.formats._format import Format
from lorac.variants.adapter import Adapter

_BEGINS, _ENDS = "model_dict.", ".weight_lora"


def _recognises(path: Path) -> bool:
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    try:
        names = read_header(path).tensors
    except FormatError:
        return False
    return any(name.startswith(_BEGINS) and name.endswith(_ENDS) for name in names)


def _load(path: Path, model: nn.Module | None, name: str | None) -> Adapter:
    raise FormatError(
        f"'{path}' holds the gates of AutoLoRA's merger, and the LoRAs that they fuse lie elsewhere",
        next_step="load these, and give them to lorac.AutoLoRA.from_loras with gates=, this file's tensors by name",
        code="unsupported_field",
    )


FORMAT = Format(
    name="autolora",
    looks_for=f"a file with tensors {_BEGINS}<layer>{_ENDS}",
    recognises=_recognises,
    load=_load,
)
