"""Every variant there is, found by listing, through the whole conformance kit."""

import importlib.util
from pathlib import Path

import pytest

from lorac.testing import Oracle, conformance
from lorac.variants import variants

ORACLES = Path(__file__).parents[1] / "oracles"
BUILT_IN = {name: variant for name, variant in variants().items() if variant.__module__.startswith("lorac.")}


def oracle_at(file: Path) -> Oracle:
    spec = importlib.util.spec_from_file_location(f"oracle_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Oracle.of(module)


@pytest.mark.parametrize("name", BUILT_IN)
def test_has_an_oracle_of_its_own(name):
    file = ORACLES / f"{name}.py"
    assert file.exists(), f"write the equations of '{name}' in NumPy, from its paper: {file}"
    source = file.read_text()
    assert "import torch" not in source and "lorac" not in source.replace("lorac.testing", "")


def _checks():
    for name, variant in BUILT_IN.items():
        file = ORACLES / f"{name}.py"
        yield from conformance(variant, oracle_at(file) if file.exists() else None)


@pytest.mark.parametrize("check", list(_checks()), ids=str)
def test_conforms(check):
    check()
