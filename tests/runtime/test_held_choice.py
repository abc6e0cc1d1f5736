"""A choice that is held stays as it is, whatever happens to its adapters meanwhile."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

import lorac
from tests.refusing import refuses
from tests.runtime.switching import MIXTURE, answer, build, pair, raw
from tests.runtime.test_threads import running

TARGETS = ("eager", "onnxruntime")


def made(target: str, mode: str = "live") -> Any:
    return build(pair("lora", "dora"), target, mode, active="a")


@pytest.mark.parametrize("target", TARGETS)
def test_held_choices_survive_swaps_and_removals(target: str) -> None:
    compiled = made(target)
    expected = {str(choice): raw(answer(compiled, adapters=choice)) for choice in ("a", "b", MIXTURE)}
    with compiled.hold() as active, compiled.hold(MIXTURE) as mixture, compiled.hold("b") as other:
        compiled.swap("b")
        compiled.remove_adapter("a")
        compiled.remove_adapter("b")
        compiled.add_adapter(pair("lora", "dora")[1], name="a")
        assert raw(answer(compiled, adapters=active)) == expected["a"]
        assert raw(answer(compiled, adapters=other)) == expected["b"]
        assert raw(answer(compiled, adapters=mixture)) == expected[str(MIXTURE)]
        assert raw(answer(compiled, adapters="a")) == expected["b"]
    with refuses("choice_error", match="has ended"):
        answer(compiled, adapters=active)


@pytest.mark.medium("test_bank.py: a removed adapter's bytes are back")
def test_frees_a_removed_adapter_after_its_last_holder() -> None:
    compiled = made("onnxruntime")
    with compiled.hold("b") as first:
        with compiled.hold("b") as second:
            kept = weakref.ref(second.state.bound)
        compiled.remove_adapter("b")
        gc.collect()
        assert kept() is first.state.bound
    assert kept() is None


@pytest.mark.medium("the mistakes of the suite")
def test_rejects_a_choice_of_another_model() -> None:
    one, other = made("onnxruntime"), made("eager")
    with one.hold("a") as held, refuses("choice_error", match="held by another model"):
        answer(other, adapters=held)


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_swap_of_fused_weights_waits_for_holders(target: str) -> None:
    compiled = made(target, "fused")
    expected, started = raw(answer(compiled)), threading.Event()

    def swap() -> None:
        started.set()
        compiled.swap("b")

    with compiled.hold() as held:
        with refuses("unavailable", match="call of this thread uses"):
            compiled.swap("b")
        with refuses("unavailable", match="one choice of adapters at a time"), compiled.hold("b"):
            pass
        thread = threading.Thread(target=swap)
        thread.start()
        started.wait()
        thread.join(0.05)
        assert raw(answer(compiled, adapters=held)) == expected
        assert compiled.active == {"a": 1.0}
    thread.join()
    assert compiled.active == {"b": 1.0}


@pytest.mark.medium("test_threads.py, and adapters that are removed while they are held")
def test_holders_of_many_threads() -> None:
    compiled = made("onnxruntime")
    expected = {choice: raw(answer(compiled, adapters=choice)) for choice in ("a", "b")}

    def hold() -> bool:
        with compiled.hold("a") as held:
            return raw(answer(compiled, adapters=held)) == expected["a"]

    with running(hold, times=4) as found:
        for _ in range(40):
            compiled.remove_adapter("b")
            compiled.add_adapter(pair("lora", "dora")[1])
            compiled.swap("b")
    assert found
    assert all(found)


@pytest.mark.medium("a held choice in plain calls")
def test_generates_with_a_held_choice() -> None:
    from tests.decoders import DECODERS, IDS

    adapter = lorac.LoRA(r=2, targets=["q_proj"])
    compiled = lorac.compile(DECODERS["llama"](), {"a": adapter}, target="onnxruntime", cache=True, self_test=False)
    expected = compiled.generate(IDS, max_new_tokens=4, do_sample=False)
    with compiled.hold("a") as held:
        compiled.remove_adapter("a")
        assert compiled.generate(IDS, max_new_tokens=4, do_sample=False, adapters=held).equal(expected)
