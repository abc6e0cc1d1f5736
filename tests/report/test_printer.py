"""The printed graph at every level: golden texts, determinism, contents."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

import lorac
from lorac import Unavailable
from lorac.ir.graph.graph import Level
from lorac.ir.graph.passes import run_pipeline
from lorac.passes.fuse_projections import FuseProjections
from lorac.report.dump import Dump, Row, dump
from lorac.report.picture.boxes import build_boxes
from lorac.report.printer import diff_dumps, to_text
from tests import goldens
from tests.captured import Stack, capture, captured_stack, graph_of, lower, two_adapters
from tests.zoo import ZOO


@pytest.fixture(scope="module")
def compiled() -> lorac.Compiled:
    """The tiny Llama with a DoRA and a LoRA, the DoRA active."""
    return lorac.compile(ZOO["tiny_llama"].fresh(), adapters=two_adapters("tiny_llama"), active="style")


@pytest.mark.parametrize("stage", ["capture", "insert", "expand"])
def test_golden(compiled: lorac.Compiled, stage: str) -> None:
    view = compiled.graph["main"].after(stage)
    goldens.check(f"llama_{view.level}", str(view))


def test_a_modules_text_equals_the_golden_file(compiled: lorac.Compiled) -> None:
    goldens.check("llama_attention", str(compiled.graph["main"].after("insert").at("model.layers.0.self_attn")))


def test_golden_diff(compiled: lorac.Compiled) -> None:
    main = compiled.graph["main"]
    goldens.check("llama_insert_diff", main.after("insert").diff(main.after("capture")))
    goldens.check("llama_expand_diff", main.after("expand").diff(main.after("insert")))


def test_printing_all_is_printing_each(compiled: lorac.Compiled) -> None:
    assert str(compiled.graph) == str(compiled.graph["main"])
    assert list(compiled.graph) == ["main"]


@pytest.mark.medium("the golden text")
def test_equal_models_print_equal_text(compiled: lorac.Compiled) -> None:
    """Only shapes of the weights are printed."""
    model = ZOO["tiny_llama"].fresh()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    again = lorac.compile(model, adapters=two_adapters("tiny_llama"), active="style")
    assert str(again.graph) == str(compiled.graph)


@pytest.mark.medium("test_target_level_prints_too")
def test_every_target_prints_the_same_passes() -> None:
    adapters = {"style": lorac.DoRA(r=3, targets=["query"]), "task": lorac.LoRA(r=2, targets=["key", "query"])}
    model, inputs = Stack(), (torch.randn(2, 5, 10),)
    eager, ort = (
        lorac.compile(model, adapters=adapters, active="task", example_inputs=inputs, target=target).graph["main"]
        for target in ("eager", "onnxruntime")
    )
    captured = ("trace", "layers", "names", "capture")
    assert eager.stages[:5] == (*captured, "insert"), "eager runs each of the host's layers by itself"
    assert ort.stages == (*captured, "fuse_projections", *eager.stages[4:], "legalize"), (
        "the target's own rewrites come last"
    )
    assert str(ort.after("capture")) == str(eager.after("capture"))
    insert = {name: str(view.after("insert")) for name, view in (("eager", eager), ("ort", ort))}
    for line in ("+ style  low-rank r=3", "+ task  low-rank r=2"):
        counts = {name: text.count(line) for name, text in insert.items()}
        assert counts["ort"] == counts["eager"] > 0, "what is packed is told where each of its sites is given"


def test_source_lines_are_where_the_value_is_written(compiled: lorac.Compiled) -> None:
    from transformers.models.llama import modeling_llama

    lines = inspect.getsource(modeling_llama).splitlines()
    text = str(compiled.graph["main"].after("insert"))
    for leaf in ("q_proj", "k_proj", "o_proj", "down_proj"):
        (number,) = re.findall(rf"%\w+\.{leaf} = .*modeling_llama\.py:(\d+)", text)
        assert f"self.{leaf}(" in lines[int(number) - 1]


def test_a_site_lists_its_terms_and_whether_they_are_on(compiled: lorac.Compiled) -> None:
    def term(adapter: str) -> str:
        text = str(compiled.graph["main"].after("insert").at("model.layers.2.self_attn.q_proj"))
        (line,) = (line for line in text.splitlines() if f"+ {adapter}" in line)
        return " ".join(line.split())

    assert term("style") == "+ style low-rank r=3 A[3, 64]! B[96, 3]! c[96]! fusable"
    assert term("task") == "+ task low-rank r=2 A[2, 64]! B[96, 2]! off fusable"
    compiled.swap({"style": 0.5, "task": 1.0})
    try:
        assert "x 0.5 fusable" in term("style")
        assert term("task").endswith("B[96, 2]! fusable")
    finally:
        compiled.swap("style")


def test_footer_counts(compiled: lorac.Compiled) -> None:
    footer = str(compiled.graph).splitlines()[-1]
    sites = {"q_proj": (64, 96), "k_proj": (64, 48), "down_proj": (96, 64)}
    active = sum(2 * 3 * sum(sites[leaf]) + sites[leaf][1] for leaf in ("q_proj", "k_proj")) * 3
    trainable = sum(3 * sum(sites[leaf]) + sites[leaf][1] for leaf in ("q_proj", "k_proj")) * 3
    trainable += sum(2 * sum(sites[leaf]) for leaf in ("q_proj", "down_proj")) * 3
    assert footer.startswith("sites 23: 9 live, 14 bare · slots ")
    assert footer.endswith(f"trainable {trainable:,} · +{active / 1000:.1f} kFLOP/token".replace(",", " "))
    assert sum(t.numel() for t in compiled.parameters() if t.requires_grad) == trainable


@pytest.mark.medium("the golden text")
def test_modes_print_differently() -> None:
    fused = lorac.compile(ZOO["tiny_llama"].fresh(), adapters={"a": lorac.DoRA(r=2, targets=["q_proj"])}, mode="fused")
    text = str(fused.graph["main"].after("insert"))
    assert re.search(r"\+ a  low-rank r=2 .* fused$", text, re.M)
    assert "sites 23: 3 fused, 20 bare" in text
    assert "q_proj:weight[64, 96]!" in str(fused.graph)
    assert "W.q_proj" not in str(fused.graph), "the replaced weight has left the program"


@pytest.mark.medium("ir/algebra/test_affine.py: the same reason; explain() tells it too")
def test_prints_why_a_branch_cannot_be_fused() -> None:
    adapters = {"bottleneck": lorac.AdapterTune(r=4, targets="model.layers.[0-9]+")}
    text = str(lorac.compile(ZOO["tiny_llama"].fresh(), adapters=adapters).graph["main"].after("insert"))
    assert re.search(r"\+ bottleneck  branch .* not fusable: y' is not affine in x$", text, re.M)


def test_target_level_prints_too() -> None:
    it = capture("plain_mlp")
    lower(it.graph)
    expanded = to_text(dump(it.graph))
    it.graph.level = Level.TARGET
    assert to_text(dump(it.graph)) == expanded.replace("@expanded", "@target")


def test_capture_is_lazy_and_leaves_training_mode_alone() -> None:
    entry = ZOO["plain_mlp"]
    adapters = {"a": lorac.LoRA(r=2, targets=entry.targets, dropout=0.5)}
    compiled = lorac.compile(entry.fresh(), adapters, example_inputs=entry.inputs())
    compiled.train()
    text = str(compiled.graph)
    assert compiled.training
    assert "= dropout" not in text, "captured in eval mode"


def test_a_dump_keeps_no_tensor_and_no_node(compiled: lorac.Compiled) -> None:
    def leaves(value: object) -> set[type]:
        if isinstance(value, dict):
            return leaves(list(value.items()))
        if isinstance(value, list | tuple):
            return {kind for item in value for kind in leaves(item)}
        if hasattr(value, "__dataclass_fields__"):
            return leaves(list(vars(value).values()))
        return {type(value)}

    found = compiled.graph["main"].dump
    assert isinstance(found, Dump)
    assert leaves(found) <= {str, int, bool, type(None)}


def test_an_unchanged_graph_has_no_diff(compiled: lorac.Compiled) -> None:
    main = compiled.graph["main"]
    assert main.diff(main) == ""
    assert diff_dumps(main.dump, main.dump) == ""


def test_shows_a_change_in_one_layer_only_there() -> None:
    graph = captured_stack({"one": lorac.LoRA(r=2, targets=["out"], layers=[1])})
    run_pipeline(graph, [FuseProjections()])  # which is of all layers, adapted or not
    before = dump(graph)
    lower(graph)
    text = diff_dumps(before, dump(graph))
    changed = {path: block for path, block in re.findall(r"@@ (\S+) @@\n((?:[-+ ].*\n)*)", text)}
    assert "out:a" in changed["body.layers.1"]
    assert list(changed) == ["body.layers.1"]
    assert "… x" not in text


def test_unknown_stage_and_module(compiled: lorac.Compiled) -> None:
    with pytest.raises(Unavailable, match="insert"):
        compiled.graph["main"].after("insrt")
    with pytest.raises(Unavailable, match=r"model\.layers\.9"):
        compiled.graph["main"].at("model.layers.9")


def test_rejects_the_graph_of_a_loaded_eager_artifact(tmp_path: Path) -> None:
    lorac.compile(Stack(), adapters=[lorac.LoRA(r=2)], example_inputs=(torch.randn(2, 5, 10),)).save(tmp_path / "it")
    with pytest.raises(Unavailable, match="artifact"):
        _ = lorac.load(tmp_path / "it").graph


def test_dot_draws_identical_layers_once(compiled: lorac.Compiled) -> None:
    text = compiled.graph.to_dot()
    assert text.count("{") == text.count("}")
    assert re.findall(r'subgraph "cluster_([^"]+)"', text) == ["model.layers.0"]
    drawn = set(re.findall(r"^\s*(n\d+) \[", text, re.M))
    edges = re.findall(r"(n\d+) -> (n\d+);", text)
    assert edges
    assert {end for edge in edges for end in edge} <= drawn


def test_draws_one_layer_of_a_llama(compiled: lorac.Compiled) -> None:
    root = build_boxes(compiled.graph["main"].after("capture").dump, {})
    assert {part.call: len(part.copies) for part in root.all() if part.copies} == {"model.layers.0": 2}
    titles = {part.call: [inner.title for inner in part.parts] for part in root.all() if part.kind == "module"}
    assert [t for t in titles["model.layers.0.self_attn"] if t.endswith("_proj")] == [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    ]
    assert titles["model.layers.0.mlp"] == ["gate_proj", "act_fn", "up_proj", "mul", "down_proj"]
    (layer,) = (part for part in root.all() if (part.kind, part.call) == ("module", "model.layers.0"))
    add = next(part for part in layer.parts if part.title == "add")
    past = [link.source for link in layer.links if link.target is add]
    assert None in past, "what goes past a norm comes from where the layer begins, not from a cast within the norm"


def test_a_graph_without_slots_prints(tmp_path: Path) -> None:
    from tests.captured import captured_program

    entry = ZOO["plain_conv"]
    model = entry.fresh()
    graph = graph_of("main", captured_program(model, entry.inputs()), lorac.sites(model), {})
    goldens.check("plain_conv_host", to_text(dump(graph)))


def test_a_block_that_is_left_and_entered_again_is_printed_both_times() -> None:
    """As rewrites of an emitted program leave it."""
    inside = {"blocks": ("net.0",), "modules": ("net", "net.0")}
    rows = (
        Row("in", "x", "", type="t"),
        Row("value", "one", "sin \x00", (0,), "t", **inside),
        Row("value", "between", "exp \x00", (1,), "t"),
        Row("value", "two", "cos \x00", (2,), "t", **inside),
        Row("out", "", "\x00", (3,), "t"),
    )
    found = Dump("main", "emitted", rows)
    text = to_text(found)
    assert [text.count(op) for op in (" = sin", " = exp", " = cos")] == [1, 1, 1]
    assert [diff_dumps(Dump("main", "host", ()), found).count(op) for op in (" = sin", " = cos")] == [1, 1]


def test_skips_of_passes_are_recorded() -> None:
    adapters = {"style": lorac.DoRA(r=3, targets=["query"]), "task": lorac.LoRA(r=2, targets=["query", "out"])}
    options = {"target": "onnxruntime", "self_test": False, "example_inputs": (torch.randn(2, 5, 10),)}
    graph = lorac.compile(Stack(), adapters=adapters, active=None, **options).graph["main"]
    alone = {skip.where: skip.why for skip in graph.skipped["fuse_projections"]}
    assert alone["body.layers.0.out"] == "no other site of its module reads its input and can be fused with it"
    assert graph.after("insert").skipped == graph.skipped
