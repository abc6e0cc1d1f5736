"""Every field of PEFT's configurations is known, and those that change the result are refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import lorac
from lorac import DoRA, FormatError, LoRA, load_adapter
from lorac.formats._config_fields import Refused
from lorac.formats.peft.config import REFUSED_TYPES, peft_types
from tests.peft_files import CONFIG, configure, make_peft, of_peft_0_21, quiet, save_small
from tests.refusing import refuses
from tests.zoo import ZOO

CLASSES = {
    kind: PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in sorted(peft_types()) if kind in PEFT_TYPE_TO_CONFIG_MAPPING
}


@of_peft_0_21
def test_every_type_of_peft_is_known() -> None:
    assert {kind.value for kind in PeftType} == {*peft_types(), *REFUSED_TYPES}


@of_peft_0_21
@pytest.mark.parametrize("kind", CLASSES)
def test_the_table_is_the_dataclass(kind: str) -> None:
    """A field that a new PEFT adds fails this test until someone says what it is."""
    table = peft_types()[kind].fields
    fields = {field.name: field for field in dataclasses.fields(CLASSES[kind])}
    assert {name for name, field in table.items() if field.written} <= set(fields), f"PEFT {peft.__version__}"
    assert set(fields) <= set(table), f"PEFT {peft.__version__}"
    for name, field in fields.items():
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if table[name].written and name != "peft_type":
            assert table[name].default == default, name


@pytest.mark.parametrize("kind", CLASSES)
def test_rejected_fields_have_a_next_step(kind: str) -> None:
    for name, field in peft_types()[kind].fields.items():
        assert (field.next_step is not None) == (isinstance(field, Refused) or name == "init_lora_weights")


@pytest.mark.parametrize("kind", REFUSED_TYPES)
def test_rejects_some_types_with_a_reason(kind: str, folder: Path) -> None:
    configure(folder, peft_type=kind)
    with refuses("unsupported_field", match=f"is of peft_type {kind}, a second model of the base's architecture"):
        load_adapter(folder)


@of_peft_0_21
@torch.no_grad()
def test_the_shadow_alone_is_a_model_to_compile() -> None:
    """The next step that the refusal names."""
    base: Any = ZOO["tiny_llama"].fresh()
    with quiet():
        wrapped: Any = peft.get_peft_model(base, peft.ShadowConfig(r=2, task_type="CAUSAL_LM")).eval()
    with refuses("unsupported_field", match="unload_shadow"):
        lorac.compile(wrapped)
    alone, ids = wrapped.base_model.unload_shadow(copy=True).eval(), torch.arange(3, 9)[None]
    compiled = lorac.compile(alone, {"a": LoRA(r=2, targets=["q_proj"])})
    assert torch.equal(compiled(input_ids=ids, adapters=None).logits, alone(input_ids=ids).logits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_small(tmp_path / "f", "LORA")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("enable_lora", [True, False, True]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("megatron_config", {"hidden_size": 4}),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_fields_that_change_the_result(folder: Path, name: str, value: object) -> None:
    configure(folder, **{name: value})
    with refuses("unsupported_field") as error:
        load_adapter(folder)
    assert f"{name}={value!r}" in str(error.value)
    assert error.value.next_step


@pytest.mark.parametrize("name", sorted(peft_types()["LORA"].fields))
def test_every_rejected_field_is_tested(name: str) -> None:
    if isinstance(peft_types()["LORA"].fields[name], Refused):
        marks = test_fields_that_change_the_result.pytestmark  # type: ignore[attr-defined]
        assert name in {case[0] for mark in marks for case in mark.args[1]}


@pytest.mark.parametrize("value", [None, False, [], {}])
@pytest.mark.parametrize("name", ["arrow_config", "target_parameters", "use_qalora", "layer_replication"])
def test_accepts_neutral_values_of_rejected_fields(folder: Path, name: str, value: object) -> None:
    configure(folder, **{name: value})
    assert type(load_adapter(folder).variant) is LoRA


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("r", "8", "a whole number above 0"),
        ("r", 0, "a whole number above 0"),
        ("r", True, "a whole number above 0"),
        ("lora_alpha", None, "a number"),
        ("lora_alpha", "16", "a number"),
        ("use_rslora", "yes", "true or false"),
        ("rank_pattern", [["up", 3]], "a mapping"),
        ("arrow_config", "top_k", "a mapping"),
        ("rank_pattern", {"up": "3"}, "a whole number above 0"),
        ("target_modules", ["up", 3], "a list of names"),
        ("target_modules", {"up": 1}, "a list of names"),
        ("layers_to_transform", ["0"], "a list of layer numbers"),
        ("bias", "some", "none, all or lora_only"),
        ("init_lora_weights", "gausian", "nearest is gaussian"),
    ],
)
def test_values_of_another_type(folder: Path, name: str, value: object, expected: str) -> None:
    configure(folder, **{name: value})
    with refuses("unsupported_field", match=expected) as error:
        load_adapter(folder)
    assert f"{name}={value!r}" in str(error.value)


def test_unknown_field(folder: Path) -> None:
    configure(folder, use_rslorra=True)
    with refuses("unknown_field", match="'use_rslorra' = True") as error:
        load_adapter(folder)
    assert error.value.nearest == "use_rslora"


@pytest.mark.parametrize(
    ("value", "error", "nearest"),
    [
        ("LORRA", FormatError, "LORA"),
        ("lora", FormatError, "LORA"),
        (None, FormatError, None),
        (["LORA"], FormatError, None),
        ("C3A", FormatError, None),
    ],
)
def test_peft_type(folder: Path, value: object, error: type[Exception], nearest: str | None) -> None:
    configure(folder, peft_type=value)
    with pytest.raises(error, match="peft_type") as raised:
        load_adapter(folder)
    if nearest:
        assert raised.value.nearest == nearest  # type: ignore[attr-defined]


def test_fields_that_are_not_combined(folder: Path) -> None:
    configure(folder, use_dora=True, lora_bias=True)
    with refuses("unsupported_field", match="lora_bias=True together with use_dora=True"):
        load_adapter(folder)
    configure(folder, use_dora=False, lora_bias=False, target_modules="up", layers_to_transform=[0])
    with refuses("unsupported_field", match="layers_to_transform together with a pattern"):
        load_adapter(folder)


def test_reads_the_fields(folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        lora_dropout=0.25,
        use_rslora=True,
        use_dora=True,
        target_modules=["head", "up", "embed"],
        exclude_modules=["embed"],
        rank_pattern={"up": 2},
        alpha_pattern={"head": 5},
        bias="lora_only",
        modules_to_save=["down"],
    )
    model, inputs = ZOO["plain_mlp"].fresh(torch.float64), ZOO["plain_mlp"].inputs()
    make_peft(model, tmp_path / "g", config, inputs=inputs)
    variant = load_adapter(tmp_path / "g", model).variant
    assert isinstance(variant, DoRA)
    assert sorted(variant.targets) == ["embed", "head", "up"]
    assert variant == DoRA(
        r=4,
        alpha=3,
        dropout=0.25,
        rslora=True,
        targets=variant.targets,
        exclude=("embed",),
        rank_pattern={"up": 2},
        alpha_pattern={"head": 5},
        bias="dora_only",
        modules_to_save=("down",),
    )


def test_old_files_lack_fields(folder: Path) -> None:
    path = folder / CONFIG
    raw = json.loads(path.read_text())
    keep = ("peft_type", "r", "lora_alpha", "target_modules")
    old = {name: raw[name] for name in keep} | {"merge_weights": False, "enable_lora": None}
    path.write_text(json.dumps(old))
    assert load_adapter(folder).variant == LoRA(r=2, alpha=8, targets=tuple(raw["target_modules"]))


def test_targets_left_to_peft_are_those_of_the_file(folder: Path) -> None:
    configure(folder, target_modules=None)
    adapter = load_adapter(folder, ZOO["plain_mlp"].model())
    assert set(adapter.variant.targets) == set(adapter.tensors) == {"up", "down"}


@pytest.mark.parametrize("value", [["x"], [1.5], [-1], "abc", {"a": 1}])
def test_rejects_invocation_tokens_that_are_no_ids(folder: Path, value: object) -> None:
    configure(folder, alora_invocation_tokens=value)
    with refuses("unsupported_field", match="token ids"):
        load_adapter(folder)


def test_reads_no_invocation_tokens_as_peft_does(folder: Path) -> None:
    """An empty list, of which PEFT makes a LoRA that acts on every token."""
    configure(folder, alora_invocation_tokens=[])
    assert load_adapter(folder).variant == LoRA(**{**load_adapter(folder).variant.settings, "invocation_tokens": ()})
