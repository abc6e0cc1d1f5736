"""TeRA by hand: its special cases, the law of its rank, and one core for all sites."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lorac
from lorac import Site, SiteKind
from lorac.adapters.fresh import make_fresh_adapter
from lorac.frontend.model_view import ModelView
from lorac.ir.algebra.changes import Delta, LowRank
from lorac.testing import assert_close, conformance
from lorac.variants.tera import balanced_modes
from tests.limits import assert_apart
from tests.oracles import tera as oracle


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def site(out, columns):
    return Site("site", SiteKind.LINEAR, out, columns, torch.float32, "site.weight")


def random(variant, out, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    specs = variant.params(site(out, columns))
    return {n: torch.randn(spec.shape, generator=generator, dtype=torch.float64) for n, spec in specs.items()}


def delta(variant, out, columns, tensors):
    return variant.weight(torch.zeros(out, columns, dtype=torch.float64), SimpleNamespace(**tensors))


def test_worked_example():
    tensors = {
        "tera_G": tensor([[1.0, 2.0], [3.0, 4.0]]),
        "tera_d_0": tensor([1.0, 2.0]),
        "tera_d_1": tensor([1.0, 0.5]),
    }
    variant = lorac.TeRA(order=1, factors="identity", scale=1)
    assert delta(variant, 2, 2, tensors).tolist() == [[1.0, 1.0], [6.0, 4.0]]


def test_order_1_contains_vera():
    tensors = random(lorac.TeRA(order=1, scale=1), 11, 7)
    tensors["tera_U_0"] = torch.eye(11, dtype=torch.float64)
    vera = {
        "vera_A": tensors["tera_U_1"].t(),
        "vera_B": tensors["tera_G"],
        "vera_lambda_b": tensors["tera_d_0"],
        "vera_lambda_d": tensors["tera_d_1"],
    }
    found = delta(lorac.TeRA(order=1, scale=1), 11, 7, tensors)
    assert_close(found, delta(lorac.VeRA(r=7), 11, 7, vera))


@pytest.mark.parametrize("r", [1, 2, 3, 4])
def test_the_law_of_its_rank(r):
    variant = lorac.TeRA(r=r)
    tensors = random(variant, 16, 16)
    assert torch.linalg.matrix_rank(delta(variant, 16, 16, tensors)) == r * r
    assert sum(t.numel() for name, t in tensors.items() if name.startswith("tera_d")) == 4 * r


def test_is_linear_in_every_vector():
    variant = lorac.TeRA(r=2)
    tensors = random(variant, 12, 6)
    for k in range(4):
        scaled = {**tensors, f"tera_d_{k}": 3 * tensors[f"tera_d_{k}"]}
        assert_close(delta(variant, 12, 6, scaled), 3 * delta(variant, 12, 6, tensors))


@pytest.mark.parametrize("r", [None, 2])
def test_matches_a_contraction_by_modes(r):
    """6 inputs in modes (2, 3) through U·diag(d) into the core, and out of it into 12 outputs in modes (3, 4)."""
    variant = lorac.TeRA(r=r)
    tensors = random(variant, 12, 6)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    U, d = ([tensors[f"tera_{kind}_{k}"] for k in range(4)] for kind in ("U", "d"))
    hidden = torch.einsum("tij,ia,jb->tab", x.unflatten(1, (2, 3)), U[2], U[3]) * d[2][:, None] * d[3]
    hidden = torch.einsum("tab,cdab->tcd", hidden, tensors["tera_G"]) * d[0][:, None] * d[1]
    y = torch.einsum("tcd,kc,ld->tkl", hidden, U[0], U[1]).flatten(1) * 6**-0.5
    assert_close(x @ delta(variant, 12, 6, tensors).t(), y)


@pytest.mark.parametrize(
    ("size", "order", "expected"),
    [
        (4096, 2, (64, 64)),
        (11008, 2, (86, 128)),
        (13, 2, (1, 13)),
        (64, 3, (4, 4, 4)),
        (7, 1, (7,)),
        (1, 2, (1, 1)),
    ],
)
def test_modes(size, order, expected):
    assert balanced_modes(size, order) == expected


def test_a_count_of_the_specification():
    """4096 x 4096 at full rank: four vectors of 64."""
    specs = lorac.TeRA().params(site(4096, 4096))
    assert sum(spec.shape[0] for spec in specs.values() if not spec.shared) == 256


class Host(nn.Module):
    """Two layers of one shape and a smaller one."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 24), nn.Linear(16, 24)
        self.three = nn.Linear(24, 10)

    def forward(self, x):
        return self.three(torch.tanh(self.one(x)) * self.two(x))


TARGETS = ("one", "two", "three")


def fresh(**fields):
    model = Host().double().eval()
    return model, lorac.compile(model, {"a": lorac.TeRA(targets=TARGETS, **fields)})


@torch.no_grad()
def test_sites_share_core_and_factors(tmp_path):
    model, compiled = fresh()
    adapter = compiled.adapters["a"]
    for name in ("tera_G", "tera_U_0", "tera_U_3"):
        assert len({id(tensors[name]) for tensors in adapter.tensors.values()}) == 1
    assert adapter.tensors["one"]["tera_G"].shape == (4, 6, 4, 6)
    lorac.save_adapter(adapter, tmp_path / "a.safetensors", format="native", model=model)
    assert (tmp_path / "a.safetensors").stat().st_size < 8 * adapter.numel() + 16_000
    assert lorac.load_adapter(tmp_path / "a.safetensors", model).numel() == adapter.numel()


