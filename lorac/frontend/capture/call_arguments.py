"""Arguments of an example call: inputs of the program, and constants in it.

A trace follows Python, so that a value on which Python code branches is fixed: a number, a text, a list of sizes. Such
an argument is a constant of the program, not an input, and a call with another value is refused.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import CaptureError, short
from lorac.frontend.capture.trace_guards import find_running_model_line
from lorac.frontend.host import Host
from lorac.frontend.model_runner import ModelRunner
from lorac.ir.calls.call import Call, Inputs, to_json_value
from lorac.ir.calls.multimodal_positions import GRID_SUFFIX, POSITION_IDS, MultimodalPositions
from lorac.ir.traces.gate import outside_traces
from lorac.ir.traces.modes import FunctionMode


@dataclass(frozen=True)
class CallArguments:
    """The arguments of an example call by name.

    Attributes:
        inputs: the inputs of a program.
        fixed: the program's constants, as the caller passed them.
        read: constants that the caller passes as tensors -> the numbers that forward uses instead.
        positions: the object that computes the positions if the caller gave none; else None.
        truths: line of the model that branches on a computed tensor -> the truth values at this line, in order.
    """

    inputs: dict[str, object]
    fixed: dict[str, object] = field(default_factory=dict)
    read: dict[str, object] = field(default_factory=dict)
    positions: MultimodalPositions | None = None
    truths: Mapping[str, list[bool]] = field(default_factory=dict)

    @property
    def trace_constants(self) -> dict[str, object]:
        """The constants as forward takes them in a trace."""
        return self.fixed | self.read

    @property
    def notes(self) -> list[str]:
        """Notes about the constants, for the program's callers."""
        consequence = "the program holds {}, and calls with other values are refused"
        read = [
            f"forward reads '{name}' as numbers: {consequence.format(short(to_json_value(v)))}"
            for name, v in self.read.items()
        ]
        branching = "forward branches on values that it computes, and the program takes the example's branches"
        return read + ([f"{branching}, at {', at '.join(self.truths)}"] if self.truths else [])

    def iter_alternatives(self, model: nn.Module) -> "Iterator[CallArguments]":
        """Yield these arguments, then variants with more constants: image sizes, then branches that forward takes."""
        yield self
        named = {name: value for name, value in self.inputs.items() if name.endswith(GRID_SUFFIX)}
        sizes = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        remaining = {name: value for name, value in self.inputs.items() if name not in sizes}
        if sizes:
            yield replace(self, inputs=remaining, fixed=self.fixed | sizes, read=self.read | sizes)
        recording = _TruthRecorder()
        with contextlib.suppress(Exception), recording:  # a failed run adds no information
            ModelRunner(model).run(Call((), {**self.inputs, **self.fixed}))
        if recording.found:
            yield replace(self, truths=recording.found)

    @contextlib.contextmanager
    def apply_in_trace(self) -> Iterator[None]:
        """Run a traced forward inside the block: constants are computed, and truth values are replayed."""
        constants = any(isinstance(value, Tensor) for value in self.trace_constants.values())
        with (
            _ConstantEvaluation() if constants else contextlib.nullcontext(),
            _TruthReplay(self.truths) if self.truths else contextlib.nullcontext(),
        ):
            yield

    @classmethod
    def of(cls, host: Host, named: Inputs) -> "CallArguments":
        """Sort the arguments of an example call into inputs and constants.

        Raises:
            CaptureError: an argument is not a tensor and cannot be compared with the argument of a later call.
        """
        read = host.find_number_inputs(named)
        fixed = {name: value for name, value in named.items() if name in read or not _holds_tensors(name, value)}
        for name, value in fixed.items():
            try:
                stored = name in read or json.loads(json.dumps(value)) == to_json_value(value)
            except (TypeError, ValueError):
                stored = False
            if not stored:
                raise CaptureError(
                    f"the argument '{name}' holds {short(value)}, which a program can neither take nor hold",
                    next_step="give tensors, numbers, texts, or lists and dicts of them; target='eager' takes anything",
                )
        inputs = {name: value for name, value in named.items() if name not in fixed}
        positions = None if POSITION_IDS in named else host.find_positions()
        computed = None if positions is None else positions.compute(named)
        if computed is None:
            return cls(inputs, fixed, read)
        return cls({**inputs, POSITION_IDS: computed}, fixed, read, positions)


class _ConstantEvaluation(FunctionMode):
    """A mode that computes results of constants instead of tracing them, so that Python can read their values."""

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        symbols = any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        known = all(type(tensor) is Tensor for tensor in tensors) if tensors else function in _MAKERS
        if symbols or not known:
            return function(*args, **kwargs)
        with outside_traces():
            return function(*args, **kwargs)


class _TruthRecorder(FunctionMode):
    """A mode that records the truth values that each line reads."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[bool]] = {}

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        answer = function(*args, **kwargs)
        line = find_running_model_line() if function is Tensor.__bool__ else None
        if line is not None:
            self.found.setdefault(line, []).append(answer)
        return answer


class _TruthReplay(FunctionMode):
    """A mode that replays recorded truth values at each line of a trace, and adds checks of them to the program.

    Args:
        truths: line -> its truth values, in order.
    """

    def __init__(self, truths: Mapping[str, list[bool]]) -> None:
        super().__init__()
        self._left = {line: list(found) for line, found in truths.items()}

    def handle(self, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        line = find_running_model_line() if function is Tensor.__bool__ else None
        if line is None or not self._left.get(line):
            return function(*args, **kwargs)
        found = self._left[line].pop(0)
        torch._check_tensor_all(args[0].bool() if found else ~args[0].bool())
        return found


_MAKERS = frozenset({torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros})


def _holds_tensors(name: str, value: object) -> bool:
    """Return whether an argument is a tensor, or dicts, lists and tuples of only tensors."""
    leaves = pytree.tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]
    if tensors and others:
        raise CaptureError(
            f"the argument '{name}' holds tensors and {short(others[0])}, and a program needs these apart",
            next_step="give them as separate arguments; target='eager' takes them together",
        )
    return bool(tensors)
