"""The library of lorac-native: under sanitizers, with each instruction set, in other releases, as a wheel."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import onnxruntime
import pytest

from tests.native.library import PACKAGE, ROOT, SOURCES, build, needs_compiler

pytestmark = [needs_compiler, pytest.mark.slow]
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all -g1"
LOWEST = "1.24.1"
"""The first release with the version of the interface that ``src/ort_abi.h`` asks for."""
CHECKS = 60


@pytest.fixture(scope="module")
def fuzzer() -> Path:
    options = ("-DLORAC_NATIVE_FUZZ=ON", "-DCMAKE_BUILD_TYPE=None", f"-DCMAKE_CXX_FLAGS={SANITIZERS}")
    return build(ROOT / "build" / "native-fuzz", *options) / "fuzz"


@pytest.mark.parametrize("kernels", ["portable", "avx2", "avx512", "neon"])
def test_random_updates_are_right_and_stay_within_their_buffers(fuzzer: Path, kernels: str) -> None:
    run = subprocess.run(
        [fuzzer, str(CHECKS), "7"],
        env={**os.environ, "LORAC_NATIVE_KERNELS": kernels},
        capture_output=True,
        text=True,
        check=False,
    )
    if f"the {kernels} kernels" not in run.stdout and run.returncode == 0:
        pytest.skip(f"this processor does not run {kernels}")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("release", [LOWEST, onnxruntime.__version__])
def test_the_op_runs_in_the_lowest_and_the_newest_release(release: str, package: Path, tmp_path: Path) -> None:
    _pip("install", "--no-deps", "--target", str(tmp_path), f"onnxruntime=={release}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    found = "import onnxruntime; print(onnxruntime.__version__, onnxruntime.__file__)"
    shown = subprocess.run([sys.executable, "-c", found], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout.split() == [release, str(tmp_path / "onnxruntime" / "__init__.py")]
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/native/test_add_low_rank.py"]
    subprocess.run(tests, env=environment, cwd=ROOT, check=True)


def test_a_wheel_holds_the_package_and_its_version(tmp_path: Path) -> None:
    _pip("wheel", "--no-deps", "--wheel-dir", str(tmp_path), str(SOURCES))
    (wheel,) = tmp_path.glob("*.whl")
    version = tomllib.loads((SOURCES / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name.startswith(f"{PACKAGE}-{version}-py3-none-")
    _pip("install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel))
    names = {path.name for path in (tmp_path / "site" / PACKAGE).iterdir()}
    assert {"__init__.py", "liblorac_native.so"} <= names


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *arguments], check=True)