def test_the_seed_determines_core_and_factors():
    (_, one), (_, two), (_, other) = fresh(), fresh(), fresh(seed=1)
    for name in ("tera_G", "tera_U_0", "tera_U_1", "tera_U_2", "tera_U_3"):
        first, second, third = (c.adapters["a"].tensors["one"][name] for c in (one, two, other))
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


@torch.no_grad()
def test_an_adapter_is_exchanged_by_its_vectors():
    """Of its values 53 are sent; core and factors are drawn anew where they arrive."""
    model, sender = fresh(seed=3)
    x = torch.randn(5, 16, dtype=torch.float64)
    own = {path: {n: t for n, t in at.items() if "_d_" in n} for path, at in sender.adapters["a"].tensors.items()}
    for vector in (vector for at in own.values() for vector in at.values()):
        vector.normal_()
    assert sum(vector.numel() for at in own.values() for vector in at.values()) == 18 + 18 + 17
    answers = {}
    for seed in (3, 4):
        received = fresh(seed=seed)[1].adapters["a"]
        for path, at in own.items():
            for name, vector in at.items():
                received.tensors[path][name].copy_(vector)
        answers[seed] = lorac.compile(model, {"a": received})(x)
    sent = lorac.compile(model, {"a": sender.adapters["a"]})(x)
    assert torch.equal(answers[3], sent)
    assert_apart(answers[4], sent)


@torch.no_grad()
def test_entries_have_the_deviation_of_a_linear_layers():
    """std(ΔW) = 1/√in, so that one learning rate serves all shapes."""
    _, compiled = fresh()
    tensors = {name: torch.ones_like(t) if "_d_" in name else t for name, t in _at(compiled, "one").items()}
    found = delta(lorac.TeRA(), 24, 16, tensors).std()
    assert 0.5 < found * 16**0.5 < 2


@torch.no_grad()
def test_the_size_of_entries_does_not_depend_on_other_layers():
    """Its mean square over seeds, at ones, is 1/in next to layers that need a larger network."""
    sizes = {"small": (16, 16), "tall": (256, 16), "large": (256, 256)}
    model = nn.ModuleDict({name: nn.Linear(columns, out) for name, (out, columns) in sizes.items()})
    squares = dict.fromkeys(sizes, 0.0)
    for seed in range(40):
        variant = lorac.TeRA(seed=seed, targets=tuple(sizes))
        tensors = make_fresh_adapter(variant, "a", ModelView.of(model)).tensors
        for name, (out, columns) in sizes.items():
            at = {key: torch.ones_like(t) if "_d_" in key else t for key, t in tensors[name].items()}
            zero = torch.zeros(out, columns)
            squares[name] += float(variant.weight(zero, SimpleNamespace(**at)).square().mean()) * columns / 40
    assert all(0.7 < square < 1.4 for square in squares.values()), squares


def _at(compiled, path):
    return compiled.adapters["a"].tensors[path]


@pytest.mark.medium("the last vector", keep=["2-2"])
@pytest.mark.parametrize(("zero_mode", "k"), [(-1, 3), (0, 0), (2, 2)])
def test_a_single_vector_starts_at_zero(zero_mode, k):
    _, compiled = fresh(zero_mode=zero_mode)
    starts = [_at(compiled, "three")[f"tera_d_{i}"] for i in range(4)]
    assert [bool(t.any()) for t in starts] == [i != k for i in range(4)]


@pytest.mark.medium("one order", keep=["fields0-*"])
@pytest.mark.parametrize(("fields", "form"), [({"r": 2}, LowRank), ({}, Delta), ({"factors": "identity"}, Delta)])
def test_form(fields, form):
    _, compiled = fresh(**fields)
    values = compiled.pool["a"].changes
    assert isinstance(values["one"], form)
    if form is LowRank:
        assert values["one"].rank == 4


@pytest.mark.medium("a third order", keep=["tera,order=3-linear-formula"])
@pytest.mark.parametrize(
    "check",
    [
        check
        for fields in ({"factors": "identity"}, {"order": 1}, {"order": 3, "r": 2}, {"r": None})
        for check in conformance(lorac.TeRA(**fields), oracle, targets=())
        if check.name.endswith(("linear-formula", "conv-formula", "embedding-formula"))
    ],
    ids=str,
)
def test_every_completion_is_the_oracle(check):
    check()


def test_an_unknown_kind_of_factors():
    with pytest.raises(lorac.OptionError, match="no factors='identiy'") as error:
        fresh(factors="identiy")
    assert error.value.nearest == "identity"


@pytest.mark.parametrize("zero_mode", [-5, 4])
def test_a_vector_that_is_not_there_cannot_start_at_zero(zero_mode):
    with pytest.raises(lorac.OptionError, match="of order 2 has 4 vectors") as error:
        lorac.TeRA(zero_mode=zero_mode)
    assert error.value.next_step == "give a zero_mode from -4 to 3"
