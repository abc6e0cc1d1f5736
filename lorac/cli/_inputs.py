"""Inputs of a model in an .npz, .json or .safetensors file, one entry per input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from lorac.errors import LoracError, OptionError, nearest_name
from lorac.storage.open_file import OpenFile
from lorac.storage.strict_json import parse_object, read_json_text

if TYPE_CHECKING:
    import numpy as np
    import torch

Array: TypeAlias = "np.ndarray | torch.Tensor"
INPUTS_HELP = "An .npz, .json or .safetensors file: one array per input of the model."
InputsOption = Annotated[Path | None, typer.Option("--inputs", "-i", help=INPUTS_HELP)]
_SUFFIXES = (".npz", ".json", ".safetensors")
_FILE_HELP = 'numpy.savez(path, name=array, ...) writes one; in JSON it is {"name": [[1, 2], [3, 4]]}'


def read_inputs(path: Path) -> dict[str, Array]:
    """Read arrays or tensors by the names of inputs.

    Raises:
        OptionError: the file has another format, or is damaged.
    """
    if path.suffix not in _SUFFIXES:
        raise OptionError(
            f"'{path}' is not a file of inputs", nearest=nearest_name(path.suffix, _SUFFIXES), next_step=INPUTS_HELP
        )
    import numpy as np
    import torch
    from safetensors.torch import load_file

    try:
        with OpenFile(path, follows_links=True).named() as opened:
            if path.suffix == ".npz":
                with np.load(opened, allow_pickle=False) as archive:
                    return dict(archive)
            if path.suffix == ".safetensors":
                return dict(load_file(opened))
            text = read_json_text(opened)
        found = parse_object(text, lambda reason: OptionError(f"'{path}' {reason}", next_step=_FILE_HELP))
        # As in torch, nested lists of whole numbers become int64, and others float32.
        return {name: torch.tensor(value) for name, value in found.items()}
    except LoracError:
        raise
    except Exception as error:  # a damaged file may make a reader raise anything
        raise OptionError(f"'{path}' cannot be read: {error}", next_step=_FILE_HELP) from error


def to_arrays(outputs: object) -> dict[str, np.ndarray]:
    """Return a model's outputs as NumPy arrays, by name or else by number."""
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(values)
    import numpy as np
    import torch

    from lorac.ir.calls.call import to_numpy

    return {
        str(n): to_numpy(v) if isinstance(v, torch.Tensor) else np.asarray(v) for n, v in items if hasattr(v, "shape")
    }


def format_inputs(inputs: Mapping[str, Array]) -> str:
    """Return the dtypes and shapes of inputs, for a message."""
    return ", ".join(f"{name} {str(a.dtype).removeprefix('torch.')}{list(a.shape)}" for name, a in inputs.items())
