"""A stub of the Hugging Face hub, and of a web server, on loopback: the paths that huggingface_hub calls."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Files = dict[str, bytes]


def read_files(folder: Path) -> Files:
    """The files of a folder by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@dataclass
class Repository:
    """A repository of the stub's.

    Attributes:
        commits: branch, tag or commit -> its files.
        token: who asks has to send it; None: it is public.
        sizes: of some files, as the stub says them whatever they are.
        elsewhere: the address of another server that has the files; None: this one.
    """

    commits: dict[str, Files]
    token: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    elsewhere: str | None = None

    def sha(self, revision: str) -> str:
        if len(revision) == 40:
            return revision
        files = self.commits[revision]
        return hashlib.sha1(repr([*sorted((name, content) for name, content in files.items())]).encode()).hexdigest()

    def find(self, revision: str) -> Files | None:
        found = {self.sha(name): files for name, files in self.commits.items()} | self.commits
        return found.get(revision)


class Hub(contextlib.AbstractContextManager["Hub"]):
    """A server with repositories, which notes the requests that came.

    Attributes:
        repositories: name -> repository.
        pages: path -> (headers, content) of plain files, for a web server.
        redirects: path -> address.
        requests: method, path and Authorization header of each request.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.pages: dict[str, tuple[dict[str, str], bytes]] = {}
        self.redirects: dict[str, str] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.commits: list[dict[str, Any]] = []
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, name: str, files: Files, **options: Any) -> Repository:
        self.repositories[name] = Repository({"main": files}, **options)
        return self.repositories[name]

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._answer_get()

    def do_GET(self) -> None:
        self._answer_get()

    def _note(self) -> list[str]:
        self.server_hub.requests.append((self.command, self.path, self.headers["authorization"]))
        return unquote(urlsplit(self.path).path).strip("/").split("/")

    def _send(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        if length := headers.pop("content_length", str(len(content))):  # "": it is not said
            self.send_header("content-length", length)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), content_type="application/json")

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", X_Error_Code=code, X_Error_Message=code)

    def _repository(self, name: str) -> Repository | None:
        found = self.server_hub.repositories.get(name)
        if found is None or (found.token is not None and self.headers["authorization"] != f"Bearer {found.token}"):
            self._refuse(401, "RepoNotFound")
            return None
        return found

    def _answer_get(self) -> None:
        parts, hub = self._note(), self.server_hub
        path = f"/{'/'.join(parts)}"
        if path in hub.redirects:
            return self._send(302, location=hub.redirects[path])
        if path in hub.pages:
            headers, content = hub.pages[path]
            return self._send(200, content, **headers)
        if parts == ["api", "models"]:
            author = parse_qs(urlsplit(self.path).query).get("author", [""])[0]
            return self._send_json([{"id": name} for name in hub.repositories if name.startswith(f"{author}/")])
        if parts[:2] == ["api", "models"] and len(parts) >= 4:
            return self._answer_api("/".join(parts[2:4]), parts[4:])
        if parts[:2] == ["api", "datasets"] and len(parts) >= 4:
            return self._answer_api("/".join(parts[1:4]), parts[4:])
        if parts[0] == "datasets" and len(parts) >= 6 and parts[3] == "resolve":
            return self._answer_file("/".join(parts[:3]), parts[4], "/".join(parts[5:]))
        if len(parts) >= 5 and parts[2] == "resolve":
            return self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._refuse(404, "EntryNotFound")

    def _answer_api(self, name: str, rest: list[str]) -> None:
        found = self._repository(name)
        if found is None:
            return None
        if rest == ["refs"]:
            refs = [{"name": one, "ref": f"refs/heads/{one}", "targetCommit": found.sha(one)} for one in found.commits]
            return self._send_json({"branches": refs, "converts": [], "tags": []})
        revision = "main" if not rest else "/".join(rest[1:])
        files = found.find(revision)
        if files is None:
            return self._refuse(404, "RevisionNotFound")
        sizes = {one: found.sizes.get(one, len(content)) for one, content in files.items()}
        if rest[:1] == ["tree"]:
            oids = {one: hashlib.sha1(content).hexdigest() for one, content in files.items()}
            return self._send_json(
                [{"type": "file", "path": one, "size": size, "oid": oids[one]} for one, size in sizes.items()]
            )
        siblings = [{"rfilename": one, "size": size} for one, size in sizes.items()]
        return self._send_json({"id": name, "sha": found.sha(revision), "siblings": siblings, "private": False})

    def _answer_file(self, name: str, revision: str, path: str) -> None:
        found = self._repository(name)
        if found is None:
            return None
        files = found.find(revision)
        if files is None or path not in files:
            return self._refuse(404, "EntryNotFound" if files else "RevisionNotFound")
        own = {"ETag": f'"{hashlib.sha1(files[path]).hexdigest()}"', "X_Repo_Commit": found.sha(revision)}
        if found.elsewhere is not None:
            linked = {"X_Linked_Size": str(len(files[path])), "X_Linked_Etag": own["ETag"]}
            return self._send(302, location=f"{found.elsewhere}/{path}", **own, **linked)
        size = found.sizes.get(path)
        return self._send(200, files[path], **own, **({} if size is None else {"X_Linked_Size": str(size)}))

    def do_POST(self) -> None:
        parts, hub = self._note(), self.server_hub
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        if parts == ["api", "validate-yaml"]:
            return self._send_json({"errors": [], "warnings": []})
        if not (self.headers["authorization"] or "").startswith("Bearer hf_"):
            return self._refuse(401, "Unauthorized")
        if parts == ["api", "repos", "create"]:
            given = json.loads(body)
            name = f"{given['organization']}/{given['name']}" if given.get("organization") else given["name"]
            is_private = given.get("private") or given.get("visibility") == "private"
            if name not in hub.repositories:
                hub.add(name, {}, token=self.headers["authorization"][7:] if is_private else None)
            return self._send_json({"url": f"{hub.address}/{name}", "id": name})
        found = hub.repositories["/".join(parts[2:4])]
        if parts[4] == "branch":
            found.commits.setdefault("/".join(parts[5:]), {})
            return self._send_json({})
        if parts[4] == "preupload":
            asked = json.loads(body)["files"]
            return self._send_json(
                {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in asked]}
            )
        lines = [json.loads(line) for line in body.splitlines()]
        revision = "/".join(parts[5:])
        for line in lines:
            if line["key"] == "file":
                content = line["value"]["content"]
                found.commits[revision][line["value"]["path"]] = base64.b64decode(content)
        hub.commits.append(next(line["value"] for line in lines if line["key"] == "header"))
        oid = found.sha(revision)
        address = f"{hub.address}/{'/'.join(parts[2:4])}/commit/{oid}"
        return self._send_json({"commitUrl": address, "commitOid": oid})


def use_hub(hub: Hub, cache: Path, patch: pytest.MonkeyPatch) -> None:
    """Let huggingface_hub ask the stub, and keep what it brings in a folder, until a test's patches are undone."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.address)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    patch.setenv("HF_ENDPOINT", hub.address)
    patch.setenv("HF_HUB_OFFLINE", "0")
    patch.setenv("XDG_CACHE_HOME", str(cache))
    patch.delenv("HF_TOKEN", raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))


def child_environment(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    """The environment in which another process asks the stub."""
    import os

    own = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), "XDG_CACHE_HOME": str(cache)}
    return {**os.environ, **own, "PYTHONPATH": str(Path(__file__).parents[1]), **more}
