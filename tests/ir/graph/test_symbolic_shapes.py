"""Symbolic sizes are found again by their names in torch's record, which is all that knows them."""

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lorac.ir.graph.symbolic_shapes import make_example, make_size


def test_a_size_is_made_once_for_each_name_in_each_record():
    records = ShapeEnv(), ShapeEnv()
    before = set(vars(records[0]))
    first, again, other = (make_size(records[0], name, 13) for name in ("tokens", "tokens", "rows"))
    elsewhere = make_size(records[1], "tokens", 13)
    assert str(first) == str(again) != str(other)
    assert set(vars(records[0])) == before, "nothing of lorac's is kept there"
    assert elsewhere.node.shape_env is records[1]


def test_the_least_value_of_a_size_is_that_of_the_first_call():
    record = ShapeEnv()
    size = make_size(record, "places", 2, 1)
    make_size(record, "places", 2)
    assert record.var_to_range[size.node.expr].lower == 1


def _hint(size: int | torch.SymInt) -> int:
    """Return the value that a size has in an example."""
    return size if isinstance(size, int) else size.node.hint


def test_an_example_equals_torchs_fake_tensor():
    record = ShapeEnv()
    mode = FakeTensorMode(shape_env=record)
    shape = (make_size(record, "places", 2, 1), 5, make_size(record, "rank", 3))
    with mode:
        expected = torch.empty(shape, dtype=torch.float16)
    made = make_example(mode, shape, torch.float16)
    assert (made.shape, made.dtype, made.device) == (shape, torch.float16, expected.device)
    assert [*map(_hint, made.stride())] == [*map(_hint, expected.stride())] == [15, 3, 1]
    assert detect_fake_mode([made]) is mode
    assert not record.guards, "nothing is decided about the sizes"
    assert made.is_contiguous()
