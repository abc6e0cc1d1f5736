"""Target aoti: packages of torch's AOTInductor, whose slots are inputs. Each compiles C++ for ten seconds and more."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.backends.aoti.hosts import make, make_convolution, make_pooled
from tests.docs.pages import ROOT, blocks

MIX = {"lora": 0.5, "dora": -0.7, "branch": 1.5}


@pytest.fixture(scope="module")
def live() -> Any:
    model, adapters, x = make()
    return lorac.compile(model, adapters, target="aoti", active="lora", example_inputs=(x,))


@pytest.fixture(scope="module")
def eager() -> Any:
    model, adapters, x = make()
    return lorac.compile(model, adapters, active=None, example_inputs=(x,))


@pytest.fixture(scope="module")
def artifact(live: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti") / "artifact"
    live.swap("lora")
    live.save(folder)
    live.save_choice(folder.parent / "mix.slots.safetensors", MIX)
    return folder


@torch.no_grad()
@pytest.mark.medium("g++ takes ten seconds; test_export_program.py runs it uncompiled")
def test_swaps_mixes_and_runs_rows_as_eager_does(live: Any, eager: Any) -> None:
    x = make()[2]
    off = live(x, adapters=None)["answer"]
    assert_close(off, eager(x)["answer"])
    for choice in ("lora", "dora", "branch", MIX):
        live.swap(choice)
        for given in (x, x[:1], x.transpose(0, 1).contiguous().transpose(0, 1)):
            assert_close(live(given)["answer"], eager(given, adapters=choice)["answer"])
    rows = ["lora", "dora", None, "lora"]
    assert_close(live(x, adapters=rows)["answer"], eager(x, adapters=rows)["answer"])
    rows = ["branch", "dora", "branch", None]
    assert_close(live(x, adapters=rows)["answer"], eager(x, adapters=rows)["answer"])
    live.swap(None)
    assert torch.equal(live(x)["answer"], off)


@pytest.mark.medium("g++ takes ten seconds; test_export_program.py runs it uncompiled")
def test_rejects_sizes_that_the_program_was_not_compiled_for(live: Any) -> None:
    with pytest.raises(lorac.InputMismatch):
        live(torch.randn(4, 2, 6))


@torch.no_grad()
@pytest.mark.medium("g++ takes ten seconds; test_export_program.py keeps the rank")
def test_adapts_a_convolution() -> None:
    model, adapter, x = make_convolution()
    compiled = lorac.compile(model, [adapter], target="aoti", active="lora", example_inputs=(x,))
    eager = lorac.compile(model, [adapter], active=None, example_inputs=(x,))
    for choice in ("lora", None, {"lora": -0.5}):
        for given in (x, x[:1], x.repeat(3, 1, 1, 1)):
            assert_close(compiled(given, adapters=choice), eager(given, adapters=choice))


class _Pooling(nn.Module):
    """Every adaptive pool that Inductor computes for the example's size alone."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.mix(x.movedim(1, -1)).movedim(-1, 1)
        lines, (values, places) = y.flatten(2), F.adaptive_max_pool2d(y, (4, 3), return_indices=True)
        means = F.adaptive_avg_pool2d(y, (7, 5)), F.adaptive_avg_pool1d(lines, 5), F.adaptive_avg_pool2d(y, (None, 2))
        return *means, values, places.to(y.dtype), F.adaptive_max_pool1d(lines, 4)


@torch.no_grad()
@pytest.mark.medium("g++ takes ten seconds; no uncompiled program shows the fault")
def test_adaptive_pools_of_any_size() -> None:
    model, free = _Pooling().eval(), torch.export.Dim.AUTO
    options = {"example_inputs": (torch.randn(2, 6, 16, 16),), "dynamic_shapes": {"x": {0: free, 2: free, 3: free}}}
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=["mix"])}, target="aoti", **options)
    for height, width in ((16, 16), (24, 24), (9, 31)):
        x = torch.randn(3, 6, height, width)
        for found, expected in zip(compiled(x), model(x), strict=True):
            assert_close(found, expected)


@torch.no_grad()
@pytest.mark.medium("g++ takes ten seconds; no uncompiled program shows the fault")
def test_takes_any_rows_after_an_example_of_one_row_for_each_place() -> None:
    model, adapter, x = make_pooled()
    compiled = lorac.compile(model, [adapter], target="aoti", active="ia3", example_inputs=(x,))
    eager = lorac.compile(model, [adapter], active=None, example_inputs=(x,))
    for given in (x, x[:1], torch.randn(6, 6)):
        assert_close(compiled(given), eager(given, adapters="ia3"))
    rows = ["ia3", "ia3", None, None, "ia3", "ia3"]
    assert_close(compiled(given, adapters=rows), eager(given, adapters=rows))


