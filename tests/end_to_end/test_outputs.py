"""Structures of outputs and names of arguments: programs return and are called as the model."""

import dataclasses
from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import lorac
from lorac.ir.calls.output_structure import replace_dataclasses
from lorac.testing import assert_close
from tests.refusing import refuses

Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Answer:
    logits: Any
    hidden: Any = None
    layers: int = 3
    kind: str = dataclasses.field(default="answer", init=False)


KINDS = {
    "none": lambda y: (y, None),
    "constants": lambda y: {"y": y, "count": 3, "text": "so", "half": 0.5, "done": True},
    "nested": lambda y: {"a": [y, (y * 2, None)], "b": {"c": y + 1}},
    "named": lambda y: Pair(y, None),
    "dataclass": lambda y: Answer(y, (y * 2, Answer(y - 1))),
    "within": lambda y: {"answer": Answer(y), "batch": y.shape[0], "more": y.shape[0] * y.shape[1]},
}


class Answering(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.site, self.kind = nn.Linear(4, 5), kind

    def forward(self, X, Mask_2=None, lower=None):
        y = self.site(X)
        y = y if Mask_2 is None else y * Mask_2
        return KINDS[self.kind](y if lower is None else y - lower)


def made(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = Answering("none").eval(), torch.randn(3, 4)
    adapter = lorac.testing.adapter_away(lorac.LoRA(r=2, targets=("site",)), model, x, name="a", seed=1)
    model.kind = kind
    return model, x, adapter


def assert_alike(found, expected, *, classes=True):
    """The same containers, the same constants, and tensors that are close."""
    (ours, ours_spec), (theirs, spec) = (pytree.tree_flatten(replace_dataclasses(o)) for o in (found, expected))
    assert ours_spec == spec or not classes
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is type(other)
        if isinstance(other, torch.Tensor):
            assert_close(mine, other)
        else:
            assert mine == other


@pytest.mark.medium(
    "an answer within others, a dataclass, and constants; two other answers", keep=["dataclass", "constants"]
)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_answer_is_the_models(kind, tmp_path):
    model, x, adapter = made(kind)
    eager = lorac.compile(model, {"a": adapter})
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", example_inputs=(x,))
    for inputs in (x, torch.cat([x, x])):
        assert_alike(emitted(inputs), eager(inputs))
        assert_alike(emitted(inputs, adapters=None), model(inputs))
    emitted.save(tmp_path / "emitted")
    assert_alike(lorac.load(tmp_path / "emitted")(x), eager(x), classes=False)
    if kind in ("nested", "within"):
        eager = lorac.compile(model, {"a": adapter}, example_inputs=(x,))
        eager.save(tmp_path / "eager")
        assert_alike(lorac.load(tmp_path / "eager")(x), eager(x), classes=False)


@torch.no_grad()
def test_arguments_of_any_name(tmp_path):
    model, x, adapter = made("none")
    mask = torch.tensor([[1.0], [2.0], [0.5]])
    inputs = {"X": x, "Mask_2": mask, "lower": mask}
    emitted = lorac.compile(model, {"a": adapter}, target="onnxruntime", example_inputs=inputs)
    expected = lorac.compile(model, {"a": adapter})(**inputs)
    emitted.save(tmp_path / "artifact")
    twice = {name: torch.cat([value, value]) for name, value in inputs.items()}
    for compiled in (emitted, lorac.load(tmp_path / "artifact")):
        assert_alike(compiled(**inputs), expected)
        assert_alike(compiled(x, Mask_2=mask, lower=mask), expected)
        assert compiled(**twice)[0].shape == (6, 5)
    with pytest.raises(lorac.ChoiceError, match="'X' is given twice"):
        emitted(x, X=x, Mask_2=mask, lower=mask)


def test_rejects_a_constant_that_depends_on_the_size():
    """It is an answer that depends on the size; a program would answer the example's."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Linear(4, 5)

        def forward(self, x):
            return self.site(x), len(x.tolist()) if not torch.compiler.is_exporting() else 3

    x = torch.ones(3, 4)
    with refuses("capture_differs", match="output 1"):
        lorac.compile(Counting().eval(), [lorac.LoRA(r=2)], target="onnxruntime", example_inputs=(x,))
