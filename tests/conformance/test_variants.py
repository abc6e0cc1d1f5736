"""Every variant there is, found by listing, through the whole conformance kit."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lorac import BranchVariant, WeightVariant
from lorac.testing import conformance
from lorac.variants import variants

ORACLES = Path(__file__).parents[1] / "oracles"
ALIKE = {"no_bias", "transposed", "padded", "attention", "divisible"}
"""Hosts that are a linear layer or a convolution once more: a formula sees no difference."""
FORMS = {"adaptertune", "hydra", "meteora", "shira"}
"""Methods of a form each, for what a target does with a model of two layers."""
OPENVINO = ("openvino",) if importlib.util.find_spec("openvino") else ()
TARGETS = ("onnxruntime", "eager", *OPENVINO)
SWITCHED = {"adaptertune", "dora", "hydra", "ia3", "lora", "meteora", "shira", "vera"}
"""Methods of a form each, for what depends on nothing else, as swaps and strengths do: OF_FORMS."""
OF_FORMS = {"host_unchanged", "strength", "swapping", "undo"}
OF_FORMULAS = {"formula", "identity_at_init", "influence", "invalid_values", "rules", "training"}
"""Checks that another configuration of a method may fail alone; where its formula is right, they seldom do."""
LATE = ("two_conv", "two_embedding", "gated", "stack")
"""Hosts of two layers whose kinds differ in nothing that shows there, and hosts that only some methods ask for."""


def oracle_at(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"oracle_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def fields_of(name: str) -> dict[str, Any]:
    """Sizes that must divide the layers', and what has no default, come with the equations: FIELDS."""
    file = ORACLES / f"{name}.py"
    return getattr(oracle_at(file), "FIELDS", {}) if file.exists() else {}


def has_all(name: str, variant: type) -> bool:
    given = fields_of(name)
    return all(f.default is not f.default_factory or f.name in given for f in dataclasses.fields(variant))


BUILT_IN = {
    name: variant
    for name, variant in variants().items()
    if variant.__module__.startswith("lorac.variants.") and issubclass(variant, WeightVariant | BranchVariant)
    if has_all(name, variant)
}
"""Those with a formula; the others replace whole tensors, or are made of methods, and tested as that."""


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_method_has_an_oracle(name):
    file = ORACLES / f"{name}.py"
    assert file.exists(), f"write the equations of '{name}' in NumPy, from its paper: {file}"
    source = file.read_text()
    assert "import torch" not in source and "lorac" not in source.replace("lorac.testing", "")


def _checks():
    for name, variant in BUILT_IN.items():
        file = ORACLES / f"{name}.py"
        oracle = oracle_at(file) if file.exists() else None
        yield from _thinned(conformance(variant, oracle, targets=TARGETS, **fields_of(name)))


def _thinned(checks):
    """Mark as slow or medium what another check of the same method catches too.

    A method's first host has every check of the first configuration, and of the others what depends on the formula;
    that of another rank waits for CI. How a formula reads a weight depends on the kind of site, so the formula itself
    runs on every kind. What a target gets depends on the normal form, not on the method, and so does what a swap does.
    """
    first = {}
    whole = None
    for check in checks:
        configuration, _, place = check.name.partition("-")
        host, _, what = place.partition("-")
        whole = whole or configuration
        if what and what != "refused":
            first.setdefault(configuration, host)
        method = configuration.partition(",")[0]
        quick = not what or (what == "refused" and configuration == whole)
        quick |= host == first.get(configuration) and (configuration == whole or what in OF_FORMULAS)
        quick |= what == "formula" and configuration == whole and host not in {*ALIKE, *LATE}
        if what.startswith(TARGETS):
            quick = configuration == whole and host.startswith("two_") and method in FORMS
            quick |= str(check).startswith("lora,") and place == "two_embedding-eager-other_sizes"
        medium = quick and configuration != whole and what in OF_FORMULAS - {"formula"}
        medium |= quick and what == "formula" and configuration != whole and ",r=1" in configuration
        medium |= quick and what in OF_FORMS and method not in SWITCHED
        medium |= quick and what.startswith("onnxruntime") and method != "shira"
        medium |= quick and what.startswith("openvino")
        marks = () if quick else pytest.mark.slow
        yield pytest.param(check, id=str(check), marks=pytest.mark.medium if medium else marks)


@pytest.mark.parametrize("check", list(_checks()))
def test_conforms(check):
    check()
