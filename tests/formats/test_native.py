"""lorac's own format stores every method, without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorac
from lorac import (
    Adapter,
    AdapterError,
    DoRA,
    FormatError,
    Hydra,
    LoRA,
    ParamSpec,
    SHiRA,
    Site,
    UnknownMethod,
    WeightVariant,
    load_adapter,
    save_adapter,
)
from lorac.variants import variants
from lorac.variants._masks import struct_mask
from lorac.variants.base import Variant
from lorac.variants.initialisers import zeros
from tests.formats.oracle import assert_equal
from tests.refusing import refuses
from tests.zoo import ZOO


def filled(variant: Variant, *paths: str, name: str = "mine", model: str = "plain_mlp") -> Adapter:
    sites = lorac.sites(ZOO[model].model())
    tensors = {
        path: {key: torch.randn(spec.shape) for key, spec in variant.at(sites[path]).params(sites[path]).items()}
        for path in paths
    }
    return Adapter(name, variant, tensors)


@pytest.mark.parametrize(
    ("variant", "model", "paths"),
    [
        (LoRA(r=3, alpha=2.5, rslora=True, rank_pattern={"u.": 1, "up": 2}), "plain_mlp", ("embed", "up")),
        (DoRA(r=2, targets=("stem", "grouped"), bias="all"), "plain_conv", ("stem", "grouped")),
        (Hydra(r=2, r_sequential=3, scale=0.5, branch_bias=True), "plain_mlp", ("up", "down")),
    ],
)
def test_round_trip(tmp_path: Path, variant: Variant, model: str, paths: tuple[str, ...]) -> None:
    base = ZOO[model].model()
    adapter = filled(variant, *paths, model=model)
    adapter.replaced["head.bias"] = torch.randn(9, dtype=torch.float16)
    adapter.provenance["note"] = {"steps": [1, 2], "who": None}
    save_adapter(adapter, tmp_path / "x.safetensors", format="native", model=base)
    for again in (load_adapter(tmp_path / "x.safetensors"), load_adapter(tmp_path / "x.safetensors", base)):
        assert_equal(again, adapter)
        assert again.variant == adapter.variant
        assert again.name == "mine"
        assert again.provenance["note"] == adapter.provenance["note"]
        assert again.provenance["base"].startswith("float32:")
    assert load_adapter(tmp_path / "x.safetensors", name="other").name == "other"


def test_order_of_patterns_survives(tmp_path: Path) -> None:
    adapter = filled(LoRA(r=1, rank_pattern={"up": 1, "a": 3, "u.": 2}), "up")
    save_adapter(adapter, tmp_path / "x", format="native")
    variant = load_adapter(tmp_path / "x").variant
    assert isinstance(variant, LoRA)
    assert list(variant.rank_pattern) == ["up", "a", "u."]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    adapter = filled(LoRA(), "up", "down", "head")
    turned = Adapter("mine", adapter.variant, dict(reversed(adapter.tensors.items())))
    for name, one in (("a", adapter), ("b", turned), ("c", adapter)):
        save_adapter(one, tmp_path / name, format="native", model=ZOO["plain_mlp"].model())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    save_adapter(load_adapter(tmp_path / "a"), tmp_path / "d", format="native")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "d").read_bytes()


def test_sites_come_in_the_models_order(tmp_path: Path) -> None:
    adapter = filled(LoRA(), "head", "down", "up")
    save_adapter(adapter, tmp_path / "x", format="native")
    assert load_adapter(tmp_path / "x", ZOO["plain_mlp"].model()).sites == ("up", "down", "head")
    numbered = Adapter("x", LoRA(), {f"l.{n}.q": adapter.tensors["up"] for n in (10, 9, 2)})
    save_adapter(numbered, tmp_path / "y", format="native")
    assert load_adapter(tmp_path / "y").sites == ("l.2.q", "l.9.q", "l.10.q")


@pytest.fixture
def throwaway() -> Iterator[type[Variant]]:
    @dataclass(frozen=True, kw_only=True)
    class Throwaway(WeightVariant):
        """One scale for the whole adapter, and a shift per site."""

        strength: float = 1.0
        callback: Any = None
        table: dict[str, list[int]] = field(default_factory=dict)
        name: ClassVar[str] = "throwaway"
        paper: ClassVar[str] = "none"

        def params(self, site: Site) -> dict[str, ParamSpec]:
            scale = ParamSpec((1,), zeros, shared=True)
            return {"scale": scale, "shift": ParamSpec((site.out_features,), zeros)}

        def weight(self, W: torch.Tensor, p: SimpleNamespace) -> torch.Tensor:
            return W * p.scale + p.shift[:, None]

    assert variants()["throwaway"] is Throwaway
    yield Throwaway


def test_any_variant_and_shared_tensors_once(tmp_path: Path, throwaway: type[Variant]) -> None:
    adapter = filled(throwaway(strength=2.0, table={"a": [1]}), "up", "down", "head")  # type: ignore[call-arg]
    shared = torch.randn(1)
    for tensors in adapter.tensors.values():
        tensors["scale"] = shared
    save_adapter(adapter, tmp_path / "x", format="native", model=ZOO["plain_mlp"].model())
    assert len(load_file(tmp_path / "x")) == 4
    again = load_adapter(tmp_path / "x", ZOO["plain_mlp"].model())
    assert_equal(again, adapter)
    assert again.variant == adapter.variant
    scales = [tensors["scale"] for tensors in again.tensors.values()]
    assert scales[0] is scales[1] is scales[2]


def test_fields_without_a_form_in_json_are_left_out(tmp_path: Path) -> None:
    """A mask function chose the positions; it is not needed once they are stored."""
    model = ZOO["plain_mlp"].model()
    variant = SHiRA(targets=("up",), mask=struct_mask(3))
    site = lorac.sites(model)["up"]
    count = variant.params(site)["values"].shape[0]
    indices = torch.stack([torch.arange(count) % 14, torch.arange(count) % 10])
    adapter = Adapter("x", variant, {"up": {"indices": indices, "values": torch.ones(count)}})
    save_adapter(adapter, tmp_path / "x", format="native", model=model)
    again = load_adapter(tmp_path / "x", model)
    assert_equal(again, adapter)
    assert again.variant == SHiRA(targets=("up",))
    assert again.provenance["left_out"] == ["mask"]
    save_adapter(again, tmp_path / "y", format="native", model=model)
    assert_equal(load_adapter(tmp_path / "y", model), adapter)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_adapter(filled(LoRA(r=2), "up"), tmp_path / "x.safetensors", "native", ZOO["plain_mlp"].model())
    return tmp_path / "x.safetensors"


def rewrite(file: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> None:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["lorac"])
    for name, value in changes.items():
        record[name] = value
        if value is ...:
            del record[name]
    save_file({**load_file(file), **(tensors or {})}, file, metadata={"lorac": json.dumps(record)})


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"variant": "lorra"}, UnknownMethod, "no method is called 'lorra'"),
        ({"config": {"ranks": 2}}, FormatError, "sets 'ranks', which lora does not have"),
        ({"config": {"r": "2"}}, FormatError, "sets r='2'"),
        ({"config": {"r": True}}, FormatError, "sets r=True"),
        ({"config": {"rank_pattern": []}}, FormatError, "sets rank_pattern="),
        ({"more": 1}, FormatError, "unknown field 'more'"),
        ({"version": 2}, FormatError, "version 2 of the format"),
        ({"version": "1"}, FormatError, "no version"),
        ({"name": ...}, FormatError, "lacks 'name'"),
        ({"provenance": 3}, FormatError, "lacks 'provenance'"),
        ({"shared": {"tensors/up/lora_B": "tensors/up/none"}}, FormatError, "contradict"),
        ({"shared": {"tensors/up/lora_B": "tensors/up/lora_A"}}, FormatError, "contradict"),
    ],
)
def test_bad_descriptions(file: Path, changes: dict[str, Any], error: type[Exception], match: str) -> None:
    rewrite(file, **changes)
    with pytest.raises(error, match=match):
        load_adapter(file)


def described(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        return str(opened.metadata()["lorac"])


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ('{"version"', '{"version"', None),
        ('{"version"', "{", "is not JSON"),
        ('"alpha":8', '"alpha":NaN', "nan is not a finite number"),
        ('"alpha":8', '"alpha":-Infinity', "-inf is not a finite number"),
        ('"alpha":8', '"alpha":1e999', "inf is not a finite number"),
        ('"alpha":8', '"alpha":1' + "0" * 400, "an integer of"),
        ('"alpha":8', '"alpha":8,"alpha":80', "'alpha' is given twice"),
        ('"version"', '"name":"other","version"', "'name' is given twice"),
        ('"provenance":{', '"provenance":{"x":' + "[" * 200 + "]" * 200, "nested deeper"),
    ],
)
def test_rejects_descriptions_that_are_not_valid_json(file: Path, old: str, new: str, match: str | None) -> None:
    text = described(file)
    assert old in text
    save_file(load_file(file), file, metadata={"lorac": text.replace(old, new, 1)})
    if match is None:
        assert load_adapter(file).variant == LoRA(r=2)
        return
    with refuses("corrupt_file", match=match):
        load_adapter(file)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 10**30])
def test_rejects_saving_values_that_cannot_be_read(tmp_path: Path, alpha: float) -> None:
    adapter = filled(LoRA(r=2), "up")
    adapter.variant = LoRA(r=2, alpha=alpha)
    for format in ("native", "peft"):
        with pytest.raises((FormatError, AdapterError), match=r"cannot be written|'alpha' of adapter 'mine' is"):
            save_adapter(adapter, tmp_path / "x", format, ZOO["plain_mlp"].model())
    assert not list(tmp_path.iterdir())


JUNK: list[tuple[str, Any]] = [
    ("shared", {"tensors/up/x": ["tensors/up/lora_A"]}),
    ("shared", {"tensors/up/x": 3}),
    ("shared", {"tensors/up/x": "tensors/nowhere/lora_A"}),
    ("left_out", [["r"]]),
    ("provenance", {"copies": ["up.weight"]}),
    ("provenance", {"copies": {"up.weight": 3}}),
    ("provenance", {"tied": {"up": ["down"]}}),
    ("provenance", {"config": [1]}),
    ("provenance", {"layout": {"up": {"kind": "linear"}}}),
    ("provenance", {"layout": {"up": {"kind": "lin", "out": 14, "in": 10, "transposed": False}}}),
    ("provenance", {"layout": {"up": {"kind": "linear", "out": -14, "in": 10, "transposed": False}}}),
    ("provenance", {"layout": {"up": {"kind": "conv1d", "out": 4, "in": 4, "transposed": False, "kernel": [[]]}}}),
    ("provenance", {"layout": ["up"]}),
]


@pytest.mark.parametrize(("field", "value"), JUNK)
def test_junk_in_a_description(file: Path, field: str, value: Any) -> None:
    describe_anew(file, {field: value})
    for model in (None, ZOO["plain_mlp"].model()):
        with refuses("corrupt_file"):
            load_adapter(file, model)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", [1]),
        ("alpha", True),
        ("r", 2.0),
        ("r", None),
        ("rank_pattern", {"up": "2"}),
        ("rank_pattern", [["up", 2]]),
        ("targets", [["up"]]),
        ("targets", {"up": 1}),
        ("layers", ["1"]),
        ("layers_pattern", [1]),
        ("bias", None),
        ("rslora", 1),
    ],
)
def test_values_of_another_type_than_their_fields(file: Path, field: str, value: Any) -> None:
    describe_anew(file, {"config": {"r": 2, field: value}})
    with refuses("unsupported_field", match=f"sets {field}="):
        load_adapter(file, ZOO["plain_mlp"].model())


def describe_anew(file: Path, changes: dict[str, Any]) -> None:
    """Change the description, and seal it again."""
    from safetensors import safe_open

    from lorac.storage.tensor_hash import hash_contents

    with safe_open(file, "pt") as opened:
        record = json.loads(opened.metadata()["lorac"])
    text, tensors = json.dumps({**record, **changes}), load_file(file)
    save_file(tensors, file, {"lorac": text, "lorac_seal": hash_contents(text, tensors)})


def test_a_description_and_the_tensors_of_another_file(file: Path, tmp_path: Path) -> None:
    """A file that is replaced by half: each half alone is intact."""
    from safetensors import safe_open

    other = tmp_path / "other.safetensors"
    save_adapter(filled(LoRA(r=2), "up"), other, "native", ZOO["plain_mlp"].model())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, metadata=metadata)
    load_adapter(file)
    save_file(load_file(other), file, metadata=metadata)
    with refuses("corrupt_file", match="do not belong together") as error:
        load_adapter(file)
    assert str(file) in str(error.value)
    changed = metadata["lorac"].replace('"alpha":8', '"alpha":80')
    save_file(load_file(other), other, metadata={**metadata, "lorac": changed})
    with refuses("corrupt_file", match="do not belong together"):
        load_adapter(other)


@pytest.mark.parametrize("key", ["up.lora_A", "tensors/lora_A", "replaced/", "other/up/lora_A"])
def test_strange_names(file: Path, key: str) -> None:
    rewrite(file, {key: torch.ones(1)})
    with refuses("unused_tensors", match=f"'{key}', which is not a name"):
        load_adapter(file)


def test_rejects_tensors_that_do_not_fit_the_model(file: Path) -> None:
    model = ZOO["plain_mlp"].model()
    rewrite(file, {"tensors/up/lora_C": torch.ones(1)})
    with refuses("unused_tensors", match="'lora_C' at 'up' that its method does not use"):
        load_adapter(file, model)
    save_adapter(filled(LoRA(r=2), "up"), file, "native")
    rewrite(file, {"tensors/up/lora_A": torch.ones(3, 10)})
    with refuses("shape_mismatch", match=r"\(3, 10\), expected \(2, 10\)"):
        load_adapter(file, model)
    save_adapter(filled(LoRA(r=2), "up"), file, "native")
    rewrite(file, {"tensors/upper/lora_A": torch.ones(2, 10)})
    with refuses("site_not_found", match="'upper'") as error:
        load_adapter(file, model)
    assert error.value.nearest == "up"
    save_adapter(Adapter("x", LoRA(targets=("upp",))), file, "native")
    with refuses("site_not_found", match="targets 'upp', which matches no site"):
        load_adapter(file, model)


def test_another_base(file: Path) -> None:
    model = ZOO["plain_mlp"].fresh()
    with torch.no_grad():
        model.get_parameter("up.weight")[0, 0] += 1
    with refuses("base_mismatch", match="made for other base weights"):
        load_adapter(file, model)


def test_truncated_file(file: Path) -> None:
    content = file.read_bytes()
    for length in (0, 7, 50, len(content) - 1):
        file.write_bytes(content[:length])
        with refuses("corrupt_file"):
            load_adapter(file)
