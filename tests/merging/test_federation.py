"""FLoRA: stacked factors, over rounds, for clients of different ranks."""

import pytest
import torch
from torch import nn

import lorac
from lorac.merging import FederatedStack
from lorac.merging.federation import STACK
from lorac.testing import assert_close
from tests.limits import assert_apart
from tests.merging.hosts import deltas, host, lora
from tests.merging.test_ways import matrix, of_pair, tensor
from tests.refusing import refuses

WEIGHTS = {"a": 0.25, "b": 0.75}
FIRST = of_pair("a", tensor([1], [0]), tensor([1, 0]), 1)


def test_the_example_of_two_clients():
    """The mean of the factors is off by 0.375; the stack is not."""
    second = of_pair("b", tensor([0], [1]), tensor([0, 1]), 1)
    exact = tensor([0.25, 0], [0, 0.75])
    stack = FederatedStack().add_round({"a": FIRST, "b": second}, WEIGHTS)
    assert_close(matrix(stack.merged()), exact)
    pairs = {name: one.tensors["fc"] for name, one in (("a", FIRST), ("b", second))}
    a, b = (sum(WEIGHTS[name] * pair[key] for name, pair in pairs.items()) for key in ("lora_A", "lora_B"))
    assert_close(b @ a, tensor([0.0625, 0.1875], [0.1875, 0.5625]))
    assert_close((b @ a - exact).norm(), torch.tensor(0.375).double())


def test_the_example_of_two_ranks():
    """Padded with zeros to one rank, their means would give [[1.1875, 1.3125], [0.1875, 0.5625]]."""
    second = of_pair("b", tensor([0, 2], [1, 0]), tensor([0, 1], [1, 1]), 2)
    stack = FederatedStack().add_round({"a": FIRST, "b": second}, WEIGHTS)
    assert_close(matrix(stack.merged()), tensor([1.75, 1.5], [0, 0.75]))
    assert stack.merged().tensors["fc"]["lora_A"].shape == (3, 2)


def clients():
    return {
        "one": lora("one", 1, r=3, alpha=5),
        "two": lora("two", 2, r=1, alpha=7),
        "three": lora("three", 3, r=2, alpha=2, sites=("fc2", "conv")),
    }


def expected(rounds):
    """Σ pₖ·ΔWₖ over rounds of (adapters, weights)."""
    total = {}
    for adapters, weights in rounds:
        for name, adapter in adapters.items():
            for path, delta in deltas(adapter, host()).items():
                total[path] = total.get(path, 0) + weights[name] / sum(weights.values()) * delta
    return total


def assert_same(adapter, changes):
    found = deltas(adapter, host())
    assert found.keys() == changes.keys()
    for path, delta in changes.items():
        assert_close(found[path], delta)


def test_rounds_add_up_and_clients_can_be_removed():
    given, weights = clients(), {"one": 10, "two": 30, "three": 60}
    later = {"two": lora("two", 5, r=2, alpha=2)}
    stack = FederatedStack().add_round(given, weights).add_round(later)
    assert_same(stack.merged(), expected([(given, weights), (later, {"two": 1})]))
    size = sum(tensor.numel() for adapter in (*given.values(), *later.values()) for tensor in adapter.parameters())
    assert stack.merged().numel() == size
    rest = {name: adapter for name, adapter in given.items() if name != "two"}
    left = stack.without("two")
    assert left.clients == ("one", "three") and len(left.rounds) == 1
    assert_same(left.merged(), expected([(rest, {"one": 10, "three": 60})]))
    turned = FederatedStack().add_round(dict(reversed(given.items())), weights)
    for path, at in FederatedStack().add_round(given, weights).merged().tensors.items():
        assert all(torch.equal(tensor, turned.merged().tensors[path][name]) for name, tensor in at.items())


def test_a_round_of_one_client_returns_its_adapter():
    assert_same(
        FederatedStack().add_round({"one": clients()["one"]}, {"one": 7}).merged(), deltas(clients()["one"], host())
    )


def test_a_round_trains_each_client_next_to_the_frozen_stack():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, y = torch.randn(20, 6).double(), torch.randint(3, (20,))
    methods = {"one": lorac.LoRA(r=2, targets=["0"]), "two": lorac.LoRA(r=1, targets=["0", "2"])}
    starts = {}

    def train(client, compiled):
        starts[client] = compiled(x).detach()
        assert compiled.training
        trained = [tensor for tensor in compiled.parameters() if tensor.requires_grad]
        own = [tensor for name, one in compiled.adapters.items() if name != STACK for tensor in one.parameters()]
        assert {id(tensor) for tensor in trained} == {id(tensor) for tensor in own}
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()

    stack = FederatedStack()
    for _ in range(2):
        begun = stack.merged()
        stack = stack.train_round(model, methods, train, {"one": 2, "two": 1})
        base = model(x) if begun is None else lorac.merge_into(model, begun)(x)
        for found in starts.values():
            assert_close(found, base.detach())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    first, second = (contributions["one"][0] for contributions in stack.rounds)
    assert_apart(first.tensors["0"]["lora_A"].detach(), second.tensors["0"]["lora_A"].detach())
    loss = nn.functional.cross_entropy(lorac.merge_into(model, stack.merged())(x), y)
    assert loss < nn.functional.cross_entropy(model(x), y)


def test_rejects_invalid_rounds():
    given = clients()
    for weights in ({"one": 1, "two": 0, "three": 1}, {"one": 1}, {**dict.fromkeys(given, 1), "four": 1}):
        with refuses("choice_error"):
            FederatedStack().add_round(given, weights)
    with refuses("choice_error"):
        FederatedStack().add_round({})
    with refuses("adapter_not_found", match="nearest: three"):
        FederatedStack().add_round(given).without("thre")
    assert FederatedStack().merged() is None


def test_weighting_both_factors_would_be_wrong():
    """The negative of the exactness: p² in place of p."""
    given = {"one": clients()["one"], "two": clients()["two"]}
    squared = lorac.merge(given, "cat", {"one": 0.25**2, "two": 0.75**2})
    for path, delta in expected([(given, {"one": 0.25, "two": 0.75})]).items():
        assert_apart(deltas(squared, host())[path], delta)


@pytest.mark.slow
def test_the_example_runs():
    from examples import federated

    found = federated.simulate(rounds=2)
    assert 1000 * max(found.errors) < min(found.errors_of_means)
    assert found.accuracies[-1] > found.accuracies[0]
