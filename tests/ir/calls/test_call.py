"""Numbers per row, as schedulers give them: one for all rows, of any dtype."""

import numpy as np
import pytest
import torch

from lorac.ir.calls.call import spread_over_rows


@pytest.mark.parametrize(
    "given", [999, 999.0, torch.tensor(999), torch.tensor([999.0]), torch.tensor([999] * 3), np.int64(999)]
)
def test_spreads_a_number_over_rows(given):
    spread = spread_over_rows({"timestep": given, "sample": torch.zeros(3, 4)}, {"timestep": "sample"})
    assert torch.equal(spread["timestep"], torch.full((3,), 999.0))
    array = spread_over_rows({"timestep": given, "sample": np.zeros((3, 4))}, {"timestep": "sample"})["timestep"]
    assert isinstance(array, np.ndarray)
    assert array.dtype == np.float32
