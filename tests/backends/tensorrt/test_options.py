"""Options of the target: capabilities, profiles and numbers, and the errors of bad ones."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import lorac
from lorac.backends.tensorrt import build, library
from lorac.backends.tensorrt.network import parse_model
from lorac.backends.tensorrt.options import TensorRTOptions
from lorac.backends.tensorrt.profiles import DEFAULT_MAX_LENGTH, DEFAULT_MAX_ROWS, SizeRange, axis_names, check_sizes
from tests.backends.tensorrt.building import quietly
from tests.backends.tensorrt.machines import install_gpus, install_nvidias
from tests.backends.tensorrt.tiny import LIBRARY


class Reads(nn.Module):
    """Reads ids of sequences, each with a picture whose sides vary."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 12), nn.Linear(12, 15)

    def forward(self, ids: Tensor, image: Tensor) -> Tensor:
        return self.head(self.embed(ids) + image.mean((1, 2))[:, None, None])


EXAMPLE = {"ids": torch.arange(12).reshape(3, 4) % 11, "image": torch.randn(3, 5, 8)}
SHAPES = {"ids": {0: Dim("rows"), 1: Dim("length", max=40)}, "image": {0: Dim("rows"), 2: Dim("width")}}


@functools.cache
def host() -> nn.Module:
    return Reads().eval()


def ranges(**options: Any) -> dict[str, tuple[SizeRange, ...]]:
    adapters = {"a": lorac.LoRA(r=2, targets=["head"]), "b": lorac.LoRA(r=3, targets=["head"])}
    usual = {"example_inputs": EXAMPLE, "dynamic_shapes": SHAPES, "self_test": False, "active": "a"}
    found = quietly(model=host(), adapters=adapters, **{**usual, **options})
    return dict(found.engine.graphs["main"].facts.ranges)


@pytest.mark.medium("test_profiles_name_axes_or_inputs")
def test_default_ranges_hold_the_examples_and_respect_the_models_bounds():
    """Rows, a text that the model bounds, a side of a picture; ranks up to the room, those of the active one usual."""
    found = ranges()
    rows = SizeRange(1, 3, DEFAULT_MAX_ROWS)
    assert found["ids"] == (rows, SizeRange(1, 4, 40)) and DEFAULT_MAX_LENGTH > 40
    assert found["image"] == (rows, SizeRange(5, 5, 5), SizeRange(1, 8, 16))
    places = SizeRange(1, 1, DEFAULT_MAX_ROWS)
    assert found["head:a"] == (places, SizeRange(12, 12, 12), SizeRange(1, 2, 5))
    assert ranges(active=None)["head:b"] == (places, SizeRange(1, 5, 5), SizeRange(15, 15, 15))


def test_profiles_name_axes_or_inputs():
    named = {"rows": (2, 4, 32), "image": [(2, 5, 6), (4, 5, 7), (32, 5, 9)], "adapters": (1, 2, 4)}
    found = ranges(profiles=named)
    assert found["head:a"][0] == SizeRange(1, 2, 4)
    assert ranges(profiles={"rows": (2, 4, 32)})["head:a"][0] == SizeRange(1, 1, 32)
    assert found["ids"] == (SizeRange(2, 4, 32), SizeRange(1, 4, 40))
    assert found["image"] == (SizeRange(2, 4, 32), SizeRange(5, 5, 5), SizeRange(6, 7, 9))


@pytest.mark.medium("names, order and bounds", keep=["profiles0*", "profiles2*", "profiles3*", "profiles4*"])
@pytest.mark.parametrize(
    ("profiles", "said"),
    [
        ({"lenght": (1, 2, 3)}, r"the model has no input or axis 'lenght'\n  nearest: length"),
        ({"length": (1, 8, 64)}, r"max sizes that the model does not take"),
        ({"ids": [(1, 2), (3, 4)]}, r"profiles= has .* for 'ids'\n  give \(min, opt, max\)"),
        ({"length": (4, 2, 8)}, r"in rising order"),
        ({"length": (0, 2, 8)}, r"from 1 on"),
        ({"image": [(1, 5, 6), (1, 6, 6), (1, 7, 6)]}, r"whose shape is \[rows, 5, width\]"),
        ({"image": [(1, 5), (1, 5), (1, 5)]}, r"whose shape is \[rows, 5, width\]"),
    ],
)
def test_profiles_that_make_no_sense(profiles, said):
    with pytest.raises(lorac.OptionError, match=said):
        ranges(profiles=profiles)


