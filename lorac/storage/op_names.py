"""The ops that a stored program may name: functional ops whose kernels check their operands.

An untrusted file decides which ops are called. No file may name an op that writes into an argument, leaves memory
uninitialised, skips checks or reads a file. Of the other ops, every file may name: ops of core ATen, into which
programs are decomposed; pointwise ops; ops in captured programs of models (``captured_ops.txt``, written by
``campaigns.captured_ops``); some ops that formulas call; and guarded ops (``lorac.storage.op_guards``). The campaign
``campaigns.op_calls`` calls these ops with hostile operands. Only files that the caller of ``lorac.load`` trusts may
name the remaining ops.
"""

import functools
import inspect
import math
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from lorac.errors import ArtifactError
from lorac.ir.graph import ops
from lorac.limits import is_trusted
from lorac.storage.op_guards import find_check, guard_op

_TAGS = frozenset({torch.Tag.core, torch.Tag.pointwise})
_EXCLUDED = ("_backward", "empty", "_embedding_bag")
"""Parts of names of ops that do not check their indices or shapes, or return uninitialised memory."""
_UNSAFE_ARGUMENTS = frozenset({"filename", "unsafe", "batch_sizes"})
"""Arguments of overloads that read files or skip the checks of their operands."""
_CAPTURED = frozenset(Path(__file__).with_name("captured_ops.txt").read_text(encoding="ascii").split()[1::2])
"""Names of ops that captured programs call; in the file, the number of these programs is before each name."""
_COMPOSED_NAMES = """
    absolute adjoint arccos arccosh arcsin arcsinh arctan arctan2 arctanh atleast_1d atleast_2d atleast_3d block_diag
    broadcast_tensors broadcast_to column_stack concat conj cosine_similarity diag dot dsplit dstack fix fliplr flipud
    frobenius_norm ger greater greater_equal hsplit hstack inner kron l1_loss less less_equal linalg_matmul linalg_norm
    linalg_vecdot logsumexp moveaxis movedim mse_loss narrow negative norm not_equal numpy_T outer pixel_shuffle
    pixel_unshuffle prelu ravel real row_stack special_erf special_exp2 special_expit special_expm1 special_log1p
    special_log_softmax special_logsumexp special_softmax std std_mean subtract swapaxes swapdims take_along_dim
    tensor_split tensordot trace var_mean vdot view_as vsplit vstack
"""
_COMPOSED = frozenset(_COMPOSED_NAMES.split())
"""Names of ops that formulas of methods call, and that torch composes of views and of ops of the other kinds."""
_MODULES: Mapping[str, ModuleType] = {"operator": operator, "math": math, "torch": torch}
_NUMBER_FUNCTIONS = frozenset(
    {"getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge"}
    | {"and_", "or_", "not_", "ceil", "floor", "trunc", "sym_float", "sym_int", "sym_max", "sym_min", "sym_not"}
    | {"sym_ite", "sym_sum"}
)
_BITS = 64
"""The most bits of an integer with which a program computes sizes."""


def op_name(target: object) -> str | None:
    """Return the name of a callable in stored programs, or None if they may not name it."""
    target = inspect.unwrap(target) if callable(target) else target
    if isinstance(target, torch._ops.OpOverload):
        return str(target) if _is_functional(target) else None
    module = getattr(target, "__module__", "").removeprefix("_")
    name = getattr(target, "__name__", "")
    return f"{module}.{name}" if module in _MODULES and name in _NUMBER_FUNCTIONS else None


def find_op(name: str) -> Callable[..., object]:
    """Return the op registered as ``<namespace>.<name>.<overload>``, or a function on numbers.

    Raises:
        ArtifactError: no program may call it, or only a trusted program may.
    """
    namespace, _, rest = name.partition(".")
    if namespace in _MODULES and rest in _NUMBER_FUNCTIONS:
        return _bound_number(getattr(_MODULES[namespace], rest))
    packet, _, overload = rest.partition(".")
    is_op = namespace in {"aten", ops.LINEAR.namespace} and packet.isidentifier()
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None) if is_op else None
    if not isinstance(found, torch._ops.OpOverload) or not _is_functional(found):
        raise ArtifactError(f"the program calls '{name}', an op that no artifact may call")
    if not is_checked(found) and not is_trusted():
        raise ArtifactError(
            f"the program calls '{name}', an op that lorac runs only from an artifact that you trust",
            next_step="give trust=True if you made the artifact, or trust its maker",
        )
    return guard_op(found)


@functools.cache
def _is_functional(op: torch._ops.OpOverload) -> bool:
    if op.namespace == ops.LINEAR.namespace:
        return True
    arguments = {argument.name for argument in op._schema.arguments}
    is_safe = not any(part in op._opname for part in _EXCLUDED) and not op._schema.is_mutable
    return op.namespace == "aten" and is_safe and arguments.isdisjoint(_UNSAFE_ARGUMENTS)


@functools.cache
def is_checked(op: torch._ops.OpOverload) -> bool:
    """Return whether an op may be called with any operands that a file states."""
    is_known = not _TAGS.isdisjoint(op.tags) and "polynomial" not in op._opname  # of any degree, at any cost
    is_known = is_known or op.namespace == ops.LINEAR.namespace or find_check(op) is not None
    return _is_functional(op) and (is_known or op._opname in _COMPOSED or op._opname in _CAPTURED)


def _bound_number(function: Callable[..., object]) -> Callable[..., object]:
    """Wrap a function on numbers, to refuse other arguments, and results of more than ``_BITS`` bits."""

    @functools.wraps(function)
    def bounded(*values: object) -> object:
        given = values[0] if function is torch.sym_sum and isinstance(values[0], list | tuple) else values
        given = values[1:] if function is operator.getitem and isinstance(values[0], list | tuple) else given
        whole = [value for value in given if type(value) is int]
        grows = function is operator.pow and len(whole) == 2 and whole[0].bit_length() * abs(whole[1]) > _BITS
        is_refused = grows or any(isinstance(value, str | list | tuple | Tensor) for value in given)
        result = None if is_refused else function(*values)
        if is_refused or (type(result) is int and result.bit_length() > _BITS):
            raise ArtifactError(f"the program calls '{function.__name__}' on arguments that are not sizes")
        return result

    # Under the name of an operator, torch.fx would write the operator itself into the code that it generates.
    bounded.__name__ = f"bounded_{function.__name__}"
    return bounded
