"""Natural mistakes, each with the correction that its message suggests: rows of ``tests/test_mistakes.py``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from typer.testing import CliRunner

import lorac
from lorac import LoRA
from lorac.backends.onnxruntime.options import OnnxRuntimeOptions
from lorac.cli import app

NAN = float("nan")


class Layer(nn.Module):
    """Two linear layers of unequal sizes around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.out_proj = nn.Linear(width, width + 4), nn.Linear(width + 4, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As wide as it came."""
        return x + self.out_proj(torch.relu(self.q_proj(x)))


class Tiny(nn.Module):
    """A model with ids, a mask that it needs, an input that it does not, and an argument that is no tensor."""

    def __init__(self, width: int = 24, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(2))
        self.conv = nn.Conv1d(width, 6, 3, padding=1)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor, shift: torch.Tensor | None = None, scale: float = 1.0
    ) -> torch.Tensor:
        """(batch, 6, length)."""
        x = self.embed(ids) if shift is None else self.embed(ids) + shift
        for layer in self.layers:
            x = layer(x)
        return self.conv((x * mask.unsqueeze(-1)).transpose(1, 2)) * scale


def example() -> dict[str, torch.Tensor]:
    """Inputs of the model."""
    return {"ids": torch.arange(10).reshape(2, 5), "mask": torch.ones(2, 5)}


def lora(r: int = 2, **rest: Any) -> LoRA:
    """A LoRA on the model's first kind of layer."""
    return LoRA(**{"r": r, "targets": ["q_proj"], **rest})


class World:
    """One model, what was compiled of it, and files, made once for all mistakes; none of them changes any of it.

    Args:
        folder: an empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, Tiny().eval()
        self.inputs = example()
        self.eager = self.compile({"sql": lora(), "style": lora()}, example_inputs=self.inputs)
        self.program = self.compile(
            {"sql": lora()},
            target="onnxruntime",
            mode="fused",
            active=None,
            example_inputs=self.inputs,
            self_test=False,
        )
        self.baked = self.compile({"sql": lora()}, mode="baked")
        self.program.save(folder / "compiled")
        for name, adapter in self.eager.adapters.items():
            lorac.save_adapter(adapter, folder / name, model=self.model)
        for name in ("empty", "app", "base"):
            (folder / name).mkdir()
        (folder / "app" / "manifest.json").write_text(json.dumps({"name": "a web page's"}))
        (folder / "base" / "config.json").write_text("{}")
        (folder / "notes.txt").write_text("mine")
        whole = (folder / "sql" / "adapter_model.safetensors").read_bytes()
        (folder / "cut").mkdir()
        (folder / "cut" / "adapter_config.json").write_bytes((folder / "sql" / "adapter_config.json").read_bytes())
        (folder / "cut" / "adapter_model.safetensors").write_bytes(whole[: len(whole) // 2])

    def compile(self, adapters: Any = (), **rest: Any) -> Any:
        """The model with adapters."""
        return lorac.compile(self.model, adapters, **rest)

    def again(self, **rest: Any) -> Any:
        """As ``eager`` was, with something more."""
        return self.compile({"sql": lora()}, **rest)

    def quantised(self, **rest: Any) -> Any:
        """The model with its weights quantised."""
        options = {"target": "onnxruntime", "weights": "int8", "block_size": 16, "self_test": False}
        return self.again(example_inputs=self.inputs, **options, **rest)

    def captured(self, **rest: Any) -> str:
        """The graph that is captured of the model."""
        return str(self.again(**rest).graph)

    def path(self, name: str) -> str:
        """What is called so in the folder."""
        return str(self.folder / name)

    def call(self, compiled: Any, **changed: Any) -> Any:
        """A call with some inputs changed; those that are None are left out."""
        return compiled(**{name: value for name, value in {**self.inputs, **changed}.items() if value is not None})


@dataclass(frozen=True)
class Mistake:
    """Something that people do.

    Attributes:
        name: what they do.
        wrong: doing it.
        right: following the message (of which it gets the text): whatever is not refused. None where the message
            names nothing that could be run.
    """

    name: str
    wrong: Callable[[World], Any]
    right: Callable[[World, str], Any] | None = None


def sites(w: World, said: str) -> None:
    """The command that a message names, on this model; what is nearest stands in its table."""
    assert "`lorac sites MODEL`" in said
    listed = CliRunner().invoke(app, ["sites", f"{__name__}:Tiny"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    assert "layers.0.q_proj" in listed.output


def reserve(said: str) -> Any:
    """The ``reserve=`` that a message prints."""
    found = re.search(r"reserve=(lorac\.Reserve\(.*?\)),", said)
    assert found, said
    return eval(found[1], {"lorac": lorac})


def _admit(w: World, said: str, source: Any) -> None:
    compiled = w.again(reserve=reserve(said))
    compiled.add_adapter(source, "late")
    compiled.swap("late")


def _settled(w: World, said: str) -> None:
    assert "target='onnxruntime', mode='fused'" in said
    assert w.program.swap("sql", settle=True).state == "settled"
    w.program.swap(None)


def _removed(w: World) -> Any:
    compiled = w.compile({"sql": lora(), "gone": lora()})
    compiled.remove_adapter("gone")
    return compiled


COMPILING = [
    Mistake("a target that is misspelt", lambda w: w.compile({"a": lora(targets=["q_prj"])}), sites),
    Mistake("no targets at all", lambda w: w.compile({"a": lora(targets=[])}), sites),
    Mistake("targets=None, as in PEFT", lambda w: lora(targets=None), lambda w, said: lora(targets="all-linear")),
    Mistake("a layer's number as a target", lambda w: lora(targets=[0])),
    Mistake(
        "targets of a kind that the method does not adapt",
        lambda w: w.compile({"a": lorac.MeteoRA(targets=["conv"])}),
        lambda w, said: w.compile({"a": lorac.MeteoRA(targets=["q_proj", "conv"], exclude=["conv"])}),
    ),
    Mistake(
        "a method of blocks on layers",
        lambda w: w.compile({"a": lorac.AdapterTune(targets=["q_proj"])}),
        lambda w, said: w.compile({"a": lorac.AdapterTune(targets="all-blocks")}),
    ),
    Mistake("a rank as text", lambda w: lora(r="8")),
    Mistake("half a rank", lambda w: lora(r=2.5)),
    Mistake("no alpha", lambda w: lora(alpha=None)),
    Mistake("weights in bits that nothing takes", lambda w: w.compile(target="onnxruntime", weights="int3")),
    Mistake(
        "an algorithm of codes that nothing knows",
        lambda w: w.compile(target="onnxruntime", weights="int4", algorithm="awq"),
        lambda w, said: OnnxRuntimeOptions(weights="int4", algorithm="gptq"),
    ),
    Mistake(
        "calls for codes that are rounded",
        lambda w: w.compile(target="onnxruntime", weights="int4", calibration=[w.inputs]),
        lambda w, said: OnnxRuntimeOptions(weights="int4", algorithm="gptq", calibration=[w.inputs]),
    ),
    Mistake(
        "k-quants without zero points",
        lambda w: w.compile(target="onnxruntime", weights="int4", algorithm="k_quant", symmetric=True),
        lambda w, said: OnnxRuntimeOptions(weights="int4", algorithm="k_quant"),
    ),
    Mistake(
        "some weights in eight bits where all are",
        lambda w: w.compile(target="onnxruntime", weights="int8", mixed=True),
        lambda w, said: OnnxRuntimeOptions(weights="int4", mixed=True),
    ),
    Mistake("blocks of any size", lambda w: w.compile(target="onnxruntime", weights="int4", block_size=24)),
    Mistake(
        "blocks of weights that are not quantised",
        lambda w: w.compile(target="onnxruntime", block_size=64, example_inputs=w.inputs),
        lambda w, said: OnnxRuntimeOptions(weights="int8", block_size=64),
    ),
    Mistake(
        "merging into quantised weights",
        lambda w: w.quantised(mode="fused"),
        lambda w, said: w.quantised(mode="baked"),
    ),
    Mistake("one extra output as text", lambda w: w.compile({"a": lorac.MeteoRA(targets=["q_proj"])}, aux="router")),
    Mistake(
        "an extra output that is misspelt", lambda w: w.compile({"a": lorac.MeteoRA(targets=["q_proj"])}, aux=["routr"])
    ),
    Mistake("no model", lambda w: lorac.compile({})),
    Mistake("a component with a dot in its name", lambda w: lorac.compile({"text.encoder": w.model})),
    Mistake(
        "a path of no adapter",
        lambda w: w.compile({"a": w.path("sq")}),
        lambda w, said: w.compile({"a": w.path("sql")}),
    ),
    Mistake("a folder without an adapter", lambda w: w.compile({"a": w.path("empty")})),
    Mistake("the folder above an adapter's", lambda w: w.compile({"a": str(w.folder)})),
    Mistake("a model's folder as an adapter", lambda w: w.compile({"a": w.path("base")})),
    Mistake("a file that was cut off", lambda w: w.compile({"a": w.path("cut")})),
    Mistake("an adapter of a larger model", lambda w: lorac.compile(Tiny(32), {"a": w.path("sql")})),
    Mistake("an adapter of another base", lambda w: lorac.compile(Tiny(seed=1), {"a": w.path("sql")})),
    Mistake(
        "an adapter of another kind of model",
        lambda w: lorac.compile(nn.Sequential(nn.Linear(3, 4)), {"a": w.path("sql")}),
        sites,
    ),
    Mistake(
        "two adapters of one name",
        lambda w: w.compile([lora(), lora()]),
        lambda w, said: w.compile({"one": lora(), "other": lora()}),
    ),
    Mistake("active= names nobody", lambda w: w.again(active="slq"), lambda w, said: w.again(active="sql")),
    Mistake(
        "baking without a choice",
        lambda w: w.compile({"a": lora(), "b": lora()}, mode="baked"),
        lambda w, said: w.compile({"a": lora(), "b": lora()}, mode="baked", active={"a": 0.5}),
    ),
    Mistake(
        "fusing what cannot be merged",
        lambda w: w.compile({"a": lorac.MeteoRA(targets=["q_proj"])}, mode="fused"),
        lambda w, said: w.compile({"a": lorac.MeteoRA(targets=["q_proj"])}, mode="live"),
    ),
    Mistake(
        "a dict as reserve=",
        lambda w: w.again(reserve={"rank": 8}),
        lambda w, said: w.again(reserve=lorac.Reserve(targets=["q_proj"], rank=8)),
    ),
    Mistake("a reserve's rank as text", lambda w: lorac.Reserve(rank="8")),
    Mistake("a reserve where there is nothing", lambda w: w.again(reserve=lorac.Reserve(targets=["up"])), sites),
    Mistake(
        "a reserve by a keyword that finds nothing",
        lambda w: lorac.compile(nn.Sequential(nn.Conv1d(3, 4, 1)), reserve=lorac.Reserve()),
        sites,
    ),
]

INPUTS = [
    Mistake(
        "no example inputs",
        lambda w: w.again(target="onnxruntime"),
        lambda w, said: w.call(w.program),  # which was made with them
    ),
    Mistake(
        "example inputs of another name",
        lambda w: w.again(target="onnxruntime", example_inputs={**w.inputs, "idx": w.inputs["ids"]}),
    ),
    Mistake("example inputs that lack one", lambda w: w.again(target="onnxruntime", example_inputs=w.inputs["ids"])),
    Mistake(
        "example ids with fractions",
        lambda w: w.again(target="onnxruntime", example_inputs={**w.inputs, "ids": w.inputs["ids"].float()}),
    ),
    Mistake("example inputs as lists", lambda w: w.again(target="onnxruntime", example_inputs=[[1, 2], [3, 4]])),
    Mistake(
        "dynamic shapes of another name",
        lambda w: w.captured(example_inputs=w.inputs, dynamic_shapes={"idx": {0: Dim.AUTO}}),
        lambda w, said: w.captured(example_inputs=w.inputs, dynamic_shapes={name: {0: Dim.AUTO} for name in w.inputs}),
    ),
    Mistake("an input that the model does not have", lambda w: w.call(w.program, input_ids=w.inputs["ids"])),
    Mistake(
        "an input that was not captured",
        lambda w: w.call(w.program, shift=torch.ones(24)),
        lambda w, said: w.captured(example_inputs={**w.inputs, "shift": torch.ones(24)}).index("shift"),
    ),
    Mistake("an input that is missing", lambda w: w.call(w.program, mask=None), lambda w, said: w.call(w.program)),
    Mistake(
        "a choice by an argument that is misspelt",
        lambda w: w.call(w.program, adapter="sql"),
        lambda w, said: w.call(w.program, adapters="sql"),
    ),
    Mistake("an input twice", lambda w: w.program(w.inputs["ids"], ids=w.inputs["ids"])),
    Mistake("one input too many", lambda w: w.program(*w.inputs.values(), None, 1.0, 1.0)),
    Mistake("ids with fractions", lambda w: w.call(w.program, ids=w.inputs["ids"].float())),
    Mistake(
        "text for ids",
        lambda w: w.call(w.program, ids=[["a"] * 5] * 2),
        lambda w, said: w.call(w.program, ids=w.inputs["ids"].numpy()),
    ),
    Mistake("an id that the embedding lacks", lambda w: w.call(w.program, ids=w.inputs["ids"] + 9)),
    Mistake("one row without its batch", lambda w: w.call(w.program, ids=w.inputs["ids"][0], mask=w.inputs["mask"][0])),
    Mistake(
        "an argument that was captured with another value",
        lambda w: w.call(w.program, scale=2.0),
        lambda w, said: w.call(w.again(target="eager"), scale=2.0),
    ),
]

RUNNING = [
    Mistake(
        "a swap to a name that is misspelt",
        lambda w: w.eager.swap("sqll"),
        lambda w, said: w.again().add_adapter(lora(), name="sqll"),
    ),
    Mistake(
        "a swap to an adapter that was removed",
        lambda w: _removed(w).swap("gone"),
        lambda w, said: _removed(w).add_adapter(lora(), name="gone"),
    ),
    Mistake("a strength as text", lambda w: w.eager.swap({"sql": "0.7"})),
    Mistake("a strength that is no number", lambda w: w.eager.swap({"sql": NAN})),
    Mistake("a switch as a strength", lambda w: w.eager.swap({"sql": True})),
    Mistake(
        "a list of names as a choice",
        lambda w: w.eager.swap(["sql", "style"]),
        lambda w, said: (w.again().swap({"sql": 1.0}), w.call(w.eager, adapters=["sql", "style"])),
    ),
    Mistake("a name and its strength as a pair", lambda w: w.eager.swap(("sql", 0.5))),
    Mistake(
        "a rank of a method that is not nested",
        lambda w: w.eager.swap({"sql": lorac.Active(1.0, rank=1)}),
        lambda w, said: w.compile({"a": lorac.DyLoRA(r=2, targets=["q_proj"])}).swap({"a": lorac.Active(1.0, rank=1)}),
    ),
    Mistake("a rank of 0 in a choice", lambda w: w.eager.swap({"sql": lorac.Active(1.0, rank=0)})),
    Mistake("a choice's strength as text", lambda w: lorac.Active("1")),
    Mistake("a swap of what is baked", lambda w: w.baked.swap(None), lambda w, said: w.again(mode="live").swap(None)),
    Mistake(
        "adding to what is baked",
        lambda w: w.baked.add_adapter(lora()),
        lambda w, said: w.again(mode="fused").swap(None),
    ),
    Mistake("settling where nothing is bound", lambda w: w.eager.swap("sql", settle=True), _settled),
    Mistake(
        "fewer choices than rows",
        lambda w: w.call(w.eager, adapters=["sql"]),
        lambda w, said: (w.call(w.eager, adapters=["sql", None]), w.call(w.eager, adapters="sql")),
    ),
    Mistake(
        "a row's choice that is misspelt",
        lambda w: w.call(w.eager, adapters=["sql", "slq"]),
        lambda w, said: w.call(w.eager, adapters=["sql", "sql"]),
    ),
    Mistake(
        "removing what is not there",
        lambda w: w.eager.remove_adapter("slq"),
        lambda w, said: w.again().remove_adapter("sql"),
    ),
    Mistake(
        "adding under a name that is taken",
        lambda w: w.eager.add_adapter(lora(), "sql"),
        lambda w, said: w.again().add_adapter(lora(), name="other"),
    ),
    Mistake(
        "adding a larger rank",
        lambda w: w.eager.add_adapter(lora(r=12), "x"),
        lambda w, said: _admit(w, said, lora(r=12)),
    ),
    Mistake(
        "adding at other layers",
        lambda w: w.eager.add_adapter(lora(targets=["out_proj"]), "x"),
        lambda w, said: _admit(w, said, lora(targets=["out_proj"])),
    ),
    Mistake(
        "adding what scales outputs",
        lambda w: w.eager.add_adapter(lorac.DoRA(r=2, targets=["q_proj"]), "x"),
        lambda w, said: _admit(w, said, lorac.DoRA(r=2, targets=["q_proj"])),
    ),
    Mistake(
        "adding what changes single weights",
        lambda w: w.eager.add_adapter(lorac.SHiRA(r=1, targets=["q_proj"]), "x"),
        lambda w, said: _admit(w, said, lorac.SHiRA(r=1, targets=["q_proj"])),
    ),
    Mistake(
        "adding a router",
        lambda w: w.eager.add_adapter(lorac.MeteoRA(r=1, targets=["q_proj"]), "x"),
        lambda w, said: w.compile({"x": lorac.MeteoRA(r=1, targets=["q_proj"])}),
    ),
    Mistake(
        "adding an adapter of another base",
        lambda w: lorac.compile(Tiny(seed=1), {"a": lora()}).add_adapter(w.path("sql")),
    ),
    Mistake("a component of a single model", lambda w: w.eager["unet"], lambda w, said: w.call(w.eager)),
    Mistake(
        "several models called as one",
        lambda w: lorac.compile({"a": w.model, "b": w.model})(**w.inputs),
        lambda w, said: lorac.compile({"a": w.model, "b": w.model})["a"](**w.inputs),
    ),
    Mistake("training what is no module", lambda w: w.program.train(), lambda w, said: w.again(target="eager").train()),
    Mistake("another dtype afterwards", lambda w: w.eager.half(), lambda w, said: w.again(dtype="float16")),
]

MISTAKES = [*COMPILING, *INPUTS, *RUNNING]