def test_rejects_a_call_outside_the_profile_and_names_a_larger_one():
    found = quietly(model=host(), adapters={}, example_inputs=EXAMPLE, dynamic_shapes=SHAPES, self_test=False)
    part = found.engine.graphs["main"]
    many = {"ids": torch.zeros(9, 4, dtype=torch.long), "image": torch.zeros(9, 5, 8)}
    with pytest.raises(lorac.InputMismatch, match="'ids' has size 9 on axis 0; the plan is for 1 to 8") as error:
        found(**many)
    assert "profiles={'rows': (1, 3, 9)}" in str(error.value)
    check_sizes(part.facts.ranges, EXAMPLE, axis_names(part.interface))


def test_capabilities_are_the_librarys(monkeypatch):
    listed = library.known_capabilities(LIBRARY)
    assert {"8.6", "8.9", "12.0"} <= set(listed) and "9.0" not in listed
    with pytest.raises(lorac.OptionError, match=r"builds for no compute capability '9\.0'") as error:
        TensorRTOptions(target_capabilities=("9.0",))
    assert ", ".join(listed) in str(error.value)
    assert library.choose_capabilities(("8.6",), LIBRARY) == ("8.6",)
    for here, wanted in (("8.9", ("8.9",)), ("9.0", ()), (None, ())):  # the local GPU's, else the library's default
        monkeypatch.setattr(library, "local_capability", lambda here=here: here)
        assert library.choose_capabilities((), LIBRARY) == wanted


def test_tensorrt_rejects_target_capabilities(monkeypatch):
    install_nvidias(monkeypatch)
    with pytest.raises(lorac.OptionError, match="builds for the GPU that is here") as error:
        TensorRTOptions(target_capabilities=("8.9",), library="tensorrt")
    assert "library='tensorrt_rtx'" in str(error.value)


def test_the_library_that_has_an_option_builds(monkeypatch):
    install_nvidias(monkeypatch)
    install_gpus(monkeypatch, "8.9")
    assert not TensorRTOptions().builder.is_rtx and TensorRTOptions(library="tensorrt_rtx").builder.is_rtx
    assert TensorRTOptions(target_capabilities=("8.9",)).builder.is_rtx
    assert not TensorRTOptions(hardware_compatibility="ampere_plus").builder.is_rtx
    for options, said in (
        ({"hardware_compatibility": "ampere_plus", "library": "tensorrt_rtx"}, "takes no hardware_compatibility"),
        ({"hardware_compatibility": "ampere_plus", "target_capabilities": ("8.9",)}, "takes no hardware_compatibility"),
        ({"hardware_compatibility": "ampere"}, "nearest: ampere_plus"),
        ({"library": "trt"}, "library cannot be 'trt'"),
    ):
        with pytest.raises(lorac.OptionError, match=said):
            TensorRTOptions(**options)


def test_numbers_have_their_range():
    for options in ({"builder_optimization_level": 6}, {"workspace": 0}):
        with pytest.raises(lorac.OptionError, match=next(iter(options))):
            TensorRTOptions(**options)
    with pytest.raises(lorac.WrongType, match="profiles"):
        TensorRTOptions(profiles=3)


