"""Swapping: after any history the bits of a fresh compile, and the report of a swap (invariants 1 and 7)."""

import itertools

import pytest
import torch

import lorac
from lorac.ir.slots.buffers import FusedBuffer
from tests.runtime.switching import CHOICES, CYCLE, MIXTURE, X, adapter, answer, build, fresh, key, pair, raw

PAIRS = (("dora", "shira"), ("lora", "hydra"))
ENGINES = (
    ("eager", torch.float32),
    ("eager", torch.bfloat16),
    ("onnxruntime", torch.float32),
)
ROOM = lorac.Reserve(targets=("up", "down", "head"), rank=8, adapters=2, scales=True)


def _runs():
    """Every pair on every engine; a thousand swaps of those that take long wait for the long run."""
    for methods, (target, dtype) in itertools.product(PAIRS, ENGINES):
        name = "-".join((*methods, target, str(dtype).removeprefix("torch.")))
        late = target == "eager" or methods is not PAIRS[0]
        yield pytest.param(methods, target, dtype, 1000, id=f"{name}-1000", marks=pytest.mark.slow if late else ())
        if target == "eager":
            yield pytest.param(methods, target, dtype, 20 * len(CYCLE), id=f"{name}-100")


@pytest.mark.medium(
    "two pairs of normal forms, one live and one fused",
    keep=["dora-shira-eager-float32-100-live", "lora-hydra-eager-float32-100-fused"],
)
@pytest.mark.slow("a hundred swaps; the soak does a million", cases=["*-1000-*"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize(("methods", "target", "dtype", "swaps"), list(_runs()))
def test_any_number_of_swaps(methods, target, dtype, swaps, mode):
    adapters = pair(*methods)
    expected = {key(c): answer(fresh(adapters, target, mode, c, dtype=dtype)) for c in CHOICES}
    assert len({raw(y) for y in expected.values()}) == len(CHOICES)
    compiled = build(adapters, target, mode, dtype=dtype)
    for i in range(swaps):
        choice = CYCLE[i % len(CYCLE)]
        assert compiled.swap(choice).state == "bound"
        y = answer(compiled)
        assert torch.equal(y, expected[key(choice)]), f"swap {i}, to {choice}"
        assert raw(y) == raw(expected[key(choice)]), f"swap {i}, to {choice}"


@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_inactive_adapters_change_no_bit(target):
    """Adapters of larger rank and on more sites, given to compile or added later."""
    small, large = adapter("lora_small", "a"), adapter("lora_large", "b")
    alone = answer(fresh([small], target, "live", "a"))
    both = build([small, large], target)
    both.swap("a")
    assert raw(answer(both)) == raw(alone)
    both.swap(None)
    assert raw(answer(both)) == raw(answer(both, adapters=None)) != raw(alone)


@pytest.mark.medium("eager, and test_inactive_adapters_change_no_bit on ONNX Runtime", cases=["onnxruntime-*"])
@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_inactive_adapters_change_no_bit_with_equal_reserves(target, mode):
    """The method does not matter if the reserve is the same."""
    small, large = adapter("lora_small", "a"), adapter("dora_large", "b")
    alone = build([small], target, mode, reserve=ROOM, active="a")
    expected = answer(alone)
    both = fresh([small, large], target, mode, "a", reserve=ROOM)
    assert raw(answer(both)) == raw(expected)
    alone.add_adapter(large)
    alone.swap("b")
    alone.swap("a")
    assert raw(answer(alone)) == raw(expected)
    assert raw(answer(alone, adapters=MIXTURE)) == raw(answer(both, adapters=MIXTURE)) != raw(expected)


def test_the_alignment_of_tensors_changes_no_bit():
    given = adapter("lora", "a")

    def shifted(tensor):
        store = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return store[1:].view(tensor.shape).copy_(tensor)

    tensors = {path: {name: shifted(t) for name, t in at.items()} for path, at in given.tensors.items()}
    moved = lorac.Adapter("a", given.variant, tensors)
    assert raw(answer(build([moved], "eager"))) == raw(answer(build([given], "eager")))


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_choice_for_one_call_keeps_the_active_choice(mode):
    adapters = pair("lora", "shira")
    compiled = build(adapters, "eager", mode)
    compiled.swap("a")
    before = answer(compiled)
    for choice in CHOICES:
        expected = answer(fresh(adapters, "eager", mode, choice))
        assert raw(answer(compiled, adapters=choice)) == raw(expected)
        assert compiled.active == {"a": 1.0}
        assert raw(answer(compiled)) == raw(before)


@pytest.mark.parametrize("mode", ["live", "fused"])
def test_a_tensor_written_after_a_swap_takes_effect(mode):
    """A tensor written after the swap shows in the next call."""
    compiled = build(pair("lora", "shira"), "eager", mode)
    compiled.swap("a")
    before = answer(compiled)
    with torch.no_grad():
        next(iter(compiled.adapters["a"].parameters())).add_(0.1)
    after = answer(compiled)
    assert not torch.equal(after, before)
    assert raw(answer(build([compiled.adapters["a"]], "eager", mode))) == raw(after)


# --- what a swap reports ---------------------------------------------------------------------------------------------


def test_report_of_a_live_swap():
    compiled = build(pair("lora", "hydra"), "eager")
    report = compiled.swap("a")
    found = compiled.adapters["a"]
    assert (report.state, report.sites, report.blocked_seconds) == ("bound", 3, 0.0)
    # Hydra brings a slot for the bias to two sites; what a choice binds is what its slots hold.
    assert report.bytes >= sum(t.nbytes for t in found.parameters())
    assert report.seconds > 0
    again = compiled.swap("a")
    assert (again.sites, again.bytes) == (0, 0)
    assert compiled.swap("b").sites == 3
    assert compiled.swap(None).sites == 2
    assert compiled.swap(None).sites == 0


def test_report_of_a_fused_swap():
    compiled = build(pair("lora", "shira"), "eager", "fused")
    sites = {path: plan.site for path, plan in compiled.plans.items()}
    whole = sum(4 * site.out_features * site.in_features for site in sites.values())
    report = compiled.swap("a")
    assert (report.state, report.sites, report.bytes) == ("bound", 3, whole)
    assert 0 < report.blocked_seconds <= report.seconds
    compiled.swap(None)
    values = sum(at["values"].nbytes for at in compiled.adapters["b"].tensors.values())
    sparse = compiled.swap("b")
    assert (sparse.sites, sparse.bytes) == (2, values)
    # Sparse to sparse: what A had written is restored, B's is written.
    assert compiled.swap({"b": 0.5}).bytes == 2 * values
    assert compiled.swap({"b": 0.5}).bytes == 0


def test_evicts_states_of_old_choices():
    compiled = build(pair("lora", "shira"), "eager")
    for i in range(1, 50):
        compiled.swap({"a": i / 50})
    assert len(compiled.switch.states._kept) < 20


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["live", "fused"])
@pytest.mark.parametrize(
    ("choice", "error"),
    [
        ("sqll", lorac.AdapterNotFound),
        ({"a": 1.0, "c": 1.0}, lorac.AdapterNotFound),
        ({"a": float("nan")}, lorac.ChoiceError),
        ({"a": float("inf")}, lorac.ChoiceError),
        ({"a": "1"}, lorac.ChoiceError),
        (7, lorac.ChoiceError),
        ({"a": lorac.Active(1.0, rank=1)}, lorac.ChoiceError),
        ({"a": lorac.Active(1.0, rank=0)}, lorac.ChoiceError),
    ],
    ids=str,
)
def test_a_rejected_swap_changes_nothing(mode, choice, error):
    compiled = build(pair("lora", "shira"), "eager", mode)
    compiled.swap("b")
    before = answer(compiled)
    for attempt in (lambda: compiled.swap(choice), lambda: answer(compiled, adapters=choice)):
        with pytest.raises(error):
            attempt()
        assert compiled.active == {"b": 1.0}
        assert raw(answer(compiled)) == raw(before)


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_rejects_more_rank_than_reserved(target):
    """Two that fit alone, and not together."""
    room = lorac.Reserve(targets=("up", "down", "head"), rank=3)
    compiled = build([], target, reserve=room)
    compiled.add_adapter(adapter("lora", "a"))
    compiled.add_adapter(adapter("lora", "a"), name="b")
    compiled.swap("a")
    before = answer(compiled)
    with pytest.raises(lorac.NeedsRecompile, match="holds rank 3, not 6"):
        compiled.swap(MIXTURE)
    assert compiled.active == {"a": 1.0}
    assert raw(answer(compiled)) == raw(before)


@pytest.mark.parametrize("held", ["a", "b", None])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_a_swap_that_fails_half_way_is_undone(broken, target, held):
    """Some sites are written when another turns out to be broken."""
    compiled = broken[target]
    compiled.swap(held)
    before = answer(compiled)
    for attempt in (lambda: compiled.swap("c"), lambda: answer(compiled, adapters="c")):
        with pytest.raises((IndexError, RuntimeError)):
            attempt()
        assert compiled.active == ({} if held is None else {held: 1.0})
        assert raw(answer(compiled)) == raw(before)


@pytest.fixture(scope="module")
def broken():
    """Compiled models with an adapter c whose positions leave the last site's weight."""
    return {target: _broken(target) for target in ("eager", "onnxruntime")}


def _broken(target):
    compiled = build([*pair("lora", "shira"), adapter("shira", "c")], target, "fused")
    with torch.no_grad():
        compiled.adapters["c"].tensors["down"]["indices"][0, -1] = 10**6
    return compiled


def test_a_torn_buffer_is_known_as_torn():
    """The sparse positions of what it held are restored before those of the next turn out to be wrong."""
    compiled = build(pair("lora", "shira"), "eager", "fused")
    compiled.swap("b")
    buffer = compiled.engine.buffers["up"]
    assert isinstance(buffer, FusedBuffer)
    held, content = buffer.current, buffer.buffer.clone()
    wrong = type(held)(held.rows + 10**6, held.cols, held.values)
    with pytest.raises((IndexError, RuntimeError)):
        buffer.write(wrong)
    assert buffer.write(held) > 0
    assert torch.equal(buffer.buffer, content)


def test_baked_rejects_changes():
    compiled = build(pair("lora", "shira"), "eager", "baked", active=MIXTURE)
    assert compiled.active == MIXTURE
    for change in (
        lambda: compiled.swap("a"),
        lambda: compiled.add_adapter(adapter("lora", "c")),
        lambda: compiled.remove_adapter("a"),
    ):
        with pytest.raises(lorac.Unavailable, match="baked"):
            change()
    expected = answer(build(pair("lora", "shira"), "eager", "fused", active=MIXTURE))
    assert raw(answer(compiled)) == raw(expected)


@pytest.mark.medium("eager", cases=["onnxruntime"])
@pytest.mark.parametrize("target", ["eager", "onnxruntime"])
def test_baked_rejects_a_choice_for_one_call(target):
    compiled = build(pair("lora", "shira"), target, "baked", active="a")
    before = answer(compiled)
    with pytest.raises(lorac.Unavailable, match="baked"):
        answer(compiled, adapters="b")
    assert raw(answer(compiled, X)) == raw(before)


def test_baking_several_needs_a_choice():
    with pytest.raises(lorac.ChoiceError, match="active="):
        build(pair("lora", "shira"), "eager", "baked")
