"""Equations of the papers on hand examples, and the properties that they promise."""

import pytest
import torch

import lorac
from lorac.testing import assert_close
from tests.limits import rank_of
from tests.merging.hosts import deltas, host, lora
from tests.refusing import refuses


def tensor(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def of_delta(name, matrix):
    return lorac.Adapter(name, lorac.Edit(targets=("fc",)), {"fc": {"delta": matrix}})


def of_pair(name, b, a, alpha):
    return lorac.Adapter(name, lorac.LoRA(r=len(a), alpha=alpha, targets=("fc",)), {"fc": {"lora_A": a, "lora_B": b}})


def matrix(merged):
    at = merged.tensors["fc"]
    return at["delta"] if "delta" in at else merged.variant.at_path("fc").scale * at["lora_B"] @ at["lora_A"]


UNITS = [of_pair("a", tensor([1], [0]), tensor([1, 0]), 2), of_pair("b", tensor([0], [1]), tensor([0, 1]), 0.5)]
ROWS = [
    of_delta(*row)
    for row in (("a", tensor([3, -1, 2, 0.5])), ("b", tensor([-2, -4, 1, 0.1])), ("c", tensor([-2, 3, -0.5, 4])))
]


def test_cat_has_no_cross_terms_and_linear_factors_have():
    assert_close(matrix(lorac.merge(UNITS, "cat", [1, -1])), tensor([2, 0], [0, -0.5]))
    linear = lorac.merge(UNITS, "task_arithmetic", [1, -1], space="factors")
    assert_close(matrix(linear), tensor([2, -1], [1, -0.5]))


@pytest.mark.parametrize("way", ["cat", "ties"])
def test_rejects_results_that_are_not_finite(way):
    large = [of_pair(name, tensor([1e200], [1]), tensor([1e200, 1]), 1e20) for name in ("a", "b")]
    with refuses("non_finite"):
        lorac.merge(large, way, [1e300, 1e300])


def test_two_copies_at_half():
    one, other = lora("a", 1, r=3, alpha=3), lora("b", 1, r=3, alpha=3)
    expected = deltas(one, host())
    for method, options, share in (
        ("cat", {}, 1),
        ("linear", {}, 1),
        ("task_arithmetic", {"space": "factors"}, 2),
        ("ties", {"space": "factors"}, 0.5),
        ("ties", {}, 1),
        ("model_stock", {}, 0.5),
        ("karcher", {}, 1),
        ("slerp", {}, 1),
    ):
        merged = deltas(lorac.merge([one, other], method, [0.5, 0.5], **options), host())
        for path, delta in expected.items():
            assert_close(merged[path], share * delta)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weighted": False}, [3, -4, 2, 2]),
        ({}, [3, -4, 2, 4]),
        ({"weighted": False, "majority_sign_method": "frequency"}, [3, 1.5, 2, 2]),
    ],
)
def test_ties(options, expected):
    merged = lorac.merge(ROWS, "ties", [1, 1, 0.5], density=0.5, **options)
    assert_close(matrix(merged), tensor(expected))


def test_dare_rescales_by_density_or_norm(monkeypatch):
    monkeypatch.setattr(torch, "bernoulli", lambda p, generator: tensor([0, 1, 1, 0]))
    one = of_delta("a", tensor([4, -2, 1, 1]))
    assert_close(matrix(lorac.merge([one], "dare_linear", density=0.5, rescale_norm="density")), tensor([0, -4, 2, 0]))
    assert_close(matrix(lorac.merge([one], "dare_linear", density=0.5)), tensor([0, -16 / 3, 8 / 3, 0]))


def test_a_seed_determines_the_dropped_entries():
    adapters = [lora("a", 1, r=3), lora("b", 2, r=3)]
    for method in ("dare_ties", "della"):
        first, again, other = (
            lorac.merge(adapters, method, density=0.5, seed=seed).tensors["fc1"]["delta"] for seed in (1, 1, 2)
        )
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_breadcrumbs_of_a_small_matrix_is_not_empty():
    merged = matrix(lorac.merge([ROWS[0]], "breadcrumbs", density=0.5))
    assert_close(merged, tensor([3, 0, 2, 0]))


def test_of_equal_entries_the_first_are_kept():
    merged = matrix(lorac.merge([of_delta("a", tensor([1, -1, 2, 1]))], "magnitude_prune", density=0.5))
    assert_close(merged, tensor([1, 0, 2, 0]))


@pytest.mark.parametrize("space", ["knots", "core"])
def test_a_sum_in_a_joint_basis_is_the_sum(space):
    adapters = [lora("a", 1, r=3), lora("b", 2, r=2, alpha=3), lora("c", 3, sites=("fc1",), r=4)]
    weights = {"a": 0.7, "b": -0.4, "c": 1.5}
    merged = lorac.merge(adapters, "task_arithmetic", weights, space=space)
    assert merged.variant.name == "lora"
    expected = deltas(lorac.merge(adapters, "cat", weights), host())
    for path, delta in deltas(merged, host()).items():
        assert_close(delta, expected[path])
        assert rank_of(delta) <= 9


