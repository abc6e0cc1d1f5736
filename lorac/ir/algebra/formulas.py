"""Calls of a method's formula, whose errors name the method, the site and the line.

A formula is a pure function of torch ops. A call is *watched* when the arguments have no memory (traced, or fake
tensors): an op that writes into an argument or a view of an argument is refused before it runs, and so is a step that
reads the value of a tensor. So a formula never writes into a model or an adapter.
"""

import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

from lorac.errors import AdapterError, LoracError
from lorac.ir.traces.functions import find_written_tensors
from lorac.ir.traces.gate import tracing
from lorac.ir.traces.modes import DispatchMode
from lorac.source_lines import definition_line, innermost_user_line
from lorac.third_party_output import suppress_third_party_output

_FORMULA_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Exceptions that are the formula's fault on real numbers. Other exceptions pass through: they are control flow of the
callers, such as the end of a checkpoint's recomputation."""
_FORMULA_CONTRACT = "a formula is a pure function of torch ops that returns W' like W, or y' like y"
_ONCE_CONTRACT = "`once` returns a dictionary of tensors by name, which branches read as own:<name>"
_READS_VALUE = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Formula:
    """One formula of a method at one site, called as its function is.

    Attributes:
        function: a pure function of torch ops, to a tensor.
        site: the site's path.
    """

    function: Callable[..., object]
    method: str
    site: str

    def __call__(self, *args: object, like: Tensor, read: Mapping[str, Tensor] | None = None) -> Tensor:
        """Compute the formula's result.

        Args:
            *args: arguments of the function; every tensor of a ``Params`` counts as an argument.
            like: an argument with the shape that the result must have.
            read: further program values that the function may read, by name.

        Raises:
            AdapterError: the function raises, writes, needs the value of a tensor, or returns something else.
        """
        return self._check(self._run(args, read or {}, watched=isinstance(like, FakeTensor)), like)

    def several(self, *args: object, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Compute the result of a formula that returns tensors of any shape, by name.

        Args:
            *args, read: as for a call.

        Raises:
            AdapterError: as for a call.
        """
        watched = any(isinstance(tensor, FakeTensor) for tensor in self._named(args, read).values())
        result = self._run(args, read, watched=watched)
        if not isinstance(result, Mapping):
            raise self._error(f"returns {_describe_type(result)}, not tensors by name", _ONCE_CONTRACT)
        for name, tensor in result.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise self._error(f"returns {_describe_type(tensor)} as {name!r}, not a tensor", _ONCE_CONTRACT)
        return dict(result)

    def _run(self, args: Sequence[object], read: Mapping[str, Tensor], *, watched: bool) -> object:
        named = self._named(args, read) if watched else {}
        guard = _MutationGuard(named) if watched else nullcontext()
        sizes: list[object] = [size for tensor in named.values() for size in tensor.shape]
        varying = [size for size in sizes if isinstance(size, torch.SymInt) and not _is_constant(size)]
        try:
            with guard:
                result = self.function(*args)
            if any(_is_constant(size) for size in varying):
                raise _SizeFixed
            return result
        except (LoracError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not watched and not isinstance(error, _FORMULA_ERRORS):
                raise
            raise self._error(*_explain_error(error), error) from (
                None if isinstance(error, _ArgumentMutated | _SizeFixed) else error
            )

    def _named(self, args: Sequence[object], read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every tensor into which the formula must not write, by its name in the formula."""
        count = len(args)
        known = list(inspect.signature(self.function).parameters)[:count]
        names = [*known, *(f"argument {index}" for index in range(len(known), count))]
        found = {name: arg for name, arg in zip(names, args, strict=True) if isinstance(arg, Tensor)}
        for name, arg in zip(names, args, strict=True):
            if isinstance(arg, SimpleNamespace):
                found |= {f"{name}.{key}": value for key, value in vars(arg).items()}
        return found | {f"the value '{name}'": value for name, value in read.items()}

    def _check(self, result: object, like: Tensor) -> Tensor:
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        if not isinstance(result, Tensor):
            raise self._error(f"returns {_describe_type(result)}, not a tensor")
        pairs = zip(result.shape, like.shape, strict=False)
        if result.dim() != like.dim() or any(statically_known_true(a != b) for a, b in pairs):
            raise self._error(f"returns a tensor of shape {list(result.shape)}, not {list(like.shape)}")
        if not result.is_floating_point():
            raise self._error(f"returns a tensor of {result.dtype}, not of floating-point numbers")
        return result

    def _error(self, what: str, step: str = _FORMULA_CONTRACT, error: Exception | None = None) -> AdapterError:
        # The first frame of the traceback is the call of the formula.
        line = innermost_user_line(traceback.extract_tb(error.__traceback__)[1:]) if error is not None else None
        line = line or definition_line(self.function)
        message = f"the formula of {self.method} at '{self.site}' {what}"
        return AdapterError(message + (f"\n  in {line}" if line else ""), next_step=step, code="formula_failed")


def _describe_type(result: object) -> str:
    return "nothing" if result is None else f"a {type(result).__name__}"


def _explain_error(error: Exception) -> tuple[str, str]:
    """Return the formula's fault that caused an exception, and the next step."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    if isinstance(error, _ArgumentMutated):
        return f"writes into {error.name} ({error.op})", "compute a new tensor, as W * s for W.mul_(s)"
    if isinstance(error, _SizeFixed):
        return (
            "makes a number of a size that differs between calls, as of rows or tokens",
            "read sizes as x.shape[0], not len(x), and write torch ops for a loop over them",
        )
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException | GuardOnDataDependentSymNode):
        return "takes a step that depends on the values of tensors", "use torch.where or masks"
    reason = str(error).strip().partition("\n")[0]
    return f"raises {type(error).__name__}: {reason}", _FORMULA_CONTRACT


@contextmanager
def fake_execution() -> Iterator[Callable[[Tensor], Tensor]]:
    """Run the block on fake tensors; yield a function that makes a fake tensor with another tensor's layout."""
    with tracing(), suppress_third_party_output(), FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda like: torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)


class _ArgumentMutated(Exception):
    """An op is about to write into an argument of a formula."""

    def __init__(self, name: str, op: str) -> None:
        super().__init__(name)
        self.name, self.op = name, op


class _SizeFixed(Exception):
    """A formula has specialised to a symbolic size of an argument, so that its trace is valid for one size only."""


def _is_constant(size: torch.SymInt) -> bool:
    return size.node.maybe_as_int() is not None


class _MutationGuard(DispatchMode):
    """A mode that refuses ops that write into the memory of given tensors, or read the value of a fake tensor."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._names = {_storage_key(tensor): name for name, tensor in tensors.items()}

    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        for tensor in find_written_tensors(op, args, kwargs):
            name = self._names.get(_storage_key(tensor))
            if name is not None:
                raise _ArgumentMutated(name, str(op._schema.name).replace("::", "."))
        if op is _READS_VALUE and getattr(args[0], "constant", None) is None:
            raise DataDependentOutputException(op)
        return op(*args, **kwargs)


def _storage_key(tensor: Tensor) -> int:
    """Return a key that is equal for tensors with the same memory."""
    return int(tensor.untyped_storage()._cdata)
