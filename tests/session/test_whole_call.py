"""torch.compile takes a compiled model whole: one graph, with the answers and gradients of eager calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import lorac
from lorac.testing import assert_close

LAYERS = ["up", "down"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)
        self.down.bias = None

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": x + scale * self.down(torch.relu(self.norm(self.up(x))))}


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests():
    torch._dynamo.reset()


def drawn(methods: dict[str, Any], **options: Any) -> Any:
    """Network with adapters whose tensors are all random."""
    torch.manual_seed(0)
    network, example = Network(), (torch.randn(2, 6),)
    compiled = lorac.compile(network, methods, example_inputs=example)
    with torch.no_grad():
        for adapter in compiled.adapters.values():
            for tensor in adapter.parameters():
                tensor.normal_(0, 0.3)
    return lorac.compile(network, compiled.adapters, example_inputs=example, **{"active": None, **options})


def whole(compiled: Any) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(compiled, fullgraph=True, backend=counter), counter


METHODS = {"a": lorac.LoRA(r=2, targets=LAYERS), "b": lorac.DoRA(r=2, targets=["up"])}


def test_a_swap_chooses_one_whole_graph() -> None:
    compiled = drawn(METHODS)
    run, counter = whole(compiled)
    x = torch.randn(3, 6)
    for choice in ("a", "b", None, "a", {"a": 0.5, "b": -0.3}):
        compiled.swap(choice)
        for gradients in (True, False):
            with torch.set_grad_enabled(gradients):
                assert torch.equal(run(x)["y"], compiled(x)["y"])
    assert counter.frame_count == 8


def test_another_adapter_of_the_same_name_is_not_the_graph_of_the_first() -> None:
    compiled = drawn(METHODS)
    run, _ = whole(compiled)
    x = torch.randn(3, 6)
    compiled.swap("a")
    before = run(x)["y"]
    compiled.swap(None)
    compiled.remove_adapter("a")
    compiled.add_adapter(lorac.LoRA(r=2, alpha=64, targets=LAYERS), name="a")
    with torch.no_grad():
        for tensor in compiled.adapters["a"].parameters():
            tensor.fill_(0.1)
    compiled.swap("a")
    assert torch.equal(run(x)["y"], compiled(x)["y"])
    assert not torch.equal(run(x)["y"], before)


def test_gradients_and_new_values_pass_through() -> None:
    compiled = drawn(METHODS)
    run, counter = whole(compiled)
    x = torch.randn(3, 6)
    compiled.swap("a")
    compiled.train()
    tensors = list(compiled.adapters["a"].parameters())
    for _ in range(3):
        found, expected = (torch.autograd.grad(call(x)["y"].square().sum(), tensors) for call in (run, compiled))
        for mine, theirs in zip(found, expected, strict=True):
            assert_close(mine, theirs)
        with torch.no_grad():
            for tensor, gradient in zip(tensors, expected, strict=True):
                tensor.sub_(0.1 * gradient)
    assert counter.frame_count == 1


def test_dropout_is_drawn_anew_and_ends_with_training() -> None:
    compiled = drawn({"a": lorac.LoRA(r=2, dropout=0.5, targets=LAYERS)})
    run, _ = whole(compiled)
    compiled.swap("a")
    compiled.train()
    x = torch.randn(3, 6)
    assert not torch.equal(run(x)["y"], run(x)["y"])
    for layer in (compiled.host.up, compiled.host.down):
        layer.training = False
    assert torch.equal(run(x)["y"], run(x)["y"])
    compiled.eval()
    assert torch.equal(run(x)["y"], compiled(x)["y"])


def test_other_sizes_get_graphs_of_their_own() -> None:
    compiled = drawn(METHODS)
    run, _ = whole(compiled)
    compiled.swap("b")
    for rows in (3, 5, 7):
        x = torch.randn(rows, 6)
        assert torch.equal(run(x, scale=0.5)["y"], compiled(x, scale=0.5)["y"])


def test_a_trace_leaves_later_calls_outside_as_they_are() -> None:
    traced, fresh = drawn(METHODS), drawn(METHODS)
    run, _ = whole(traced)
    x = torch.randn(3, 6)
    for compiled in (traced, fresh):
        compiled.swap({"a": 1.0, "b": 1.0})
    run(x)
    assert torch.equal(traced(x)["y"], fresh(x)["y"])


def test_sums_of_tensors_are_not_traced() -> None:
    """A call in eval mode compares sums of the tensors, which torch.compile must not trace."""
    compiled = drawn(METHODS)
    run, _ = whole(compiled)
    compiled.swap("a")
    compiled.eval()
    x = torch.randn(3, 6)
    with torch.no_grad():
        assert_close(run(x)["y"], compiled(x)["y"])


def test_a_baked_model_is_one_graph() -> None:
    compiled = drawn({"a": METHODS["a"]}, mode="baked", active="a")
    run, _ = whole(compiled)
    x = torch.randn(3, 6)
    assert_close(run(x)["y"], compiled(x)["y"])


@pytest.mark.medium("test_a_swap_chooses_one_whole_graph")
def test_a_checkpointed_model_of_transformers_is_one_graph() -> None:
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_attention_heads=2, **sizes))
    model.activation_checkpointing_enable()
    compiled = lorac.compile(model, {"a": lorac.LoRA(r=2, targets="all-linear")}, active="a").train()
    run, counter = whole(compiled)
    ids, tensors = torch.randint(0, 32, (2, 5)), list(compiled.adapters["a"].parameters())
    given = {"input_ids": ids, "labels": ids, "use_cache": False, "attention_mask": None}
    found, expected = (torch.autograd.grad(call(**given).loss, tensors) for call in (run, compiled))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs)
    assert counter.frame_count == 1


ROUTED = {"a": lorac.ReMix(r=2, experts=3, top_k=1, targets=LAYERS)}
BROKEN: dict[str, tuple[Callable[[], Any], dict[str, Any], bool]] = {
    "a choice": (lambda: drawn(METHODS), {"adapters": "a"}, False),
    "a choice per row": (lambda: drawn(METHODS), {"adapters": ["b", None, {"a": 0.5}]}, False),
    "fused": (lambda: drawn(METHODS, mode="fused"), {}, False),
    "extra outputs": (lambda: drawn(ROUTED, aux=["log_prob"]), {}, False),
    "branches that train": (lambda: drawn(ROUTED), {}, True),
}


@pytest.mark.medium("test_a_swap_chooses_one_whole_graph", keep=["a choice"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's, of code of lorac's that it leaves as it is
@pytest.mark.parametrize("case", BROKEN)
def test_a_call_in_several_graphs_gives_its_reason(case: str) -> None:
    make, given, trains = BROKEN[case]
    compiled = make()
    if not given:
        compiled.swap("a")
    compiled.train(trains)
    x = torch.randn(3, 6)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"lorac traces a call as one graph without adapters="):
        whole(compiled)[0](x, **given)
    torch._dynamo.reset()
    run, found = torch.compile(compiled, backend="aot_eager"), []
    for call in (run, compiled):
        torch.manual_seed(7)
        found.append((call(x, **given)["y"], {**compiled.aux}))
    assert_close(found[0][0], found[1][0])
    assert found[0][1].keys() == found[1][1].keys()


def test_arguments_and_outputs_may_be_none() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(6, 6)

        def forward(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, None]:
            return self.up(x if mask is None else x * mask), None

    compiled = lorac.compile(
        Optional(), {"a": lorac.LoRA(r=2, targets=["up"])}, example_inputs=(torch.randn(2, 6), None)
    )
    run, _ = whole(compiled)
    x = torch.randn(3, 6)
    found, nothing = run(x, None)
    assert torch.equal(found, compiled(x, None)[0])
    assert nothing is None
