"""Arguments whose values decide which way a model goes: constants of its program, and calls are compared with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.captured import captured_program
from tests.refusing import refuses


class Cropping(nn.Module):
    """Takes of every row what its size says, as models do that see images of several sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, sizes: Any, scale: float = 1.0, upside_down: bool = False) -> Tensor:
        y = self.linear(x) * scale
        cropped = torch.cat([row[:size] for row, size in zip(y, sizes, strict=True)])
        return cropped.flip(0) if upside_down else cropped


X = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(0))
GIVEN = {"sizes": (3, 5), "upside_down": True}


@pytest.fixture(scope="module")
def host() -> Cropping:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Cropping().eval()


@pytest.fixture(scope="module")
def compiled(host: Cropping, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiled, saved and loaded again: what is asked of it goes through everything."""
    folder = tmp_path_factory.mktemp("fixed") / "artifact"
    adapter = lorac.LoRA(r=2, targets=["linear"])
    with pytest.warns(lorac.LoracWarning, match=r"axis 0 of 'x', at 2(.|\n)*for row, size in zip\(y, sizes"):
        made = lorac.compile(host, {"a": adapter}, target="onnxruntime", example_inputs={"x": X, **GIVEN}, active=None)
    made.save(folder)
    return lorac.load(folder)


@pytest.mark.medium("calls that go another way")
@pytest.mark.parametrize("sizes", [(3, 5), [3, 5], torch.tensor([3, 5])], ids=["tuple", "list", "tensor"])
def test_accepts_the_same_constants_as_arguments(host: Cropping, compiled: Any, sizes: Any):
    assert_close(compiled(X, sizes=sizes, upside_down=True), host(X, **GIVEN).detach())
    assert_close(compiled(X, sizes, 1.0, True), host(X, **GIVEN).detach())


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({**GIVEN, "sizes": (4, 5)}, r"captured with sizes=\[3, 5\], and cannot take sizes=\[4, 5\]"),
        ({**GIVEN, "scale": 2.0}, "captured with scale=1.0, and cannot take scale=2.0"),
        ({"sizes": (3, 5)}, "captured with upside_down=True, and cannot be called without it"),
        ({"upside_down": True}, r"be called without it\n  give sizes=\[3, 5\]"),
    ],
)
def test_rejects_other_constants_as_arguments(compiled: Any, said: dict[str, Any], text: str):
    with pytest.raises(lorac.InputMismatch, match=text):
        compiled(X, **said)


# ── Weights that forward casts ───────────────────────────────────────────────────────────────────────────────────────
class Casting(nn.Module):
    """Brings a layer to a dtype at every call, as routers of experts are kept in full precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.router, self.dtype = nn.Linear(6, 3), dtype

    def forward(self, x: Tensor) -> Tensor:
        self.router = self.router.to(self.dtype)
        return self.router(x.to(self.dtype))


def test_captures_a_cast_to_the_same_dtype():
    host = Casting(torch.float32)
    assert_close(captured_program(host, (X,)).module()(X), host(X))


def test_rejects_a_cast_to_another_dtype_and_names_the_line():
    host = Casting(torch.float64)
    with refuses("capture_failed", match=r"self.router.to\(self.dtype\): it casts its own weight 'weight'"):
        captured_program(host, (X,))
    assert host.router.weight.dtype == torch.float32


# ── Sizes of images that are read one by one ─────────────────────────────────────────────────────────────────────────
class Windows(nn.Module):
    """Reads how many pieces each image has, counts them over, and takes them column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, image_grid_thw: Tensor) -> Tensor:
        places, first = [], 0
        for _, height, width in image_grid_thw:
            grid = torch.arange(int(height) * int(width)).reshape(int(height), int(width))
            places.append(grid.T.reshape(-1) + first)
            first += (grid >= 0).sum(0).cumsum(0).tolist()[-1]
        parts = torch.split(self.linear(x)[torch.cat(places)], image_grid_thw.prod(-1).tolist())
        return torch.stack([part[0] * i for i, part in enumerate(parts, 1)])


@pytest.mark.medium("capture/test_trace_guards.py")
def test_sizes_of_images_that_no_trace_can_follow_become_constants():
    host, sizes = Windows().eval(), torch.tensor([[1, 2, 3], [1, 2, 1]])
    call = {"x": X[0, :4].repeat(2, 1), "image_grid_thw": sizes}
    adapter = lorac.LoRA(r=2, targets=["linear"])
    with pytest.warns(
        lorac.LoracWarning, match=r"reads 'image_grid_thw' as numbers: the program holds \[\[1, 2, 3\], "
    ):
        compiled = lorac.compile(host, {"a": adapter}, target="onnxruntime", example_inputs=call, active=None)
    other = {**call, "x": call["x"] + 1}
    assert_close(compiled(**other), host(**other).detach())
    with pytest.raises(lorac.InputMismatch, match=r"cannot take image_grid_thw=\[\[1, 3, 2\]"):
        compiled(**{**call, "image_grid_thw": torch.tensor([[1, 3, 2], [1, 2, 1]])})


# ── Ways that a model goes by what it computes ───────────────────────────────────────────────────────────────────────
class Deciding(nn.Module):
    """Leaves its mask alone where nothing is masked, as some models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        answer: Tensor = self.linear(x)
        if mask.bool().all() and not mask.isnan().any():
            return answer
        return answer * mask[..., None]


@pytest.mark.medium("the other value", cases=["True"])
@pytest.mark.parametrize("masked", [False, True])
def test_rejects_calls_that_take_another_branch_than_the_example(masked: bool):
    host, adapter = Deciding().eval(), lorac.LoRA(r=2, targets=["linear"])
    way = {False: torch.ones(3, 5), True: torch.ones(3, 5).tril()}
    call = {"x": X[:, :5], "mask": way[masked][:2]}
    with pytest.warns(lorac.LoracWarning, match=r"takes the example's branches, at .*: if mask\.bool\(\)\.all\(\)"):
        compiled = lorac.compile(host, {"a": adapter}, target="onnxruntime", example_inputs=call, active=None)
    x = torch.randn(3, 5, 6)
    assert_close(compiled(x, way[masked]), host(x, way[masked]).detach())
    with pytest.raises(lorac.InputMismatch, match=r"the model checks them at .*: if mask\.bool\(\)\.all\(\)"):
        compiled(x, way[not masked])
