"""Recurrent cells as functional ops, since torch decomposes them into ops that write in place.

The equations are those of the documentation of ``torch.nn.LSTMCell``, ``GRUCell`` and ``RNNCell``.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Bias = Tensor | None


def lstm_cell(
    x: Tensor, state: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None
) -> tuple[Tensor, Tensor]:
    """Return h (batch, hidden) and c (batch, hidden)."""
    h, c = state
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_cell(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Bias = None, b_hh: Bias = None) -> Tensor:
    """Return h (batch, hidden)."""
    (xr, xz, xn), (hr, hz, hn) = F.linear(x, w_ih, b_ih).chunk(3, 1), F.linear(h, w_hh, b_hh).chunk(3, 1)
    n = (xn + (xr + hr).sigmoid() * hn).tanh()
    return (h - n) * (xz + hz).sigmoid() + n


def rnn_cell(
    activation: Callable[[Tensor], Tensor],
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Bias = None,
    b_hh: Bias = None,
) -> Tensor:
    """Return h (batch, hidden)."""
    return activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh))


CELLS: Mapping[object, Callable[..., object]] = {
    torch.ops.aten.lstm_cell.default: lstm_cell,
    torch.ops.aten.gru_cell.default: gru_cell,
    torch.ops.aten.rnn_tanh_cell.default: functools.partial(rnn_cell, torch.tanh),
    torch.ops.aten.rnn_relu_cell.default: functools.partial(rnn_cell, torch.relu),
}
"""Op -> its cell."""
