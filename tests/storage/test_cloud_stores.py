"""Adapters at s3://, from a stub of the store on loopback, by the libraries of ``lorac[stores]``."""

from __future__ import annotations

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

import lorac
from tests.hub import Files, read_files
from tests.mistakes import Tiny, lora
from tests.refusing import refuses

TIME = "2026-12-01T00:00:00.000Z"
LIBRARIES = {"s3": "s3fs"}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers the calls that list and read objects."""

    protocol_version = "HTTP/1.1"
    files: Files
    keys: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.keys.append(self.headers.get("Authorization", ""))
        _, bucket, key = (*unquote(address.path).split("/", 2), "")[:3]
        if not key and "list-type" in asked:
            return self._answer(self._list(bucket, asked.get("prefix", "")), "application/xml")
        content = self.files.get(key)
        if content is None:
            return self._answer(b"", status=404)
        return self._answer(content, "application/octet-stream", ranged=True)

    def _list(self, bucket: str, prefix: str) -> bytes:
        found = [key for key in sorted(self.files) if key.startswith(prefix)]
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>{TIME}</LastModified>"
            f"<ETag>&quot;{hashlib.md5(self.files[key]).hexdigest()}&quot;</ETag>"
            f"<Size>{len(self.files[key])}</Size><StorageClass>STANDARD</StorageClass></Contents>"
            for key in found
        )
        return (
            '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>"
        ).encode()

    def _answer(self, content: bytes, kind: str = "text/plain", *, status: int = 200, ranged: bool = False) -> None:
        wanted, total = self.headers.get("Range", ""), len(content)
        if ranged and wanted.startswith("bytes="):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            content, status = content[int(first) : int(last) + 1 if last else None], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {int(first)}-{int(first) + len(content) - 1}/{total}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.md5(content).hexdigest()}"')
        self.send_header("Last-Modified", "Tue, 01 Dec 2026 00:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture(params=LIBRARIES)
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The scheme of a store, and the server's class with the files of its bucket."""
    pytest.importorskip(LIBRARIES[request.param], reason="needs lorac[stores], which is not required")
    handler = type("Bucket", (Handler,), {"files": {}, "keys": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "ann",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "NO_PROXY": "*",
        "HF_HUB_OFFLINE": "0",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    import fsspec
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield request.param, handler
    fsspec.get_filesystem_class(request.param).clear_instance_cache()
    server.shutdown()
    server.server_close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore", "ignore::ResourceWarning")
def test_loads_a_folder_of_a_bucket(store: Any, tmp_path: Path) -> None:
    scheme, handler = store
    model = Tiny().eval()
    compiled = lorac.compile(model, {"a": lora()})
    for tensor in compiled.adapters["a"].parameters():
        tensor.data.normal_()
    lorac.save_adapter(compiled.adapters["a"], tmp_path / "a", model=model)
    handler.files |= {f"team/sql/{name}": content for name, content in read_files(tmp_path / "a").items()}
    handler.files |= {"team/sql-other/adapter_config.json": b"{}"}
    adapter = lorac.load_adapter(f"{scheme}://bucket/team/sql", model)
    assert adapter.name == "sql"
    pairs = zip(adapter.parameters(), compiled.adapters["a"].parameters(), strict=True)
    assert all(one.equal(other) for one, other in pairs)
    copies = [*(tmp_path / "cache").rglob("*.safetensors")]
    assert len(copies) == 1
    assert not [*Path.cwd().iterdir()]
    assert all("ann/" in key for key in handler.keys), "signed by the key of the environment"
    with refuses("unreadable", match="has nothing that lorac reads"):
        lorac.load_adapter(f"{scheme}://bucket/team/none")
    with lorac.budget(download=10), refuses("over_budget"):
        lorac.load_adapter(f"{scheme}://bucket/team/sql")
