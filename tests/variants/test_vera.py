"""VeRA by hand, and the memory of its shared A and B: one for all sites of a shape, in every runtime and file."""

import math
from types import SimpleNamespace

import pytest
import torch
from peft import VeraConfig, get_peft_model
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.backends.onnx import build as building
from lorac.ir.algebra.changes import Delta, LowRank
from tests.oracles import vera as oracle
from tests.parity import assert_parity
from tests.refusing import refuses

TARGETS = ("q", "k", "v", "out", "first", "second", "third")
VERA = lorac.VeRA(r=5, targets=TARGETS)
LORA = lorac.LoRA(r=2, alpha=3, targets=("v", "other"))
MIXTURE = {"a": 0.7, "l": 0.4}
CHOICES = ("a", "b", MIXTURE, "l", None, {"a": 0.5}, "a")


class Host(nn.Module):
    """Linears of two shapes, three and more of each, and one that VeRA leaves alone."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 24) for _ in range(3))
        self.out = nn.Linear(24, 16)
        self.first, self.second, self.third = (nn.Linear(24, 16, bias=False) for _ in range(3))
        self.other = nn.Linear(16, 24)

    def forward(self, x):
        hidden = torch.tanh(self.q(x)) * self.k(x) + self.v(x)
        x = x + self.out(hidden)
        hidden = torch.tanh(self.other(x))
        return self.first(hidden) + torch.tanh(self.second(hidden)) * self.third(hidden)


def host(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Host().to(dtype).eval()


X = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(5))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def drawn(variant, model, name, spread=0.25, seed=0):
    """A fresh adapter with every trained tensor away from its init."""
    found = lorac.compile(model, {name: variant}).adapters[name]
    generator = torch.Generator().manual_seed(seed)
    for tensors in found.tensors.values():
        for key, value in tensors.items():
            if key not in {"vera_A", "vera_B"}:
                value.add_(spread * torch.randn(value.shape, generator=generator, dtype=torch.float64))
    return found


@pytest.fixture(scope="module")
def model():
    return host()


@pytest.fixture(scope="module")
def adapters(model):
    return {
        "a": drawn(VERA, model, "a"),
        "b": drawn(VERA, model, "b", seed=1),
        "l": drawn(LORA, model, "l", spread=0.05),
    }


@torch.no_grad()
def answer(compiled, **choice):
    return compiled(X.to(next(iter(compiled.sites.values())).dtype), **choice)


def by_shape(compiled, tensors):
    """(role, shape of the site) -> where in memory the tensors of its sites lie."""
    found = {}
    for (path, role), value in tensors.items():
        site = compiled.sites[path]
        found.setdefault((role, site.out_features, site.in_features), []).append(value.data_ptr())
    return found


# --- the formula -----------------------------------------------------------------------------------------------------


def test_worked_example():
    p = SimpleNamespace(
        vera_lambda_b=tensor([1.0, 2.0]),
        vera_B=tensor([[1.0], [1.0], [9.0]]),
        vera_lambda_d=tensor([3.0]),
        vera_A=tensor([[1.0, 1.0, 9.0]]),
    )
    zero = torch.zeros(2, 2, dtype=torch.float64)
    assert lorac.VeRA(r=1).weight(zero, p).tolist() == [[3.0, 3.0], [6.0, 6.0]]


def test_has_two_vectors_per_site(model):
    """RoBERTa-base of the paper's table 2: r = 1024 on query and value of twelve layers makes 43k."""
    site = Site("site", SiteKind.LINEAR, 768, 768, torch.float32, "site.weight")
    specs = lorac.VeRA(r=1024).params(site)
    trained = sum(math.prod(spec.shape) for name, spec in specs.items() if "lambda" in name)
    assert 24 * trained == 43_008
    compiled = lorac.compile(model, {"a": VERA})
    assert sum(p.numel() for p in compiled.parameters() if p.requires_grad) == sum(
        compiled.sites[path].out_features + 5 for path in compiled.adapters["a"].sites
    )


@pytest.mark.parametrize("key", [0, 5])
def test_a_fresh_adapter_equals_pefts(key):
    model = host(torch.float32)
    wrapped = get_peft_model(
        host(torch.float32), VeraConfig(r=5, target_modules=list(TARGETS), projection_prng_key=key, d_initial=0.3)
    )
    adapter = lorac.compile(
        model, {"a": lorac.VeRA(r=5, d_initial=0.3, projection_prng_key=key, targets=TARGETS)}
    ).adapters["a"]
    for path, tensors in adapter.tensors.items():
        layer = wrapped.base_model.model.get_submodule(path)
        for name, found in tensors.items():
            assert torch.equal(found, getattr(layer, name)["default"]), (path, name)


def test_form(model, adapters):
    values = lorac.compile(model, {"a": adapters["a"]}).pool["a"].changes
    for path, value in values.items():
        assert isinstance(value, LowRank)
        tensors = adapters["a"].tensors[path]
        assert torch.equal(value.scales["g"], tensors["vera_lambda_d"])
        assert torch.equal(value.scales["h"], tensors["vera_lambda_b"])
        assert set(value.scales) == {"g", "h"}
        assert value.e is None


