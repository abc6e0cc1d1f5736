"""Reading files without trusting them, and writing them deterministically."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorac.formats import _files
from lorac.formats._files import (
    peek_metadata,
    read_json,
    read_metadata,
    read_pickle,
    read_safetensors,
    write_json,
)
from lorac.storage.tensor_file import DTYPES, write_safetensors
from tests.refusing import refuses

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


LYING: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"[]", "not an object"),
    (b'{"a": \xff}', "not JSON"),
    (b'{"a": 1, "a": 2}', "given twice"),
    (b"[" * 50_000, "not JSON"),
    ({"__metadata__": {"a": 1}}, "metadata"),
    ({"__metadata__": []}, "metadata"),
    ({"a": []}, "not dtype, shape and data_offsets"),
    ({"a": {**GOOD, "more": 1}}, "not dtype, shape and data_offsets"),
    ({"a": {**GOOD, "dtype": "F33"}}, "unknown dtype 'F33'"),
    ({"a": {**GOOD, "dtype": ["F32"]}}, "unknown dtype"),
    ({"a": {**GOOD, "shape": [2, -3]}}, "not whole numbers"),
    ({"a": {**GOOD, "shape": [2, 3.0]}}, "not whole numbers"),
    ({"a": {**GOOD, "shape": [True, 6]}}, "not whole numbers"),
    ({"a": {**GOOD, "data_offsets": [0]}}, "not whole numbers"),
    ({"a": {**GOOD, "data_offsets": [24, 0]}}, "but has -24 bytes"),
    ({"a": {**GOOD, "shape": [2, 4]}}, "but has 24 bytes"),
    ({"a": {**GOOD, "shape": [2**40, 2**40]}}, "but has 24 bytes"),
    ({"a": {**GOOD, "dtype": "F16"}}, "but has 24 bytes"),
    ({"a": GOOD, "b": GOOD}, "overlaps the tensor before it"),
    ({"a": {**GOOD, "data_offsets": [8, 32]}}, "leaves a hole before it"),
    ({"a": {**GOOD, "shape": [2, 2], "data_offsets": [0, 16]}}, "promises 16 bytes of data"),
    ({"a": {**GOOD, "shape": [4, 3], "data_offsets": [0, 48]}}, "promises 48 bytes of data"),
    ({}, "promises 0 bytes of data"),
]


@pytest.mark.parametrize(("header", "reason"), LYING)
def test_lying_headers(tmp_path: Path, header: Any, reason: str) -> None:
    path = write(tmp_path / "x.safetensors", header)
    with refuses("corrupt_file", match=reason) as error:
        read_safetensors(path)
    assert str(path) in str(error.value)


def test_rejects_every_truncation(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, whole, metadata={"format": "pt"})
    content = whole.read_bytes()
    for length in range(len(content)):
        part.write_bytes(content[:length])
        with refuses("corrupt_file"):
            read_metadata(part)
    part.write_bytes(content + b"\0")
    with refuses("corrupt_file"):
        read_metadata(part)
    assert read_metadata(whole) == {"format": "pt"}


@pytest.mark.parametrize("length", [2**63, 10**9, 1000])
def test_lying_header_lengths(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x", {"a": GOOD}, length=length)
    with refuses("corrupt_file", match=f"promises {length} bytes of header"):
        read_metadata(path)
    assert peek_metadata(path) == {}


def test_peeking_never_raises(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    assert peek_metadata(tmp_path / "short") == peek_metadata(tmp_path / "none") == {}
    assert peek_metadata(write(tmp_path / "x", {"__metadata__": {"a": "b", "c": 1}})) == {"a": "b"}
    assert peek_metadata(write(tmp_path / "x", {"__metadata__": 3})) == {}


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(6).reshape(2, 3).to(dtype)
    tensors = {"b": values, "a": values[0, 0], "empty": values[:0], "turned": values.t()}
    write_safetensors(tmp_path / "x", tensors, {"format": "pt"})
    for found in (load_file(tmp_path / "x"), read_safetensors(tmp_path / "x")[0]):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == dtype
            same = [t.contiguous().flatten().view(torch.uint8) for t in (found[name], tensor)]
            assert torch.equal(*same) and found[name].shape == tensor.shape


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    one = {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.zeros(2), "c": torch.tensor(1)}
    other = dict(reversed(one.items()))
    write_safetensors(tmp_path / "1", one, {"x": "1", "format": "pt", "y": "2"})
    write_safetensors(tmp_path / "2", other, {"y": "2", "x": "1", "format": "pt"})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert read_safetensors(tmp_path / "1")[1] == {"x": "1", "format": "pt", "y": "2"}
    write_json(tmp_path / "1", {"b": {"z": 1, "y": 2}, "a": None})
    write_json(tmp_path / "2", {"a": None, "b": {"z": 1, "y": 2}})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(read_json(tmp_path / "1")["b"]) == ["z", "y"]


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(1000)}, path)
    tensors, _ = read_safetensors(path)
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert tensors["a"].sum() == 1000


NUMBERS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_non_finite_values_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"fine": torch.ones(2), "bad": torch.tensor([1, float("nan"), 2]).to(dtype)}, tmp_path / "x")
    with refuses("non_finite", match=r"tensor 'bad' .* holds 1 NaN or infinite of 3 values"):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("dtype", NUMBERS[:5], ids=str)
def test_accepts_finite_values_whose_sum_overflows(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"large": torch.full((300,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)}, tmp_path / "x")
    assert (read_safetensors(tmp_path / "x")[0]["large"].double() == torch.finfo(dtype).max).all()


class Evil:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


def test_pickles_run_no_code(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for save in (torch.save, lambda x, p: p.write_bytes(pickle.dumps(x))):
        save({"a": torch.ones(2), "b": Evil(trace)}, tmp_path / "x.bin")
        with refuses("corrupt_file", match="weights_only=True"):
            read_pickle(tmp_path / "x.bin")
        assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, {"a": {"b": torch.ones(1)}}],
)
def test_pickles_of_other_things(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with refuses("corrupt_file"):
        read_pickle(tmp_path / "x.bin")


def test_damaged_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(200)}, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    for damaged in (b"", content[:100], content[:-50], b"nothing of the kind"):
        (tmp_path / "x.bin").write_bytes(damaged)
        with refuses("corrupt_file"):
            read_pickle(tmp_path / "x.bin")


@pytest.mark.parametrize("part", [1, 100, 1 << 20])
def test_tensors_of_a_part_are_apart_from_each_other(
    tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read into one allocation, but each owns its bytes alone, aligned as torch's own."""
    monkeypatch.setattr(_files, "_PART", part)
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64]
    stored = {f"t{i}": torch.arange(7 * i).reshape(i, 7).to(dtypes[i % 5]) for i in range(9)}
    save_file(stored, tmp_path / "x", {"odd": "1" * 3})
    tensors, _ = read_safetensors(tmp_path / "x")
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, stored[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0
    tensors["t3"].fill_(1)
    assert all(torch.equal(tensors[name], stored[name]) for name in stored if name != "t3")


def test_a_file_of_nothing_but_an_empty_tensor(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 3)}, tmp_path / "x")
    assert read_safetensors(tmp_path / "x")[0]["none"].shape == (0, 3)
