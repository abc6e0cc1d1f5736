"""The emitted program as text: the nodes of ONNX Runtime, by module, with slots and sites."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import lorac
from lorac import Unavailable
from tests.captured import Stack

INPUTS = (torch.randn(2, 5, 10),)


@pytest.fixture(scope="module")
def compiled() -> lorac.Compiled:
    """Three blocks with a pair, a sparse change and a branch, none active."""
    adapters = {
        "pair": lorac.LoRA(r=2, targets=["query", "key"]),
        "sparse": lorac.SHiRA(r=1, targets=["out"]),
        "branch": lorac.AdapterTune(r=2, targets=r"body\.layers\.1"),
    }
    options = {"target": "onnxruntime", "active": None, "self_test": False}
    return lorac.compile(Stack(), adapters, example_inputs=INPUTS, **options)


def test_the_emitted_model_is_the_last_stage(compiled: lorac.Compiled) -> None:
    main = compiled.graph["main"]
    emitted = main.emitted
    assert emitted.level == "emitted"
    assert emitted.stages == (*main.stages, "emitted")
    assert main.level == "target", "what is printed without asking stays as it is"


def test_nodes_stand_in_their_module_and_read_its_slots(compiled: lorac.Compiled) -> None:
    text = str(compiled.graph["main"].emitted.at("body.layers.0"))
    assert re.search(r"= MatMul .*query:b\[adapters, query:rank, 14\]!", text), "a slot, with the name of its size"
    assert re.search(r"%out\.\w+ = MatMul .*out:weight\[14, 10\]!", text)
    assert "captured.py:" in text, "the line that asks for it"
    branch = str(compiled.graph["main"].emitted.at("body.layers.1"))
    assert re.search(r"= If .*then=\(.*MatMul", branch), "what is left out where the branch is off"
    assert "= If" not in text
    for row in compiled.graph["main"].emitted.dump.rows:
        assert row.kind != "value" or row.modules or not row.site


def test_sites_are_known_and_every_slot_is_read(compiled: lorac.Compiled) -> None:
    found = compiled.graph["main"].emitted.dump
    assert set(found.sites) == {site for site, plan in compiled.plans.items() if not plan.empty}
    assert found.sites["body.layers.2.out"] == "fused"
    assert found.classes[""] == "Stack"
    assert found.classes["body.layers.2.out"] == "Linear"
    sites = {row.site for row in found.rows}
    assert {f"body.layers.{n}.out" for n in range(3)} <= sites


def test_a_loaded_artifact_draws_its_emitted_program(compiled: lorac.Compiled, tmp_path: Path) -> None:
    compiled.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    assert loaded.graph["main"].dump == compiled.graph["main"].emitted.dump
    page = loaded.graph.to_html(tmp_path / "it.html").read_text(encoding="utf-8")
    assert "Stack · onnxruntime, live" in page
    assert '"kind":"site"' in page
    assert '"title":"emitted"' in page


def test_a_target_that_runs_the_host_emits_none() -> None:
    graph = lorac.compile(Stack(), [lorac.LoRA(r=1)], example_inputs=INPUTS).graph["main"]
    with pytest.raises(Unavailable, match="onnxruntime"):
        _ = graph.emitted
