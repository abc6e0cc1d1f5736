"""Values that a call gives for the inputs of a program."""

from collections.abc import Mapping

import numpy as np
import torch

from lorac.errors import ChoiceError, short

ROW_NUMBERS = ("timestep",)
"""Arguments of diffusion models with one number per row; schedulers give one for all rows, as integers or floats."""


def spread_over_rows(given: Mapping[str, object], row_numbers: Mapping[str, str]) -> dict[str, object]:
    """Return the arguments of a call with numbers per row as float32, in the library of the other inputs.

    Args:
        given: the arguments by name.
        row_numbers: argument with one number per row -> an argument with as many rows.
    """
    spread = dict(given)
    for name, rows_of in row_numbers.items():
        shape = getattr(spread.get(rows_of), "shape", ())
        if name in spread and shape:
            numbers = torch.as_tensor(spread[name]).to(torch.float32)
            numbers = numbers.expand(shape[0]) if numbers.numel() == 1 and numbers.dim() <= 1 else numbers
            spread[name] = numbers.numpy(force=True) if isinstance(spread[rows_of], np.ndarray) else numbers
    return spread


def check_numbers(name: str, value: object) -> None:
    """Raise ``ChoiceError`` for text, and for sequences of anything but numbers."""
    try:
        reason = None if np.asarray(value).dtype.kind in "biuf" else short(value)
    except (TypeError, ValueError) as error:
        reason = str(error)
    if reason is not None:
        raise not_numbers_error(name, reason)


def not_numbers_error(name: str, reason: object) -> ChoiceError:
    """Return the error for an input that is not an array of numbers."""
    return ChoiceError(
        f"input '{name}' is not an array of numbers: {reason}",
        next_step="give tensors of torch or arrays of NumPy; tokenizers make them with return_tensors='pt'",
    )


def check_ids(name: str, value: object, count: int) -> None:
    """Raise ``ChoiceError`` for ids outside 0 to ``count`` - 1; values that are not integers are refused elsewhere."""
    ids = value.numpy(force=True) if isinstance(value, torch.Tensor) else np.asarray(value)
    if ids.dtype.kind not in "iu" or not ids.size:
        return
    # Read as unsigned, a negative number is huge: one maximum finds both kinds of wrong ids.
    if int(ids.view(f"u{ids.itemsize}").max()) >= count:
        wrong = min(int(ids.min()), 0) or int(ids.max())
        raise ChoiceError(
            f"input '{name}' holds the id {wrong}; its embedding has the ids 0 to {count - 1}",
            next_step="give ids of the model's own tokenizer, and mark padding in the mask",
        )
