"""Runs of a stored program within limits: its memory and operations are computed before it runs.

A few small ops may double each other's results until the system kills the process, and a few matrix products may take
hours. So before the first call with some input shapes, the ops run on torch's meta device, which allocates and computes
nothing, and which refuses shapes that do not fit even where a kernel does not check them. Where sizes depend on values,
each op is measured in this way before it runs.
"""

import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.flop_counter import flop_registry

from lorac.errors import InputMismatch, LoracError
from lorac.ir.calls.call import Call
from lorac.ir.traces.modes import DispatchMode
from lorac.limits import get_chosen_memory, get_chosen_operations
from lorac.storage.op_guards import GuardedOp

_KEPT_SHAPES = 4096
"""The most input shapes whose peaks are cached; one shape more clears the cache."""
_META = torch.device("meta")
_OPERATIONS, _FACTOR = 1 << 38, 1 << 10
"""Operations that every call may take, and further operations for each pair of a value of the caller's and a value that
the program reads. A linear layer takes 2 per pair; attention over long inputs, and features of images, take more."""
_PER_OP = 1 << 17
"""The number of operations that take as long as the call of an op, and that are counted for it."""
_BY_VALUES = frozenset({"repeat_interleave", "one_hot"})
"""Ops whose results have sizes that depend on the operands' values, not only on their shapes."""
_OF_MATRICES = ("solve", "inv_", "inverse", "cholesky", "_lu", "qr", "svd", "eig", "det", "matrix_exp", "cdist")
"""Parts of names of ops that take more operations than they have values."""
RunNode = Callable[[fx.Node, Call], object]
"""A function that computes a node from its operands."""
Limit = tuple[float, float]
"""The limits of a call: bytes at once, and operations."""
LastUses = Mapping[fx.Node, Sequence[fx.Node]]
_HAS_SIZE = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})  # absent on Windows
_MACHINE_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if _HAS_SIZE else sys.maxsize


class BoundedRun:
    """A runner of a program of functional ops, with limits on memory and operations.

    Args:
        program: the program.
        callers: for each input, whether the caller gives it.
        is_trusted: whether it may take any number of operations, and call ops that the meta device lacks.

    Attributes:
        peaks: shapes of inputs -> the most bytes that results take at once, and the number of operations; None if these
            depend on values.
    """

    def __init__(self, program: fx.GraphModule, callers: Sequence[bool], is_trusted: bool) -> None:
        self._program, self._callers, self._is_trusted = program, callers, is_trusted
        self.peaks: dict[tuple[torch.Size, ...], tuple[int, float] | None] = {}
        self._last_uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        last = {used: node for node in program.graph.nodes for used in (*node.all_input_nodes, node)}
        for used, node in last.items():
            self._last_uses[node].append(used)

    def __call__(self, values: Sequence[Tensor]) -> Sequence[object]:
        """Return the program's outputs.

        Raises:
            InputMismatch: its results would take more memory at once than the machine has or ``lorac.budget`` allows,
                or it would take too many operations.
            Exception: torch's own error, for shapes that do not fit.
        """
        operations = math.inf if self._is_trusted else get_chosen_operations()
        if operations is None:
            sizes = [value.numel() for value in values]
            callers = sum(size for size, is_callers in zip(sizes, self._callers, strict=True) if is_callers)
            operations = _OPERATIONS + _FACTOR * float(callers) * sum(sizes)
        shapes, limit = tuple([value.shape for value in values]), (get_chosen_memory() or _MACHINE_MEMORY, operations)
        peaks = self.peaks  # another thread may replace the attribute
        if shapes not in peaks:
            if len(peaks) >= _KEPT_SHAPES:
                peaks = self.peaks = {}
            peaks[shapes] = self._measure([value.to(_META) for value in values], limit)
        peak = peaks[shapes]
        if peak is not None:
            _check(*peak, limit)
            outputs: Sequence[object] = self._program(*values)
            return outputs
        ledger, counter = _Ledger(values), OperationCounter(limit)

        def run(node: fx.Node, call: Call) -> object:
            _check(ledger.live + self._measure_result(node, call, counter), counter.operations, limit)
            result = node.target(*call.args, **call.kwargs)  # type: ignore[operator]  # a stored program calls functions alone
            _check(ledger.live + sum(size for _, size in _list_storages(result)), counter.operations, limit)
            return result

        return _run(self._program.graph, values, self._last_uses, ledger, run)

    def _measure(self, values: Sequence[Tensor], limit: Limit) -> tuple[int, float] | None:
        """Return the peak bytes and the operations for inputs of these shapes; None if they depend on values."""
        ledger = _Ledger(values)
        try:
            with torch.inference_mode(False), OperationCounter(limit) as counter:
                _run(self._program.graph, values, self._last_uses, ledger, _call_on_meta)
        except Exception as error:
            self._raise_misfit(error)
            return None
        return ledger.peak, counter.operations

    def _measure_result(self, node: fx.Node, call: Call, counter: "OperationCounter") -> int:
        """Return the bytes that an op will allocate for its result, as far as they are known before the call."""
        given = _to_meta((call.args, call.kwargs))
        try:
            with torch.inference_mode(False), counter:
                made = _call_on_meta(node, Call(*given))
        except Exception as error:
            self._raise_misfit(error)
            tensors = [*_list_tensors((call.args, call.kwargs))]
            name = getattr(getattr(node.target, "op", node.target), "_opname", "")
            if name not in _BY_VALUES or not tensors or not tensors[-1].numel():
                return 0
            first, last = tensors[0], tensors[-1]
            if name == "one_hot":
                return last.numel() * (int(last.max()) + 1) * last.itemsize
            return int(float(last.double().sum()) * first.numel() / last.numel() * first.itemsize)
        operands = {address for address, _ in _list_storages(given)}
        return sum(size for address, size in _list_storages(made) if address not in operands)

    def _raise_misfit(self, error: Exception) -> None:
        """Raise the error of the meta device, unless it lacks the op or needs a value."""
        if isinstance(error, LoracError) or not (self._is_trusted or isinstance(error, NotImplementedError)):
            raise error


