"""The hash over a description and its tensors."""

from __future__ import annotations

import pytest
import torch

from lorac.storage import tensor_hash
from lorac.storage.tensor_hash import agrees_with_hash, hash_contents

# As lorac made it before it hashed with several threads: files with such a hash are still checked.
EARLIER = "7ce0f6492510636602bc1a65c3038444"


def tensors() -> dict[str, torch.Tensor]:
    numbers = torch.arange(24, dtype=torch.float32)
    return {"b": numbers.view(4, 6), "a": numbers[:6].to(torch.bfloat16), "none": numbers[:0], "scalar": numbers[3]}


def test_hashes_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed = hash_contents("text", tensors())
    monkeypatch.setattr(tensor_hash, "_FEW_BYTES", 0)
    for count in (1, 3, 8):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        assert hash_contents("text", dict(reversed(tensors().items()))) == hashed


@pytest.mark.parametrize("earlier", [False, True])
def test_detects_changes_of_names_shapes_and_values(earlier: bool) -> None:
    hashed = EARLIER if earlier else hash_contents("text", tensors())
    assert agrees_with_hash(hashed, "text", tensors())
    assert not agrees_with_hash(hashed, "texts", tensors())
    changed = tensors()
    changed["b"][2, 3] += 1
    others = [
        changed,
        {**tensors(), "b": tensors()["b"].view(6, 4)},
        {**tensors(), "b": tensors()["b"].view(torch.int32)},
        {name: tensor for name, tensor in tensors().items() if name != "none"},
        {("c" if name == "b" else name): tensor for name, tensor in tensors().items()},
    ]
    for other in others:
        assert not agrees_with_hash(hashed, "text", other)
    for wrong in (None, 3, "", hashed.upper()):
        assert not agrees_with_hash(wrong, "text", tensors())
