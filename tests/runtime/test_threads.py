"""Calls from many threads while others swap, add and remove: every answer belongs to exactly one choice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import lorac
from tests.runtime.switching import CHOICES, adapter, answer, build, key, pair, raw

SECONDS = 1.0
ENGINES = [(target, mode) for target in ("eager", "onnxruntime") for mode in ("live", "fused")]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def compiled(request):
    """One compiled model per target and mode."""
    return build(pair("lora", "shira"), *request.param)


@pytest.fixture
def expected(compiled):
    """The output of every choice."""
    found = {}
    for choice in CHOICES:
        compiled.swap(choice)
        found[raw(answer(compiled))] = key(choice)
    assert len(found) == len(CHOICES)
    return found


@contextmanager
def running(work: Callable[[], object], times: int = 1) -> Iterator[list[object]]:
    """``work`` again and again on several threads while the block runs; what it raised is raised afterwards."""
    stop, found, errors = threading.Event(), [], []

    def loop() -> None:
        try:
            while not stop.is_set():
                found.append(work())
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop) for _ in range(times)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join(30)
    assert not errors, errors[0]
    assert not any(thread.is_alive() for thread in threads)


def swaps(compiled: lorac.Compiled, seconds: float = SECONDS) -> int:
    """Swap through all choices, one every 50 ms or so."""
    count, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline or count < len(CHOICES):
        compiled.swap(CHOICES[count % len(CHOICES)])
        count += 1
        time.sleep(0.05)
    return count


@pytest.mark.medium(
    "test_threads_with_a_choice_per_call; eager fused weights, and test_threads_with_a_choice_per_call on ONNX Runtime"
)
@pytest.mark.slow(
    "eager fused weights, and live programs; live programs, and eager fused weights",
    cases=["onnxruntime-fused", "eager-live"],
)
def test_every_output_is_of_a_single_choice(compiled, expected):
    with running(lambda: raw(answer(compiled)), times=8) as answers:
        swaps(compiled)
    assert {expected.get(found, "none of them") for found in answers} == set(expected.values())


@pytest.mark.slow("live programs, and eager fused weights", cases=["onnxruntime-fused", "eager-live", "eager-fused"])
def test_threads_with_a_choice_per_call(compiled, expected):
    """Threads that choose for themselves, beside others that take the active choice, while that is swapped."""
    own = {choice: found for found, choice in expected.items()}

    def chosen() -> int:
        wrong = 0
        for choice in CHOICES:
            wrong += raw(answer(compiled, adapters=choice)) != own[key(choice)]
        return wrong

    with running(chosen, times=3) as wrong, running(lambda: raw(answer(compiled)), times=2) as answers:
        swaps(compiled)
    assert wrong
    assert not any(wrong)
    assert {expected.get(found, "none of them") for found in answers} <= set(expected.values())


@pytest.mark.medium("test_adding_from_several_threads")
@pytest.mark.slow("live programs, and eager fused weights", cases=["onnxruntime-fused", "eager-live", "eager-fused"])
def test_adapters_that_come_and_go(compiled, expected):
    """A call may end with an adapter that was removed after it began."""

    def change() -> None:
        compiled.add_adapter(adapter("lora", "a"), name="c")
        compiled.swap("c")
        time.sleep(0.01)
        compiled.remove_adapter("c")
        time.sleep(0.01)

    with running(change), running(lambda: raw(answer(compiled)), times=4) as answers:
        time.sleep(SECONDS)
    assert "c" not in compiled.adapters
    assert {expected.get(found, "none of them") for found in answers} == {"a", "None"}


@pytest.mark.medium("fused weights in eager", cases=["onnxruntime-live"])
@pytest.mark.slow(
    "eager fused weights, and live programs; live programs, and eager fused weights",
    cases=["onnxruntime-fused", "eager-live"],
)
def test_adding_from_several_threads(compiled):
    """Exactly one of several adapters with the same name is added."""
    added, refused = [], []

    def add() -> None:
        try:
            added.append(compiled.add_adapter(adapter("lora", "a"), name="d"))
        except lorac.AdapterError as error:
            refused.append(error)

    with running(add, times=4):
        time.sleep(0.2)
    assert added == ["d"]
    assert refused
    compiled.remove_adapter("d")


def test_live_swaps_hold_no_call():
    compiled = build(pair("lora", "hydra"), "eager")
    with running(lambda: answer(compiled), times=2):
        assert all(compiled.swap(choice).blocked_seconds == 0 for choice in CHOICES)