def test_settings_reach_the_library(tmp_path):
    """TF32, which the library would round to by itself, is off unless an option says otherwise."""
    trt = LIBRARY.module
    found = quietly(model=host(), adapters={}, example_inputs=EXAMPLE, dynamic_shapes=SHAPES, self_test=False)
    parsed, part = parse_model(found.engine.files["model.onnx"].where, LIBRARY), found.engine.graphs["main"]
    plain = build._builder_config(parsed, part.facts.ranges, TensorRTOptions(), ())
    assert not plain.get_flag(trt.BuilderFlag.TF32) and not plain.get_flag(trt.BuilderFlag.STRICT_NANS)
    options = TensorRTOptions(
        tf32=True, strict_nans=True, weight_streaming=True, builder_optimization_level=5, workspace=64
    )
    settings = build._builder_config(parsed, part.facts.ranges, options, ("8.6", "12.0"))
    flags = (trt.BuilderFlag.TF32, trt.BuilderFlag.STRICT_NANS, trt.BuilderFlag.WEIGHT_STREAMING)
    assert all(settings.get_flag(flag) for flag in flags)
    assert settings.builder_optimization_level == 5
    assert settings.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    kinds = trt.ComputeCapability
    assert [settings.get_compute_capability(i) for i in range(2)] == [kinds.SM86, kinds.SM120]
    assert settings.num_optimization_profiles == 1


@pytest.mark.medium("test_settings_reach_the_library")
def test_hardware_compatibility_reaches_the_library(monkeypatch):
    install_nvidias(monkeypatch)
    found = quietly(model=host(), adapters={}, example_inputs=EXAMPLE, dynamic_shapes=SHAPES, self_test=False)
    parsed, part = parse_model(found.engine.files["model.onnx"].where, LIBRARY), found.engine.graphs["main"]
    made: dict[str, object] = {}

    class Config:
        """A configuration of TensorRT for RTX, which has no such levels, and ignores them."""

        def __getattr__(self, name):
            return getattr(real, name)

        def __setattr__(self, name, value):
            made[name] = value

    real, profile = parsed.builder.create_builder_config(), parsed.builder.create_optimization_profile
    builder = SimpleNamespace(create_builder_config=Config, create_optimization_profile=profile)
    options = TensorRTOptions(hardware_compatibility="ampere_plus")
    build._builder_config(replace(parsed, builder=builder), part.facts.ranges, options, ())
    assert made == {"hardware_compatibility_level": LIBRARY.module.HardwareCompatibilityLevel.AMPERE_PLUS}


def test_the_times_of_kernels_are_measured_once():
    """A stand-in, since NVIDIA's library measures them on a GPU alone."""
    attached, written = [], []

    class Config:
        def create_timing_cache(self, stored):
            return stored

        def set_timing_cache(self, cache, ignore_mismatch):
            attached.append((cache, ignore_mismatch))
            return cache != b"of another driver"

        def get_timing_cache(self):
            return SimpleNamespace(serialize=lambda: b"measured now")

    builder = SimpleNamespace(build_serialized_network=lambda network, config: b"plan")
    parsed = SimpleNamespace(library=LIBRARY, network=None, builder=builder)
    for stored in (None, b"measured", b"of another driver"):
        timings = SimpleNamespace(read=lambda stored=stored: stored, write=written.append)
        assert build._build_plan(parsed, "main", Config(), timings) == b"plan"
    assert attached == [(b"", False), (b"measured", False), (b"of another driver", False), (b"", False)]
    assert written == [b"measured now"] * 3


@pytest.mark.skipif(library.local_capability() is not None, reason="there is a GPU here")
def test_rejects_refitting_without_a_gpu():
    with pytest.raises(lorac.Unavailable, match="needs an NVIDIA GPU") as error:
        quietly(model=host(), adapters={}, example_inputs=EXAMPLE, mode="fused", refit=True)
    assert "mode='fused'" in str(error.value)
    with pytest.raises(lorac.OptionError, match="which a program in mode 'live' lacks"):
        quietly(model=host(), adapters={}, example_inputs=EXAMPLE, refit=True)


def test_rejects_inputs_that_determine_sizes():
    value = SimpleNamespace(name="count", is_shape_tensor=True)
    with pytest.raises(lorac.Unavailable, match="computes sizes from the values of input 'count'"):
        build._refuse_shape_tensor(value)
