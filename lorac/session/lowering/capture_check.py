"""Check a captured program against the model: same outputs, at other sizes too (invariant 8).

The reference interpreter runs the bare program, before any pass, and the model runs by itself. Both get the example
inputs, then inputs of another batch and length made from these. Behaviour that no program can have, such as drawing
random numbers, becomes a note on the graph, which ``explain()`` repeats.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lorac.errors import CaptureError, ExampleInputsNeeded, nearest_name, short, warn
from lorac.frontend.capture.export import isolate_tracing
from lorac.frontend.host import Host
from lorac.frontend.inputs.dynamic_shapes import find_row_layout
from lorac.frontend.model_runner import ModelRun, ModelRunner, WeightWritten, seed_random_numbers
from lorac.ir.calls.call import Call, to_json_value
from lorac.ir.calls.output_structure import replace_dataclasses
from lorac.ir.calls.row_layout import RowLayout
from lorac.ir.calls.sizes import AxisSizes, describe_axes
from lorac.ir.graph.graph import Graph
from lorac.ir.graph.interpreter import (
    differs_beyond_rounding,
    read_example_inputs,
    relative_error,
    resize_inputs,
    run_graph,
)

Inputs = Mapping[str, Tensor]
_SEED, _OTHER_SEED = 0, 1


def check_capture(graph: Graph, host: Host, *, tested: bool) -> None:
    """Compare a captured graph with its model, and warn callers of its limits.

    Args:
        graph: the captured graph; the check adds the accepted sizes, and notes, to its interface.
        host: the model that it was captured from; left as it was.
        tested: whether to run both. If not, torch's assumptions about small sizes are dropped without a check.

    Raises:
        CaptureError: the program's outputs differ, or the model does not run or writes its weights.
    """
    if tested and not any(parameter.is_meta for parameter in host.model.parameters()):
        with isolate_tracing(host.model):
            _ModelComparison(graph, host).check()
    else:
        _accept_unchecked(graph, read_example_inputs(graph, graph.interface.inputs))
    if graph.interface.sizes.fixed:
        sizes = graph.interface.sizes
        values = sorted({f"{sizes.shapes[name][axis]}" for name, axis in sizes.fixed})
        lines = "".join(f"\n  at {line}" for line in dict.fromkeys(sizes.lines.values()))
        warn(
            f"the trace of the model fixed sizes that should vary: {describe_axes(sizes.fixed)}, at "
            f"{' and '.join(values)}; calls of another size are refused{lines}",
            next_step="compile with example_inputs= of the sizes that are needed; target='eager' takes any",
        )
    for note in graph.interface.notes:
        warn(note)


def check_runnable(host: Host, inputs: object) -> None:
    """Run the model on its example inputs, to raise its own error where torch.export's says less.

    Args:
        host: a model that could not be captured; left as it was.
        inputs: its example inputs; None: they are made.

    Raises:
        CaptureError: the model writes a weight.
        ExampleInputsNeeded: the model cannot be called with the given inputs.
    """
    try:
        with isolate_tracing(host.model):
            ModelRunner(host.model).run(Call((), host.bind(inputs)), _SEED)
    except WeightWritten as error:
        raise _written_weight(host.model, error) from error
    except Exception as error:
        if inputs is None:
            return
        parameters = list(host.parameters)
        named = inputs if isinstance(inputs, Mapping) else dict(enumerate(inputs)) if isinstance(inputs, tuple) else {}
        shapes = {
            n: f"{str(v.dtype).removeprefix('torch.')}{list(v.shape)}"
            for n, v in named.items()
            if isinstance(v, Tensor)
        }
        given = ", ".join(f"{name} {shapes.get(name) or short(value)}" for name, value in named.items()) or short(
            inputs
        )
        unknown = [name for name in named if isinstance(name, str) and name not in parameters]
        raise ExampleInputsNeeded(
            f"{type(host.model).__name__} cannot be called with example_inputs= ({given}): {type(error).__name__}: "
            f"{error}",
            nearest=nearest_name(unknown[0], parameters) if unknown else None,
            next_step=host.advise_names(named)
            or f"its forward takes ({', '.join(parameters)}): give inputs with which the model itself can be called",
        ) from error


def _written_weight(model: nn.Module, error: WeightWritten) -> CaptureError:
    return CaptureError(
        f"forward of {type(model).__name__} writes into its own weight '{error.name}'",
        next_step="call the model once in eval mode before compiling, if only its first call writes; a weight that "
        "every call writes cannot be a constant of a program",
    )


def _accept_unchecked(graph: Graph, inputs: Inputs) -> None:
    """Accept the program at the smallest sizes without a comparison."""
    sizes = graph.interface.sizes
    _set_sizes(graph, sizes.find_smallest(sizes.measure(inputs)))


def _set_sizes(graph: Graph, right: Sequence[AxisSizes]) -> None:
    sizes = graph.interface.sizes.resolve_assumptions(right)
    graph.interface = replace(graph.interface, sizes=sizes)


@dataclass(frozen=True)
class _OutputDifference:
    """The difference between an output of the program and the model's.

    Attributes:
        error: the error relative to the model's output; infinite if the two cannot be compared.
        failure: the error that the program raised, if it did.
    """

    output: str
    error: float
    inputs: Inputs
    failure: Exception | None = None

    def __str__(self) -> str:
        on = "on inputs of " + ", ".join(f"{name} {list(value.shape)}" for name, value in self.inputs.items())
        if self.failure is not None:
            return f"it does not run {on}: {self.failure}"
        by = f"is off by {self.error:.2g} of its size" if self.error < math.inf else "is another one"
        return f"'{self.output}' {by} {on}"


class _ModelComparison:
    """A comparison of a captured graph with its model."""

    def __init__(self, graph: Graph, host: Host) -> None:
        self.graph, self._host, self.model = graph, host, host.model
        self.inputs = read_example_inputs(graph, graph.interface.inputs)
        self.stateful = False
        self._runner = ModelRunner(host.model)

    @property
    def runner(self) -> ModelRunner:
        """The copy of the model to run: the same for all runs, or a fresh one if earlier runs change the outputs."""
        return ModelRunner(self.model) if self.stateful else self._runner

    def check(self) -> None:
        """Compare on the example inputs, then at other sizes."""
        first = self._run_example()
        if changed := self.runner.changed():
            again = self._run_model(self.runner, self.inputs)
            if self._worst(self._varying_outputs(again), first, self.inputs) is not None:
                self._note_stateful(" and ".join(f"'{name}'" for name in changed))
        try:
            worst = self._worst(self._run_program(self.inputs), first, self.inputs)
        except _ProgramError as error:
            raise self._differs(_OutputDifference("", math.inf, self.inputs, error)) from error
        second = None  # another run, whose outputs differ if the model is stochastic
        if first.drew or worst is not None:
            seed = _OTHER_SEED if first.drew else _SEED
            second = self._varying_outputs(self._run_model(ModelRunner(self.model), self.inputs, seed=seed))
        if second is not None and self._worst(second, first, self.inputs) is not None:
            with seed_random_numbers(self.model, _SEED) as drew:
                run_graph(self.graph, self.inputs)
                draws = drew()
            does = "draws at each call, too" if draws else "repeats what was drawn when it was captured"
            unchecked = "" if worst is None else ", and could not be compared with the model"
            self.graph.add_notes(
                f"the model is stochastic: on equal inputs it answers differently; the program {does}{unchecked}"
            )
            if worst is not None:  # outputs cannot be compared at other sizes either
                _accept_unchecked(self.graph, self.inputs)
                return
        elif worst is not None:
            raise self._differs(worst)
        self._check_sizes()
        if not self.stateful:
            self._check_rows()

    def _check_sizes(self) -> None:
        """Compare at another batch and length, and at sizes that torch may have specialised on, such as 1."""
        sizes = self.graph.interface.sizes
        example = sizes.measure(self.inputs)
        other, runs = sizes.find_other(example), example
        with contextlib.suppress(_ModelError):  # the model does not run at this size, so the program need not
            if other is not None:
                if (worst := self._difference(other)) is not None:
                    raise self._differs(worst)
                runs = other
        right: list[AxisSizes] = []
        for chosen in sizes.find_doubtful(runs):
            with contextlib.suppress(_ModelError):
                if self._difference(chosen) is None:
                    right.append(chosen)
        _set_sizes(self.graph, right)

    def _check_rows(self) -> None:
        """Find out whether a program of a fixed number of rows can run other calls in parts of that many rows."""
        interface = self.graph.interface
        constants = {name: value for name, value in interface.constants.items() if isinstance(value, Tensor)}
        rows = find_row_layout(self._host, self.inputs, constants)
        if rows is None:
            return
        sizes = interface.sizes
        fixed = {
            (name, axis)
            for name, axis in rows.axes.items()
            if name in sizes.shapes and sizes.shapes[name][axis] is not None
        }
        varies = next(iter(rows.axes.items())) not in fixed or fixed & {*sizes.fixed}
        if not varies or not (fixed or rows.axes.keys() & constants.keys()):
            return
        layout = self._run_in_parts(rows, constants)
        if layout is None:
            return
        lines = "".join(f", at {line}" for line in dict.fromkeys(map(sizes.lines.get, sorted(fixed))) if line)
        self.graph.add_notes(
            f"the trace of the model holds for {rows.count} rows, and other calls run in parts of so many{lines}"
        )
        self.graph.interface = replace(self.graph.interface, rows=layout, sizes=sizes.forget_fixed(fixed))

    def _run_in_parts(self, rows: RowLayout, constants: Mapping[str, Tensor]) -> RowLayout | None:
        """Return the outputs' row layout if one row more, run in parts, gives the model's outputs for all rows at once.

        Args:
            rows: the row layout of the example inputs.
            constants: tensors that are constants of the program; they must be the same for every part.
        """
        structure = self.graph.interface.structure
        assert structure is not None
        more = rows.select({**self.inputs, **constants}, [*reversed(range(rows.count)), 0])
        parts = rows.split(more)
        pairs = [(part[name], value) for part in parts for name, value in constants.items()]
        if any(to_json_value(one) != to_json_value(other) for one, other in pairs):
            return None
        inputs = {name: more[name] for name in self.inputs}
        try:
            expected = self._run_model(self.runner, inputs, {name: more[name] for name in constants})
            answers = [self._run_program({name: part[name] for name in inputs}) for part in parts]
        except (_ModelError, _ProgramError):
            return None
        expected_output = replace_dataclasses(expected.output)
        layout = structure.find_row_outputs(answers[0], expected_output, rows, rows.count_rows(more))
        if layout is None:
            return None
        joined = structure.join(answers, layout, rows.count_rows(more))
        leaves = zip(pytree.tree_leaves(joined), pytree.tree_leaves(expected_output), strict=False)
        for one, other in leaves:
            both = isinstance(one, Tensor) and isinstance(other, Tensor)
            if differs_beyond_rounding(one, other) if both else one != other:
                return None
        return layout

    def _difference(self, chosen: AxisSizes) -> _OutputDifference | None:
        """Return the largest difference of outputs at some sizes; raises ``_ModelError`` if the model fails there."""
        inputs = resize_inputs(self.inputs, chosen)
        expected = self._run_model(self.runner, inputs)  # first, since the program may fail where the model fails
        try:
            worst = self._worst(self._run_program(inputs), expected, inputs)
            if worst is None or self.stateful:
                return worst
            worst = self._worst(self._run_program(inputs), self._run_model(ModelRunner(self.model), inputs), inputs)
        except _ProgramError as error:
            return _OutputDifference(self.graph.interface.outputs[0], math.inf, inputs, error)
        if worst is None:
            self._note_stateful("its attributes")
        return worst

    def _run_example(self) -> ModelRun:
        try:
            return self._run_model(self.runner, self.inputs)
        except WeightWritten as error:
            raise _written_weight(self.model, error) from error
        except _ModelError as error:
            cause = error.__cause__
            raise CaptureError(
                f"{type(self.model).__name__} does not run on the example inputs: {type(cause).__name__}: {cause}",
                next_step="give example_inputs= that it can be called with",
            ) from cause

    def _run_model(
        self, runner: ModelRunner, inputs: Inputs, constants: Mapping[str, Tensor] | None = None, seed: int = _SEED
    ) -> ModelRun:
        """Run a copy of the model; ``constants`` replace constants of the program."""
        interface = self.graph.interface
        args, kwargs = self.graph.exported.example_inputs or ((), {})
        exchanged = {id(value): inputs[name] for name, value in self.inputs.items()}
        own = {name: value for name, value in kwargs.items() if name not in interface.derived}
        args, own = pytree.tree_map(lambda value: exchanged.get(id(value), value), (args, own))
        try:
            return runner.run(Call(args, {**own, **interface.constants, **(constants or {})}), seed)
        except WeightWritten:
            raise
        except Exception as error:
            raise _ModelError from error

    def _run_program(self, inputs: Inputs) -> list[object]:
        """Run the program with the same random numbers as the model."""
        interface = self.graph.interface
        try:
            with seed_random_numbers(self.model, _SEED):
                derived = interface.derive_inputs({**interface.constants, **inputs})
                return run_graph(self.graph, {**inputs, **derived})
        except Exception as error:
            raise _ProgramError(f"{type(error).__name__}: {error}") from error

    def _worst(self, answer: list[object], expected: ModelRun, inputs: Inputs) -> _OutputDifference | None:
        """Return the output that is farthest from the model's, or None if all agree up to rounding."""
        leaves, structure = pytree.tree_leaves(replace_dataclasses(expected.output)), self.graph.interface.structure
        assert structure is not None
        if len(leaves) != structure.spec.num_leaves:
            return _OutputDifference(f"{structure.spec.num_leaves} outputs for {len(leaves)}", math.inf, inputs)
        for place, value in structure.constants.items():
            if isinstance(leaves[place], Tensor) or leaves[place] != value:
                return _OutputDifference(f"output {place}", math.inf, inputs)
        pairs = zip(self.graph.interface.outputs, answer, self._varying_outputs(expected), strict=False)
        differences = [
            _OutputDifference(name, relative_error(y, ref), inputs)
            for name, y, ref in pairs
            if isinstance(y, Tensor) and isinstance(ref, Tensor) and differs_beyond_rounding(y, ref)
        ]
        return max(differences, key=lambda difference: difference.error, default=None)

    def _varying_outputs(self, run: ModelRun) -> list[object]:
        """Return the model's outputs, except outputs that are constants of the program."""
        leaves, structure = pytree.tree_leaves(replace_dataclasses(run.output)), self.graph.interface.structure
        constants = {} if structure is None else structure.constants
        return [leaf for place, leaf in enumerate(leaves) if place not in constants]

    def _note_stateful(self, place: str) -> None:
        self.stateful = True
        self.graph.add_notes(
            f"the model's answers depend on what earlier calls left in {place}; the program leaves nothing there, and "
            "always answers as a first call does"
        )

    def _differs(self, worst: _OutputDifference) -> CaptureError:
        step = (
            "forward depends on something that tracing does not see, such as values of its inputs or missing "
            "arguments: give example_inputs= all that the model's own processor makes"
            if worst.inputs is self.inputs
            else "give dynamic_shapes= that fix these sizes, for a program of the example's sizes"
        )
        return CaptureError(
            f"torch.export gave another program than {type(self.model).__name__}: {worst}",
            next_step=f"{step}; target='eager' runs the model itself, self_test=False compiles the program as it is",
            code="capture_differs",
        )


class _ModelError(Exception):
    """The model raised an error on these inputs."""


class _ProgramError(Exception):
    """The program raised an error where the model did not."""
