"""Plans for TensorRT: inputs, names and weights of plans, and outputs of the parsed file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lorac.ir.graph.interpreter import read_example_inputs
from lorac.ir.slots.roles import is_strength
from lorac.testing import assert_close
from tests.backends.tensorrt.building import HOSTS, WINDOW, Built, built, model_of, weights_of
from tests.limits import assert_apart

pytestmark = pytest.mark.slow("test_calls.py builds and swaps a plan; test_cpu_check.py compares parsed files")

ALL = ("lora", "one", "dora", "ia3", "oft", "meteora")
LINEAR = ("lora", "one", "dora", "ia3", "oft")
FAST = [
    ("llama", "fused", "float32", ("lora",)),
    ("bert", "live", "float16", ALL),
    ("vit", "baked", "bfloat16", ("dora",)),
    ("t5", "live", "float32", ("lora",)),
    ("resnet", "live", "float32", ("lora", "ia3")),
]
"""Every host, method, mode and dtype, but not every one with every other."""
TOGETHER = [
    ("llama", "live", "float16", ("lora", "one", "dora")),
    ("bert", "live", "float32", ALL),
    ("bert", "live", "bfloat16", ("lora",)),
    ("vit", "live", "float16", ALL),
    ("vit", "fused", "float16", ("oft",)),
    ("t5", "live", "float32", ("lora", "meteora")),
    ("resnet", "live", "float32", LINEAR),
]
"""More of them together."""
METHODS = ("lora", "dora", "ia3", "oft", "meteora")
WHOLE = [
    (name, mode, dtype, (method,))
    for name in HOSTS
    for dtype in ("float32", "float16")
    for mode, methods in (("live", METHODS), ("fused", METHODS[:2]), ("baked", METHODS[:2]))
    for method in methods
]
SLOW = [case for case in [*TOGETHER, *WHOLE] if case not in FAST]
CASES = [(case, ()) for case in FAST] + [(case, pytest.mark.slow) for case in SLOW]


def _named(case: tuple[str, str, str, tuple[str, ...]]) -> str:
    *words, methods = case
    return "-".join((*words, "+".join(methods)))


@pytest.fixture(scope="module", params=[pytest.param(case, marks=marks, id=_named(case)) for case, marks in CASES])
def found(request: pytest.FixtureRequest) -> Built:
    """Return a built case, once for all its tests, which follow one another."""
    make = built if request.param in FAST else built.__wrapped__  # none that takes long is cached
    return make(*request.param)


KERNEL = 4
CHANNELS = 4
"""To a multiple of so many the library fills up a kernel's channels in half precision."""
KINDS = {torch.float32: "FLOAT", torch.float16: "HALF", torch.bfloat16: "BF16", torch.int64: "INT64"}


def test_the_inputs_of_the_network_are_the_programs_own(found):
    """Names, dtypes and sizes, as the manifest of slots and the call have them; ranks lie within what was planned."""
    part, engine = found.engine.graphs["main"], found.engine
    slots = {} if engine.constant else part.slots
    assert found.network.keys() == {*part.interface.inputs, *slots} == part.facts.ranges.keys()
    assert {name: kind for name, (kind, _) in found.network.items()} == {n: KINDS[d] for n, d in part.dtypes.items()}
    contents = engine.memory if engine.fused else found.compiled.switch.state.bound.tensors
    for slot in slots:
        assert contents[slot].dtype == part.dtypes[slot]
        assert all(size in range_ for size, range_ in zip(contents[slot].shape, part.facts.ranges[slot], strict=True))
        plan, places = engine.plans[part.slots[slot].site], [(1, engine.most_places("main"))] * part.slots[slot].placed
        varying = [
            (r.least, r.most)
            for r, size in zip(part.facts.ranges[slot], found.network[slot][1], strict=True)
            if size < 0
        ]
        assert varying in (places, [*places, (plan.least_rank, plan.rank)])


def test_names_and_weights_are_in_the_plan(found):
    """Every input's name; and every large weight once, found by a part of it."""
    plan = found.plan
    for value in found.network:
        assert value.encode() in plan
    weights = weights_of(found.engine)
    assert weights
    for weight, array in weights.items():
        count = sum(plan.count(window) for window in {_window(form) for form in _laid_out(array)})
        assert count == 1, f"{weight} is in the plan {count} times"


def _laid_out(array: Any) -> list[Any]:
    """Yield the layouts in which a plan may store a weight: by rows, by columns, or with a kernel's channels last."""
    if array.ndim != KERNEL:
        return [array, array.T]
    missing = -array.shape[1] % CHANNELS if array.itemsize == 2 else 0
    return [np.pad(array.transpose(0, 2, 3, 1), [(0, 0), (0, 0), (0, 0), (0, missing)])]


def _window(array: Any) -> bytes:
    flat = np.ascontiguousarray(array).reshape(-1)
    middle = flat.size // 2
    return flat[middle : middle + WINDOW].tobytes()


def test_the_file_that_the_parser_was_handed_answers_as_the_program(found):
    """At the least rank and the largest, each method alone, and none; half precision computed in float32."""
    methods = list(found.compiled.adapters)
    several = [{method: 0.5 for method in methods if method != "meteora"}] if len(methods) > 1 else []
    choices: list[Any] = [methods[0]] if found.engine.constant else [*methods, *several, None]
    answered = []
    for choice in choices:
        (y, *_), (wanted, *_) = found.answers(choice)
        assert_close(y, wanted)
        answered.append(y)
    for y in answered[:-1]:
        assert_apart(y, answered[-1])
    if "meteora" in methods:
        _assert_selected(found)


def _assert_selected(found: Built) -> None:
    """Check that a router that is off leaves the base's bits whatever its parameters are."""
    ops = {node.op_type for node in model_of(found.engine).graph.node}
    assert "Where" in ops and "If" not in ops
    graph = found.program.graphs["main"]
    inputs, slots = read_example_inputs(graph, graph.interface.inputs), found.engine.slots
    contents = found.compiled.switch.state.bound.tensors  # nothing was active last
    parameters = {name for name in contents if "branch" in slots[name].role and not is_strength(slots[name].role)}
    assert parameters
    spoilt = {name: torch.full_like(t, torch.nan) if name in parameters else t for name, t in contents.items()}
    answers = [found.tried.outputs("main", tensors, inputs)[0] for tensors in (contents, spoilt)]
    assert torch.equal(*answers)
