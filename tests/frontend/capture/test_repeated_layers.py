"""Layers that repeat are traced once, and the program is the one that tracing all of them gives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, fx, nn

import lorac
from lorac.frontend.capture import export as capture
from lorac.frontend.capture.layer_groups import LayerGroup
from lorac.frontend.host import Host
from lorac.testing import assert_close

ROWS = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))


class Layer(nn.Module):
    """A residual layer.

    Args:
        number: what it holds as its own number.
        slope: what tells some layers apart.
    """

    def __init__(self, number: int = 0, slope: float = 0.5) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 4), nn.Linear(4, 6, bias=False)
        self.number, self.slope = number, slope
        self.register_buffer("shift", torch.randn(6))
        self.table = torch.ones(6)

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        y = self.down(torch.nn.functional.leaky_relu(self.up(x), self.slope)) + self.shift
        return x + (y if factor is None else y * factor)


class Numbered(Layer):
    """One that computes by its number."""

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        return super().forward(x, factor) / (self.number + 1)


class Writing(Layer):
    """One that writes into what it was given."""

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        x = x + 0
        x[:, :, 1:3] = self.down(self.up(x))[:, :, 1:3]
        return super().forward(x, factor)


class Keeping(Layer):
    """One that keeps what it computed, as some cache their masks."""

    kept: Tensor | None = None

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        self.kept = x.mean()
        return super().forward(x, factor) + self.kept


class Within(Layer):
    """One that computes a part in a region of its own."""

    region: Callable[[], Any]

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        with type(self).region():
            y = self.up(x) @ self.up(x).transpose(-1, -2)
        return super().forward(x, factor) + y.mean(-1, keepdim=True)


class Casting(Within):
    """One that keeps autocast away from a part, as attentions do that divide by small sums."""

    region = functools.partial(torch.autocast, "cpu", enabled=False)


class Frozen(Within):
    """One that needs no gradients of a part."""

    region = torch.no_grad


class Graded(Within):
    """One that turns gradients on."""

    region = torch.enable_grad


class Stack(nn.Module):
    """Layers one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        factor = torch.sigmoid(x.mean(-1, keepdim=True))
        for number, layer in enumerate(self.layers):
            x = layer(x, factor if number % 2 else None)
        return x


class Again(Stack):
    """All of them twice, with another factor."""

    def forward(self, x: Tensor) -> Tensor:
        for factor in (torch.sigmoid(x.mean(-1, keepdim=True)), torch.tanh(x.sum(-1, keepdim=True))):
            for layer in self.layers:
                x = layer(x, factor)
        return x


class Region(Stack):
    """All of them in one region.

    Args:
        layers: its layers.
        region: makes it.
    """

    def __init__(self, layers: list[nn.Module], region: Callable[[], Any]) -> None:
        super().__init__(layers)
        self.region = region

    def forward(self, x: Tensor) -> Tensor:
        with self.region():
            return super().forward(x)


