"""One choice per row of a batch."""

import numpy as np
import pytest
import torch

import lorac
from lorac.ir.calls.call import Call
from lorac.runtime.batching import check_rows, run_rows
from lorac.runtime.choice_switch import RowGroup
from lorac.target.engine import CallResult
from tests import parity
from tests.limits import ROWS as LIMITS
from tests.runtime.switching import MIXTURE, X, answer, build, pair, raw
from tests.zoo import SMALL_LLAMA

ROWS = ["a", None, MIXTURE]
ENGINES = [("eager", "live"), ("eager", "fused"), ("onnxruntime", "live")]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def compiled(request):
    return build(pair("lora", "shira" if request.param[1] == "fused" else "hydra"), *request.param)


def _assert_same(y, ref):
    """Equal but for what a batch of another size rounds."""
    assert float((y - ref).abs().max()) <= LIMITS[y.dtype] * float(ref.abs().max())


@pytest.mark.medium("eager, and test_rows.py there", cases=["onnxruntime-live"])
def test_rows_equal_row_wise_calls(compiled):
    compiled.swap("b")
    y = answer(compiled, adapters=ROWS)
    for row, choice in enumerate(ROWS):
        _assert_same(y[row], answer(compiled, X[row : row + 1], adapters=choice)[0])
    assert compiled.active == {"b": 1.0}


def test_runs_rows_of_one_choice_together(compiled):
    """In the order the rows came, whatever order the choices are run in."""
    batch = torch.cat([X, X.flip(1)])
    y = answer(compiled, batch, adapters=["b", "a", "b", "a", "a", "b"])
    for choice, rows in (("a", [1, 3, 4]), ("b", [0, 2, 5])):
        _assert_same(y[rows], answer(compiled, batch[rows], adapters=choice))
    base = answer(compiled, batch, adapters=None)
    parity.assert_parity(y[[1, 3, 4]], answer(compiled, batch, adapters="a")[[1, 3, 4]], base[[1, 3, 4]])


def test_mixtures_in_another_order_are_the_same_choice(compiled):
    turned = dict(reversed(MIXTURE.items()))
    y = answer(compiled, X[:2], adapters=[MIXTURE, turned])
    assert raw(y) == raw(answer(compiled, X[:2], adapters=MIXTURE))


def test_returns_numpy_for_numpy():
    compiled = build(pair("lora", "hydra"), "onnxruntime", self_test=False)
    y = compiled(tokens=X.numpy(), adapters=ROWS)
    assert isinstance(y, np.ndarray)
    assert y.tobytes() == raw(answer(compiled, adapters=ROWS))
    assert compiled(tokens=X.numpy()[::-1], adapters=ROWS[::-1]).tobytes() == y[::-1].tobytes()


def test_no_rows_have_no_choices():
    compiled = build(pair("lora", "hydra"), "eager")
    assert answer(compiled, X[:0], adapters=[]).shape == answer(compiled, X[:0]).shape


@pytest.mark.parametrize("rows", [[], ["a"], ["a", "b"], ["a", "b", None, None]], ids=len)
def test_rows_and_choices_differ(compiled, rows):
    compiled.swap("a")
    before = answer(compiled)
    with pytest.raises(lorac.ChoiceError, match=f"{len(rows)} choices of adapters for 3 rows"):
        answer(compiled, adapters=rows)
    assert raw(answer(compiled)) == raw(before)


def test_an_unknown_name_in_a_row(compiled):
    with pytest.raises(lorac.AdapterNotFound, match="'c'"):
        answer(compiled, adapters=["a", "c", None])


