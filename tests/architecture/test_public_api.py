"""The public interface: a change here is a change for everyone, so it is written down."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lorac
from docs import hooks
from lorac import errors

ROOT = Path(__file__).parents[2]
NAMES = list(lorac.__all__)
REFERENCE = "\n".join(hooks.listed(page.read_text()) for page in sorted((ROOT / "docs/reference").glob("*.md")))


def test_every_method_and_error_is_listed():
    methods = {
        method.__name__ for method in lorac.variants().values() if method.__module__.startswith("lorac.variants.")
    }
    assert methods <= set(NAMES)
    assert set(errors.__all__) <= set(NAMES)
    assert sorted(errors.__all__) == list(errors.__all__)
    assert dir(lorac) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_documents_every_public_name(name):
    assert re.search(rf"^::: lorac\.(errors\.)?{name}$", REFERENCE, re.MULTILINE)


def test_the_reference_documents_nothing_else():
    documented = re.findall(r"^::: lorac\.(?:errors\.)?([A-Z]\w+)$", REFERENCE, re.MULTILINE)
    assert set(documented) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_resolves_and_is_documented(name):
    found = getattr(lorac, name)
    assert callable(found)
    assert inspect.getdoc(found)


def test_every_error_is_in_the_tree():
    for name in errors.__all__:
        assert issubclass(getattr(lorac, name), lorac.LoracError | lorac.LoracWarning)
        assert name in errors.__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'LoRa'"):
        _ = lorac.LoRa


@pytest.mark.parametrize("named", ["a-first-of-all", "x_lora"])
def test_a_users_class_does_not_replace_a_method_of_the_same_name(named):
    own = dataclasses.dataclass(frozen=True, kw_only=True)(
        type(
            "XLoRA",
            (lorac.BranchVariant,),
            {
                "name": named,
                "params": lambda self, site: {},
                "branch": lambda self, x, y, p, ctx: y,
            },
        )
    )
    assert lorac.XLoRA is not own
    assert lorac.XLoRA.__module__ == "lorac.variants.x_lora"


@pytest.mark.medium("the names of the package, listed in this process")
def test_listing_stays_callable_once_the_package_is_imported():
    """`lorac.variants` is a function to call and a package on disk; importing the second must not hide the first."""
    script = "import lorac, lorac.variants; lorac.LoRA; print(len(lorac.variants()), len(lorac.variants()))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    one, two = done.stdout.split()
    assert int(one) == int(two) >= 40
