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

from lorac.adapters.fit import check_finite
from lorac.formats import reading
from lorac.formats._config_fields import write_json
from lorac.formats.reading import AdapterFile
from lorac.storage.tensor_file import DTYPES, write_safetensors
from tests.refusing import refuses

GOOD = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write(path: Path, header: Any, data: bytes = bytes(24), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + text + data)
    return path


OF_THE_LIBRARY = "the safetensors library refuses it: .*"
LYING: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"[]", "not an object"),
    (b'{"a": \xff}', "not JSON"),
    (b'{"a": 1, "a": 2}', "given twice"),
    (b"[" * 50_000, "not JSON"),
    ({"__metadata__": {"a": 1}}, OF_THE_LIBRARY),
    ({"__metadata__": []}, OF_THE_LIBRARY),
    ({"a": []}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "more": 1}}, "'a' has fields besides dtype, shape and data_offsets"),
    ({"a": {**GOOD, "dtype": "F8_E8M0", "shape": [24]}}, "'a' is of dtype F8_E8M0, which lorac does not read"),
    ({"a": {**GOOD, "dtype": "F33"}}, f"{OF_THE_LIBRARY}F33"),
    ({"a": {**GOOD, "dtype": ["F32"]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [2, -3]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [2, 3.0]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [True, 6]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "data_offsets": [0]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "data_offsets": [24, 0]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [2, 4]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [2**40, 2**40]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "dtype": "F16"}}, OF_THE_LIBRARY),
    ({"a": GOOD, "b": GOOD}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "data_offsets": [8, 32]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [2, 2], "data_offsets": [0, 16]}}, OF_THE_LIBRARY),
    ({"a": {**GOOD, "shape": [4, 3], "data_offsets": [0, 48]}}, OF_THE_LIBRARY),
    ({}, OF_THE_LIBRARY),
]


@pytest.mark.parametrize(("header", "reason"), LYING)
def test_rejects_headers_that_do_not_fit_their_file(tmp_path: Path, header: Any, reason: str) -> None:
    path = write(tmp_path / "x.safetensors", header)
    with refuses("corrupt_file", match=reason) as error:
        AdapterFile(path).read_tensors()
    assert str(path) in str(error.value)


def test_rejects_every_truncation(tmp_path: Path) -> None:
    whole, part = tmp_path / "whole", tmp_path / "part"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4)}, whole, metadata={"format": "pt"})
    content = whole.read_bytes()
    for length in range(len(content)):
        part.write_bytes(content[:length])
        with refuses("corrupt_file"):
            assert not AdapterFile(part).header
    part.write_bytes(content + b"\0")
    with refuses("corrupt_file"):
        assert not AdapterFile(part).header
    assert AdapterFile(whole).metadata == {"format": "pt"}


@pytest.mark.parametrize("length", [2**63, 10**9, 1000])
def test_lying_header_lengths(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x", {"a": GOOD}, length=length)
    with refuses("corrupt_file", match=f"promises {length} bytes of header"):
        assert not AdapterFile(path).header
    assert AdapterFile(path).peek_metadata() == {}


def test_peeking_never_raises(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"abc")
    for path in (tmp_path / "short", tmp_path / "none", tmp_path):
        file = AdapterFile(path)
        assert (file.peek_metadata(), file.peek_names(), file.begins(b"xyz")) == ({}, frozenset(), False)
    mixed = write(tmp_path / "x", {"__metadata__": {"a": "b", "c": 1}})
    assert AdapterFile(mixed).peek_metadata() == {"a": "b"}
    assert AdapterFile(write(tmp_path / "x", {"__metadata__": 3})).peek_metadata() == {}


@pytest.mark.parametrize("dtype", list(DTYPES.values()), ids=str)
def test_every_dtype_round_trips(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.arange(6).reshape(2, 3).to(dtype)
    tensors = {"b": values, "a": values[0, 0], "empty": values[:0], "turned": values.t()}
    write_safetensors(tmp_path / "x", tensors, {"format": "pt"})
    for found in (load_file(tmp_path / "x"), AdapterFile(tmp_path / "x").read_tensors()):
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
    assert AdapterFile(tmp_path / "1").metadata == {"x": "1", "format": "pt", "y": "2"}
    write_json(tmp_path / "1", {"b": {"z": 1, "y": 2}, "a": None})
    write_json(tmp_path / "2", {"a": None, "b": {"z": 1, "y": 2}})
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert list(AdapterFile(tmp_path / "1").read_json()["b"]) == ["z", "y"]


def test_tensors_outlive_their_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_file({"a": torch.ones(1000)}, path)
    tensors = AdapterFile(path).read_tensors()
    with path.open("r+b") as file:
        file.seek(-4000, os.SEEK_END)
        file.write(bytes(4000))
    assert tensors["a"].sum() == 1000


NUMBERS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.complex64]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_non_finite_values_of_any_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"fine": torch.ones(2), "bad": torch.tensor([1, float("nan"), 2]).to(dtype)}, tmp_path / "x")
    with refuses("non_finite", match=r"tensor 'bad' .* holds 1 NaN or infinite of 3 values"):
        check_finite(AdapterFile(tmp_path / "x").read_tensors(), "it")


@pytest.mark.parametrize("dtype", NUMBERS[:5], ids=str)
def test_accepts_finite_values_whose_sum_overflows(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"large": torch.full((300,), torch.finfo(dtype).max, dtype=torch.float64).to(dtype)}, tmp_path / "x")
    tensors = AdapterFile(tmp_path / "x").read_tensors()
    check_finite(tensors, "it")
    assert (tensors["large"].double() == torch.finfo(dtype).max).all()


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
            AdapterFile(tmp_path / "x.bin").read_tensors()
        assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"a": 1}, {1: torch.ones(2)}, {"a": torch.ones(2).to_sparse()}, {"a": {"b": torch.ones(1)}}],
)
def test_pickles_of_other_things(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "x.bin")
    with refuses("corrupt_file"):
        AdapterFile(tmp_path / "x.bin").read_tensors()


def test_damaged_pickles(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(200)}, tmp_path / "x.bin")
    content = (tmp_path / "x.bin").read_bytes()
    for damaged in (b"", content[:100], content[:-50], b"nothing of the kind"):
        (tmp_path / "x.bin").write_bytes(damaged)
        with refuses("corrupt_file"):
            AdapterFile(tmp_path / "x.bin").read_tensors()


@pytest.mark.parametrize("part", [1, 100, 1 << 20])
def test_tensors_of_a_part_are_apart_from_each_other(
    tmp_path: Path, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read into one allocation, but each owns its bytes alone, aligned as torch's own."""
    monkeypatch.setattr(reading, "_PART", part)
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.float64]
    stored = {f"t{i}": torch.arange(7 * i).reshape(i, 7).to(dtypes[i % 5]) for i in range(9)}
    save_file(stored, tmp_path / "x", {"odd": "1" * 3})
    tensors = AdapterFile(tmp_path / "x").read_tensors()
    assert tensors.keys() == stored.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, stored[name])
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert tensor.data_ptr() % 64 == 0
    tensors["t3"].fill_(1)
    assert all(torch.equal(tensors[name], stored[name]) for name in stored if name != "t3")


def test_a_file_of_nothing_but_an_empty_tensor(tmp_path: Path) -> None:
    save_file({"none": torch.zeros(0, 3)}, tmp_path / "x")
    assert AdapterFile(tmp_path / "x").read_tensors()["none"].shape == (0, 3)