def test_a_rank_that_saves_nothing_is_merged(model):
    compiled = lorac.compile(model, {"a": lorac.VeRA(targets=TARGETS)})
    assert all(isinstance(value, Delta) for value in compiled.pool["a"].changes.values())
    assert "saves nothing" in compiled.pool["a"].reasons[0].why


@torch.no_grad()
def test_every_mode_is_the_oracle(model, adapters):
    given, base = adapters["a"], model(X.double())
    reference, sites = host(), lorac.sites(model)
    for path, tensors in given.tensors.items():
        weight = reference.get_parameter(sites[path].weight)
        p = SimpleNamespace(**{name: value.numpy() for name, value in _plain(tensors).items()})
        weight.copy_(torch.from_numpy(oracle.weight(weight.numpy(), p, VERA)))
    expected = reference(X.double())
    for mode in ("live", "fused", "baked"):
        assert_parity(answer(lorac.compile(model, {"a": given}, mode=mode)), expected, base)


def _plain(tensors):
    return {name: value.detach() for name, value in tensors.items()}


# --- one memory ------------------------------------------------------------------------------------------------------


def test_sites_share_the_memory_of_projections(model, adapters):
    compiled = lorac.compile(model, {"a": adapters["a"]})
    held = compiled.adapters["a"].tensors.values()
    assert len({id(tensors["vera_A"]) for tensors in held}) == len({id(tensors["vera_B"]) for tensors in held}) == 1
    values = compiled.pool["a"].changes
    found = by_shape(compiled, {(path, role): getattr(v, role) for path, v in values.items() for role in ("a", "b")})
    assert len(found) == 2 * 2
    for places in found.values():
        assert len(places) >= 3
        assert len(set(places)) == 1


def test_slots_share_the_memory_of_projections(model, adapters):
    """What a binding of the eager engine holds; λ of every site is its own."""
    compiled = lorac.compile(model, {"a": adapters["a"]})
    slots = compiled.switch.state.bound.active.slots
    found = by_shape(compiled, {(p, r): t for p, s in slots.items() for r, t in s.named().items()})
    for (role, *_), places in found.items():
        assert len(set(places)) == (1 if role in {"a", "b"} else len(places))


@pytest.fixture(scope="module")
def emitted(adapters):
    return lorac.compile(host(torch.float32), adapters, target="onnxruntime", active="a", example_inputs=(X,))


@pytest.mark.medium("the kit's shared tensors")
def test_onnx_runtime_bindings_share_the_memory_of_projections(emitted):
    emitted.swap("a")
    binding = emitted.switch.state.bound
    named = {tuple(name.rsplit(":", 1)): t for name, t in binding.tensors.items()}
    touched = {(path, role): t for (path, role), t in named.items() if path in emitted.adapters["a"].tensors}
    found = by_shape(emitted, {key: t for key, t in touched.items() if key[1] in {"a", "b"} and key[0] != "v"})
    assert len(found) == 2 * 2
    for places in found.values():
        assert len(places) >= 2
        assert len(set(places)) == 1
    for name, value in binding.values.items():
        assert value.data_ptr() == binding.tensors[name].data_ptr() or not binding.tensors[name].numel()


@torch.no_grad()
def test_training_moves_lambda_alone(model, adapters):
    compiled = lorac.compile(model, {"a": adapters["a"]})
    kept = {id(t): t.clone() for t in compiled.adapters["a"].parameters()}
    with torch.enable_grad():
        compiled.train()(X.double()).square().mean().backward()
    trained = [p for p in compiled.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.any() for p in trained)
    torch.optim.SGD(trained, lr=1e-2).step()
    compiled.eval()
    for tensors in compiled.adapters["a"].tensors.values():
        for name, value in tensors.items():
            assert torch.equal(value, kept[id(value)]) == (name in {"vera_A", "vera_B"})
    again = lorac.compile(model, {"a": compiled.adapters["a"]})
    assert torch.equal(answer(compiled), answer(again))
    values = compiled.pool["a"].changes
    assert len({v.a.data_ptr() for path, v in values.items() if path in {"q", "k", "v"}}) == 1


# --- mixtures and swaps ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mixtures_are_the_weighted_sum(adapters):
    """At a single layer, where the output is linear in the weight."""
    model = torch.nn.Sequential()
    model.add_module("site", torch.nn.Linear(7, 11, dtype=torch.float64))
    sources = {"a": lorac.VeRA(r=2, targets=("site",)), "l": lorac.LoRA(r=1, targets=("site",))}
    given = {name: drawn(source, model, name, spread=0.1) for name, source in sources.items()}
    x = torch.randn(5, 7, dtype=torch.float64)
    base = model(x)
    moved = {name: lorac.compile(model, {name: one})(x) - base for name, one in given.items()}
    for mode in ("live", "fused"):
        compiled = lorac.compile(model, given, mode=mode)
        assert_parity(compiled(x, adapters=MIXTURE), base + 0.7 * moved["a"] + 0.4 * moved["l"], base)
        with torch.enable_grad():
            assert_parity(compiled(x, adapters=MIXTURE), base + 0.7 * moved["a"] + 0.4 * moved["l"], base)


