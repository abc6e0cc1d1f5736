"""Values computed once per call: for each adapter its own, together with the base pass, or not at all."""

from collections import Counter
from dataclasses import dataclass, replace

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lorac
from lorac.testing import assert_close
from tests.parity import assert_parity
from tests.variants.modules import Routed, drawn

WIDTH = 6
ROUTED = Routed(targets=["0", "2"], of="2", width=WIDTH, n=2)
X, OTHER = torch.randn(4, 5, WIDTH), torch.randn(2, 5, WIDTH)
TARGETS = pytest.mark.parametrize("target", ["eager", "onnxruntime"])


def host() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).eval()


def two(model: nn.Module) -> dict[str, lorac.Adapter]:
    found = lorac.compile(model, {"a": ROUTED, "b": ROUTED}).adapters
    return dict(found)


def by_hand(model: nn.Module, adapters, strengths, x: torch.Tensor) -> torch.Tensor:
    """Both sites, each with the sum of the adapters' branches, gated by what the model answers without them."""
    last, y = model(x), x
    for path in ("0", "2"):
        base = model[int(path)](y)
        added = 0
        for name, t in strengths.items():
            p = adapters[name].tensors[path]
            gates = (last @ p["classifier"].T).softmax(-1)
            added = added + t * ((y @ p["lora_A"].T * gates) @ p["lora_B"].T)
        y = base + added if path == "2" else torch.tanh(base + added)
    return y


@TARGETS
@torch.no_grad()
def test_each_adapter_reads_its_own(target: str) -> None:
    model = host()
    adapters = two(model)
    compiled = lorac.compile(model, adapters, target, (X,))
    for x in (X, OTHER):
        for choice in ({"a": 0.3}, {"b": 0.3}, {"a": 0.2, "b": -0.3}):
            y = by_hand(model, adapters, choice, x)
            assert_parity(compiled(x, adapters=choice), y, model(x), own_base=compiled(x, adapters=None))
    rows = compiled(OTHER, adapters=["b", None])
    assert_close(rows[:1], compiled(OTHER[:1], adapters="b"))
    assert_close(rows[1:], model(OTHER)[1:])


@pytest.mark.medium("eager", cases=["onnxruntime"])
@TARGETS
@pytest.mark.filterwarnings("ignore:onnxruntime has no kernels for float16")
@torch.no_grad()
def test_computes_shared_values_in_float32_for_a_half_precision_model(target: str) -> None:
    model = host().half()
    adapter = lorac.compile(model, {"a": ROUTED}).adapters["a"]
    assert {tensor.dtype for tensor in adapter.parameters()} == {torch.float32}
    found = lorac.compile(model, {"a": adapter}, target, (X.half(),))(X.half())
    expected = by_hand(model.float(), {"a": adapter}, {"a": 1}, X.half().float())
    assert_close(found.half(), expected.half())


def test_gradients_treat_the_base_pass_as_constant() -> None:
    model = host()
    compiled = lorac.compile(model, {"a": ROUTED})
    given = compiled.adapters["a"].tensors
    wanted = by_hand(model, {"a": compiled.adapters["a"]}, {"a": 1}, X)
    for tensor in (given["0"]["classifier"], given["2"]["lora_A"]):
        expected = torch.autograd.grad(wanted.square().sum(), tensor, retain_graph=True)[0]
        found = torch.autograd.grad(compiled(X).square().sum(), tensor)[0]
        # The pass of the base has no gradients anyway: nothing in it is trained.
        assert_close(found, expected)


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self, within: nn.Module) -> None:
        super().__init__()
        self.within, self.calls = within, 0

    def forward(self, x):
        self.calls += 1
        return self.within(x)


@torch.no_grad()
def test_eager_runs_one_pass_while_inactive() -> None:
    compiled = lorac.compile(
        nn.Sequential(Counted(host())), {"a": replace(ROUTED, of="0.within.2", targets=["within.0"])}
    )
    counted = compiled.host[0]
    for choice, passes in ((None, 1), ("a", 2)):
        counted.calls = 0
        compiled(X, adapters=choice)
        assert counted.calls == passes


@pytest.mark.medium("backends/onnx/test_gates.py: each branch lies in an If of its own")
@torch.no_grad()
def test_a_program_computes_only_the_base_while_inactive(tmp_path) -> None:
    model = host()
    compiled = lorac.compile(model, two(model), "onnxruntime", (X,))
    compiled.save(tmp_path / "routed")
    lorac.compile(model, {}, "onnxruntime", (X,)).save(tmp_path / "base")
    routed, base = (onnx.load(next((tmp_path / name).rglob("*.onnx"))).graph for name in ("routed", "base"))
    products = ("MatMul", "Gemm")
    outside = Counter(node.op_type for node in routed.node if node.op_type in products)
    assert outside == Counter(node.op_type for node in base.node if node.op_type in products)
    # One for what all share, one for what each adapter computes once, and one for each adapter at each site.
    gates = [node for node in routed.node if node.op_type == "If"]
    assert len(gates) == 1 + 2 + 2 * 2
    bodies = [next(a.g for a in gate.attribute if a.name == "then_branch") for gate in gates]
    softmax = [[node.op_type for node in body.node].count("Softmax") for body in bodies]
    assert sorted(softmax) == [0] * 5 + [1] * 2  # the classifier of each once, not once per site


