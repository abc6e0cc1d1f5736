"""Adapters and models by name: from a stub of the hub, a store in memory, and a web server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from torch import nn

import lorac
from lorac.storage.remote.names import find_stem, parse_name
from tests.hub import Hub, child_environment, read_files, use_hub
from tests.mistakes import Tiny, lora
from tests.refusing import refuses

TOKEN = "hf_" + "x" * 34


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Tiny().eval()


@pytest.fixture(scope="module")
def files(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A folder of PEFT's."""
    compiled = lorac.compile(model, {"a": lora()})
    for tensor in compiled.adapters["a"].parameters():
        nn.init.normal_(tensor)
    folder = tmp_path_factory.mktemp("peft")
    lorac.save_adapter(compiled.adapters["a"], folder, model=model)
    return read_files(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    with Hub() as hub, use_hub(hub, tmp_path / "cache"):
        yield hub


def equal(one: lorac.Adapter, files: dict[str, bytes], folder: Path) -> bool:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    other = lorac.load_adapter(folder)
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return one.sites == other.sites and all(torch.equal(a, b) for a, b in pairs)


def test_loads_an_adapter_of_the_hub(hub: Hub, files: dict[str, bytes], model: nn.Module, tmp_path: Path) -> None:
    hub.add("ann/sql", {**files, "optimizer.pt": b"x" * 100, ".gitattributes": b"", "runs/a": b"log"})
    adapter = lorac.load_adapter("ann/sql", model)
    assert adapter.name == "sql"
    assert equal(adapter, files, tmp_path / "same")
    assert {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")} == set(files)
    assert not [*Path.cwd().iterdir()]
    assert list(lorac.compile(model, ["ann/sql"]).adapters) == ["sql"]
    assert lorac.check("ann/sql", model).fits
    assert not lorac.check("ann/none", model).fits


@pytest.mark.parametrize("form", ["ann/sql/b", "hf://ann/sql/b", "hf:/ann/sql/b", "{hub}/ann/sql/tree/main/b"])
def test_loads_a_subfolder(hub: Hub, files: dict[str, bytes], form: str) -> None:
    hub.add("ann/sql", {"README.md": b"", **{f"b/{name}": content for name, content in files.items()}})
    assert lorac.load_adapter(form.format(hub=hub.address)).name == "b"


@pytest.mark.parametrize("form", ["ann/sql@v2", "hf://ann/sql@v2", "ann/sql@{sha}", "{hub}/ann/sql/tree/v2"])
def test_loads_a_revision(hub: Hub, files: dict[str, bytes], form: str) -> None:
    found = hub.add("ann/sql", {})
    found.commits["v2"] = files
    lorac.load_adapter(form.format(hub=hub.address, sha=found.sha("v2")))
    with refuses("unreadable", match="has nothing that lorac reads"):
        lorac.load_adapter("ann/sql")


def test_rejects_a_revision_that_does_not_exist(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/sql", files).commits["version-2"] = files
    with refuses("unreadable", match="has no revision 'version2'\n  nearest: version-2"):
        lorac.load_adapter("ann/sql@version2")


def test_rejects_a_name_of_nothing(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/sql", files)
    with refuses("unreadable", match="'ann/sqll' is neither a path nor a name.*\n  nearest: ann/sql\n"):
        lorac.load_adapter("ann/sqll")
    with refuses("unreadable", match="has nothing that lorac reads at 'adaptr'"):
        lorac.load_adapter("ann/sql/adaptr")


def test_reads_a_private_adapter_with_a_token_alone(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("ann/own", files, token=TOKEN)
    with refuses("unreadable", match="log in: hf auth login, or HF_TOKEN"):
        lorac.load_adapter("ann/own")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    lorac.load_adapter("ann/own")


def test_sends_no_token_to_another_host(hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with Hub() as other:
        other.pages = {f"/{name}": ({}, content) for name, content in files.items()}
        hub.add("ann/own", files, token=TOKEN, elsewhere=other.address.replace("127.0.0.1", "localhost"))
        lorac.load_adapter("ann/own")
        assert other.requests
        assert {sent for *_, sent in other.requests} == {None}
        assert {sent for *_, sent in hub.requests} == {f"Bearer {TOKEN}"}


def test_reads_the_cache_where_there_is_no_network(
    hub: Hub, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("ann/sql", files)
    before = lorac.load_adapter("ann/sql")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pairs = zip(before.parameters(), lorac.load_adapter("ann/sql").parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    with refuses("unreadable", match="is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        lorac.load_adapter("ann/other")
    assert not hub.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.warns(lorac.LoracWarning, match="is read as the cache has it: asking for it fails, Connect"):
        lorac.load_adapter("ann/sql")
    with refuses("unreadable", match="check the name, the network and HF_TOKEN"):
        lorac.load_adapter("ann/other")


@pytest.mark.parametrize("more", [-8, 8], ids=["shorter", "longer"])
def test_rejects_a_file_of_another_size_than_its_header_says(
    hub: Hub, files: dict[str, bytes], more: int, tmp_path: Path
) -> None:
    """The safetensors header, the hub's listing, and the length that a web server announces."""
    name, content = "adapter_model.safetensors", files["adapter_model.safetensors"]
    hub.add("ann/sql", {**files, name: content + b"\0" * more if more > 0 else content[:more]})
    with refuses("corrupt_file"):
        lorac.load_adapter("ann/sql")
    hub.add("ann/lies", files, sizes={name: len(content) + more})
    with refuses("unreadable"):
        lorac.load_adapter("ann/lies")


def test_rejects_more_bytes_than_the_budget_before_it_downloads_any(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/sql", files)
    with lorac.budget(download=100), refuses("over_budget", match=r"lorac.budget\(download=\d+\)"):
        lorac.load_adapter("ann/sql")
    assert not [path for _, path, _ in hub.requests if "/resolve/" in path]
    lorac.load_adapter("ann/sql")
    with lorac.budget(download=100):
        lorac.load_adapter("ann/sql")  # it is in the cache, and brings nothing


@pytest.mark.parametrize("name", ["../../../out", "/out", "a/../../out", "a\\..\\out"])
def test_writes_nothing_outside_the_cache(hub: Hub, files: dict[str, bytes], name: str, tmp_path: Path) -> None:
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    hub.add("ann/evil", {**files, name: b"x"})
    with refuses("unreadable", match="could lie outside its folder"):
        lorac.load_adapter("ann/evil")
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not Path("/out").exists()


def test_a_path_that_exists_wins(hub: Hub, files: dict[str, bytes]) -> None:
    hub.add("ann/sql", {**files, "adapter_config.json": b"{}"})
    for name, content in files.items():
        Path("ann/sql").mkdir(parents=True, exist_ok=True)
        Path("ann/sql", name).write_bytes(content)
    lorac.load_adapter("ann/sql")
    with refuses("unknown_format", match="hf://ann/sqll"):
        lorac.load_adapter("ann/sqll")
    assert not hub.requests


def test_loads_a_folder_of_a_store(files: dict[str, bytes], hub: Hub, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/bucket/sql/{name}": content for name, content in files.items()})
    memory.pipe("/bucket/sql-other/adapter_config.json", b"{}")
    adapter = lorac.load_adapter("memory://bucket/sql")
    assert adapter.name == "sql"
    assert equal(adapter, files, tmp_path / "same")
    copies = [*(tmp_path / "cache" / "lorac").rglob("*.safetensors")]
    lorac.load_adapter("memory://bucket/sql/")
    assert len(copies) == 1
    memory.pipe("/bucket/sql/adapter_config.json", b"{}")
    with refuses("corrupt_file"):
        lorac.load_adapter("memory://bucket/sql")
    with refuses("unreadable", match="has nothing that lorac reads"):
        lorac.load_adapter("memory://bucket/none")
    with lorac.budget(download=10), refuses("over_budget"):
        lorac.load_adapter("memory://bucket/sql")


def test_reads_a_copy_of_a_store_offline(files: dict[str, bytes], hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/bucket/off/{name}": content for name, content in files.items()})
    lorac.load_adapter("memory://bucket/off")
    memory.rm("/bucket/off", recursive=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert lorac.load_adapter("memory://bucket/off").name == "off"
    with refuses("unreadable", match="HF_HUB_OFFLINE is set"):
        lorac.load_adapter("memory://bucket/none")


def test_names_the_extra_of_a_store(hub: Hub) -> None:
    with refuses("missing_extra", match=r"s3fs is not installed\n.*lorac\[stores\]"):
        lorac.load_adapter("s3://bucket/sql")


def native(files: dict[str, bytes], tmp_path: Path, model: nn.Module) -> bytes:
    compiled = lorac.compile(model, {"a": lora()})
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "own.safetensors", format="native")
    return (tmp_path / "own.safetensors").read_bytes()


def test_loads_a_file_from_a_web_server(hub: Hub, files: dict[str, bytes], tmp_path: Path, model: nn.Module) -> None:
    content = native(files, tmp_path, model)
    with Hub() as web:
        web.pages["/own.safetensors"] = ({"ETag": '"1"'}, content)
        web.redirects["/old"] = "/own.safetensors"
        assert lorac.load_adapter(f"{web.address}/own.safetensors?x=1").name == "a"
        lorac.load_adapter(f"{web.address}/old", model)
        web.pages["/page"] = ({}, b"<!doctype html>")
        with refuses("unknown_format", match="a web page"):
            lorac.load_adapter(f"{web.address}/page")
        web.pages["/pointer.safetensors"] = ({}, b"version https://git-lfs.github.com/spec/v1")
        with refuses("corrupt_file", match="a pointer of Git LFS"):
            lorac.load_adapter(f"{web.address}/pointer.safetensors")
        with refuses("unreadable", match="404"):
            lorac.load_adapter(f"{web.address}/none")
        web.pages["/long"] = ({"content_length": str(1 << 40)}, content)
        with refuses("over_budget"):
            lorac.load_adapter(f"{web.address}/long")
        web.pages["/evil"] = ({"Content_Disposition": 'attachment; filename="../out"'}, content)
        with refuses("unreadable", match="could lie outside"):
            lorac.load_adapter(f"{web.address}/evil")
        with refuses("unreadable", match="password"):
            lorac.load_adapter(web.address.replace("//", "//me:secret@"))
    assert not [*Path.cwd().iterdir()]


def test_follows_no_redirect_to_another_host(hub: Hub) -> None:
    with Hub() as web, Hub() as other:
        web.redirects["/a"] = f"{other.address}/b"
        with refuses("unreadable", match=f"it leads to another host; if you trust that one, give {other.address}/b"):
            lorac.load_adapter(f"{web.address}/a")
        assert not other.requests


@pytest.mark.parametrize(
    "text", ["a/b", "a/b@c", "a/b@refs/pr/1", "a/b/c/d@e", "a/b@e/c", "hf://a/b", "s3://a/b", "https://a/b"]
)
def test_recognises_names(text: str, hub: Hub) -> None:
    assert parse_name(text) == parse_name(Path(text))
    assert parse_name(text) is not None


@pytest.mark.parametrize(
    "text", ["a", "./a/b", "../a/b", "/a/b", "~/a", "a/b/../c", "C:/a/b", "ftp://a/b", "hf://a", "a.b:c"]
)
def test_leaves_paths_alone(text: str, hub: Hub) -> None:
    assert parse_name(text) is None


@pytest.mark.parametrize(
    ("text", "stem"),
    [("a/b", "b"), ("a/b@v1.0", "b"), ("a/b/c.safetensors", "c"), ("s3://a/b/", "b"), ("https://a/b.pt?x=1.2", "b")],
)
def test_names_an_adapter_after_its_name(text: str, stem: str, hub: Hub) -> None:
    assert find_stem(text) == stem


@pytest.mark.medium("starts two processes; the others set the same settings in this one")
def test_a_process_reads_the_settings_of_the_hub(hub: Hub, files: dict[str, bytes], tmp_path: Path) -> None:
    """A new process with HF_ENDPOINT, HF_HOME and HF_TOKEN; then offline."""
    hub.add("ann/own", files, token=TOKEN)
    command = [sys.executable, "-m", "lorac", "inspect", "ann/own", "--json"]
    more = {"HF_TOKEN": TOKEN, "HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": ""}
    environment = child_environment(hub, tmp_path / "cache", **more)
    first = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_TOKEN": ""}
    assert subprocess.run(command, env=offline, capture_output=True, text=True, check=True).stdout == first.stdout
    assert not (tmp_path / "home").exists()