@pytest.mark.medium("the kit swaps VeRA")
@pytest.mark.parametrize("mode", ["live", "fused"])
def test_swaps_leave_no_trace(model, adapters, mode):
    compiled = lorac.compile(model, adapters, mode=mode)
    for choice in CHOICES:
        compiled.swap(choice)
        fresh = lorac.compile(model, adapters, mode=mode, active=choice)
        assert torch.equal(answer(compiled), answer(fresh)), choice
    compiled.swap(None)
    assert torch.equal(answer(compiled), model(X.double()))


@pytest.mark.medium("swaps in eager, and exchanged slots there")
def test_swaps_in_onnx_runtime(emitted, adapters):
    first = {}
    eager = lorac.compile(host(torch.float32), adapters)
    emitted.swap(None)
    own = answer(emitted)
    base = answer(eager, adapters=None)
    for choice in (*CHOICES, *CHOICES):
        emitted.swap(choice)
        found = answer(emitted)
        assert torch.equal(found, first.setdefault(str(choice), found)), choice
        if choice is not None:
            assert_parity(found, answer(eager, adapters=choice), base, own_base=own)
    assert len({value.numpy().tobytes() for value in first.values()}) == len(first)


def test_adds_to_a_model_with_reserved_slots(model, adapters):
    """A slot for a plain pair takes it too, λ worked into B."""
    compiled = lorac.compile(model, {}, reserve=lorac.Reserve(targets=TARGETS, rank=5))
    compiled.add_adapter(adapters["a"])
    compiled.swap("a")
    base = model(X.double())
    assert_parity(answer(compiled), answer(lorac.compile(model, {"a": adapters["a"]})), base)


def test_compiles_in_inference_mode(model, adapters):
    with torch.inference_mode():
        compiled = lorac.compile(model, {"a": adapters["a"]})
        assert torch.equal(answer(compiled), answer(lorac.compile(model, {"a": adapters["a"]})))


@pytest.mark.parametrize(
    "role", [pytest.param("a", marks=pytest.mark.slow), "g", pytest.param("h", marks=pytest.mark.slow)]
)
def test_exchanged_slots_are_found(adapters, role, monkeypatch):
    """Also those that hold the same memory."""
    honest = building.emit

    def dishonest(*args):
        made = honest(*args)
        first, second = (next(v for v in made.graph.inputs if v.name == f"{path}:{role}") for path in ("q", "k"))
        first.name, second.name = "spare", f"q:{role}"
        first.name = f"k:{role}"
        return made

    monkeypatch.setattr(building, "emit", dishonest)
    with refuses("self_test_failed", match=f"'q:{role}'") as error:
        lorac.compile(host(torch.float32), {"a": adapters["a"]}, target="onnxruntime", example_inputs=(X,))
    assert "first" not in str(error.value)


# --- files -----------------------------------------------------------------------------------------------------------


def test_an_adapters_file_holds_a_and_b_once(model, adapters, tmp_path):
    file = tmp_path / "a.safetensors"
    lorac.save_adapter(adapters["a"], file, format="native", model=model)
    own = sum(t.nbytes for at in adapters["a"].tensors.values() for n, t in at.items() if "lambda" in n)
    shared = 8 * (5 * 24 + 24 * 5)
    assert own + shared < file.stat().st_size < own + shared + 16_000
    loaded = lorac.load_adapter(file, model)
    assert len({id(tensors["vera_A"]) for tensors in loaded.tensors.values()}) == 1
    assert loaded.numel() == adapters["a"].numel()


def test_an_artifact_answers_the_same(emitted, tmp_path):
    emitted.swap(MIXTURE)
    emitted.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    for choice in ("a", MIXTURE, None):
        assert torch.equal(answer(loaded, adapters=choice), answer(emitted, adapters=choice))
    values = loaded.pool["a"].changes
    assert len({v.a.data_ptr() for path, v in values.items() if path in {"q", "k", "v"}}) == 1
    files = [file.stat().st_size for file in (tmp_path / "it" / "adapters").iterdir()]
    assert max(files) < 64_000


@pytest.mark.medium("the kit saves and loads")
def test_an_eager_artifact_answers_the_same(model, adapters, tmp_path):
    compiled = lorac.compile(model, {"a": adapters["a"]}, active="a", example_inputs=(X.double(),))
    compiled.save(tmp_path / "it")
    loaded = lorac.load(tmp_path / "it")
    assert_parity(answer(loaded), answer(compiled), answer(compiled, adapters=None))
