"""Symbolic sizes are found again by their names in torch's record, which is all that knows them."""

from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lorac.ir.graph.new_sizes import make_size


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
