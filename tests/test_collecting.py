"""While a model is compiled Python's garbage collector rests, and afterwards it is as it was."""

import gc

import pytest
import torch
from torch import nn

import lorac
from lorac.collecting import uncollected


@pytest.fixture
def switched_off():
    gc.disable()
    yield
    gc.enable()


def test_it_rests_until_the_last_block_ends():
    first, second = uncollected(), uncollected()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not gc.isenabled()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_it_is_put_back_where_the_block_fails():
    with pytest.raises(ValueError, match="some"), uncollected():
        raise ValueError("some")
    assert gc.isenabled()


@pytest.mark.usefixtures("switched_off")
def test_who_has_switched_it_off_finds_it_off():
    with uncollected():
        pass
    assert not gc.isenabled()


class Watching(nn.Module):
    """A linear layer that notes whether the collector may run while it is traced and run."""

    def __init__(self, found):
        super().__init__()
        self.up, self.note = nn.Linear(3, 4), found.add

    def forward(self, x):
        self.note(gc.isenabled())
        return self.up(x)


def test_compiling_lets_it_rest():
    found = set()
    host, variant = Watching(found).eval(), lorac.LoRA(r=2, targets=["up"])
    lorac.compile(host, {"a": variant}, target="onnxruntime", example_inputs=(torch.ones(2, 3),))
    assert found == {False}
    assert gc.isenabled()
