"""Mistakes with held choices, budgets and registered adapters, as those of ``tests/mistakes.py``."""

from __future__ import annotations

from typing import Any

from tests.mistakes import Mistake, World
from tests.runtime.generation.recompute import over
from tests.runtime.generation.texts import compiled, prompts
from tests.runtime.switching import answer, build, pair


def _model(mode: str = "live") -> Any:
    return build(pair("lora", "dora"), "eager", mode, active="a")


def _crowded(limit: int | None) -> Any:
    model = _model()
    model.memory.limit = model.memory.used - 1
    model.memory.limit = limit or model.memory.limit
    return model.swap("b")


def _held(mode: str, choice: str, swapped: bool = False) -> Any:
    model = _model(mode)
    if swapped:
        model.swap(choice)
    with model.hold(choice) as held:
        return answer(model, adapters=held)


def _held_too_long(w: World) -> Any:
    model = _model()
    with model.hold("b") as held:
        pass
    return answer(model, adapters=held)


def _held_elsewhere(w: World) -> Any:
    with _model().hold("b") as held:
        return answer(_model(), adapters=held)


def _registered(w: World) -> Any:
    (w.folder / "none").mkdir(exist_ok=True)
    return _model().register(w.folder / "none")


def _row(**options: Any) -> Any:
    from lorac.runtime.generation.row_sampler import RowSampler

    return RowSampler(over(compiled("llama")), prompts()[0], max_new_tokens=2, **options)


MEMORY = [
    Mistake(
        "a choice that there is no memory for",
        lambda w: _crowded(None),
        lambda w, said: _crowded(1 << 20),
    ),
    Mistake("a choice that is held no longer", _held_too_long, lambda w, said: _held("live", "b")),
    Mistake("a choice that another model holds", _held_elsewhere),
    Mistake(
        "two choices in the same weights",
        lambda w: _held("fused", "b"),
        lambda w, said: (_held("fused", "b", swapped=True), _held("live", "b")),
    ),
    Mistake("a folder without adapters", _registered),
    Mistake(
        "beams in a running batch",
        lambda w: _row(num_beams=2),
        lambda w, said: over(compiled("llama")).generate(prompts()[0][None], num_beams=2, max_new_tokens=2),
    ),
]
