"""A base in parts in several processes: the losses of one process, and a killed run that goes on to the bit."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import lorac
from lorac.testing import assert_close
from lorac.training import shard_base
from tests.limits import LOSSES
from tests.refusing import refuses
from tests.trainer.runs import STEPS, TEXTS, losses, recipe, tokenizer, write_rows
from tests.trainer.sharded import run
from tests.zoo import ZOO


def by_processes(processes, *words):
    """Run ``tests.trainer.sharded`` in several processes and return how it ended."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *launch, "-m", "tests.trainer.sharded", *map(str, words)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=False, timeout=120, env=environment).returncode


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run by one process."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    run(folder, 1)
    return folder


@pytest.mark.medium("it starts processes; trainer/test_steps.py rejects models in parts")
@pytest.mark.slow("four processes", keep=["2"])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_a_base_in_parts_train_as_one(processes, alone):
    parts = alone.parent / f"parts{processes}"
    assert by_processes(processes, parts) == 0
    one, other = (losses(folder / "trainer_state.json") for folder in (alone, parts))
    assert len(one) == 4
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) <= LOSSES
    adapters = [lorac.load_adapter(folder / "mine", ZOO["tiny_llama"].model()) for folder in (alone, parts)]
    assert adapters[0].provenance.get("base") == adapters[1].provenance.get("base")
    for a, b in zip(*(adapter.parameters() for adapter in adapters), strict=True):
        assert_close(a, b)


@pytest.mark.slow("starts processes three times")
def test_a_killed_run_with_a_base_in_parts_goes_on_to_the_bit(tmp_path):
    assert by_processes(2, tmp_path / "whole") == 0
    assert by_processes(2, tmp_path / "run", "--kill") != 0
    assert not (tmp_path / "run" / "mine").exists()
    assert by_processes(2, tmp_path / "run", "--resume") == 0
    one, other = (load_file(tmp_path / name / "mine" / "adapter_model.safetensors") for name in ("whole", "run"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_rejects_parts_for_one_process():
    compiled = lorac.compile(ZOO["tiny_llama"].fresh(), {"a": lorac.LoRA(r=2, targets=["q_proj"])})
    with refuses("unavailable", match="there is one process, and torchrun"):
        shard_base(compiled)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"fsdp_config": {"activation_checkpointing": True}}, "takes no activation_checkpointing=True"),
        ({"fsdp_config": {"version": 1}}, "takes no version=1"),
        ({"fsdp": "full_shard offload"}, "takes no cpu_offload=True"),
        ({"fsdp": True}, "there is one process"),
    ],
)
def test_rejects_settings_of_fsdp_that_have_no_effect(fields, match, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in TEXTS])
    said = recipe(rows, arguments={**STEPS, "fsdp": "full_shard", **fields})
    with refuses("unavailable", match=match):
        lorac.trainer.train(ZOO["tiny_llama"].model(), tokenizer(), said, tmp_path / "out")
