"""Tables of values that depend on positions alone, and how many positions a model's own table admits."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from lorac.ir.graph.nodes import find_stored_tensors
from lorac.passes.position_tables import tabulate
from tests.captured import captured_program, graph_of

ROWS, WIDTH, OFFSET = 9, 6, 2
aten = torch.ops.aten


class Learned(nn.Module):
    """Multiplies by a function of the rows of a table, which it looks up by the position and an offset."""

    def __init__(self, *, indexes: bool) -> None:
        super().__init__()
        self.table, self.indexes = nn.Parameter(torch.randn(ROWS, WIDTH)), indexes

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        rows = positions + OFFSET
        return x * torch.relu(self.table[rows] if self.indexes else embedding(rows, self.table))


@pytest.mark.parametrize("indexes", [False, True])
@torch.no_grad()
def test_a_models_table_bounds_the_positions(indexes: bool) -> None:
    model, sizes = Learned(indexes=indexes), {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    exported = captured_program(model, (torch.arange(5)[None], torch.randn(1, 5, WIDTH)), (sizes, sizes))
    graph = graph_of("main", exported, {}, {})
    positions, _ = graph.placeholders()[-2:]
    assert tabulate(graph, positions) == ROWS - OFFSET
    (product,) = graph.find(aten.mul.Tensor)
    lookup = product.args[1]
    assert lookup.target is aten.embedding.default
    assert torch.equal(find_stored_tensors(graph.exported)[lookup.args[0]], torch.relu(model.table[OFFSET:]))
