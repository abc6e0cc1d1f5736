"""Precision: the dtype a model has or is asked in, the one its target computes in, and inputs that follow."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lorac.errors import OptionError, Unavailable, nearest_name, warn
from lorac.frontend.copying import copy_structure
from lorac.target.dialect import AnyDialect

DtypePairs = tuple[tuple[torch.dtype, torch.dtype], ...]
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_FLOATING_DTYPES = {name: dtype for name, dtype in _DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}


@dataclass(frozen=True)
class Precision:
    """What became of a model's dtype.

    Attributes:
        cast: the dtype that the model was brought to, if it was to be brought to any.
        lost: (dtype that the model has or was asked in, dtype that the target computes in), where it lacks the first.
        inputs: dtype of the model as it was given -> the dtype it has instead, because another one was asked for.
    """

    cast: torch.dtype | None = None
    lost: DtypePairs = ()
    inputs: Mapping[torch.dtype, torch.dtype] = field(default_factory=dict)

    def fit(self, inputs: object) -> object:
        """Example inputs cast as the model is: what is floating-point, in any nesting."""
        return inputs if self.cast is None else cast_floating(inputs, self.cast)

    def warn(self, target: str) -> None:
        """Warn where the target computes in another dtype."""
        if not self.lost:
            return
        lacking, computed = ", ".join(_dtype_name(before) for before, _ in self.lost), _dtype_name(self.lost[0][1])
        warn(
            f"{target} has no kernels for {lacking}: it computes in {computed}, and answers so",
            next_step=f"dtype='{computed}' asks for that; compiled.explain() says it too",
        )


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype, or the one of that name.

    Raises:
        OptionError: it is no floating-point dtype that a model can have.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in _FLOATING_DTYPES.values()):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if name not in _FLOATING_DTYPES:
        usual = ("float32", "float64", "bfloat16", "float16")
        raise OptionError(
            f"dtype= takes no '{name}'",
            nearest=nearest_name(name, usual),
            next_step=f"it takes {', '.join(usual)}, as text or as torch has them",
        )
    return _FLOATING_DTYPES[name]


def cast_model(
    model: nn.Module, dialect: AnyDialect, dtype: torch.dtype | None, device: str | torch.device | None
) -> tuple[nn.Module, Precision]:
    """A model as a target computes it: itself, or a copy in another dtype or on another device.

    Args:
        model: left as it was.
        dialect: the target's.
        dtype: the dtype asked for; None: the model's own.
        device: the device asked for; None: the model's own.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    own = sorted({tensor.dtype for tensor in tensors if tensor.is_floating_point()}, key=str)
    lacking = [wanted for wanted in (own if dtype is None else [dtype]) if wanted not in dialect.dtypes]
    computed = dialect.dtypes[0] if lacking else dtype
    lost = tuple((wanted, dialect.dtypes[0]) for wanted in lacking)
    inputs = {} if dtype is None or computed is None else {had: computed for had in own if had != computed}
    precision = Precision(computed, lost, inputs)
    if device is None and (computed is None or own == [computed]):
        return model, precision
    if device is None and dtype is None:
        return copy_structure(model).to(computed), precision
    return copy.deepcopy(model).to(device=device, dtype=computed), precision


def check_stored_dtypes(dialect: AnyDialect, dtypes: Iterable[torch.dtype], stored: str) -> None:
    """Refuse a stored program, which cannot be cast, in a dtype that the target does not compute in.

    Raises:
        Unavailable: naming the dtype.
    """
    for dtype in dtypes:
        if dtype not in dialect.dtypes:
            raise Unavailable(
                f"'{stored}' holds a program in {_dtype_name(dtype)}, and {dialect.name} has no kernels for that",
                next_step=f"compile from the model, or save it with dtype='{_dtype_name(dialect.dtypes[0])}'",
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cast_floating(tree: object, to: torch.dtype) -> object:
    """The same inputs with their floating-point tensors in another dtype; any mapping by name becomes a dict."""
    if isinstance(tree, Mapping):
        return {name: cast_floating(value, to) for name, value in tree.items()}

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(to) if tensor.is_floating_point() else tensor

    return pytree.tree_map_only(torch.Tensor, cast, tree)