@torch.no_grad()
@pytest.mark.medium("g++ takes ten seconds; test_export_program.py runs it uncompiled")
def test_loads_an_artifact_whose_maker_is_trusted(artifact: Path, eager: Any) -> None:
    with pytest.raises(lorac.ArtifactError, match="machine code"):
        lorac.load(artifact)
    with pytest.raises(lorac.OptionError, match="compiled for the CPU"):
        lorac.load(artifact, trust=True, device="cuda")
    loaded, x = lorac.load(artifact, trust=True), make()[2]
    assert_close(loaded(x)["answer"], eager(x, adapters="lora")["answer"])
    loaded.swap("dora")
    assert_close(loaded(x)["answer"], eager(x, adapters="dora")["answer"])


_ALONE = """
import sys, torch, safetensors.torch
package = torch._inductor.aoti_load_package(sys.argv[1])
slots = safetensors.torch.load_file(sys.argv[2])
x = torch.linspace(-1, 1, 72).reshape(4, 3, 6)
print(*package(x, lorac=slots)["answer"].flatten().tolist())
assert "lorac" not in sys.modules
"""


@torch.no_grad()
@pytest.mark.medium("g++ takes ten seconds; test_export_program.py runs it uncompiled")
@pytest.mark.parametrize(("file", "choice"), [("artifact/adapters/dora.slots.safetensors", "dora"),
                                              ("mix.slots.safetensors", MIX)])  # fmt: skip
def test_runs_in_python_without_lorac(artifact: Path, eager: Any, file: str, choice: Any) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _ALONE, str(artifact / "model.pt2"), str(artifact.parent / file)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=artifact).stdout
    x = torch.linspace(-1, 1, 72).reshape(4, 3, 6)
    found = torch.tensor([float(number) for number in printed.split()])
    assert_close(found, eager(x, adapters=choice)["answer"].flatten())


@torch.no_grad()
@pytest.mark.slow("g++ takes ten seconds; test_export_program.py runs it uncompiled")
def test_runs_in_cpp(artifact: Path, eager: Any, tmp_path: Path) -> None:
    """The program of docs/aoti.md, over the headers and libraries that torch ships."""
    from torch.utils import cpp_extension

    if shutil.which("g++") is None or not Path(cpp_extension.include_paths()[0], "torch/csrc/inductor").exists():
        pytest.skip("needs g++ and torch's headers")
    (code,) = (block.text for block in blocks(ROOT / "docs" / "aoti.md") if block.language == "cpp")
    (tmp_path / "swap.cpp").write_text(code, encoding="utf-8")
    (library,) = cpp_extension.library_paths()
    build = ["g++", "-std=c++20", "swap.cpp", "-o", "swap", *(f"-I{path}" for path in cpp_extension.include_paths())]
    build += [f"-L{library}", f"-Wl,-rpath,{library}", "-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr[-2000:]
    x = torch.linspace(-1, 1, 72).reshape(4, 3, 6)
    for name in ("lora", "dora", "branch"):
        slots = artifact / "adapters" / f"{name}.slots.safetensors"
        command = [tmp_path / "swap", artifact / "model.pt2", slots, "4,3,6", *map(str, x.flatten().tolist())]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = torch.tensor([float(line) for line in printed.split()])
        assert_close(found, eager(x, adapters=name)["answer"].flatten())


@torch.no_grad()
@pytest.mark.slow("g++ takes ten seconds; test_export_program.py runs it uncompiled")
@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_merges_weights(mode: str, eager: Any) -> None:
    model, adapters, x = make()
    del adapters["branch"]
    compiled = lorac.compile(model, adapters, target="aoti", mode=mode, active="dora", example_inputs=(x,))
    assert_close(compiled(x)["answer"], eager(x, adapters="dora")["answer"])
    if mode == "fused":
        compiled.swap("lora")
        assert_close(compiled(x)["answer"], eager(x, adapters="lora")["answer"])


@torch.library.custom_op("aoti_tests::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return doubled(self.inner(x))


def test_rejects_ops_of_other_libraries_by_module_and_line() -> None:
    model, x = Foreign().eval(), torch.randn(2, 6)
    with pytest.raises(lorac.Unavailable, match=r"aoti does not compute aoti_tests::doubled.*test_aoti\.py"):
        lorac.compile(model, {"a": lorac.LoRA(r=1, targets=["inner"])}, target="aoti", example_inputs=(x,))


def test_asks_for_a_compiler() -> None:
    import torch._inductor.config

    model, adapters, x = make()
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")}),
        pytest.raises(lorac.Unavailable, match="finds no C\\+\\+ compiler"),
    ):
        lorac.compile(model, adapters, target="aoti", example_inputs=(x,))


def test_rejects_other_devices() -> None:
    model, adapters, x = make()
    with pytest.raises(lorac.OptionError, match="does not run on device 'cuda'"):
        lorac.compile(model, adapters, target="aoti", device="cuda", example_inputs=(x,))
