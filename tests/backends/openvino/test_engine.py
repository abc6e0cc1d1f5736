"""Programs in OpenVINO: every mode, rows, threads, artifacts, precisions, devices, and refusals."""

from __future__ import annotations

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorac
from lorac.testing import assert_close
from tests.docs.pages import blocks
from tests.limits import SWAP_SECONDS

openvino = pytest.importorskip("openvino")

ROOT = Path(__file__).parents[3]
X = torch.randn(4, 6, 9, 7, generator=torch.Generator().manual_seed(0))
MIX = {"a": 0.5, "b": 0.7}
ABILITIES = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif("BF16" not in ABILITIES, reason="this processor has no bf16")


class Net(nn.Module):
    """A convolution with circular padding, and two layers on its means."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 10, 3, padding=(2, 1), padding_mode="circular")
        self.left, self.right = nn.Linear(10, 14), nn.Linear(14, 9)

    def forward(self, image: Tensor) -> Tensor:
        return self.right(torch.tanh(self.left(torch.relu(self.conv(image)).mean((2, 3)))))


@functools.cache
def host() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@functools.cache
def eager() -> lorac.Compiled:
    adapters = {
        "a": lorac.LoRA(r=3, targets=["conv", "left", "right"]),
        "b": lorac.DoRA(r=5, targets=["left"]),
        "c": lorac.Bottleneck(reduction_factor=2, targets=["left", "right"]),
    }
    compiled = lorac.compile(host(), adapters)
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in compiled.parameters() if p.requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return compiled.eval()


def compiled(mode: str = "live", names: str = "ab", **options: Any) -> lorac.Compiled:
    adapters = {name: eager().adapters[name] for name in names}
    options = {"active": None, "example_inputs": (X,), **options}
    return lorac.compile(host(), adapters, target="openvino", mode=mode, **options)


@functools.cache
def live() -> lorac.Compiled:
    return compiled(names="abc")


@torch.no_grad()
def expected(choice: object, x: Tensor = X) -> Tensor:
    return eager()(x, adapters=choice)


@pytest.mark.parametrize("choice", ["a", "b", "c", MIX, None, ["a", None, "b", MIX]], ids=str)
def test_answers_as_eager_does_for_every_choice(choice):
    assert_close(live()(X, adapters=choice), expected(choice))


def test_answers_a_larger_batch_than_the_example_s_from_the_first_call_on():
    x = torch.randn(11, 6, 9, 7)
    assert_close(compiled(names="c")(x, adapters=None), expected(None, x))


class PatchesAndTokens(nn.Module):
    """Three convolutions of an image of one size, and attention of tokens of any number."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.mix = nn.Conv2d(3, 32, 8, stride=8), nn.Conv2d(32, 32, 3, padding=1)
        self.down = nn.Conv2d(32, 32, 1, stride=2)
        self.qkv, self.words = nn.Linear(32, 96), nn.Embedding(50, 32)

    def attend(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return x + F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        mixed = self.mix(self.patch(image))
        image = self.attend(mixed.flatten(2).transpose(1, 2)).mean(1, keepdim=True)
        return self.attend(self.words(tokens) + image + self.down(mixed).mean((2, 3))[:, None])


def test_convolutions_with_adapters_answer_rightly_after_calls_that_need_more_memory():
    torch.manual_seed(0)
    host, generator = PatchesAndTokens().eval(), torch.Generator().manual_seed(1)
    eager = lorac.compile(host, {"a": lorac.LoRA(r=4, targets=["patch", "mix", "down"])})
    for parameter in (p for p in eager.parameters() if p.requires_grad):
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1

    def call(tokens: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 3, 32, 32, generator=generator), torch.randint(50, (2, tokens), generator=generator)

    free = torch.export.Dim.DYNAMIC
    live = lorac.compile(
        host, eager.adapters, target="openvino", example_inputs=call(11), dynamic_shapes=({0: free}, {0: free, 1: free})
    )
    with torch.no_grad():
        for tokens in (11, 40, 11, 200, 300, 17):
            inputs = call(tokens)
            assert_close(live(*inputs), eager(*inputs))


def test_returns_the_same_bits_after_swaps():
    program = compiled()
    before = program(X)
    program.swap("a")
    assert not torch.equal(program(X), before)
    program.swap(None)
    assert torch.equal(program(X), before)


def test_merges_in_place_and_as_constants():
    fused, baked = compiled("fused"), compiled("baked", active="a")
    for choice in ("a", MIX, None):
        fused.swap(choice)
        assert_close(fused(X), expected(choice))
    assert_close(baked(X), expected("a"))


def test_swaps_in_two_milliseconds():
    program = live()
    program.swap("a")
    assert min(program.swap(choice).seconds for choice in ("b", "a", "b", "a")) < SWAP_SECONDS


def test_gives_every_thread_the_answer_to_its_own_choice():
    program, choices = live(), ["a", "b", MIX, None]
    wanted = {str(choice): program(X, adapters=choice) for choice in choices}
    with ThreadPoolExecutor(6) as pool:
        answers = list(
            pool.map(lambda index: (str(choices[index % 4]), program(X, adapters=choices[index % 4])), range(60))
        )
    assert all(torch.equal(answer, wanted[choice]) for choice, answer in answers)


def test_bounds_the_calls_at_a_time():
    loaded = compiled(streams=2).engine.graphs["main"]
    assert loaded.turns._value == 4
    assert loaded.model.get_property("NUM_STREAMS") == 2


def test_answers_arrays_for_arrays():
    found = live()(X.numpy(), adapters="a")
    assert isinstance(found, np.ndarray)
    assert_close(torch.from_numpy(found), expected("a"))


def test_loads_in_a_process_without_transformers(tmp_path):
    program = compiled("fused", threads=1)
    program.save(tmp_path / "program")
    torch.save((X, expected("a")), tmp_path / "answer.pt")
    script = """
import sys, torch, lorac
loaded = lorac.load("program")
x, wanted = torch.load("answer.pt")
loaded.swap("a")
torch.testing.assert_close(loaded(x), wanted)
assert not {"transformers", "onnxruntime", "onnxscript", "onnx_ir"} & {*sys.modules}, "heavy"
"""
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])}
    )


