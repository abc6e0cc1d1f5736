"""A method's formula as it is called: what it may not do is refused, with the method, the site and the line.

A formula is a pure function of torch ops. It is *watched* where its arguments have no memory (traced, or imagined with
tensors of the same shapes): an op that writes into an argument, or into a view of one, is refused before it runs, and
so is a step that needs the value of a tensor. So nothing of a host or an adapter is ever written by a formula.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from lorac.errors import AdapterError, LoracError
from lorac.ir.tracing import tracing
from lorac.source_lines import definition_line, innermost_user_line
from lorac.third_party_output import suppress_third_party_output

Tensor = torch.Tensor
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
"""What a formula that computes real numbers is at fault with; other exceptions are the control flow of somebody around
it (a checkpoint ends its recomputation by one), and pass as they are."""
_FORMULA_CONTRACT = "a formula is a pure function of torch ops: W' like W, or y' like y"
_ONCE_CONTRACT = "`once` answers a dictionary of tensors by name, which branches read as own:<name>"
_READS_VALUE = torch.ops.aten._local_scalar_dense.default


@dataclass(frozen=True)
class Formula:
    """One formula of a method at one site; called as the function is.

    Attributes:
        function: a pure function of torch ops, to a tensor.
        method: the method's name.
        site: the site's path.
    """

    function: Callable[..., Any]
    method: str
    site: str

    def __call__(self, *args: Any, like: Tensor, read: Mapping[str, Tensor] | None = None) -> Tensor:
        """The formula's answer.

        Args:
            *args: its arguments; of a ``Params`` every tensor counts as one.
            like: one of them, of the shape that the answer must have.
            read: program values that it may read besides, by name.

        Raises:
            AdapterError: it raises, writes, needs the value of a tensor, or answers something else.
        """
        return self._admitted(self._found(args, read or {}, watched=isinstance(like, FakeTensor)), like)

    def several(self, *args: Any, read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The answer of a formula to tensors of any shape, by name.

        Args:
            *args, read: as of a call.

        Raises:
            AdapterError: as a call does.
        """
        watched = any(isinstance(tensor, FakeTensor) for tensor in self._named(args, read).values())
        found = self._found(args, read, watched=watched)
        if not isinstance(found, Mapping):
            raise self._failed(f"answers {_describe_type(found)}, not tensors by name", _ONCE_CONTRACT)
        for name, tensor in found.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise self._failed(f"answers {_describe_type(tensor)} as {name!r}, not a tensor", _ONCE_CONTRACT)
        return dict(found)

    def _found(self, args: Sequence[Any], read: Mapping[str, Tensor], *, watched: bool) -> Any:
        around: AbstractContextManager[Any] = _MutationGuard(self._named(args, read)) if watched else nullcontext()
        try:
            with around:
                return self.function(*args)
        except (LoracError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if not watched and not isinstance(error, _FORMULA_ERRORS):
                raise
            raise self._failed(*_explain_error(error), error) from (
                None if isinstance(error, _ArgumentMutated) else error
            )

    def _named(self, args: Sequence[Any], read: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every tensor that must not be written, by how the formula calls it."""
        names = _argument_names(self.function, len(args))
        found = {name: arg for name, arg in zip(names, args, strict=True) if isinstance(arg, Tensor)}
        for name, arg in zip(names, args, strict=True):
            if isinstance(arg, SimpleNamespace):
                found |= {f"{name}.{key}": value for key, value in vars(arg).items()}
        return found | {f"the value '{name}'": value for name, value in read.items()}

    def _admitted(self, found: Any, like: Tensor) -> Tensor:
        if not isinstance(found, Tensor):
            raise self._failed(f"answers {_describe_type(found)}, not a tensor")
        if not _shapes_match(found, like):
            raise self._failed(f"answers a tensor of shape {list(found.shape)}, not of {list(like.shape)}")
        if not found.is_floating_point():
            raise self._failed(f"answers a tensor of {found.dtype}, not of floating-point numbers")
        return found

    def _failed(self, what: str, step: str = _FORMULA_CONTRACT, error: Exception | None = None) -> AdapterError:
        # The first frame of the traceback is the call itself.
        line = innermost_user_line(traceback.extract_tb(error.__traceback__)[1:]) if error is not None else None
        line = line or definition_line(self.function)
        told = f"the formula of {self.method} at '{self.site}' {what}"
        return AdapterError(told + (f"\n  in {line}" if line else ""), next_step=step, code="formula_failed")


def _describe_type(found: Any) -> str:
    return "nothing" if found is None else f"a {type(found).__name__}"


def _explain_error(error: Exception) -> tuple[str, str]:
    """What a formula did, by the exception that came of it, and what to do instead."""
    if isinstance(error, _ArgumentMutated):
        return f"writes into {error.name} ({error.op})", "compute a new tensor, as W * s for W.mul_(s)"
    if isinstance(error, _data_dependent_errors()):
        return "takes a step that depends on the values of tensors", "choose with torch.where, or by masks"
    reason = str(error).strip().partition("\n")[0]
    return f"raises {type(error).__name__}: {reason}", _FORMULA_CONTRACT


def _data_dependent_errors() -> tuple[type[Exception], ...]:
    """What torch raises where a step without memory needs the value of a tensor."""
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return DataDependentOutputException, DynamicOutputShapeException, GuardOnDataDependentSymNode


@contextmanager
def fake_execution() -> Iterator[Callable[[Tensor], Tensor]]:
    """What is computed inside has no memory; gives what makes of a tensor one of its shape for that."""
    with tracing(), suppress_third_party_output(), FakeTensorMode(allow_non_fake_inputs=True):
        yield _empty_copy


class _ArgumentMutated(Exception):
    """An op is about to write into an argument of a formula."""

    def __init__(self, name: str, op: str) -> None:
        super().__init__(name)
        self.name, self.op = name, op


class _MutationGuard(TorchDispatchMode):
    """Refuses every op that would write into the memory of certain tensors, or that reads a value of one without any.

    Args:
        kept: the tensors, by the names to tell them by.
    """

    def __init__(self, kept: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's
        self._names = {_storage_key(tensor): name for name, tensor in kept.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        for tensor in _mutated_tensors(func, args, given):
            name = self._names.get(_storage_key(tensor))
            if name is not None:
                raise _ArgumentMutated(name, str(func._schema.name).replace("::", "."))
        if func is _READS_VALUE and getattr(args[0], "constant", None) is None:
            raise DataDependentOutputException(func)
        return func(*args, **given)


def _mutated_tensors(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    """The tensors that an op writes into, by its schema."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[index] if index < len(args) else kwargs.get(argument.name)
        yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if isinstance(v, Tensor))


def _storage_key(tensor: Tensor) -> int:
    """What tensors that share memory have in common."""
    return int(tensor.untyped_storage()._cdata)


def _argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """How a function calls its first arguments."""
    known = list(inspect.signature(function).parameters)[:count]
    return [*known, *(f"argument {index}" for index in range(len(known), count))]


def _empty_copy(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _shapes_match(found: Tensor, like: Tensor) -> bool:
    """Whether two shapes are one; of sizes that are not known yet, whether they are not known to differ."""
    if found.dim() != like.dim():
        return False
    return not any(_is_statically_true(a != b) for a, b in zip(found.shape, like.shape, strict=True))


def _is_statically_true(differs: bool | torch.SymBool) -> bool:
    """Whether sizes differ whatever the symbols among them stand for."""
    if isinstance(differs, bool):
        return differs
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(differs)