def test_knots_combines_the_parts_of_a_dense_decomposition():
    adapters = [lora("a", 1, r=3), lora("b", 2, r=2)]
    first, second = (deltas(one, host())["fc1"] for one in adapters)
    u, s, vh = torch.linalg.svd(torch.cat([first, second], 1), full_matrices=False)
    parts = torch.stack([s[:5, None] * part for part in vh[:5].chunk(2, dim=1)])
    kept = torch.stack(
        [part * (part.abs() >= part.abs().flatten().topk(part.numel() // 2).values[-1]) for part in parts]
    )
    merged = deltas(lorac.merge(adapters, "magnitude_prune", space="knots", density=0.5), host())["fc1"]
    assert_close(merged, u[:, :5] @ kept.sum(0))


@pytest.mark.parametrize("space", ["deltas", "knots"])
def test_scope_adapter_trims_all_sites_together(space):
    one = lora("a", 1, r=3)
    one.tensors["fc2"]["lora_B"] *= 5
    options = {"space": space, "density": 0.5}
    whole = deltas(lorac.merge([one], "ties", scope="adapter", **options), host())
    apart = deltas(lorac.merge([one], "ties", **options), host())
    sizes = torch.cat([delta.abs().flatten() for delta in deltas(one, host()).values()])
    if space == "deltas":
        kept = {path: int((delta != 0).sum()) for path, delta in whole.items()}
        assert sum(kept.values()) == sizes.numel() // 2 and kept["fc2"] > kept["fc1"]
    assert all(not torch.equal(whole[path], apart[path]) for path in whole)


def test_knots_and_core_are_short_for_ties_there():
    adapters = [lora("a", 1, r=3), lora("b", 2, r=2)]
    for space in ("knots", "core"):
        short = lorac.merge(adapters, space, density=0.5)
        long = lorac.merge(adapters, "ties", space=space, density=0.5)
        assert torch.equal(short.tensors["fc1"]["lora_A"], long.tensors["fc1"]["lora_A"])


def test_sums_keep_the_form_of_their_parts():
    model = host()
    with torch.no_grad():
        dora = lorac.compile(model, {"d": lorac.DoRA(r=2, targets=["fc1"])}).adapters["d"]
        dora.tensors["fc1"]["lora_B"].normal_(generator=torch.Generator().manual_seed(0))
    for method in ("cat", "task_arithmetic", "linear", "karcher"):
        both = lorac.merge([dora, lora("a", 1, r=3)], method, [0.5, 2], model)
        assert both.variant.name == "edit" and sorted(both.tensors["fc1"]) == ["a", "b", "c"]
    # Sparse changes stay sparse.
    shira = lorac.compile(model, {"s": lorac.SHiRA(r=1, targets=["fc1"])}).adapters["s"]
    with torch.no_grad():
        for tensors in shira.tensors.values():
            next(t for t in tensors.values() if t.is_floating_point()).fill_(1.0)
    twice = lorac.merge({"s": shira, "t": shira}, "cat", [0.25, 0.5], model)
    assert sorted(twice.tensors["fc1"]) == ["indices", "values"] and set(twice.tensors["fc1"]["values"].tolist()) == {
        0.75
    }


def test_provenance_holds_the_error_of_a_lower_rank():
    merged = lorac.merge([lora("a", 1, r=3), lora("b", 2, r=4)], "cat", rank=5)
    s = torch.linalg.svdvals(deltas(lorac.merge([lora("a", 1, r=3), lora("b", 2, r=4)], "cat"), host())["fc1"])
    error = torch.tensor(merged.provenance["errors"]["fc1"], dtype=torch.float64)
    assert_close(error, (s[5:].square().sum() / s.square().sum()).sqrt())
    assert "errors" not in lorac.merge([lora("a", 1, r=3), lora("b", 2, r=4)], "cat", rank=7).provenance


def test_half_precision_stays_half_and_is_computed_in_float32():
    adapters = [lora("a", 1, r=3), lora("b", 2, r=3)]
    for one in adapters:
        one.tensors = {p: {k: t.to(torch.bfloat16) for k, t in at.items()} for p, at in one.tensors.items()}
    merged = lorac.merge(adapters, "ties", density=0.5)
    assert {t.dtype for t in merged.parameters()} == {torch.bfloat16}


def test_merges_replaced_tensors_relative_to_the_base():
    model = host()
    adapters, expected = [], model.fc2.weight.clone()
    for number, weight in enumerate((0.5, 0.25)):
        own = model.fc2.weight + number + 1
        expected += weight * (own - model.fc2.weight)
        one = lora(f"a{number}", number, sites=("fc1",), r=2)
        adapters.append(lorac.Adapter(one.name, one.variant, one.tensors, {"fc2.weight": own}))
    merged = lorac.merge(adapters, "cat", [0.5, 0.25], model)
    assert_close(merged.replaced["fc2.weight"], expected)
    with refuses("base_needed"):
        lorac.merge(adapters, "cat")


def test_merges_adapters_of_several_models():
    one, other = lora("a", 1), lora("b", 2)
    apart = lorac.merge({"a": {"unet": one}, "b": {"unet": other}}, "cat")
    for path, tensors in lorac.merge([one, other], "cat").tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(apart.tensors[f"unet.{path}"][name], tensor)
