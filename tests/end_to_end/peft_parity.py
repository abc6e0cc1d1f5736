"""One PEFT checkpoint through lorac: eager in every mode, there and back, and in ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lorac
from lorac import load_adapter, save_adapter
from tests import parity, peft_files
from tests.end_to_end.peft_cases import Case, Inputs, checkpoint, example, joined, shapes
from tests.formats.oracle import assert_equal


@dataclass(frozen=True)
class Checkpoint:
    """What PEFT wrote of a case, and what it and the base alone answer to several calls.

    Attributes:
        case: what it is of.
        folder: where it is.
        model: the base.
        calls: the inputs of each call.
        reference: PEFT's answers.
        base: the base's.
        types: of the base's answers, one per call.
    """

    case: Case
    folder: Path
    model: nn.Module
    calls: list[Inputs]
    reference: dict[str, Tensor]
    base: dict[str, Tensor]
    types: list[type]

    @classmethod
    @torch.no_grad()
    def of(cls, case: Case, folder: Path, dtype: torch.dtype) -> Checkpoint:
        """Have PEFT write it, for a base of a dtype, into ``folder``."""
        model, oracle = checkpoint(case, folder, dtype)
        calls = shapes(case.model, dtype)
        reference, base = ([host(**inputs) for inputs in calls] for host in (oracle, model))
        both = (joined(answers, case.compared) for answers in (reference, base))
        return cls(case, folder, model, calls, *both, [type(answer) for answer in base])

    @torch.no_grad()
    def answers(self, host: Any, **settings: Any) -> dict[str, Tensor]:
        """What a model, PEFT's or lorac's, answers to the same calls."""
        found = [host(**inputs, **settings) for inputs in self.calls]
        assert [type(answer) for answer in found] == self.types
        return joined(found, self.case.compared)


def assert_eager(made: Checkpoint) -> None:
    """lorac computes what PEFT does, in every mode of the case."""
    for mode in made.case.modes:
        compiled = lorac.compile(made.model, {"a": made.folder}, mode=mode)
        parity.assert_parity(made.answers(compiled), made.reference, made.base)


def assert_back(made: Checkpoint, folder: Path) -> None:
    """PEFT computes with what lorac saves into ``folder`` as with its own file, bit for bit: by the same code."""
    adapter = load_adapter(made.folder, made.model)
    save_adapter(adapter, folder / "known", model=made.model)
    if made.case.alone:
        save_adapter(load_adapter(made.folder), folder / "alone")
    for saved in folder.iterdir():
        assert_equal(load_adapter(saved, made.model), adapter)
        found = made.answers(peft_files.load_peft(made.model, saved))
        for name, value in made.reference.items():
            assert torch.equal(found[name], value), (saved.name, name)


def assert_onnxruntime(made: Checkpoint, mode: str) -> None:
    """A compiled program in ONNX Runtime computes what PEFT does, in float32."""
    settings = {**example(made.case.model), "self_test": False}  # PEFT is the test here
    compiled = lorac.compile(made.model, {"a": made.folder}, target="onnxruntime", mode=mode, **settings)
    own = None if mode == "baked" else made.answers(compiled, adapters=None)
    parity.assert_parity(made.answers(compiled), made.reference, made.base, own_base=own)