@pytest.mark.medium("generation over caches, whose rows are compared one by one")
@torch.no_grad()
def test_a_decoders_output_and_cache_row_by_row():
    """A transformers decoder answers rows as it answers one of them alone, step by step on the cache of the last."""
    from transformers import DynamicCache

    entry, choices = SMALL_LLAMA, ["a", None, "b"]
    ids, mask = entry.inputs(batch=3).values()
    compiled = lorac.compile(
        entry.model(), {n: lorac.LoRA(r=2, targets=["q_proj", "down_proj"]) for n in "ab"}, active=None
    )
    for name in "ab":
        for tensor in compiled.adapters[name].parameters():
            tensor.add_(0.1 if name == "a" else -0.2)
    cache = DynamicCache()
    steps = [(ids[:, :3], mask[:, :3]), (ids[:, 3:4], mask[:, :4]), (ids[:, 4:], mask)]
    own = [None] * 3
    for step_ids, step_mask in steps:
        y = compiled(input_ids=step_ids, attention_mask=step_mask, cache=cache, adapters=choices)
        for row, choice in enumerate(choices):
            at = slice(row, row + 1)
            alone = compiled(input_ids=step_ids[at], attention_mask=step_mask[at], cache=own[row], adapters=choice)
            own[row] = alone.cache
            assert type(y) is type(alone)
            _assert_same(y.logits[at], alone.logits)
            for layer, other in zip(cache.layers, alone.cache.layers, strict=True):
                _assert_same(layer.keys[at], other.keys)
        assert y.cache is cache
    # Without a cache given, the answer has one of its own.
    together, alone = compiled(input_ids=ids, adapters=choices), compiled(input_ids=ids[1:2], adapters=None)
    _assert_same(together.cache.layers[0].values[1:2], alone.cache.layers[0].values)


class Held:
    """An object that holds rows, as caches do."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.layers, self.seen, self.itself = [rows], 0, self


def _groups(*choices):
    """The rows of each choice, in the order in which the choices come first."""
    return [RowGroup(each, [i for i, one in enumerate(choices) if one == each]) for each in dict.fromkeys(choices)]


def _noted(held, choice):
    """Writes into what it is given, and answers with less than it wrote."""
    held.layers = [held.layers[0] * 2, held.layers[0] + len(choice)]
    held.seen += 1
    return {0: held.layers[0], "kind": "noted", "fixed": torch.tensor(3.0)}


def test_merges_attributes_that_calls_leave_on_arguments():
    rows = torch.arange(6.0).view(3, 2)
    held = Held(rows)
    with pytest.raises(lorac.ChoiceError, match="no input has rows"):
        check_rows(Call((held,)).rows, ["x"])
    groups = _groups("x", "yy", "x")
    answer = run_rows(lambda c, g: CallResult(_noted(c.args[1], g.choice)), Call((rows, held)), groups).output
    assert torch.equal(answer[0], rows * 2)
    assert (answer["kind"], float(answer["fixed"])) == ("noted", 3.0)
    assert torch.equal(held.layers[0], rows * 2)
    assert torch.equal(held.layers[1], rows + torch.tensor([[1.0], [2.0], [1.0]]))
    assert held.seen == 1
    assert held.itself is held


def test_rejects_outputs_without_rows_that_differ():
    rows = torch.arange(6.0).view(3, 2)
    held = Held(rows)
    with pytest.raises(lorac.Unavailable, match="no row per input row") as error:
        run_rows(
            lambda c, _: CallResult([_noted(c.args[1], "x"), c.args[0].sum()]),
            Call((rows, held)),
            _groups("x", "y", "x"),
        )
    assert "such as labels= for a loss" in str(error.value)
    assert (held.seen, held.layers) == (0, [rows])
    # Rows of one choice are one call, whatever it answers.
    assert (
        float(run_rows(lambda c, _: CallResult(c.args[0].sum()), Call((rows,)), _groups("x", "x", "x")).output) == 15.0
    )


def test_keeps_an_array_without_rows_that_all_calls_return():
    rows = np.arange(6.0).reshape(3, 2)
    fixed = np.array([1.0, 2.0, 3.0, 4.0])
    answered = run_rows(
        lambda c, _: CallResult([c.args[0], fixed.copy()]), Call((rows,)), _groups("x", "y", "x")
    ).output
    assert np.array_equal(answered[0], rows) and np.array_equal(answered[1], fixed)
    with pytest.raises(lorac.Unavailable, match="no row per input row"):
        groups = _groups("x", "yy", "x")
        run_rows(lambda c, g: CallResult([c.args[0], fixed + len(g.choice)]), Call((rows,)), groups)
