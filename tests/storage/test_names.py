"""Adapters and models by name: from a stub of the hub, a store in memory, and a web server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request

import fsspec
import pytest
import torch
from torch import nn

import lorac
from lorac.cli import main
from lorac.diffusion.pipeline import CompiledPipeline
from lorac.serving import run
from lorac.storage.remote import _SameHost, find_stem, parse_name
from lorac.trainer.factories import make_adapters
from tests.hub import Hub, child_environment, read_files, use_hub
from tests.mistakes import Tiny, lora
from tests.refusing import refuses
from tests.runtime.generation.test_artifacts import words
from tests.zoo import SMALL_LLAMA

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
    with Hub() as hub:
        use_hub(hub, tmp_path / "cache", monkeypatch)
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
    with pytest.warns(lorac.LoracWarning, match="from the cache, which may be older: asking for it fails, Connect"):
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


def test_rejects_a_file_of_another_size_than_the_listing_says(hub: Hub, files: dict[str, bytes]) -> None:
    with Hub() as other:
        other.pages = {f"/{name}": ({}, content) for name, content in files.items()}
        hub.add("ann/lies", files, sizes={"adapter_model.safetensors": 9}, elsewhere=other.address)
        with refuses("unreadable", match="bytes, and its server says 9\n  remove it, and load it again"):
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
        web.pages["/endless"] = ({"content_length": ""}, content)
        with lorac.budget(download=100), refuses("over_budget"):
            lorac.load_adapter(f"{web.address}/endless")
        web.pages["/cut"] = ({"content_length": str(len(content) + 8)}, content)
        with refuses("unreadable", match=f"has {len(content)} bytes, and its server says {len(content) + 8}"):
            lorac.load_adapter(f"{web.address}/cut")
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


def test_follows_no_redirect_that_gives_up_encryption() -> None:
    def follow(old: str, new: str) -> Any:
        return _SameHost().redirect_request(Request(old), None, 302, "", {}, new)

    assert follow("http://a/b", "https://a/c").full_url == "https://a/c"
    with pytest.raises(ValueError, match="leads to another host"):
        follow("https://a/b", "http://a/c")


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


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """A decoder, it with one other weight, it compiled, and an adapter of it."""
    place, decoder = tmp_path_factory.mktemp("models"), SMALL_LLAMA.fresh()
    words().save_pretrained(place / "base")
    decoder.save_pretrained(place / "base")  # type: ignore[operator]
    compiled = lorac.compile(decoder, {"lora": lorac.LoRA(r=2, targets=["q_proj"])})
    lorac.save_adapter(compiled.adapters["lora"], place / "lora", model=decoder)
    compiled.save(place / "compiled")
    with torch.no_grad():
        decoder.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 5] += 1
    decoder.save_pretrained(place / "tuned")  # type: ignore[operator]
    return {name: read_files(place / name) for name in ("base", "tuned", "compiled", "lora")}


def extract(_: pytest.MonkeyPatch) -> None:
    adapter = lorac.extract("ann/tuned@v1", "ann/base@v1")
    assert (adapter.name, [*adapter.tensors]) == ("tuned", ["model.layers.0.mlp.up_proj"])


def merge(patch: pytest.MonkeyPatch) -> None:
    entries = [{"adapter": "ann/lora@v1"}, {"adapter": "ann/many/two@v1"}]
    recipe = {"merge_method": "linear", "base_model": "ann/base@v1", "models": entries}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    patch.setattr(sys, "argv", ["lorac", "merge", "--recipe", "recipe.yaml", "-o", "merged"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert len(lorac.load_adapter("merged").sites) == 2


def train(patch: pytest.MonkeyPatch) -> None:
    recipe = {"adapters": {"own": {"path": "ann/lora@v1"}}, "model": "ann/base@v1", "out": "run"}
    Path("recipe.yaml").write_text(json.dumps(recipe))
    made: list[str] = []

    def begin(model: nn.Module, _: object, recipe: Any, *rest: object, **options: object) -> SimpleNamespace:
        made.extend(make_adapters(recipe.adapters, model, list))
        return SimpleNamespace(adapters=made)

    patch.setattr("lorac.trainer.train", begin)
    patch.setattr(sys, "argv", ["lorac", "train", "recipe.yaml"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert made == ["own"]


def register(_: pytest.MonkeyPatch) -> None:
    compiled = lorac.compile(SMALL_LLAMA.model(), {}, reserve=lorac.Reserve(targets=["q_proj"], rank=2))
    assert compiled.register("ann/many@v1") == ["one", "two"]


def serve(patch: pytest.MonkeyPatch) -> None:
    served: list[lorac.Compiled] = []

    def build(compiled: lorac.Compiled, *_: object, **options: object) -> None:
        served.append(compiled)
        raise KeyboardInterrupt

    patch.setattr("lorac.serving.server.build_app", build)
    with pytest.raises(KeyboardInterrupt):
        run("ann/compiled@v1", adapters="ann/many@v1")
    assert [*served[0].adapters] == ["lora"]
    served[0].swap("two")


DOORS = {door.__name__: door for door in (extract, merge, train, register, serve)}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_takes_a_name(
    door: str, hub: Hub, folders: dict[str, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {f"{name}/{file}": content for name in ("one", "two") for file, content in folders["lora"].items()}
    for name, found in {**folders, "many": many}.items():
        hub.add(f"ann/{name}", {}).commits["v1"] = found
    DOORS[door](monkeypatch)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("ann/style", {"subfolder": "b", "weight_name": "own.safetensors", "revision": "v1"}),
        ("ann/style", {"subfolder": "b", "weight_name": "own.safetensors", "revision": "refs/pr/1"}),
        ("ann/style@v1", {"subfolder": "b", "weight_name": "own.safetensors"}),
        ("hf://ann/style", {"subfolder": "b", "weight_name": "own.safetensors", "revision": "v1"}),
    ],
)
def test_load_lora_weights_takes_a_name(
    source: str, options: dict[str, str], hub: Hub, files: dict[str, bytes], tmp_path: Path, model: nn.Module
) -> None:
    found = {"b/own.safetensors": native(files, tmp_path, model), "c/adapter_config.json": b"{}"}
    hub.add("ann/style", {}).commits.update({"v1": found, "refs/pr/1": found})
    pipeline: Any = SimpleNamespace(compiled=lorac.compile(model, {}, reserve=lorac.Reserve(rank=4)))
    CompiledPipeline.load_lora_weights(pipeline, source, "own", **options)  # type: ignore[arg-type]  # by name
    assert pipeline.compiled.active == {"own": 1.0}


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
