"""What every test gets: no network, a fixed seed, and a guard over the shared models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator

import pytest
import torch

from tests import zoo

pytest.register_assert_rewrite("tests.parity", "tests.peft_files")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _shared_models_untouched() -> Iterator[None]:
    """The zoo's models live as long as the session, so no test may change one."""
    before = {name: zoo.fingerprint(model) for name, model in zoo.built.items()}
    yield
    changed = [name for name, mark in before.items() if zoo.fingerprint(zoo.built[name]) != mark]
    for name in changed:
        del zoo.built[name]  # the tests that follow get a fresh one
    assert not changed, f"the test changed shared models: {changed}; use ZOO[name].fresh()"
