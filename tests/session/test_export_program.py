"""`compiled.export_program()`: a model with its adapters as a plain program of torch's, whose slots are inputs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorac
from lorac.testing import adapter_away, assert_close
from tests.backends.aoti.hosts import make, make_convolution
from tests.refusing import refuses

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch's own tree specs, as it saves them


@pytest.fixture(scope="module")
def compiled() -> Any:
    model, adapters, x = make()
    return lorac.compile(model, adapters, active="lora", example_inputs=(x,))


@pytest.fixture(scope="module")
def program(compiled: Any) -> Any:
    return compiled.export_program()


@torch.no_grad()
def test_answers_as_eager_does_for_any_choice_and_any_rows(compiled: Any, program: Any) -> None:
    run, x = program.module(), make()[2]
    args, kwargs = program.example_inputs
    assert torch.equal(args[0], x)
    assert_close(run(*args, **kwargs)["answer"], compiled(x, adapters="lora")["answer"])
    for choice in ("dora", "branch", None, {"lora": 0.5, "dora": -0.7, "branch": 1.5}):
        slots = compiled.program_slots(program, choice)
        for given in (x, x[:1], x.repeat(3, 1, 1)):
            assert_close(run(given, lorac=slots)["answer"], compiled(given, adapters=choice)["answer"])
    assert compiled.program_slots(program).keys() == kwargs["lorac"].keys()


@torch.no_grad()
def test_takes_inputs_that_do_not_lie_in_one_piece(compiled: Any, program: Any) -> None:
    x = make()[2].transpose(0, 1).contiguous().transpose(0, 1)
    assert not x.is_contiguous()
    slots = compiled.program_slots(program, "lora")
    assert_close(program.module()(x, lorac=slots)["answer"], compiled(x, adapters="lora")["answer"])


@torch.no_grad()
def test_takes_any_rank_and_as_many_places_as_rows() -> None:
    model, adapters, x = make()
    compiled = lorac.compile(model, {"lora": adapters["lora"]}, active="lora", example_inputs=(x,))
    program = compiled.export_program()
    run = program.module()
    one, other = (compiled.program_slots(program, name) for name in ("lora", None))
    assert {one["up:a"].shape[-1], other["up:a"].shape[-1]} == {3, 0}
    rows = dict(one)
    for name in one:
        missing = [size - own for size, own in zip(one[name].shape, other[name].shape, strict=True)]
        rows[name] = torch.cat([one[name], nn.functional.pad(other[name], (0, missing[2], 0, missing[1]))])
    assert_close(run(x, lorac=rows)["answer"], compiled(x, adapters=["lora", "lora", None, None])["answer"])


@torch.no_grad()
def test_keeps_the_rank_of_a_convolution_which_inductor_fixes() -> None:
    model, adapter, x = make_convolution()
    compiled = lorac.compile(model, [adapter], active=None, example_inputs=(x,))
    program = compiled.export_program()
    for choice in (None, "lora"):
        slots = compiled.program_slots(program, choice)
        assert slots["0:a"].shape[0] == slots["0:b"].shape[1] == 4
        assert_close(*program.module()(x, lorac=slots).values(), compiled(x, adapters=choice))


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2, 3])
def test_takes_any_rows_after_an_example_of_few(count: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 8)).eval(), torch.randn(count, 6)
    methods = {"lora": lorac.LoRA(r=2, targets=["0", "2"]), "dora": lorac.DoRA(r=1, targets=["0"])}
    adapters = [adapter_away(m, model, x, name=name, seed=3) for name, m in methods.items()]
    compiled = lorac.compile(model, adapters, active=None, example_inputs=(x,))
    program = compiled.export_program()
    for choice in ("dora", None, {"lora": 0.5, "dora": -0.7}):
        slots = compiled.program_slots(program, choice)
        for given in (x, torch.randn(5, 6), torch.randn(1, 6)):
            assert_close(*program.module()(given, lorac=slots).values(), compiled(given, adapters=choice))


def test_is_of_torchs_own_ops_alone(program: Any) -> None:
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(op.startswith("lorac") for op in ops)


@torch.no_grad()
def test_ties_go_to_the_lowest_index() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.topk((self.up(x) > 0).float(), 2).indices

    x = torch.ones(2, 6)
    model = Chosen().eval()
    nn.init.ones_(model.up.weight)
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=1, targets=["up"])}, example_inputs=(x,))
    program = compiled.export_program()
    (found,) = program.module()(x, **program.example_inputs[1]).values()
    assert found.tolist() == [[0, 1], [0, 1]]


@torch.no_grad()
@pytest.mark.parametrize("mode", ["fused", "baked"])
def test_has_merged_weights_as_slots_or_as_constants(mode: str) -> None:
    model, adapters, x = make()
    del adapters["branch"]
    compiled = lorac.compile(model, adapters, mode=mode, active="dora", example_inputs=(x,))
    program = compiled.export_program()
    args, kwargs = program.example_inputs
    assert sorted(kwargs.get("lorac", ())) == (["down:weight", "up:weight"] if mode == "fused" else [])
    assert_close(program.module()(*args, **kwargs)["answer"], compiled(x)["answer"])
    if mode == "baked":
        with refuses("unavailable"):
            compiled.program_slots(program, "lora")


def test_rejects_unknown_components_and_adapters(compiled: Any, program: Any) -> None:
    with pytest.raises(lorac.ChoiceError, match="decoder"):
        compiled.export_program("decoder")
    with pytest.raises(lorac.AdapterNotFound, match="nearest: lora"):
        compiled.program_slots(program, "lorra")


_LOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
args, kwargs = program.example_inputs
print(*program.module()(*args, **kwargs)["answer"].flatten().tolist())
assert not {"lorac", "transformers"} & sys.modules.keys()
"""


@torch.no_grad()
@pytest.mark.medium("a process imports torch anew; a test above runs the same program")
def test_is_saved_and_loaded_by_torch_in_a_process_without_lorac(compiled: Any, program: Any, tmp_path: Path) -> None:
    torch.export.save(program, tmp_path / "program.pt2")
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "program.pt2")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    found = torch.tensor([float(number) for number in printed.split()])
    assert_close(found, compiled(make()[2], adapters="lora")["answer"].flatten())
