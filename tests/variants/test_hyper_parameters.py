"""Hyper-parameters out of a method's range are rejected by the field's own limits, from code and from files."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import lorac
from lorac.argument_types import field_types
from lorac.testing import HOSTS, samples
from lorac.variants import variants
from lorac.variants.base import Variant, WeightVariant
from tests.refusing import refuses
from tests.variants.routers import X, host, loras

READS = {"hidden": "norm", "hidden_size": 8}
WRONG: list[tuple[Any, dict[str, Any], str]] = [
    (lorac.MeteoRA, {"temperature": 0}, "numbers above 0"),
    (lorac.MeteoRA, {"top_k": 0}, "numbers from 1"),
    (lorac.FlyLoRA, {"density": 0}, "numbers above 0 to 1"),
    (lorac.FlyLoRA, {"density": 2}, "numbers above 0 to 1"),
    (lorac.FlyLoRA, {"top_k": 0}, "numbers from 1"),
    (lorac.ReMix, {"top_k": 0}, "numbers from 1"),
    (lorac.XLoRA, {"depth": 0, **READS}, "numbers from 1"),
    (lorac.XLoRA, {"top_k_lora": 99, **READS}, "numbers from 1 to experts=4"),
    (lorac.XLoRA, {"softmax_temperature": 0.0, **READS}, "numbers above 0"),
    (lorac.XLoRA, {"dropout_p": 1.5, **READS}, "numbers from 0 to 1"),
    (lorac.VBLoRA, {"topk": 300}, "numbers from 1 to num_vectors=256"),
    (lorac.AdapterTune, {"every": 0}, "numbers from 1"),
    (lorac.MPS, {"dims": (0, 6)}, "numbers from 1"),
    (lorac.OFT, {"num_cayley_neumann_terms": 10**6}, "numbers from 1 to 100"),
    (lorac.TrainableTokens, {"token_indices": (2**63,)}, "numbers from 0 to"),
    (lorac.LoRA, {"r": -(10**40)}, "numbers from 1"),
    (lorac.TeRA, {"seed": 2**64}, "numbers from -9223372036854775808 to 18446744073709551615"),
    (lorac.VeRA, {"projection_prng_key": 2**64}, "numbers from -9223372036854775808 to"),
    (lorac.RandLoRA, {"projection_prng_key": -(2**63) - 1}, "numbers from -9223372036854775808 to"),
    (lorac.FourierFT, {"random_loc_seed": 2**64}, "numbers from -9223372036854775808 to"),
    (lorac.TLoRA, {"residual": "lorra"}, "lora, ttv"),
]


@pytest.mark.parametrize(("method", "fields", "takes"), WRONG, ids=[f"{m.name}-{next(iter(f))}" for m, f, _ in WRONG])
def test_rejects_invalid_values_and_names_valid_ones(method, fields, takes):
    field, value = next(iter(fields.items()))
    with refuses("option_error", match=f"{method.__name__} takes no {field}=") as refused:
        method(**fields)
    assert repr(value) in refused.value.what and f"it takes {takes}" in refused.value.next_step


def test_names_the_formula_that_a_method_lacks():
    class Unfinished(WeightVariant):
        def params(self, site):
            return {}

    with refuses("wrong_type", match="the method Unfinished does not define weight") as refused:
        Unfinished()
    assert "def weight(self, W: Tensor, p: Params) -> Tensor" in refused.value.next_step


def test_rejects_invalid_values_in_patterns():
    variant = lorac.LoRA(targets=["line"], rank_pattern={"line": -1})
    with refuses("option_error", match="LoRA takes no r=-1"):
        lorac.compile(host(), {"a": variant})


def test_names_the_file_with_an_invalid_value(tmp_path):
    path = tmp_path / "task.safetensors"
    lorac.save_adapter(lorac.MeteoRA.from_loras(loras(host(), (X,))), path, format="native", model=host())
    with safe_open(path, "pt") as opened:
        metadata, tensors = opened.metadata(), {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    (entry,) = (key for key, value in metadata.items() if '"temperature"' in value)
    record = json.loads(metadata[entry])
    record["config"]["temperature"] = 0
    save_file(tensors, path, {entry: json.dumps(record)})
    with refuses("unsupported_field", match=r"task\.safetensors.*takes no temperature=0"):
        lorac.load_adapter(path, host())


def _numbers(cls):
    """The numeric hyper-parameters of a method."""
    common = {field.name for field in dataclasses.fields(Variant)}
    types = {name: str(kind) for name, kind in field_types(cls).items() if name not in common}
    return [name for name, kind in types.items() if ("int" in kind or "float" in kind) and "[" not in kind]


def _sample(cls):
    """A configuration on the first host that admits it, or None for a method that cannot be made by defaults."""
    try:
        first = samples(cls, **({"r": 0} if cls is lorac.OFT else {}))[0]
    except lorac.LoracError:
        return None
    small = [first, dataclasses.replace(first, **{k: 2 for k in ("vector_length", "n_frequency") if hasattr(first, k)})]
    return next(((one, found) for one in small for found in HOSTS.values() if found.admits(one)), None)


METHODS = [cls for cls in variants().values() if cls.__module__.startswith("lorac.variants.")]


@pytest.mark.slow
@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.name)
@torch.no_grad()
def test_every_number_of_every_method_gives_finite_answers_or_a_refusal(cls):
    made = _sample(cls)
    if made is None:
        return
    sample, found = made
    for name in _numbers(cls):
        for value in (0, -1, 9):
            try:
                variant = found.fit(dataclasses.replace(sample, **{name: value}))
                answer = lorac.compile(found.model(), {"a": variant})(found.inputs(found.batches[0]))
            except lorac.LoracError:
                continue
            assert torch.isfinite(answer).all(), f"{name}={value}"
