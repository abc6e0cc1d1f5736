"""Arguments of a call that a program holds as constants: what is no tensor, and tensors that forward reads as numbers.

A trace follows Python, so whatever Python decides by is decided for good: a number, a text, a list of sizes. Such an
argument is no input of the program but part of what it is, and a call that says otherwise is refused.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from lorac.errors import CaptureError, short
from lorac.frontend.call_binding import Inputs
from lorac.frontend.hugging_face import is_hugging_face
from lorac.frontend.model_runner import ModelRunner
from lorac.frontend.multimodal_positions import find_multimodal_positions
from lorac.frontend.trace_guards import find_running_model_line
from lorac.ir.fixed_arguments import to_json_value
from lorac.ir.multimodal_positions import GRID_SUFFIX, POSITION_IDS, MultimodalPositions


@dataclass(frozen=True)
class CallArguments:
    """The arguments of an example call, each by name.

    Attributes:
        inputs: what become inputs of a program.
        fixed: what become constants of it, as the caller gave them.
        read: those of the constants that are tensors for the caller -> the numbers that forward reads in their place.
        positions: what makes the positions among the inputs, where the caller gave none.
        truths: the line of the model that decides by a truth that it computes -> what it found, time by time.
    """

    inputs: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    positions: MultimodalPositions | None = None
    truths: Mapping[str, list[bool]] = field(default_factory=dict)

    @property
    def traced(self) -> dict[str, Any]:
        """The constants as forward is given them in a trace."""
        return self.fixed | self.read

    @property
    def notes(self) -> list[str]:
        """What whoever calls the program should know about it."""
        held = "the program holds {}, and calls that say otherwise are refused"
        read = [
            f"forward reads '{name}' as numbers: {held.format(short(to_json_value(v)))}"
            for name, v in self.read.items()
        ]
        goes = "forward decides by values that it computes: the program goes the example's way and refuses other calls"
        return read + ([f"{goes}, at {', at '.join(self.truths)}"] if self.truths else [])

    def ways(self, model: nn.Module) -> Iterator[CallArguments]:
        """These, and then the same with more that is constant: sizes of images, and which way the model goes."""
        yield self
        named = {name: value for name, value in self.inputs.items() if name.endswith(GRID_SUFFIX)}
        sizes = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        left = {name: value for name, value in self.inputs.items() if name not in sizes}
        if sizes:
            yield replace(self, inputs=left, fixed=self.fixed | sizes, read=self.read | sizes)
        truths = _record_truths(model, {**self.inputs, **self.fixed})
        if truths:
            yield replace(self, truths=truths)

    @contextlib.contextmanager
    def traced_with(self) -> Iterator[None]:
        """Around a traced forward: constants are computed, and truths are what they were."""
        constants = any(isinstance(value, Tensor) for value in self.traced.values())
        with (
            _ConstantEvaluation() if constants else contextlib.nullcontext(),
            _TruthReplay(self.truths) if self.truths else contextlib.nullcontext(),
        ):
            yield

    @classmethod
    def of(cls, model: nn.Module, named: Inputs) -> CallArguments:
        """An example call's arguments, told apart.

        Raises:
            CaptureError: an argument that is no tensor, and nothing that later calls can be held against.
        """
        read = _find_numeric_tensors(model, named)
        fixed = {name: value for name, value in named.items() if name in read or not _holds_tensors(name, value)}
        for name, value in fixed.items():
            if name not in read and not _survives_json(value):
                raise CaptureError(
                    f"the argument '{name}' holds {short(value)}, which no program can take or hold",
                    next_step="give tensors, numbers, texts, or lists and dicts of them; target='eager' takes anything",
                    code="capture_failed",
                )
        inputs = {name: value for name, value in named.items() if name not in fixed}
        positions = None if POSITION_IDS in named else find_multimodal_positions(model)
        made = None if positions is None else positions.made(named)
        return cls(inputs, fixed, read) if made is None else cls({**inputs, POSITION_IDS: made}, fixed, read, positions)


class _ConstantEvaluation(TorchFunctionMode):
    """Computes what is made of constants alone, instead of tracing it, so that numbers can be read off it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        leaves = pytree.tree_leaves((args, given))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        symbols = any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in leaves)
        known = all(type(tensor) is Tensor for tensor in tensors) if tensors else func in _MAKERS
        if symbols or not known:
            return func(*args, **given)
        with _disable_current_modes():
            return func(*args, **given)


def _record_truths(model: nn.Module, named: Inputs) -> dict[str, list[bool]]:
    """The truths of tensors by which a model decides in Python, by the line that does; none of one that fails."""
    recording = _TruthRecorder()
    with contextlib.suppress(Exception), recording:
        ModelRunner(model).run((), dict(named), 0)
    return recording.found


class _TruthRecorder(TorchFunctionMode):
    """Notes what every line finds that reads a truth."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[bool]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        line = find_running_model_line() if func is Tensor.__bool__ else None
        if line is not None:
            self.found.setdefault(line, []).append(answer)
        return answer


class _TruthReplay(TorchFunctionMode):
    """Gives every line of a trace the truths that it found before, and has the program check them.

    Args:
        truths: line -> what it found, time by time.
    """

    def __init__(self, truths: Mapping[str, list[bool]]) -> None:
        super().__init__()
        self._left = {line: list(found) for line, found in truths.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = find_running_model_line() if func is Tensor.__bool__ else None
        if line is None or not self._left.get(line):
            return func(*args, **(kwargs or {}))
        found = self._left[line].pop(0)
        torch._check_tensor_all(args[0].bool() if found else ~args[0].bool())
        return found


_MAKERS = frozenset({torch.arange, torch.full, torch.linspace, torch.ones, torch.tensor, torch.zeros})


def _survives_json(value: Any) -> bool:
    """Whether an argument is the same after it was stored."""
    try:
        return bool(json.loads(json.dumps(value)) == to_json_value(value))
    except (TypeError, ValueError):
        return False


def _holds_tensors(name: str, value: Any) -> bool:
    """Whether an argument is a tensor, or nothing but tensors in dicts, lists and tuples.

    Raises:
        CaptureError: it holds tensors and other things.
    """
    leaves = pytree.tree_leaves(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [leaf for leaf in leaves if leaf is not None and not isinstance(leaf, Tensor)]
    if tensors and others:
        raise CaptureError(
            f"the argument '{name}' holds tensors beside {short(others[0])}: inputs and constants of a program in one",
            next_step="give them as arguments of their own; target='eager' takes them together",
            code="capture_failed",
        )
    return bool(tensors)


def _find_numeric_tensors(model: nn.Module, named: Inputs) -> dict[str, Any]:
    """Tensors that a model of transformers reads as numbers, the sizes of images for one, as its exporter has them."""
    if not is_hugging_face(model):
        return {}
    from transformers.exporters.utils import precompute_export_inputs

    prepared = dict(named)
    with contextlib.suppress(Exception):  # what it makes of arguments that are no model's own
        precompute_export_inputs(model, prepared)
    tensors = [name for name, value in named.items() if isinstance(value, Tensor)]
    return {name: prepared[name] for name in tensors if not isinstance(prepared[name], Tensor)}