def test_a_process_handles_signals_after_its_programs_are_freed():
    """On a processor with AMX the handler's stack would be gone."""
    script = """
import gc, signal, time, torch, lorac
host = torch.nn.Sequential(torch.nn.Linear(4, 3))
adapters = {"a": lorac.LoRA(r=1, targets=["0"])}
programs = [lorac.compile(host, adapters, "openvino", torch.ones(2, 4), self_test=False) for _ in range(2)]
while programs:
    del programs[0]
    gc.collect()
handled = []
signal.signal(signal.SIGALRM, lambda *given: handled.append(given))
signal.setitimer(signal.ITIMER_REAL, 0.05)
time.sleep(0.5)
assert handled
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={"PYTHONPATH": ":".join([str(ROOT), *sys.path])})


def test_computes_in_float32_by_default():
    settings = live().engine.graphs["main"].model
    assert settings.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert settings.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0


def test_loads_on_the_cpu_and_no_other_device(tmp_path):
    program = compiled()
    program.save(tmp_path / "program")
    assert torch.equal(lorac.load(tmp_path / "program", device="cpu")(X), program(X))
    with pytest.raises(lorac.OptionError, match="target 'openvino' does not run on device 'cuda'"):
        lorac.load(tmp_path / "program", device="cuda")


@needs_bf16
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_holds_slots_in_the_precision_of_products(mode, tmp_path):
    program = compiled(mode, precision="bf16")
    program.save(tmp_path / "program")
    for made in (program, lorac.load(tmp_path / "program")):
        graph = made.engine.graphs["main"]
        assert {graph.dtypes[name] for name in graph.slots} == {torch.bfloat16}
        made.swap("a")
        found, wanted = made(X), expected("a")
        assert found.dtype == torch.float32
        assert not torch.equal(found, wanted)
        assert_close(found.bfloat16(), wanted.bfloat16())
    wide = lorac.load(tmp_path / "program", precision="f32")
    wide.swap("a")
    assert_close(wide(X), expected("a"))


@pytest.mark.skipif("FP16" in ABILITIES, reason="this processor has f16")
def test_rejects_a_precision_that_the_processor_lacks():
    with pytest.raises(lorac.Unavailable, match="does not compute in f16") as raised:
        compiled(precision="f16")
    assert "precision='f32'" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp16"}, "precision cannot be"),
        ({"streams": 0}, "streams cannot be 0"),
        ({"threads": -1}, "threads cannot be -1"),
        ({"device_name": "GPU.7"}, "OpenVINO finds no device 'GPU.7'"),
        ({"spinning": True}, "target 'openvino' has no option 'spinning'"),
    ],
)
def test_rejects_wrong_options(options, words):
    with pytest.raises(lorac.LoracError, match=words):
        compiled(**options)


class Determinant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.head(x))


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.det(x)


def test_rejects_an_op_without_a_translation_by_module_and_line():
    with pytest.raises(
        lorac.Unavailable, match=r"does not compute Det, which 'inner' asks for, line \d+ of .*test_engine"
    ):
        lorac.compile(Determinant(), {}, target="openvino", example_inputs=(torch.randn(2, 3, 3),))


class Ids(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids % 5)


def test_rejects_whole_numbers_beyond_32_bits():
    program = lorac.compile(Ids(), {}, target="openvino", example_inputs=(torch.ones(2, 3, dtype=torch.int64),))
    with pytest.raises(lorac.InputMismatch, match="beyond 2147483647"):
        program(torch.tensor([[1, 2**31, 3]]))


def test_names_the_mode_of_an_op_that_shows_only_where_the_program_is_read():
    from onnx import TensorProto, helper, numpy_helper

    from lorac.backends.openvino.model_checks import missing_op_error

    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    pads = numpy_helper.from_array(np.array([0, 0, 0, 1, 0, 0, 0, 1]), "pads")
    nodes = [
        helper.make_node("Pad", ["x", "pads"], ["p"], "pad", mode="wrap"),
        helper.make_node("Conv", ["p", "w"], ["y"]),
    ]
    inputs = [value("x", shape=["b", 4, 9, 9]), value("w", shape=[4, 4, 3, 3])]
    graph = helper.make_graph(nodes, "main", inputs, [value("y", shape=None)], [pads])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises(RuntimeError) as raised:
        openvino.Core().read_model(model.SerializeToString())
    assert missing_op_error(model, str(raised.value)).what == (
        "openvino does not compute Pad (Unsupported padding mode: [wrap])"
    )


def test_reads_weights_at_addresses_of_this_process():
    """``compile_model`` relies on it: weights that were mapped are handed over, and copied."""
    from onnx import TensorProto, helper

    from lorac.backends.openvino.compiled_model import IN_MEMORY

    array = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=array.shape, data_location=TensorProto.EXTERNAL)
    for key, number in {"location": IN_MEMORY, "offset": array.ctypes.data, "length": array.nbytes}.items():
        weight.external_data.add(key=key, value=str(number))
    value = functools.partial(helper.make_tensor_value_info, elem_type=TensorProto.FLOAT)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "main",
        [value("x", shape=["b", 64])],
        [value("y", shape=None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    read, copied = openvino.Core().read_model(model.SerializeToString()), array.copy()
    array[:] = 0
    x = np.ones((2, 64), np.float32)
    found = openvino.Core().compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    assert_close(torch.from_numpy(found), torch.from_numpy(x @ copied))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def test_runs_several_graphs():
    one, two, x = Pair(), Pair(), torch.randn(3, 6)
    examples = {"one": (x,), "two": (x,)}
    adapters = {"a": lorac.LoRA(r=2, targets=["one.first", "two.first"])}
    program = lorac.compile({"one": one, "two": two}, adapters, target="openvino", example_inputs=examples)
    with torch.no_grad():
        assert_close(program["one"](x), one(x))
        assert_close(program["two"](x), two(x))


def test_the_page_s_code_runs(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in (block for block in blocks(ROOT / "docs" / "openvino.md") if block.language == "py"):
        exec(block.text, names)
