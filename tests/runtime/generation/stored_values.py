"""Models with quantised weights, next to PEFT's with the values that their programs store."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lorac
from lorac.backends.onnx import self_test


def compile_quantised(peft: Any, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Any:
    """Compile PEFT's model with quantised weights, then give it the values that the program computes with.

    Returns:
        The compiled model; ``peft`` is changed in place.
    """
    replacing: list[Any] = []
    run = self_test.run_self_test

    def note(*args: Any) -> None:
        replacing.append(args[3])
        run(*args)

    monkeypatch.setattr(self_test, "run_self_test", note)
    settings: dict[str, Any] = {"block_size": 16, "accuracy_level": 1, **options}
    compiled = lorac.compile(peft, target="onnxruntime", cache=True, **settings)
    (replace,) = replacing
    held = {name: p.detach() for name, p in peft.named_parameters() if "lora_" not in name}
    stored = replace(held)
    moved = [name for name, value in stored.items() if not torch.equal(value, held[name])]
    assert len(moved) > 2
    for name in moved:
        peft.get_parameter(name).data = stored[name].clone()
    return compiled
