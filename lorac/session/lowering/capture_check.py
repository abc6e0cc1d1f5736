"""The captured program held against the host: it computes what the host does, at other sizes too (invariant 8).

The bare program, before any pass, is run by the reference interpreter, and the host by itself, on the example inputs
and on others of another batch and length made from them. What a host does that no program can show, such as drawing
random numbers, becomes a note on the graph, which ``explain()`` repeats.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import CaptureError, ExampleInputsNeeded, nearest_name, short, warn
from lorac.frontend.call_binding import bind_by_name
from lorac.frontend.capture.export import isolate_tracing
from lorac.frontend.dynamic_shapes import find_row_layout
from lorac.frontend.example_inputs import make_example_inputs
from lorac.frontend.model_runner import ModelRun, ModelRunner, WeightWritten, seed_random_numbers
from lorac.ir.fixed_arguments import to_json_value
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import (
    differs_beyond_rounding,
    read_example_inputs,
    relative_error,
    resize_inputs,
    run_graph,
)
from lorac.ir.output_structure import replace_dataclasses
from lorac.ir.row_layout import RowLayout
from lorac.ir.sizes import AxisSizes, describe_axes

Inputs = Mapping[str, Tensor]
_SEED, _OTHER_SEED = 0, 1


def check_capture(graph: Graph, host: nn.Module, *, tested: bool) -> None:
    """Settle which sizes a captured graph takes, and what is to be said of it; warn of what is.

    Args:
        graph: as captured, bare; it gets ``sizes`` and ``notes``.
        host: the model that it was captured from; left as it was.
        tested: whether to run both. If not, what torch assumed of small sizes is believed to be unnecessary.

    Raises:
        CaptureError: the program answers otherwise than the host.
        CaptureError: the host does not run, or writes into its weights.
    """
    if tested and not any(parameter.is_meta for parameter in host.parameters()):
        with isolate_tracing(host):
            _HostComparison(graph, host).check()
    else:
        _accept_unchecked(graph, read_example_inputs(graph, graph.interface.inputs))
    if graph.interface.sizes.fixed:
        _warn_fixed_sizes(graph)
    for note in graph.interface.notes:
        warn(note)


def check_runnable(host: nn.Module, inputs: object) -> None:
    """Refuse a host that does not run on its example inputs, of which torch.export says what helps nobody.

    Args:
        host: a model that was not captured; left as it was.
        inputs: its example inputs; None for those that are made.

    Raises:
        CaptureError: it writes into a weight.
        ExampleInputsNeeded: it cannot be called with inputs that were given.
    """
    try:
        with isolate_tracing(host):
            ModelRunner(host).run(
                (), bind_by_name(host, make_example_inputs(host) if inputs is None else inputs), _SEED
            )
    except WeightWritten as error:
        raise _written_weight(host, error) from error
    except Exception as error:
        if inputs is not None:
            raise _rejected_inputs(host, inputs, error) from error


def _rejected_inputs(host: nn.Module, inputs: object, error: Exception) -> ExampleInputsNeeded:
    """The error for example inputs that the host itself cannot be called with."""
    takes = list(inspect.signature(host.forward).parameters)
    named = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs)) if isinstance(inputs, tuple) else {}
    given = ", ".join(f"{name} {_describe_value(value)}" for name, value in named.items()) or short(inputs)
    unknown = [name for name in named if isinstance(name, str) and name not in takes]
    return ExampleInputsNeeded(
        f"{type(host).__name__} cannot be called with example_inputs= ({given}): {type(error).__name__}: {error}",
        nearest=nearest_name(unknown[0], takes) if unknown else None,
        next_step=f"its forward takes ({', '.join(takes)}): give what the model itself answers when it is called",
    )


def _describe_value(value: object) -> str:
    if not isinstance(value, Tensor):
        return short(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _written_weight(host: nn.Module, error: WeightWritten) -> CaptureError:
    return CaptureError(
        f"forward of {type(host).__name__} writes into its own weight '{error.name}'",
        next_step="call the model once in eval mode before compiling, if only its first call writes; "
        "a weight that every call writes cannot be the constant that a program makes of it",
        code="capture_failed",
    )


def _accept_unchecked(graph: Graph, inputs: Inputs) -> None:
    """Take the program for right at the smallest sizes, since nothing is to compare it with."""
    sizes = graph.interface.sizes
    sizes = sizes.resolve_assumptions(sizes.find_smallest(sizes.measure(inputs)))
    graph.interface = replace(graph.interface, sizes=sizes)


def _warn_fixed_sizes(graph: Graph) -> None:
    sizes = graph.interface.sizes
    at = sorted({f"{sizes.shapes[name][axis]}" for name, axis in sizes.fixed})
    by = "".join(f"\n  at {line}" for line in dict.fromkeys(sizes.lines.values()))
    warn(
        f"the trace of the model fixed sizes that were to vary: {describe_axes(sizes.fixed)}, at {' and '.join(at)}; "
        f"calls of another size are refused{by}",
        next_step="compile with example_inputs= of the sizes that are needed; target='eager' takes any",
    )


@dataclass(frozen=True)
class _OutputDifference:
    """How far the program is off.

    Attributes:
        output: the output that is farthest.
        share: by how much, of the host's; infinite where the two cannot be compared.
        inputs: on which inputs.
        error: what the program failed with.
    """

    output: str
    share: float
    inputs: Inputs
    error: Exception | None = None

    def __str__(self) -> str:
        on = f"on inputs of {_describe_shapes(self.inputs)}"
        if self.error is not None:
            return f"it does not run {on}: {self.error}"
        by = f"is off by {self.share:.2g} of its size" if self.share < math.inf else "is another one"
        return f"'{self.output}' {by} {on}"


class _HostComparison:
    """A captured graph beside its host.

    Args:
        graph, host: as ``hold_against_host``'s.
    """

    def __init__(self, graph: Graph, host: nn.Module) -> None:
        self.graph, self.host = graph, host
        self.inputs = read_example_inputs(graph, graph.interface.inputs)
        self.stateful = False
        self._kept = ModelRunner(host)

    @property
    def running(self) -> ModelRunner:
        """A copy of the host to run: one for all runs, until it shows that earlier ones count."""
        return ModelRunner(self.host) if self.stateful else self._kept

    def check(self) -> None:
        """Compare on the example inputs, then at other sizes."""
        first = self._example()
        self._note_written(first)
        try:
            worst = self._worst(self._program(self.inputs), first, self.inputs)
        except _ProgramError as error:
            raise self._differs(_OutputDifference("", math.inf, self.inputs, error)) from error
        if (first.drew or worst is not None) and self._stochastic(first):
            self._note_stochastic(first, worst)
            if worst is not None:  # nothing to compare with, at other sizes neither
                _accept_unchecked(self.graph, self.inputs)
                return
        elif worst is not None:
            raise self._differs(worst)
        self._check_sizes()
        if not self.stateful:
            self._check_rows()

    def _check_sizes(self) -> None:
        """Compare at another batch and length, and see which sizes are right that torch takes no care of, such as 1."""
        sizes = self.graph.interface.sizes
        example = sizes.measure(self.inputs)
        other = sizes.find_other(example)
        with contextlib.suppress(_HostError):  # then there is nothing that the program would have to answer
            if other is not None and (worst := self._difference(other)) is not None:
                raise self._differs(worst)
        right = [tried for tried in sizes.find_doubtful(other or example) if self._right(tried)]
        self.graph.interface = replace(self.graph.interface, sizes=sizes.resolve_assumptions(right))

    def _check_rows(self) -> None:
        """Where the program takes a fixed number of rows, see whether it is right in parts of so many."""
        graph = self.graph
        constants = {name: value for name, value in graph.interface.constants.items() if isinstance(value, Tensor)}
        rows = find_row_layout(self.host, self.inputs, constants)
        if rows is None:
            return
        shapes, fixed = graph.interface.sizes.shapes, graph.interface.sizes.fixed
        held = {(name, axis) for name, axis in rows.axes.items() if name in shapes and shapes[name][axis] is not None}
        asked = next(iter(rows.axes.items())) not in held or held & {*fixed}
        needed = asked and (held or rows.axes.keys() & constants.keys())
        if (found := self._in_parts(rows, constants) if needed else None) is not None:
            by = "".join(
                f", at {line}" for line in dict.fromkeys(map(graph.interface.sizes.lines.get, sorted(held))) if line
            )
            self._note(
                f"the trace of the model holds for {rows.count} rows, and other calls run in parts of so many{by}"
            )
            sizes = graph.interface.sizes.forget_fixed(held)
            graph.interface = replace(graph.interface, rows=found, sizes=sizes)

    def _in_parts(self, rows: RowLayout, constants: Mapping[str, Tensor]) -> RowLayout | None:
        """The rows, if the program answers one more in parts as the host does at once; not if constants would differ.

        Args:
            rows: of the example.
            constants: tensors of the host's call that the program holds.
        """
        more = rows.taken({**self.inputs, **constants}, [*reversed(range(rows.count)), 0])
        inputs, total, structure = (
            {name: more[name] for name in self.inputs},
            rows.total(more),
            self.graph.interface.structure,
        )
        assert structure is not None
        try:
            parts = rows.split(more)
            if any(
                to_json_value(part[name]) != to_json_value(value) for part in parts for name, value in constants.items()
            ):
                return None
            wanted = replace_dataclasses(
                self._run(self.running, inputs, {name: more[name] for name in constants}).output
            )
            found = [self._program({name: part[name] for name in inputs}) for part in parts]
        except (_HostError, _ProgramError):
            return None
        whole = structure.find_row_outputs(found[0], wanted, rows, total)
        return whole if whole is not None and _outputs_close(structure.join(found, whole, total), wanted) else None

    def _right(self, chosen: AxisSizes) -> bool:
        """Whether both answer, and the same."""
        try:
            return self._difference(chosen) is None
        except _HostError:
            return False

    def _difference(self, chosen: AxisSizes) -> _OutputDifference | None:
        """Where the two differ at some sizes; raises ``_HostError`` where the host has no answer."""
        inputs = resize_inputs(self.inputs, chosen)
        ran = self._run(self.running, inputs)  # first: where the host raises, the program may too
        try:
            worst = self._worst(self._program(inputs), ran, inputs)
            if worst is None or self.stateful:
                return worst
            worst = self._worst(self._program(inputs), self._run(ModelRunner(self.host), inputs), inputs)
        except _ProgramError as error:
            return _OutputDifference(self.graph.interface.outputs[0], math.inf, inputs, error)
        if worst is None:
            self._note_stateful("its attributes")
        return worst

    # --- running both ------------------------------------------------------------------------------------------------

    def _example(self) -> ModelRun:
        """What the host answers on the example inputs."""
        try:
            return self._run(self.running, self.inputs)
        except WeightWritten as error:
            raise _written_weight(self.host, error) from error
        except _HostError as error:
            cause = error.__cause__
            raise CaptureError(
                f"{type(self.host).__name__} does not run on the example inputs: {type(cause).__name__}: {cause}",
                next_step="give example_inputs= that it can be called with",
                code="capture_failed",
            ) from cause

    def _run(
        self, running: ModelRunner, inputs: Inputs, constants: Mapping[str, Tensor] | None = None, seed: int = _SEED
    ) -> ModelRun:
        """One run of a copy of the host, with other constants than the program's where some are given."""
        args, kwargs = self.graph.exported.example_inputs or ((), {})
        changed = {id(value): inputs[name] for name, value in self.inputs.items()}
        own = {name: value for name, value in kwargs.items() if name not in self.graph.interface.derived}
        given, placed = pytree.tree_map(lambda value: changed.get(id(value), value), (args, own))
        try:
            return running.run(given, {**placed, **self.graph.interface.constants, **(constants or {})}, seed)
        except WeightWritten:
            raise
        except Exception as error:
            raise _HostError from error

    def _program(self, inputs: Inputs) -> list[object]:
        """The program's outputs, from the same random numbers."""
        try:
            with seed_random_numbers(self.host, _SEED):
                return run_graph(
                    self.graph,
                    {**inputs, **self.graph.interface.derive_inputs({**self.graph.interface.constants, **inputs})},
                )
        except Exception as error:
            raise _ProgramError(f"{type(error).__name__}: {error}") from error

    def _worst(self, found: list[object], ran: ModelRun, inputs: Inputs) -> _OutputDifference | None:
        """The output that is farthest from the host's; None where all are as near as rounding leaves them."""
        leaves, structure = pytree.tree_leaves(replace_dataclasses(ran.output)), self.graph.interface.structure
        assert structure is not None
        if len(leaves) != structure.spec.num_leaves:
            return _OutputDifference(f"{structure.spec.num_leaves} outputs for {len(leaves)}", math.inf, inputs)
        for place, value in structure.constants.items():
            if isinstance(leaves[place], Tensor) or leaves[place] != value:
                return _OutputDifference(f"output {place}", math.inf, inputs)
        wanted = self._tensors(ran)
        pairs = zip(self.graph.interface.outputs, found, wanted, strict=False)
        tensors = [(name, y, ref) for name, y, ref in pairs if isinstance(y, Tensor) and isinstance(ref, Tensor)]
        wrong = [
            _OutputDifference(name, relative_error(y, ref), inputs)
            for name, y, ref in tensors
            if differs_beyond_rounding(y, ref)
        ]
        return max(wrong, key=lambda difference: difference.share, default=None)

    def _tensors(self, ran: ModelRun) -> list[object]:
        """Of what the host answered, what the program answers too."""
        leaves, structure = pytree.tree_leaves(replace_dataclasses(ran.output)), self.graph.interface.structure
        constants = {} if structure is None else structure.constants
        return [leaf for place, leaf in enumerate(leaves) if place not in constants]

    # --- what is found ---------------------------------------------------------------------------------------------

    def _stochastic(self, first: ModelRun) -> bool:
        """Whether the host answers otherwise when it is asked again."""
        again = self._run(ModelRunner(self.host), self.inputs, seed=_OTHER_SEED if first.drew else _SEED)
        return self._worst(self._tensors(again), first, self.inputs) is not None

    def _note_written(self, first: ModelRun) -> None:
        """Note buffers that a call writes into, where the next one answers by them."""
        changed = self.running.changed()
        if not changed:
            return
        again = self._run(self.running, self.inputs)
        if self._worst(self._tensors(again), first, self.inputs) is not None:
            self._note_stateful(" and ".join(f"'{name}'" for name in changed))

    def _note_stateful(self, what: str) -> None:
        self.stateful = True
        self._note(
            f"the model answers by what earlier calls left in {what}; the program leaves nothing there, and answers as "
            "a first call does"
        )

    def _note_stochastic(self, first: ModelRun, worst: _OutputDifference | None) -> None:
        with seed_random_numbers(self.host, _SEED) as drew:
            run_graph(self.graph, self.inputs)
            draws = drew()
        does = "draws at each call, too" if draws else "repeats what was drawn when it was captured"
        held = "" if worst is None else ", and could not be held against the model"
        self._note(f"the model is stochastic: on equal inputs it answers differently; the program {does}{held}")

    def _note(self, text: str) -> None:
        self.graph.add_notes(text)

    def _differs(self, worst: _OutputDifference) -> CaptureError:
        other = worst.inputs is not self.inputs
        step = (
            "dynamic_shapes= that leave these sizes fixed make a program for the example's alone"
            if other
            else "something that tracing does not see decides what forward does, such as the values of its inputs, or "
            "arguments that it was not given: example_inputs= should have all that the model's own processor makes"
        )
        return CaptureError(
            f"torch.export gave another program than {type(self.host).__name__}: {worst}",
            next_step=f"{step}; target='eager' runs the model itself, self_test=False compiles the program as it is",
            code="capture_differs",
        )


def _outputs_close(found: object, wanted: object) -> bool:
    """Whether two outputs are the same but for rounding."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True))
    tensors = [(y, ref) for y, ref in pairs if isinstance(y, Tensor) and isinstance(ref, Tensor)]
    others = [(y, ref) for y, ref in pairs if not (isinstance(y, Tensor) and isinstance(ref, Tensor))]
    return all(y == ref for y, ref in others) and not any(differs_beyond_rounding(y, ref) for y, ref in tensors)


class _HostError(Exception):
    """The host raised an error on these inputs."""


class _ProgramError(Exception):
    """The program raised an error where the host answered."""


def _describe_shapes(inputs: Inputs) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