class Stages(nn.Module):
    """Stacks of stacks, the second of which passes on what it is given, beside what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage() for _ in range(3))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        given = x.exp()
        for stage in self.stages:
            found = stage({"x": x, "given": given})
            x, given = found["x"], found["given"]
        return {"x": x, "given": given}


class Stage(nn.Module):
    """A stack that takes and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(Layer(number) for number in range(3))

    def forward(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        x = given["x"]
        for layer in self.inner:
            x = layer(x, given["given"])
        return {"x": x, "given": given["given"]}


def _tied() -> Stack:
    layers = [Layer(number) for number in range(3)]
    layers[1].up = layers[2].up = layers[0].up
    return Stack([*layers])


def _hooked() -> Stack:
    layers = [Layer(number) for number in range(3)]
    layers[1].down.register_forward_hook(lambda module, args, output: output * 2)
    return Stack([*layers])


def _said(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as what it computes and where, without the names of its nodes."""
    places: dict[Any, int] = {}
    rows = []
    for node in graph.nodes:
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            continue  # torch adds them behind a trace, for people to debug by; no program keeps them
        places[node] = len(places)
        args = fx.node.map_aggregate((node.args, node.kwargs), lambda v: f"%{places[v]}" if v in places else v)
        value, stack = node.meta.get("val"), [path for path, *_ in (node.meta.get("nn_module_stack") or {}).values()]
        target = node.name if node.op == "placeholder" else str(node.target)
        rows.append((target, str(args), str(getattr(value, "shape", value)), stack, node.meta.get("stack_trace")))
    return rows


def _traced(
    model: nn.Module, inputs: Any, *, once: bool, monkeypatch: pytest.MonkeyPatch
) -> torch.export.ExportedProgram:
    with monkeypatch.context() as patch:
        if not once:
            patch.setattr(capture, "find_layer_groups", lambda host: [])
        return capture.capture_graph("main", Host.of(model), inputs, None, sites={}, plans={}).exported


SAME: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alike": (lambda: Stack([Layer(number) for number in range(6)]), 2),
    "of two kinds": (lambda: Stack([Layer(number, slope=0.5 if number < 3 else 0.1) for number in range(6)]), 4),
    "that read their number": (lambda: Stack([Numbered(number) for number in range(4)]), 4),
    "that write into what they are given": (lambda: Stack([Writing(number) for number in range(6)]), 2),
    "that keep what they compute": (lambda: Stack([Keeping(number) for number in range(4)]), 4),
    "within layers": (Stages, 1),
    "called again with another tensor": (lambda: Again([Layer(number) for number in range(4)]), 2),
    "with a tensor in common": (_tied, 3),
    "of which one is hooked": (_hooked, 2),
    "that keep autocast away": (lambda: Stack([Casting(number) for number in range(4)]), 4),
    "that need no gradients": (lambda: Stack([Frozen(number) for number in range(4)]), 4),
    "that turn gradients on": (lambda: Stack([Graded(number) for number in range(4)]), 4),
    "in a region of autocast": (lambda: Region([Layer(number) for number in range(4)], Casting.region), 4),
    "in a region without gradients": (lambda: Region([Layer(number) for number in range(4)], torch.no_grad), 2),
    "in a region of gradients": (lambda: Region([Layer(number) for number in range(4)], torch.enable_grad), 4),
}
"""Kind of layers -> (a model of them, how many have to be traced)."""


@pytest.mark.medium("layers that know their index", keep=["that read their number"])
@pytest.mark.slow("layers that turn gradients and autocast off themselves", cases=["in a region*"])
@pytest.mark.parametrize("kind", SAME)
def test_copied_layers_equal_traced_layers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = SAME[kind][0]().eval()
    found = _traced(model, (ROWS,), once=True, monkeypatch=monkeypatch)
    wanted = _traced(model, (ROWS,), once=False, monkeypatch=monkeypatch)
    assert _said(found.graph) == _said(wanted.graph)
    more = torch.randn(5, 3, 6)
    found_leaves, wanted_leaves = (torch.utils._pytree.tree_leaves(p.module()(more)) for p in (found, wanted))
    assert len(found_leaves) == len(wanted_leaves)
    assert all(torch.equal(one, other) for one, other in zip(found_leaves, wanted_leaves, strict=True))


@pytest.mark.medium("equal layers", keep=["alike"])
@pytest.mark.slow(
    "test_copied_layers_equal_traced_layers compares the programs",
    keep=["alike", "of two kinds", "that turn gradients on"],
)
@pytest.mark.parametrize("kind", SAME)
def test_layers_that_repeat_are_traced_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, most = SAME[kind]
    runs: list[int] = []
    forward = Layer.forward

    def counted(self: Layer, *args: Any, **kwargs: Any) -> Tensor:
        runs.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Layer, "forward", counted)
    _traced(make().eval(), (ROWS,), once=True, monkeypatch=monkeypatch)
    assert len(runs) == most


def _model(kind: str, **given: Any) -> nn.Module:
    config = transformers.AutoConfig.for_model(kind, vocab_size=40, **given)
    auto = transformers.AutoModelForSeq2SeqLM if kind == "t5" else transformers.AutoModelForCausalLM
    return auto.from_config(config).eval()  # type: ignore[no-untyped-call]  # transformers' own


SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "num_hidden_layers": 3},
    "gemma3_text": {**SIZES, "num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": 2},
    "gpt2": {"n_embd": 16, "n_layer": 3, "n_head": 2, "scale_attn_by_inverse_layer_idx": True},
    "t5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0},
}
"""Layers that are alike, that attend within a window and beyond, that divide by their number, that pass a bias on."""


SOON = ("llama", "t5")


@pytest.mark.slow("test_copied_layers_equal_traced_layers, over hand-written layers")
@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in SOON else pytest.mark.slow) for n in MODELS])
def test_transformers_models_are_captured_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(name, **MODELS[name])
    found, wanted = (_traced(model, None, once=once, monkeypatch=monkeypatch) for once in (True, False))
    assert _said(found.graph) == _said(wanted.graph)


def test_adapters_act_on_layers_that_were_not_traced() -> None:
    torch.manual_seed(0)
    model = Stack([Layer(number) for number in range(4)]).eval()
    eager: Any = lorac.compile(model, {"a": lorac.LoRA(r=2, targets=r"layers\.3\.up")}, example_inputs=(ROWS,))
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_()
    compiled = lorac.compile(model, dict(eager.adapters), target="onnxruntime", example_inputs=(ROWS,))
    with torch.no_grad():
        assert_close(compiled(ROWS), eager(ROWS))
        assert not torch.equal(eager(ROWS), model(ROWS))


def test_a_group_lists_the_modules_with_layer_numbers() -> None:
    from lorac.frontend.capture.layer_groups import find_layer_groups

    model = Stack([Layer(number) for number in range(4)])
    assert find_layer_groups(model) == [LayerGroup(tuple(f"layers.{n}" for n in range(4)), frozenset({("", "number")}))]
