"""The self-test after emission: no slot was folded, copied, exchanged or bypassed (invariant 8).

The static test: every slot is an input from which a path leads to an output, and no constant equals a slot's content.
The dynamic test takes a few runs for any number of slots: with seeded noise in all slots, the engine's outputs agree
with the captured program's, also for another batch and length; with the original contents, they equal the earlier
outputs bit by bit. Programs that draw random numbers cannot be tested.
"""

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lorac.backends.onnx.engine import AnyOnnxEngine
from lorac.backends.onnx.tested_contents import (
    BoundContents,
    TestedContents,
    WrittenContents,
    holds_same_values,
    self_test_failure,
)
from lorac.errors import CompileError
from lorac.ir.graph.graph import Graph, Program
from lorac.ir.graph.interpreter import (
    differs_beyond_rounding,
    read_example_inputs,
    relative_error,
    resize_inputs,
    run_graph,
)
from lorac.ir.slots.composition import ComposedWeights
from lorac.ir.slots.places import stack_places

_FEW_ROWS = 2
"""Rows, or equal parts of a batch, that get noise of their own."""
_MIN_ELEMENTS = 4
"""Tensors with fewer elements may be equal by chance."""
_MAX_AMPLIFICATION, _MAX_DISTANCE = 8, 0.02
"""Limits of an output's error: as a multiple of its change by one rounding of the inputs, and absolutely. A slot that
is dropped or exchanged changes it by more."""


