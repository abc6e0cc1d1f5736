"""Weights that are replaced in a plan: which are marked, and that nothing of the previous choice stays."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import lorac
from lorac.backends.tensorrt import refitting
from lorac.backends.tensorrt.refitting import WeightRefitter, mark_refittable
from tests.backends.tensorrt import engines, tiny
from tests.backends.tensorrt.tiny import BIAS, LIBRARY, WEIGHT

Tensor = torch.Tensor


# --- marking ----------------------------------------------------------------------------------------------------------
def test_those_that_are_named_are_marked_and_no_others() -> None:
    network, _ = tiny.parsed()
    mark_refittable(network, [WEIGHT])
    assert network.are_weights_marked_refittable(WEIGHT)
    assert not network.are_weights_marked_refittable(BIAS)


def test_a_weight_that_the_library_lacks() -> None:
    """A name that the network does not have, as of a weight that the parser folded."""
    network, _ = tiny.parsed()
    with pytest.raises(lorac.Unavailable, match=r"does not let 'folded' be replaced.*no weights named folded"):
        mark_refittable(network, ["folded"])


def test_uses_the_flag_for_marked_weights() -> None:
    assert refitting.refit_flag(LIBRARY).name == "REFIT_INDIVIDUAL"


# --- writing ----------------------------------------------------------------------------------------------------------
ONE, OTHER, THIRD = "one", "other", "third"


def _base() -> dict[str, Tensor]:
    return {name: torch.full((2, 3), float(place)) for place, name in enumerate((ONE, OTHER, THIRD))}


def _refitting(joined: dict[str, str] | None = None) -> tuple[WeightRefitter, engines.Weights, dict[str, Tensor]]:
    memory = _base()
    made = engines.Weights(_base(), joined)
    return WeightRefitter(engines.OfNetwork(), memory, LIBRARY, made), made, memory


def _choose(memory: dict[str, Tensor], adapted: Mapping[str, float]) -> None:
    """Write a choice as an engine does: the adapted weights, and the others from the base."""
    for name, base in _base().items():
        memory[name].copy_(base + adapted.get(name, 0))


def test_writes_only_the_weights_of_the_choice() -> None:
    refits, made, memory = _refitting()
    _choose(memory, {ONE: 5})
    assert refits.write([ONE]) == memory[ONE].nbytes
    assert made.runs == [[ONE]] and torch.equal(made.holds[ONE], _base()[ONE] + 5)


def test_removes_the_previous_choice() -> None:
    refits, made, memory = _refitting()
    for adapted in ({ONE: 5}, {OTHER: 7}, {}):
        _choose(memory, adapted)
        refits.write(list(adapted))
        assert all(torch.equal(made.holds[name], memory[name]) for name in memory)
    assert made.runs == [[ONE], [ONE, OTHER], [OTHER]], "always the union of what was and what is, and no more"
    assert refits.write([]) == 0 and len(made.runs) == 3


def test_weights_that_the_builder_joined_are_written_together() -> None:
    refits, made, memory = _refitting({ONE: THIRD})
    _choose(memory, {ONE: 5})
    assert refits.write([ONE]) == 2 * memory[ONE].nbytes
    assert made.runs == [[ONE, THIRD]] and torch.equal(made.holds[THIRD], _base()[THIRD])


def test_rejects_a_weight_that_is_fused_with_others() -> None:
    memory = {ONE: _base()[ONE]}
    refits = WeightRefitter(engines.OfNetwork(), memory, LIBRARY, engines.Weights(_base(), {ONE: THIRD}))
    with pytest.raises(lorac.Unavailable, match="combines 'third' with weights to be replaced"):
        refits.write([ONE])


def test_writes_all_weights_after_a_failure() -> None:
    refits, made, memory = _refitting()
    _choose(memory, {ONE: 5, OTHER: 7})
    made.fails = True
    with pytest.raises(lorac.Unavailable, match="does not replace the weights"):
        refits.write([ONE, OTHER])
    made.fails = False
    _choose(memory, {})
    refits.write([])
    assert all(torch.equal(made.holds[name], base) for name, base in _base().items())


def test_numbers_are_not_looked_through() -> None:
    _, made, _ = _refitting()
    assert made.weights_validation is False


def test_memory_of_another_size_or_dtype_is_found_at_once() -> None:
    for wrong in (torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.float16)):
        with pytest.raises(lorac.Unavailable, match="'one' was built with 6 numbers of FLOAT"):
            WeightRefitter(engines.OfNetwork(), {ONE: wrong}, LIBRARY, engines.Weights(_base()))


def test_a_plan_that_lets_none_be_replaced() -> None:
    engine = engines.OfNetwork()
    engine.refittable = False
    with pytest.raises(lorac.Unavailable, match=r"no weight of the plan can be replaced.*\n.*mode='fused' alone"):
        WeightRefitter(engine, {}, LIBRARY)
