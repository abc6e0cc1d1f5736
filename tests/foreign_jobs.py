"""Jobs that are done on a foreign system (``tests/foreign_system.py``), each in a process of its own."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import sys
import warnings
from pathlib import Path

import torch

import lorac
from lorac.errors import ArtifactError, FormatError, LoracError, LoracWarning
from lorac.serving.store import AdapterStore, StoreQuotas, reading_process
from lorac.serving.store.store_folder import StoreFolder
from lorac.storage.open_file import OpenFile

READER = (
    "import sys, lorac.serving.store.reading_main as main\n"
    "from tests.foreign_system import become\n"
    "become({system!r})\n"
    "del sys.modules[main.__name__]\n"
    "import lorac.serving.store.reading_main as main\n"
    "main.main()\n"
)
"""A reader of uploads on a foreign system."""


def _refused(kind: type[LoracError], words: str, work) -> None:  # type: ignore[no-untyped-def]
    try:
        work()
    except kind as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"it is not refused: {words}")


def model() -> torch.nn.Module:
    """A model with two layers."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8)).eval()


X = torch.ones(1, 16)


def save_and_load(folder: str) -> None:
    """Files and folders are written, flushed, replaced and read; what is open is refused and stays."""
    place = Path(folder)
    compiled = lorac.compile(model(), {"a": lorac.LoRA(r=2, targets="all-linear")}, example_inputs=(X,))
    with torch.no_grad():
        for parameter in compiled.parameters():
            parameter.add_(0.1)
        expected = compiled(X)
    for _ in range(2):  # the second replaces the first
        compiled.save(place / "saved")
        assert [path.name for path in place.iterdir()] == ["saved"]
    loaded = lorac.load(place / "saved")
    with torch.no_grad():
        assert torch.equal(loaded(X), expected)
    for format in ("peft", "native"):
        path = place / f"a-{format}{'.safetensors' if format == 'native' else ''}"
        lorac.save_adapter(compiled.adapters["a"], path, format=format, model=model())
        read = lorac.load_adapter(path).parameters()
        assert all(map(torch.equal, read, compiled.adapters["a"].parameters()))
    if sys.platform == "win32":
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        _refused(ArtifactError, "Access is denied", lambda: compiled.save(place / "saved"))
        assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        with torch.no_grad():
            assert torch.equal(lorac.load(place / "saved")(X), expected)
    (place / "link").symlink_to(place / "a-native.safetensors")
    try:
        OpenFile(place / "link")
    except OSError as error:
        assert error.errno == errno.ELOOP
    else:
        raise AssertionError("the link is followed")


def take_uploads(folder: str) -> None:
    """A store says what is weaker, reads uploads in processes that take one each, and ends those that hang."""
    _take(folder)
    left = Path(folder) / "store" / "adapters" / "alice"
    assert len(os.listdir(left)) == (sys.platform == "win32")  # a file that was open there
    gc.collect()
    assert [entry.name for entry in StoreFolder(Path(folder) / "store").scan()] == ["his"]
    assert os.listdir(left) == []


def _take(folder: str) -> None:
    reading_process._PROGRAM = READER.format(system=sys.platform)
    room = lorac.Reserve(targets="all-linear", rank=4, adapters=1)
    compiled = lorac.compile(model(), {}, reserve=room, example_inputs=(X,))
    made = lorac.compile(model(), {"a": lorac.LoRA(r=2, targets="all-linear")}, example_inputs=(X,))
    path = Path(folder) / "a.safetensors"
    lorac.save_adapter(made.adapters["a"], path, format="native", model=model())
    good, bad = path.read_bytes(), path.read_bytes()[:-8]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = AdapterStore(compiled, Path(folder) / "store", quotas=StoreQuotas(seconds=20))
    (warning,) = (str(one.message) for one in caught if issubclass(one.category, LoracWarning))
    weaker = "on memory, files and the network" if sys.platform == "win32" else "on memory and the network"
    assert f"readers of uploads have no limit {weaker} on this system" in warning
    with store:
        _refused(ArtifactError, "another store uses", lambda: AdapterStore(compiled, Path(folder) / "store"))
        store.upload("alice", "mine", {"a.safetensors": io.BytesIO(good)})
        assert all(reader._process is None for reader in store._readers.readers)
        with torch.no_grad():
            compiled(X, adapters=store.find("alice", "mine"))
        _refused(LoracError, "", lambda: store.upload("alice", "cut", {"a.safetensors": io.BytesIO(bad)}))
        incoming = Path(folder) / "store" / "incoming" / "bob"
        incoming.mkdir()
        (incoming / "b.safetensors").write_bytes(good)
        (incoming / "link").symlink_to(incoming / "b.safetensors")
        _refused(FormatError, "link", lambda: store.load("bob", "linked", "link"))
        store.load("bob", "his", "b.safetensors")
        reading_process._PROGRAM = "import time; time.sleep(60)"
        reading_process._STARTING, store._quotas.__dict__["seconds"] = 0.5, 0
        _refused(
            FormatError, "takes more time", lambda: store.upload("alice", "b", {"a.safetensors": io.BytesIO(good)})
        )
        store.unload("alice", "mine")
    lines = (Path(folder) / "store" / "audit.jsonl").read_text().splitlines()
    outcomes = [json.loads(line)["outcome"] for line in lines]
    assert outcomes == ["done", outcomes[1], "unreadable", "done", "over_budget", "done"], outcomes