class OperationCounter(DispatchMode):
    """A mode that counts the operations of ops on the meta device; composed ops count by their parts.

    Args:
        limit: the limit, beyond which an op raises ``InputMismatch``.

    Attributes:
        operations: the number of operations so far.
    """

    def __init__(self, limit: Limit) -> None:
        super().__init__()
        self.operations, self._limit = 0.0, limit

    def handle(self, op: Any, /, *args: Any, **kwargs: Any) -> Any:
        if torch.Tag.data_dependent_output in op.tags:
            raise NotImplementedError(f"{op} needs values")
        result = op(*args, **kwargs)
        self.operations += _PER_OP + count_operations(op, Call(args, kwargs), result)
        _check(0, self.operations, self._limit)
        return result


def count_operations(op: torch._ops.OpOverload, call: Call, result: object) -> float:
    """Return the number of operations of an op: of a product by torch's formula, else at least one per value."""
    tensors = [*_list_tensors((call.args, call.kwargs, result))]
    # A kernel may run along an axis although another one is empty.
    values = sum(tensor.numel() or math.prod(max(size, 1) for size in tensor.shape) for tensor in tensors)
    formula = flop_registry.get(op._overloadpacket)
    if formula is not None:
        return float(values + formula(*call.args, **call.kwargs, out_val=result))
    if "pool" in op._opname and isinstance(window := call.args[1], Sequence):  # each result reads a window
        return float(values) * math.prod(window)
    if any(part in op._opname for part in _OF_MATRICES):  # each result reads a row
        return float(values) * max((size for tensor in tensors for size in tensor.shape[-2:]), default=1)
    return float(values)


class _Ledger:
    """The memory of results.

    Args:
        given: values whose memory does not count.

    Attributes:
        live: bytes of the results that are still used.
        peak: the maximum of ``live`` so far.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.live = self.peak = 0
        self._users = Counter(address for address, _ in _list_storages(given))

    def count(self, result: object, users: int) -> None:
        """Add a number of users of a result's memory; a negative number removes users."""
        for address, size in _list_storages(result):
            before = self._users[address]
            self._users[address] += users
            if (before == 0) != (before + users == 0):
                self.live += size * users
        self.peak = max(self.peak, self.live)


def _run(graph: fx.Graph, values: Sequence[Tensor], last_uses: LastUses, ledger: _Ledger, run: RunNode) -> list[object]:
    """Run a graph node by node, and drop each result after its last use; return the outputs."""
    given, results = iter(values), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.op == "output":
            break
        call = Call(*fx.map_arg((node.args, node.kwargs), results.__getitem__))
        results[node] = next(given) if node.op == "placeholder" else run(node, call)
        ledger.count(results[node], 1)
        for used in last_uses[node]:
            ledger.count(results.pop(used), -1)
    outputs: Any = graph.output_node().args[0]
    return list(fx.map_arg(outputs, results.__getitem__))


def _call_on_meta(node: fx.Node, call: Call) -> object:
    """Call an op with operands on the meta device; skip a guard that reads values."""
    target: Any = node.target
    if isinstance(target, GuardedOp) and not target.reads_values:
        target.check_operands(call)
    op = target.op if isinstance(target, GuardedOp) else target
    op = torch.ops.aten.reshape.default if op is torch.ops.aten.view.default else op  # strides may differ there
    args, kwargs = _to_meta((call.args, call.kwargs))
    arguments = op._schema.arguments if isinstance(op, torch._ops.OpOverload) else ()
    if any(argument.kwarg_only and argument.name == "device" for argument in arguments):
        kwargs = {"device": _META, **kwargs}
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        if op._opname not in _BY_VALUES:
            raise
        raise NotImplementedError(f"{op} needs values") from error


def _to_meta(value: Any) -> Any:
    """Return operands on the meta device."""
    if isinstance(value, Tensor):
        return value.to(_META)
    if isinstance(value, list | tuple):
        return [*map(_to_meta, value)]
    if isinstance(value, dict):
        return {key: _to_meta(item) for key, item in value.items()}
    return _META if isinstance(value, torch.device) else value


def _list_tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _list_tensors(item)
    elif isinstance(value, dict):
        yield from _list_tensors([*value.values()])


def _list_storages(value: object) -> Iterator[tuple[int, int]]:
    """Yield address and size of each distinct storage of a result."""
    storages = (tensor.untyped_storage() for tensor in _list_tensors(value))
    yield from {storage._cdata: storage.nbytes() for storage in storages}.items()


def _check(size: int, operations: float, limit: Limit) -> None:
    if size <= limit[0] and operations <= limit[1]:
        return
    amount, name = f"{size >> 20} MiB at once, more than {limit[0] / (1 << 20):.0f} MiB", "bytes"
    if size <= limit[0]:
        amount, name = f"{operations:.1e} operations, more than {limit[1]:.1e}", "operations"
    raise InputMismatch(
        f"with these inputs the stored program takes {amount}",
        next_step=f"give fewer rows or a shorter sequence, or raise the limit by lorac.budget({name}=...)",
    )