@dataclass(frozen=True, kw_only=True)
class Reaching(lorac.BranchVariant):
    """Reads what it is told to, once or at its site."""

    targets: tuple[str, ...] = ("2",)
    once_reads: tuple[str, ...] = ()
    reading: tuple[str, ...] = ("own:it",)
    gives: str = "it"
    name = "test-reaching"

    def reads_once(self):
        return self.once_reads

    def reads(self, site):
        return self.reading

    def params(self, site):
        return {"up": drawn(WIDTH, WIDTH)}

    def once(self, p, ctx):
        zero = torch.zeros(())
        return {self.gives: sum((ctx.value(name).mean() for name in self.once_reads), zero)} if self.gives else 3

    def branch(self, x, y, p, ctx):
        return y + F.linear(x, p.up) * sum(ctx.value(name).mean() for name in self.reading)


@pytest.mark.medium("eager", cases=["onnxruntime"])
@TARGETS
@torch.no_grad()
def test_once_reads_inputs_parameters_weights_and_base_values(target: str) -> None:
    model = host()
    method = Reaching(once_reads=("input:input", "param:0.bias", "weight:2", "base:0"))
    eager = lorac.compile(model, {"r": method})
    p = eager.adapters["r"].tensors["2"]
    it = X.mean() + model[0].bias.mean() + model[2].weight.mean() + model[0](X).mean()
    expected = model(X) + (model[:2](X) @ p["up"].T) * it
    assert_close(lorac.compile(model, {"r": eager.adapters["r"]}, target, (X,))(X), expected)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (Reaching(once_reads=("0",)), lorac.SiteError, "not known when a call begins"),
        (Reaching(once_reads=("input:inptu",)), lorac.SiteError, "nearest: input"),
        (Reaching(reading=("param:0.bais",)), lorac.SiteError, "nearest: 0.bias"),
        (Reaching(reading=("in:3",)), lorac.SiteError, "not a value of the program"),
    ],
)
def test_rejects_values_that_do_not_exist(method, error, text) -> None:
    with pytest.raises(error, match=text):
        lorac.compile(host(), {"r": method})


@pytest.mark.medium("eager, and test_each_adapter_reads_its_own there", cases=["*-onnxruntime"])
@TARGETS
@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        (Reaching(reading=("own:that",)), (lorac.SiteError), "that"),
        (Reaching(gives=""), lorac.AdapterError, "not tensors by name"),
        (Reaching(once_reads=("input:input",), gives="it", reading=("own:it", "2")), lorac.SiteError, "'2' is not"),
    ],
)
def test_rejects_values_that_once_does_not_return(method, error, text, target) -> None:
    with pytest.raises(error, match=text):
        lorac.compile(host(), {"r": method}, target, (X,))(X)


@dataclass(frozen=True, kw_only=True)
class Noisy(lorac.BranchVariant):
    """Draws in training."""

    targets: tuple[str, ...] = ("0", "2")
    name, emits = "test-noisy", ("drawn",)

    def params(self, site):
        return {"up": drawn(WIDTH)}

    def branch(self, x, y, p, ctx):
        noise = torch.rand(2, generator=ctx.generator) if ctx.training else torch.zeros(2)
        ctx.emit("drawn", noise)
        return y + noise.sum() * p.up


def test_all_sites_share_the_random_numbers_of_a_step() -> None:
    """It comes from torch's generator, so that a seed or a saved state repeats it; other calls draw nothing."""
    compiled = lorac.compile(host(), {"n": Noisy()}, aux=["drawn"]).train()
    steps = []
    for seed in (5, None, 5):
        if seed is not None:
            torch.manual_seed(seed)
        compiled(X)
        first, second = compiled.aux["drawn"].values()
        assert torch.equal(first, second)
        steps.append(first)
    assert torch.equal(steps[0], steps[2]) and not torch.equal(steps[0], steps[1])
    state = torch.get_rng_state()
    compiled.eval()(X)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.stack(list(compiled.aux["drawn"].values())).any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_the_model_draws_the_same_numbers(reentrant) -> None:
    """Gradients are those without a checkpoint, also of several calls with one input and nothing drawn in between."""
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        compiled = lorac.compile(host(), {"n": Noisy()}).train()
        x = X.clone().requires_grad_()
        calls = [checkpoint(compiled, x, use_reentrant=reentrant) if checkpointed else compiled(x) for _ in range(3)]
        sum(weight * y.square().sum() for weight, y in enumerate(calls, 1)).backward()
        gradients.append([p.grad.clone() for p in compiled.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rejects_recomputing_with_another_random_state() -> None:
    compiled, x = lorac.compile(host(), {"n": Noisy()}).train(), X.clone().requires_grad_()
    y = checkpoint(compiled, x, use_reentrant=False, preserve_rng_state=False)
    torch.rand(1)
    with pytest.raises(lorac.Unavailable, match="a checkpoint recomputes a call"):
        y.square().sum().backward()
