"""The module that hides TensorRT: which library serves, dtypes, and errors in place of output."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

import lorac
from lorac import MissingExtra
from lorac.backends.tensorrt import library
from lorac.backends.tensorrt.library import NVIDIA, RTX, TensorRTLibrary, find_library
from tests.backends.tensorrt import tiny
from tests.backends.tensorrt.machines import install_gpus, install_nvidias
from tests.backends.tensorrt.tiny import LIBRARY


def test_a_library_has_a_name_and_a_version() -> None:
    assert LIBRARY.name_and_version == f"{LIBRARY.module.__name__} {LIBRARY.module.__version__}"
    assert LIBRARY.is_rtx == (LIBRARY.module is sys.modules.get("tensorrt_rtx"))


def test_chooses_tensorrt_rtx_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidias(monkeypatch)
    assert find_library().is_rtx and not find_library(NVIDIA).is_rtx


def test_prefers_nvidias_package_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    install_nvidias(monkeypatch)
    install_gpus(monkeypatch, "8.6")
    assert find_library().name_and_version == "tensorrt 99.0" and find_library(RTX).is_rtx


def test_a_library_that_cannot_be_loaded_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def load(name: str) -> TensorRTLibrary:
        tried.append(name)
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    install_gpus(monkeypatch, "8.6")
    monkeypatch.setattr(library, "_import_library", load)
    with pytest.raises(MissingExtra, match=r'pip install "lorac\[tensorrt\]"'):
        find_library()
    assert tried == ["tensorrt", "tensorrt_rtx"]
    with pytest.raises(MissingExtra, match=r"tensorrt is not installed\n  pip install tensorrt"):
        find_library(NVIDIA)


def test_dtypes_are_the_same_both_ways() -> None:
    for name, kind in LIBRARY.module.DataType.__members__.items():
        if name in {"INT4", "FP4", "E8M0"}:
            with pytest.raises(lorac.Unavailable, match=f"torch has no dtype for TensorRT's {name}"):
                library.torch_dtype(kind)
        else:
            assert LIBRARY.dtype(library.torch_dtype(kind)) == kind


def test_a_dtype_that_tensorrt_lacks() -> None:
    with pytest.raises(lorac.Unavailable, match=r"TensorRT has no tensors of torch.float64"):
        LIBRARY.dtype(torch.float64)


def test_collects_errors_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    network, _ = tiny.parsed()
    with library.collect_errors() as messages:
        assert not network.mark_weights_refittable("nobody")
        assert "no weights named nobody" in messages.why()
    assert capfd.readouterr() == ("", "")


def test_warns_of_errors_that_are_not_read() -> None:
    network, _ = tiny.parsed()
    with pytest.warns(lorac.LoracWarning, match="no weights named nobody"), library.collect_errors():
        network.mark_weights_refittable("nobody")


def test_the_innermost_block_collects_errors() -> None:
    network, _ = tiny.parsed()
    with library.collect_errors() as outer:
        with library.collect_errors() as inner:
            network.mark_weights_refittable("nobody")
            inner.why()
        assert inner.errors and not outer.errors


def test_a_block_collects_no_errors_of_another_threads_block() -> None:
    network, _ = tiny.parsed()
    reasons = []

    def elsewhere() -> None:
        with library.collect_errors() as messages:
            network.mark_weights_refittable("nobody")
            reasons.append(messages.why())

    with library.collect_errors() as here:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert not here.errors
    assert len(reasons) == 1


def test_all_blocks_collect_errors_of_tensorrts_threads() -> None:
    network, _ = tiny.parsed()
    with library.collect_errors() as messages:
        thread = threading.Thread(target=network.mark_weights_refittable, args=("nobody",))
        thread.start()
        thread.join()
        assert "nobody" in messages.why()


def test_says_that_tensorrt_gives_no_reason() -> None:
    assert library.BuildMessages().why() == "TensorRT gives no reason"
