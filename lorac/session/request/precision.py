"""The dtype of a model, the requested dtype, and the dtype in which the target computes."""

import copy
import functools
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorac.errors import OptionError, Unavailable, not_one_of, warn
from lorac.frontend.components import list_components
from lorac.frontend.host import Host
from lorac.frontend.parametrized_weights import materialize_weights
from lorac.frontend.quantised_weights import dequantise_weights
from lorac.ir.calls.call import map_inputs
from lorac.ir.sites.site import cast_floating
from lorac.ir.traces.modes import FunctionMode
from lorac.target.dialect import AnyDialect

_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_FLOATING_DTYPES = {name: dtype for name, dtype in _DTYPES.items() if dtype.is_floating_point and dtype.itemsize > 1}
_USUAL = ("float32", "float64", "bfloat16", "float16")


@dataclass(frozen=True)
class Precision:
    """The casts of a model and its inputs.

    Attributes:
        cast: the dtype to which the model was cast; None: no cast.
        lost: (dtype of the model or of the request, dtype of the target), for dtypes that the target lacks.
        inputs: dtype of the original model -> dtype of the compiled model, if another dtype was requested.
    """

    cast: torch.dtype | None = None
    lost: tuple[tuple[torch.dtype, torch.dtype], ...] = ()
    inputs: Mapping[torch.dtype, torch.dtype] = field(default_factory=dict)

    def fit(self, inputs: object) -> object:
        """Return example inputs with every floating-point tensor cast as the model is."""
        dtype = self.cast
        if dtype is None:
            return inputs
        return map_inputs(lambda value: cast_floating(value, dtype) if isinstance(value, Tensor) else value, inputs)

    def warn(self, target: str) -> None:
        """Warn if the target computes in another dtype than the requested one."""
        if not self.lost:
            return
        lacking, computed = ", ".join(_dtype_name(before) for before, _ in self.lost), _dtype_name(self.lost[0][1])
        warn(
            f"{target} has no kernels for {lacking}: it computes in {computed}, and its outputs are in {computed}",
            next_step=f"give dtype='{computed}' if you want that",
        )


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return a dtype that is given as a dtype or by its name.

    Raises:
        OptionError: it is not a floating-point dtype that a model can have.
    """
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in _FLOATING_DTYPES.values()):
        return dtype
    name = str(dtype).removeprefix("torch.")
    if "int" in name:
        step = "give a dtype of floats; weights='int8' quantises a program for ONNX Runtime or OpenVINO"
        raise OptionError(f"dtype= cannot be '{name}'", next_step=step)
    if name not in _FLOATING_DTYPES:
        raise not_one_of("dtype= cannot be", name, _USUAL)
    return _FLOATING_DTYPES[name]


def prepare_model(
    model: nn.Module, dialect: AnyDialect, dtype: torch.dtype | None, device: torch.device | None
) -> tuple[nn.Module, Precision]:
    """Return the model as a target computes it: itself, or a copy with other weights, of another dtype or device.

    Args:
        model: left as it was.
        dtype: the requested dtype; None: the model's own.
        device: the device of the copy; None: the model's own.
    """
    model = materialize_weights(model)
    if dialect.emits:  # an emitted program cannot call the kernels of quantisation libraries
        model = dequantise_weights(model)
    tensors = itertools.chain(model.parameters(), model.buffers())
    own = sorted({tensor.dtype for tensor in tensors if tensor.is_floating_point()}, key=str)
    lacking = [needed for needed in (own if dtype is None else [dtype]) if needed not in dialect.dtypes]
    cast = dialect.dtypes[0] if lacking else dtype
    inputs = {} if dtype is None or cast is None else {before: cast for before in own if before != cast}
    precision = Precision(cast, tuple((needed, dialect.dtypes[0]) for needed in lacking), inputs)
    precision.warn(dialect.name)
    if device is None and (cast is None or own == [cast]):
        return model, precision
    copied = Host.of(model).copy().model if device is None and dtype is None else copy.deepcopy(model)
    copied = copied.to(device=device, dtype=cast)
    for component in list_components(copied).values() if lacking else ():
        redirect_casts(component, dict(precision.lost))
    return copied, precision


def find_widened(given: nn.Module, prepared: nn.Module) -> dict[str, torch.dtype]:
    """Return name -> dtype of the parameters of a given model that ``prepare_model`` cast to a wider dtype."""
    own = {} if given is prepared else dict(prepared.named_parameters(remove_duplicate=False))
    return {
        name: before.dtype
        for name, before in given.named_parameters(remove_duplicate=False)
        if name in own and torch.promote_types(before.dtype, own[name].dtype) == own[name].dtype != before.dtype
    }


def check_stored_dtypes(dialect: AnyDialect, dtypes: Iterable[torch.dtype], folder: str) -> None:
    """Raise ``Unavailable`` if a target cannot compute in a dtype of a stored program, which cannot be cast."""
    for dtype in dtypes:
        if dtype not in dialect.dtypes:
            raise Unavailable(
                f"'{folder}' holds a program in {_dtype_name(dtype)}, and {dialect.name} has no kernels for that",
                next_step=f"compile from the model, or save it with dtype='{_dtype_name(dialect.dtypes[0])}'",
            )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_METHODS = {Tensor.bfloat16: torch.bfloat16, Tensor.half: torch.float16, Tensor.double: torch.float64}
"""Methods of tensors that cast -> their dtypes."""


def redirect_casts(model: nn.Module, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
    """Redirect the casts in a model's forward to other dtypes, by a subclass of its class.

    Args:
        model: the copy, whose weights are cast already.
        dtypes: dtype that a target lacks -> the dtype that it computes in.
    """
    cls = type(model)

    @functools.wraps(cls.forward)
    def forward(self: nn.Module, *args: object, **kwargs: object) -> object:
        with _RedirectedCasts(dtypes):
            return cls.forward(self, *args, **kwargs)

    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    model.__class__ = type(cls.__name__, (cls,), {**names, "forward": forward})


class _RedirectedCasts(FunctionMode):
    """A mode that replaces dtypes among the arguments of torch's functions."""

    def __init__(self, dtypes: Mapping[torch.dtype, torch.dtype]) -> None:
        super().__init__()
        self._dtypes = dtypes

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        target = self._dtypes.get(_METHODS[function]) if function in _METHODS else None
        if target is not None:
            return args[0].to(target)
        return function(*map(self._replace, args), **{name: self._replace(v) for name, v in kwargs.items()})

    def _replace(self, value: object) -> object:
        return self._dtypes.get(value, value) if isinstance(value, torch.dtype) else value
