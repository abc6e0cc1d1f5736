"""The setting of every test: no network, a fixed seed, and a guard over the shared models."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import fcntl
import gc
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
import torch

pytest_plugins = ["tests.extras", "tests.journal", "tests.tiers"]
pytest.register_assert_rewrite("tests.parity", "tests.peft_files")


BETWEEN_COLLECTIONS = 50_000
"""New objects before Python looks for cycles: its own 700 come and go with a few nodes of a graph."""
_known: dict[str, object] = {}
"""The shared models as the last file of tests left them."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Python's collector rests while tests are collected, and leaves alone for good what is there then.

    Libraries, test modules and ten thousand items live as long as the session: looking through them for cycles time
    and again finds nothing.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(BETWEEN_COLLECTIONS)
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def _freeze_what_is_alive() -> None:
    """Keep the collector from what is alive when a file of tests begins, such as libraries that were imported before.

    Accelerate collects garbage whenever a training starts: an eighth of the suite's time was spent looking through it.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """As torch.manual_seed(0), which notes the stack of each call where no GPU has been used yet."""
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture(autouse=True, scope="module")
def _shared_models_untouched() -> Iterator[None]:
    """The zoo's models live as long as the session, so no test, and nothing made for one, may change one."""
    yield
    zoo = sys.modules.get("tests.zoo")  # it imports transformers, which some tests do without
    now = {} if zoo is None else {name: zoo.fingerprint(model) for name, model in zoo.built.items()}
    changed = [name for name, mark in now.items() if _known.get(name, mark) != mark]
    _known.clear()
    _known.update(now)
    for name in changed:
        del sys.modules["tests.zoo"].built[name], _known[name]  # the tests that follow get a fresh one
    assert not changed, f"a test of this file changed shared models: {changed}; use ZOO[name].fresh()"


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with two adapters over the caches of ONNX Runtime, compiled once: what needs it loads its own."""
    import lorac
    from tests.decoders import DECODERS, adapt_llama

    own = tmp_path_factory.getbasetemp()
    # Each worker has a folder within the session's.
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "llama"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            host = DECODERS["llama"]()
            made = lorac.compile(host, adapt_llama(host), target="onnxruntime", mode="live", active=None, cache=True)
            made.save(folder)
    return folder
