"""One choice per row of a batch."""

import numpy as np
import pytest
import torch

import lorac
from tests import parity
from tests.runtime.switching import MIXTURE, X, answer, build, pair, raw
from tests.zoo import ZOO

ROWS = ["a", None, MIXTURE]
ENGINES = [("eager", "live"), ("eager", "fused"), ("onnxruntime", "live")]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def compiled(request):
    return build(pair("lora", "shira" if request.param[1] == "fused" else "hydra"), *request.param)


def test_rows_equal_row_wise_calls(compiled):
    compiled.swap("b")
    y = answer(compiled, adapters=ROWS)
    for row, choice in enumerate(ROWS):
        assert raw(y[row]) == raw(answer(compiled, X[row : row + 1], adapters=choice)[0])
    assert compiled.active == {"b": 1.0}


def test_rows_of_one_choice_run_together(compiled):
    """In the order the rows came, whatever order the choices are run in."""
    batch = torch.cat([X, X.flip(1)])
    y = answer(compiled, batch, adapters=["b", "a", "b", "a", "a", "b"])
    for choice, rows in (("a", [1, 3, 4]), ("b", [0, 2, 5])):
        assert raw(y[rows]) == raw(answer(compiled, batch[rows], adapters=choice))
    base = answer(compiled, batch, adapters=None)
    parity.assert_parity(y[[1, 3, 4]], answer(compiled, batch, adapters="a")[[1, 3, 4]], base[[1, 3, 4]])


def test_mixtures_written_in_another_order_are_one_choice(compiled):
    turned = dict(reversed(MIXTURE.items()))
    y = answer(compiled, X[:2], adapters=[MIXTURE, turned])
    assert raw(y) == raw(answer(compiled, X[:2], adapters=MIXTURE))


def test_numpy_comes_back_as_numpy():
    compiled = build(pair("lora", "hydra"), "onnxruntime", self_test=False)
    y = compiled(tokens=X.numpy(), adapters=ROWS)
    assert isinstance(y, np.ndarray)
    assert y.tobytes() == raw(answer(compiled, adapters=ROWS))


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


def test_the_hosts_own_output_type():
    """The rows of a transformers output are put back field by field, masks and ids taken apart by row."""
    entry = ZOO["tiny_llama"]
    inputs = entry.inputs(batch=3)
    compiled = lorac.compile(entry.model(), {"a": lorac.LoRA(r=2, targets=["q_proj", "down_proj"])}, active=None)
    with torch.no_grad():
        for tensor in compiled.adapters["a"].parameters():
            tensor.add_(0.1)
        y = compiled(**inputs, use_cache=False, adapters=["a", None, "a"])
        expected = compiled(**{name: t[1:2] for name, t in inputs.items()}, use_cache=False, adapters=None)
        touched = compiled(**{name: t[[0, 2]] for name, t in inputs.items()}, use_cache=False, adapters="a")
    assert type(y) is type(expected)
    assert raw(y.logits[1:2]) == raw(expected.logits)
    assert raw(y.logits[[0, 2]]) == raw(touched.logits)