ConstantTransform = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Tensors by name -> the tensors that the emitted program computes with, such as quantised ones."""


def run_self_test(
    engine: AnyOnnxEngine,
    program: Program,
    snapshot: ComposedWeights,
    computed: ConstantTransform = dict,
    *,
    is_onnx: bool = True,
) -> None:
    """Check an engine against the program from which it was emitted.

    Args:
        engine: as built.
        program: the lowered program, with its weights.
        snapshot: the initial contents of the slots; for a baked engine, its constants.
        computed: a function from constants of the program to those of the emitted program.
        is_onnx: whether the engine's files are ONNX models, which the static test reads.

    Raises:
        CompileError: naming the defective slots.
    """
    baked = engine.mode == "baked"
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        contents = (WrittenContents if engine.fused else BoundContents)(engine, snapshot)
        for name, graph in program.graphs.items():
            old = {} if baked or not is_onnx else _tensors_of_graph(contents.old(), graph)
            if is_onnx:
                from lorac.backends.onnx.slot_checks import check_slots  # it imports ONNX's libraries

                distinctive = {  # no constant can equal them by chance
                    slot: tensor
                    for slot, tensor in old.items()
                    if tensor.is_floating_point() and tensor.numel() >= _MIN_ELEMENTS
                    if not holds_same_values(tensor, contents.idle(slot)) and (tensor != tensor.flatten()[0]).any()
                }
                check_slots(engine, graph, distinctive)
            _ProgramComparison(engine, program, name, contents, computed).check()
        contents.leave()


class _ProgramComparison:
    """A comparison of an emitted graph with the captured one.

    Args:
        engine: the engine of the emitted program.
        program: the captured one.
        name: the name of the graph.
        contents: contents to try in the slots.
        computed: a function from constants of the program to those of the emitted program.
    """

    def __init__(
        self, engine: AnyOnnxEngine, program: Program, name: str, contents: TestedContents, computed: ConstantTransform
    ) -> None:
        self.engine, self.graph, self.contents, self.computed = engine, program.graphs[name], contents, computed
        constants = self.graph.exported.constants  # tables that passes made of weights are quantised as the weights are
        tables = {name: table for name, table in constants.items() if isinstance(table, Tensor)}
        self.weights = computed({**tables, **self.graph.exported.state_dict})
        self.inputs: Mapping[str, Tensor] = read_example_inputs(self.graph, self.graph.interface.inputs)
        sizes = self.graph.interface.sizes
        other = sizes.find_other(sizes.measure(self.inputs))
        self.others = None if other is None else resize_inputs(self.inputs, other)
        self.placed = [name for name, slot in self.graph.slots.items() if slot.placed]

    def check(self) -> None:
        """Run all comparisons; ignore differences if the program draws random numbers."""
        try:
            self._compare(list(self.graph.slots))
        except CompileError as error:
            if error.code not in ("self_test_failed", "self_test_undecided"):
                raise
            one, other = (self._wanted(self.inputs, self.contents.old()) for _ in range(2))
            if not any(differs_beyond_rounding(a, b) for a, b in zip(one, other, strict=True)):
                raise

    def _compare(self, slots: Sequence[str]) -> None:
        """Run all comparisons; if the one with noise fails, find the defective slots."""
        contents = self.contents
        if self.engine.mode == "baked":
            baked = self.computed(contents.old())
            if self._differs(baked):
                raise self_test_failure(slots, "do not hold the values that were baked into them")
            self._check_sizes(baked)
            return
        before = self._run(contents.old())
        noise = contents.noise(0)
        # Rounding may change a router's choice, but a defect also shows with other noise.
        if self._differs(noise) and self._differs(noise := contents.noise(1)):
            raise self._diagnosed(_tensors_of_graph(noise, self.graph))
        # Another batch and length, with different noise for each part; the model itself may not run at that size.
        agrees = False
        stacked = None if self.others is None else self._noise_by_places(self.others, 0)
        if stacked is not None and self.others is not None:
            with contextlib.suppress(Exception):
                agrees = not self._differs(stacked, self.others)
        if not agrees:  # the separate checks find the defect
            self._check_sizes(noise, lambda: contents.noise(2))
            self._check_places()
        after = self._run(contents.old())
        if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
            raise self_test_failure(slots, "depend on tensors that they held before: the first now give other bits")

    def _check_sizes(
        self, tensors: Mapping[str, Tensor], redraw: Callable[[], Mapping[str, Tensor]] | None = None
    ) -> None:
        """Compare at another batch and length, if the program allows it; if they differ, try other noise too."""
        if self.others is None:
            return
        try:
            wrong = self._differs(tensors, self.others) and (redraw is None or self._differs(redraw(), self.others))
        except Exception:  # the model itself does not run at that size
            return
        if wrong:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in self.others.items())
            raise CompileError(
                f"the program of graph '{self.graph.name}' is right on the example inputs, and wrong on {shapes}",
                next_step="give dynamic_shapes= that fix these sizes, for a program of the example's sizes",
                code="self_test_failed",
            )

    def _check_places(self) -> None:
        """Compare with different noise for each part of a batch, if slots have places."""
        for first in (0, 1):
            stacked = self._noise_by_places(self.inputs, first)
            if stacked is None or not self._differs(stacked):
                return
        raise self_test_failure(self.placed, "give wrong answers where rows have adapters of their own")

    def _noise_by_places(self, inputs: Mapping[str, Tensor], first: int) -> dict[str, Tensor] | None:
        """Return noise for two places, or for one place per row, with consecutive seeds; None for a single row."""
        rows = next((value.shape[0] for value in inputs.values() if value.dim()), 1)
        if not self.placed or rows < _FEW_ROWS:
            return None
        seeds = range(first, first + (_FEW_ROWS if rows % _FEW_ROWS == 0 else rows))
        drawn = [_tensors_of_graph(self.contents.noise(seed), self.graph) for seed in seeds]
        return drawn[0] | {name: stack_places([one[name] for one in drawn]) for name in self.placed}

    def _wanted(self, inputs: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the outputs of the captured program."""
        return run_graph(self.graph, inputs, tensors, self.weights)

    def _run(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        return self.engine.outputs(self.graph.name, _tensors_of_graph(tensors, self.graph), inputs or self.inputs)

    def _differs(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor] | None = None) -> bool:
        """Return whether the programs' outputs differ, by default on the example inputs."""
        # Noise in the weights of a deep network amplifies rounding, regardless of emission.
        return any(
            not error <= min(_MAX_AMPLIFICATION * moved, _MAX_DISTANCE)
            for error, moved in self._measure_errors(tensors, inputs or self.inputs)
        )

    def _measure_errors(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[tuple[float, float]]:
        """Return (error, change caused by rounding the inputs) for each output that differs by more than rounding."""
        baked = self.engine.mode == "baked"
        expected = self._wanted(inputs, tensors)
        try:
            found = self._run({} if baked else tensors, inputs)
        except Exception:  # shapes do not fit, so the slot feeds another op
            return [(math.inf, 0.0)]
        if not any(differs_beyond_rounding(y, ref) for y, ref in zip(found, expected, strict=True)):
            return []
        moved = self._wanted(_perturb(inputs), _perturb(tensors))
        return [
            (relative_error(y, ref), relative_error(again, ref))
            for y, ref, again in zip(found, expected, moved, strict=True)
            if differs_beyond_rounding(y, ref)
        ]

    def _diagnosed(self, noise: Mapping[str, Tensor]) -> CompileError:
        """Return the error that names the defective slots.

        A slot without effect is bypassed. Slots are exchanged if the programs differ only when one slot's content
        differs from that of other slots of its shape. If rounding alone changes every differing output, the test is
        undecided.
        """
        moves = [moved for _, moved in self._measure_errors(noise, self.inputs)]
        if min(moves, default=0.0) > _MAX_DISTANCE:
            return CompileError(
                f"rounding the inputs changes an output of graph '{self.graph.name}' by {max(moves):.0%}, so that a "
                "comparison cannot tell whether the program is right",
                next_step="load trained weights, which amplify less, or give self_test=False to skip the check",
                code="self_test_undecided",
            )
        mute = [name for name in noise if not self._matters(name, noise)]
        if mute:
            return self_test_failure(mute, "change nothing")
        first: dict[object, Tensor] = {}  # all slots of one shape get the same tensor
        common = {name: first.setdefault((tensor.dtype, tensor.shape), tensor) for name, tensor in noise.items()}
        wrong = [name for name in noise if self._differs({**common, name: _change_values(common[name])})]
        if self._differs(common) or not wrong:
            return self_test_failure(list(noise), "give other answers than in the captured program")
        return self_test_failure(wrong, "are exchanged")

    def _matters(self, name: str, noise: Mapping[str, Tensor]) -> bool:
        if not noise[name].is_floating_point():
            return True
        changed = {**noise, name: _change_values(noise[name])}
        try:
            one, two = (self._run(tensors) for tensors in (noise, changed))
        except Exception:  # as above: it has an effect, on another op
            return True
        return any(not torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _tensors_of_graph(tensors: Mapping[str, Tensor], graph: Graph) -> dict[str, Tensor]:
    """Return the tensors of one graph's slots."""
    return {name: tensors[name] for name in graph.slots if name in tensors}


def _perturb(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Increase or decrease every floating-point number by about one rounding."""
    generator = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        sides = torch.randint(0, 2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + sides * torch.finfo(tensor.dtype).eps)

    return {name: moved(tensor) for name, tensor in tensors.items()}


def _change_values(tensor: Tensor) -> Tensor:
    return tensor * 1.5 + 0.01 if tensor.is_floating_point() else tensor
