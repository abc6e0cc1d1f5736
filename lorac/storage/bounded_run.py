"""Running a stored program within the machine's memory: the memory of its results is computed first.

Ops that are modest by themselves may double each other's results until the system kills the process. So before the
first call with some shapes, the ops run on torch's meta device, which allocates nothing. Where sizes depend on values,
each op is measured so before it runs.
"""

import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from lorac.argument_types import Fields, Operands
from lorac.errors import InputMismatch
from lorac.limits import get_chosen_memory
from lorac.storage.op_guards import GuardedOp

_KEPT_SHAPES = 4096
"""Number of input shapes whose peak is remembered; one more, and all are forgotten."""
_META = torch.device("meta")
Call = Callable[[fx.Node, Operands, Fields], object]
LastUses = Mapping[fx.Node, Sequence[fx.Node]]
_HAS_SIZE = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})  # absent on Windows
_MACHINE_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if _HAS_SIZE else sys.maxsize


class BoundedRun:
    """Runs a program of functional ops.

    Args:
        program: the program.

    Attributes:
        peaks: shapes of inputs -> the most bytes that results take at once; None if that depends on values.
    """

    def __init__(self, program: fx.GraphModule) -> None:
        self._program = program
        self.peaks: dict[tuple[torch.Size, ...], int | None] = {}
        self._last_uses: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        last = {used: node for node in program.graph.nodes for used in (*node.all_input_nodes, node)}
        for used, node in last.items():
            self._last_uses[node].append(used)

    def __call__(self, values: Sequence[Tensor]) -> Sequence[object]:
        """Return the program's outputs.

        Raises:
            InputMismatch: its results would take more memory at once than the machine has, or than ``lorac.budget``
                allows.
        """
        shapes, limit = tuple([value.shape for value in values]), get_chosen_memory() or _MACHINE_MEMORY
        peaks = self.peaks  # which another thread may replace
        if shapes not in peaks:
            if len(peaks) >= _KEPT_SHAPES:
                peaks = self.peaks = {}
            peaks[shapes] = self._measure([value.to(_META) for value in values])
        peak = peaks[shapes]
        if peak is not None:
            _check(peak, limit)
            outputs: Sequence[object] = self._program(*values)
            return outputs
        ledger = _Ledger(values)

        def call(node: fx.Node, args: Operands, kwargs: Fields) -> object:
            _check(ledger.live + _measure_result(node, args, kwargs), limit)
            result = node.target(*args, **kwargs)  # type: ignore[operator]  # a stored program calls functions alone
            _check(ledger.live + sum(size for _, size in _list_storages(result)), limit)
            return result

        return _run(self._program.graph, values, self._last_uses, ledger, call)

    def _measure(self, values: Sequence[Tensor]) -> int | None:
        """Return the peak bytes of results for inputs of these shapes; None if the peak depends on values."""
        ledger = _Ledger(values)
        try:
            _run(self._program.graph, values, self._last_uses, ledger, _call_on_meta)
        except Exception:  # an op without a kernel there, one that needs a value, or shapes that do not fit
            return None
        return ledger.peak


class _Ledger:
    """The memory of results.

    Args:
        given: values whose memory does not count.

    Attributes:
        live: bytes of the results that are still used.
        peak: the most that this was.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.live = self.peak = 0
        self._users = Counter(address for address, _ in _list_storages(given))

    def count(self, result: object, users: int) -> None:
        """Add users of a result's memory, or take them away."""
        for address, size in _list_storages(result):
            before = self._users[address]
            self._users[address] += users
            if (before == 0) != (before + users == 0):
                self.live += size * users
        self.peak = max(self.peak, self.live)


def _run(graph: fx.Graph, values: Sequence[Tensor], last_uses: LastUses, ledger: _Ledger, call: Call) -> list[object]:
    """Run a graph node by node, and drop each result after its last use; return the outputs."""
    given, results = iter(values), dict[fx.Node, Any]()
    for node in graph.nodes:
        if node.op == "output":
            break
        args, kwargs = fx.map_arg((node.args, node.kwargs), results.__getitem__)
        results[node] = next(given) if node.op == "placeholder" else call(node, args, kwargs)
        ledger.count(results[node], 1)
        for used in last_uses[node]:
            ledger.count(results.pop(used), -1)
    outputs: Any = graph.output_node().args[0]
    return list(fx.map_arg(outputs, results.__getitem__))


def _call_on_meta(node: fx.Node, args: Operands, kwargs: Fields) -> object:
    """Call an op with operands on the meta device, without its guard, which reads values."""
    target: Any = node.target
    op = target.op if isinstance(target, GuardedOp) else target
    op = torch.ops.aten.reshape.default if op is torch.ops.aten.view.default else op  # strides may differ there
    args, kwargs = pytree.tree_map_only(torch.device, lambda _: _META, (args, kwargs))
    arguments = op._schema.arguments if isinstance(op, torch._ops.OpOverload) else ()
    if any(argument.kwarg_only and argument.name == "device" for argument in arguments):
        kwargs = {"device": _META, **kwargs}
    return op(*args, **kwargs)


def _measure_result(node: fx.Node, args: Operands, kwargs: Fields) -> int:
    """Return the bytes that an op is about to allocate for its result, as far as they may exceed its operands'."""
    given = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(_META), (args, kwargs))
    try:
        made = _call_on_meta(node, *given)
    except Exception:  # as in ``BoundedRun._measure``
        return _measure_by_values(
            node, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        )
    operands = {address for address, _ in _list_storages(given)}
    return sum(size for address, size in _list_storages(made) if address not in operands)


def _measure_by_values(node: fx.Node, tensors: Sequence[Tensor]) -> int:
    """Return the bytes of a result whose size depends on its operands' values; 0 for other ops."""
    name = getattr(node.target, "_opname", "")
    if name not in {"repeat_interleave", "one_hot"} or not tensors or not tensors[-1].numel():
        return 0
    first, last = tensors[0], tensors[-1]
    if name == "one_hot":
        return last.numel() * (int(last.max()) + 1) * last.itemsize
    return int(last.sum()) * first.numel() // last.numel() * first.itemsize


def _list_storages(value: object) -> Iterator[tuple[int, int]]:
    """Yield address and size of each distinct storage of a result."""
    storages = (leaf.untyped_storage() for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
    yield from {storage._cdata: storage.nbytes() for storage in storages}.items()


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise InputMismatch(
            f"with these inputs the stored program takes {size >> 20} MiB at once, more than {limit >> 20} MiB",
            next_step="give fewer rows or a shorter sequence; lorac.budget(bytes=...) around the call sets the limit",
        )
