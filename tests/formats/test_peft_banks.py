"""Tensors that all sites share: the random A and B of VERA and RANDLORA, the trained vectors of VBLORA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorac
from lorac import BaseNeeded, RandLoRA, VeRA, load_adapter, save_adapter
from lorac.testing import assert_close
from lorac.variants.base import Variant
from tests import parity
from tests.peft_files import WEIGHTS, change_tensors, configure, load_peft, save_small
from tests.refusing import refuses
from tests.zoo import ZOO

MODEL = ZOO["plain_mlp"].model
TRAINED = {
    "VERA": {"vera_lambda_b", "vera_lambda_d"},
    "PVERA": {"pvera_lambda_b", "pvera_lambda_d"},
    "RANDLORA": {"randlora_lambda", "randlora_gamma"},
}


@pytest.mark.medium("a setting of each method", keep=["VERA-settings0"])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("VERA", {"projection_prng_key": 0}),
        ("VERA", {"projection_prng_key": 11}),
        ("VERA", {"projection_prng_key": 11, "target_modules": ["up"]}),
        ("PVERA", {"projection_prng_key": 11}),
        ("RANDLORA", {"projection_prng_key": 11}),
        ("RANDLORA", {"projection_prng_key": 11, "sparse": True}),
        ("RANDLORA", {"projection_prng_key": 11, "very_sparse": True}),
    ],
)
def test_the_seed_reproduces_pefts_projections(kind: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit: a file without A and B is read as the same file with them."""
    with_both = load_adapter(save_small(tmp_path / "f", kind, **settings))
    folder = save_small(tmp_path / "g", kind, save_projection=False, **settings)
    assert {name.rpartition(".")[2] for name in load_file(folder / WEIGHTS)} == TRAINED[kind]
    drawn = load_adapter(folder, MODEL())
    for path, tensors in with_both.tensors.items():
        for name in set(tensors) - TRAINED[kind]:
            assert torch.equal(drawn.tensors[path][name], tensors[name])
    with pytest.raises(BaseNeeded, match="save_projection=False"):
        load_adapter(folder)
    with refuses("site_not_found"):
        load_adapter(folder, ZOO["tiny_llama"].model())


@pytest.mark.parametrize(("kind", "name"), [("VERA", "vera_A"), ("RANDLORA", "randlora_B")])
def test_copies_at_a_site_are_checked_and_kept_once(kind: str, name: str, tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", kind)
    shared = load_file(folder / WEIGHTS)[f"base_model.{name}"]
    change_tensors(folder, {f"model.up.{name}": shared.clone()})
    adapter = load_adapter(folder, MODEL())
    assert len({id(tensors[name]) for tensors in adapter.tensors.values()}) == 1
    change_tensors(folder, {f"model.up.{name}": shared + 1})
    with refuses("corrupt_file", match="copies of one tensor, and differ"):
        load_adapter(folder, MODEL())


def test_randlora_is_saved_with_copies_which_alone_will_do(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "RANDLORA")
    before, stored = load_adapter(folder, MODEL()), load_file(folder / WEIGHTS)
    assert len([name for name in stored if name.endswith("randlora_B")]) == 3
    change_tensors(folder, {"randlora_A": None, "randlora_B": None})
    after = load_adapter(folder, MODEL())
    for name in ("randlora_A", "randlora_B"):
        assert torch.equal(after.tensors["up"][name], before.tensors["up"][name])


def test_vera_is_written_without_copies(tmp_path: Path) -> None:
    folder = save_small(tmp_path / "f", "VERA")
    adapter = load_adapter(folder, MODEL())
    assert len({id(tensors["vera_A"]) for tensors in adapter.tensors.values()}) == 1
    save_adapter(adapter, tmp_path / "back", model=MODEL())
    assert set(load_file(tmp_path / "back" / WEIGHTS)) == set(load_file(folder / WEIGHTS))


@pytest.mark.medium("one bank", keep=["variant0-*"])
@pytest.mark.parametrize(
    ("variant", "trained"),
    [
        (VeRA(r=2, targets=("up", "down")), "vera_lambda_b"),
        (RandLoRA(r=2, alpha=4, targets=("up",)), "randlora_lambda"),
        (RandLoRA(r=2, alpha=4, targets=("up", "down", "head")), "randlora_lambda"),
    ],
)
@torch.no_grad()
def test_peft_loads_a_fresh_adapter(variant: Variant, trained: str, tmp_path: Path) -> None:
    """Trained in lorac from its own initialisation; every layer of another size.

    RandLoRA also where largest out and largest in are of different sites, and A and B larger than any site asks.
    """
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    compiled = lorac.compile(model, {"a": variant})
    for tensors in compiled.adapters["a"].tensors.values():
        tensors[trained].normal_()
    save_adapter(compiled.adapters["a"], tmp_path / "f", model=model)
    assert_close(load_peft(model, tmp_path / "f")(**inputs), compiled(**inputs))


@torch.no_grad()
def test_the_chosen_alone_are_written_back_as_logits(tmp_path: Path) -> None:
    model, inputs = MODEL(), ZOO["plain_mlp"].inputs()
    folder = save_small(tmp_path / "f", "VBLORA", save_only_topk_weights=True, topk=3)
    oracle, adapter = load_peft(model, folder), load_adapter(folder)
    assert all(torch.isfinite(tensor).all() for tensor in adapter.parameters())
    save_adapter(adapter, tmp_path / "back", model=model)
    assert "base_model.model.up.vblora_logits_A" in load_file(tmp_path / "back" / WEIGHTS)
    again = load_peft(model, tmp_path / "back")
    parity.assert_parity(again(**inputs), oracle(**inputs), model(**inputs))


@torch.no_grad()
def test_files_of_all_and_of_top_k_logits_are_equal(tmp_path: Path) -> None:
    model, inputs, folder = MODEL(), ZOO["plain_mlp"].inputs(), save_small(tmp_path / "f", "VBLORA")
    whole = load_adapter(folder, model)
    tensors = load_file(folder / WEIGHTS)
    for name in [name for name in tensors if "logits" in name]:
        logits, places = tensors.pop(name).topk(2)
        tensors[f"{name}_topk_indices"] = places.to(torch.uint8)
        tensors[f"{name}_topk_weights"] = torch.softmax(logits, dim=-1)[..., :-1].contiguous()
    save_file(tensors, folder / WEIGHTS)
    configure(folder, save_only_topk_weights=True)
    chosen = load_adapter(folder, model)
    expected, found = (lorac.compile(model, {"a": one})(**inputs) for one in (whole, chosen))
    parity.assert_parity(found, expected, model(**inputs))


@pytest.mark.parametrize("changes", [{"topk": 3}, {"num_vectors": 3}])
def test_choices_of_another_configuration(tmp_path: Path, changes: dict[str, int]) -> None:
    folder = save_small(tmp_path / "f", "VBLORA", save_only_topk_weights=True)
    configure(folder, **changes)
    with refuses("shape_mismatch", match=r"do not choose|has num_vectors=3 rows"):
        load_adapter(folder, MODEL())
