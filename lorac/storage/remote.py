"""Names of remote adapters and models: on the Hugging Face hub, in a store, or on a web server.

``user/repo``, ``user/repo@revision``, ``user/repo/subfolder@revision``, ``hf://…``, ``s3://…``, ``gs://…``, ``https://…``.
``find_source`` downloads the files of a name, and returns their path in a cache. A name never implies trust: the files
are read like any other files. ``push_folder`` uploads a folder to the hub, with a card that describes it.
"""

import contextlib
import fnmatch
import glob
import hashlib
import importlib
import os
import re
import shutil
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from lorac.errors import (
    FormatError,
    LoracError,
    check_known,
    list_some,
    nearest_name,
    short,
    translate_errors,
    translate_import_errors,
    warn,
)
from lorac.limits import check_download
from lorac.progress import step
from lorac.storage.atomic_folders import MANIFEST, replace_atomically
from lorac.storage.paths import ADDRESS, HUB_NAME, is_inner_name, parse_path

NAME_FORMS = "a path or a name (user/repo@revision, s3://…, https://…)"
_HUB_HOSTS = ("huggingface.co", "hf.co")
_HUB_PAGE = re.compile(
    r"(?P<repo>[^/]+/[^/]+)(/(tree|blob|resolve)/(?P<at>[^/]+)(/(?P<inner>[^?]*))?)?(?P<revision>)(\?.*)?"
)
"""The path of a page on the hub."""
_STORES = {"s3": "s3fs", "gs": "gcsfs", "memory": "fsspec"}
"""Scheme of an address -> the library with which fsspec reads it."""
_UNREAD = [
    *(".*", "*.h5", "*.msgpack", "*.ot", "*.tflite", "*.png", "*.jpg", "*.mp4", "runs/*", "checkpoint-*/*"),
    *("*optimizer.pt", "*optimizer.bin", "*scheduler.pt", "*rng_state*.pth", "*training_args.bin"),
]
"""Files that are not downloaded: hidden ones, other libraries' weights, pictures, and the states of trainings."""
_UNLISTED = shutil.ignore_patterns("README.md", "LICENSE*", ".*")
"""Files of a repository that a compiled model's manifest does not list."""
_DOUBLES = ["pytorch_model.bin", "pytorch_model-*.bin", "adapter_model.bin"]
"""Weights that are not downloaded where there are safetensors."""
_CHUNK, _TIMEOUT = 1 << 20, 30.0
Refuse = Callable[..., LoracError]
"""(fault, nearest name, next step) -> the error to raise."""
_RemoteFiles = dict[str, tuple[int | None, str, Callable[[], contextlib.AbstractContextManager[Any]]]]
"""Name of a file -> its size, if its server reports it; a text that changes with its content; a function to open it."""


class HubName(NamedTuple):
    """A model or an adapter on the hub.

    Attributes:
        repo: the repository, ``user/name``.
        revision: a branch, a tag or a commit; None: ``main``.
        inner: a file or folder in the repository; empty: the whole repository.
    """

    repo: str
    revision: str | None
    inner: str

    def __str__(self) -> str:
        return f"{self.repo}{self.inner and '/'}{self.inner}"


Admit = Callable[[HubName], None]


def parse_name(given: str | os.PathLike[str]) -> HubName | str | None:
    """Parse a text as a name on the hub, or as an address, which is returned as text; None if it is, or may be, a path.

    An existing path wins over a name, and so does a relative path whose first folder exists: then write ``hf://``.
    """
    text = os.fspath(given)
    if not isinstance(text, str) or os.path.lexists(text):
        return None
    address = ADDRESS.fullmatch(text)  # even if Path has merged its slashes
    if address is None:
        return None if os.path.exists(text.partition("/")[0]) else _parse_hub_name(HUB_NAME.fullmatch(text))
    scheme, rest = address["scheme"].lower(), address["rest"]
    host, _, path = rest.partition("/")
    if scheme == "hf":
        return _parse_hub_name(HUB_NAME.fullmatch(rest))
    if scheme in ("http", "https") and host in (*_HUB_HOSTS, urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc):
        return _parse_hub_name(_HUB_PAGE.fullmatch(path))
    is_known = scheme in ("http", "https", *_STORES) and ".." not in unquote(rest).split("/")
    return f"{scheme}://{rest}" if is_known else None


def _parse_hub_name(found: re.Match[str] | None) -> HubName | None:
    if found is None or (found["at"] and found["revision"]):
        return None
    revision, inner = unquote(found["at"] or found["revision"] or ""), unquote(found["inner"] or "").strip("/")
    return HubName(found["repo"], revision or None, inner) if not inner or is_inner_name(inner) else None


def find_stem(given: str | os.PathLike[str]) -> str:
    """Return the default name of the adapter that a path or name stands for."""
    return Path(str(parse_name(given) or given).partition("?")[0]).stem


def find_source(
    given: object,
    subject: str,
    kind: type[LoracError],
    code: str | None = None,
    admit: Admit = lambda _: None,
    *,
    repo_type: str = "model",
) -> Path:
    """Return the path of a file or folder that a path or name stands for; remote files are downloaded into a cache.

    Args:
        given: the path or name.
        subject: the path as the subject of a sentence, as ``parse_path`` takes it.
        kind: the error for a name that cannot be read, with `code`.
        admit: raises for a repository that may not be read; it gets the repository's current name on the hub.
        repo_type: the kind of a repository on the hub: ``"model"``, also for adapters, or ``"dataset"``.

    Raises:
        WrongType: it is neither text nor a path.
        MissingExtra: the library that reads such names is not installed.
        FormatError: the download is larger than ``lorac.budget`` admits.
    """
    name = parse_name(given) if isinstance(given, str | os.PathLike) else None
    if name is None:
        return parse_path(given, subject, kind, code)
    refuse = partial(kind, code=code)
    step(f"looking for {name}")
    if isinstance(name, HubName):
        return _find_on_hub(name, refuse, admit, repo_type)
    with translate_errors(refuse, f"{short(name)} cannot be read", next_step="check the address, and the access to it"):
        return _find_at_address(name, refuse)


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _find_on_hub(name: HubName, refuse: Refuse, admit: Admit, repo_type: str) -> Path:
    with translate_import_errors():
        import huggingface_hub as hub
        from huggingface_hub import errors
    api, where = hub.HfApi(), f"'{name.repo}' on {urlsplit(hub.constants.ENDPOINT).netloc}"
    download = partial(hub.snapshot_download, name.repo, repo_type=repo_type, revision=name.revision)
    try:
        info: Any = api.repo_info(name.repo, repo_type=repo_type, revision=name.revision, files_metadata=True)
    except errors.RepositoryNotFoundError as error:
        user = name.repo.partition("/")[0]
        listed = api.list_models if repo_type == "model" else api.list_datasets
        near = _find_nearest(name.repo, lambda: [one.id for one in listed(author=user, limit=100)])
        what = f"'{name}' is neither a path nor a name that you may read: there is no {where}, or it is not public"
        how = "check the name, ask for access on its page, and log in: hf auth login, or HF_TOKEN"
        raise refuse(what, nearest=near, next_step=how) from error
    except errors.RevisionNotFoundError as error:
        refs = partial(api.list_repo_refs, name.repo, repo_type=repo_type)
        near = _find_nearest(str(name.revision), lambda: [one.name for one in refs().branches + refs().tags])
        how = "give a branch, a tag or a whole commit hash"
        raise refuse(f"{where} has no revision '{name.revision}'", nearest=near, next_step=how) from error
    except Exception as error:  # no network, a failing server, or any error of the HTTP client
        reason = "HF_HUB_OFFLINE is set" if _is_offline() else f"asking for it fails, {type(error).__name__}: {error}"
        with contextlib.suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
            below = f"{glob.escape(name.inner)}/" if name.inner else ""
            ignore = [below + pattern for pattern in _UNREAD + _DOUBLES]
            folder = Path(download(allow_patterns=[f"{below}*"], ignore_patterns=ignore, local_files_only=True))
            if (folder / name.inner).exists():
                if not _is_offline():
                    warn(f"{where} is read from the cache, which may be older: {reason}")
                return _copy_linked(folder / name.inner)
        kind = "" if repo_type == "model" else f" --repo-type {repo_type}"
        how = (
            f"check the name, the network and HF_TOKEN, or download it where that works: hf download {name.repo}{kind}"
        )
        raise refuse(f"{where} is not in the hub's cache, and {reason.splitlines()[0]}", next_step=how) from error
    admit(name._replace(repo=info.id))
    files = {one.rfilename: one.size for one in info.siblings or ()}
    chosen = _choose(files, name.inner, where, refuse)
    cached = partial(hub.try_to_load_from_cache, name.repo, repo_type=repo_type, revision=info.sha)
    check_download(sum(files[one] or 0 for one in chosen if not isinstance(cached(one), str)), f"'{name}'")
    with translate_errors(refuse, f"{where} cannot be downloaded", next_step="load it again"):
        folder = Path(download(allow_patterns=[glob.escape(one) for one in chosen]))
    for one in chosen:
        _check_size(f"'{folder / one}'", (folder / one).stat().st_size, files[one], refuse)
    return _copy_linked(folder / name.inner)


def _copy_linked(folder: Path) -> Path:
    """Copy a compiled model out of the hub's cache, whose files are links; return other files and folders unchanged."""
    copy = _find_cache() / _hash(os.path.realpath(folder))
    if (folder / MANIFEST).is_file() and not copy.exists():
        with replace_atomically(copy) as staged:
            shutil.copytree(folder, staged, ignore=_UNLISTED, copy_function=_link_or_copy)
    return copy if (folder / MANIFEST).is_file() else folder


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _find_nearest(name: str, listed: Callable[[], list[str]]) -> str | None:
    """Return the name most like ``name`` among the names that a server lists, or None."""
    with contextlib.suppress(Exception):  # it is only for a message
        return nearest_name(name, listed(), alike=0.6)
    return None


def _choose(names: Collection[str], inner: str, where: str, refuse: Refuse) -> list[str]:
    """Return the files to download: the files at or below ``inner`` that lorac may read."""
    unread = _UNREAD + _DOUBLES * any(one.endswith(".safetensors") for one in names)
    below = [one for one in names if not inner or one == inner or one.startswith(f"{inner}/")]
    unsafe = next((one for one in below if not is_inner_name(one)), None)
    if unsafe is not None:
        how = "tell who made it, or download the files that you need, and give their path"
        raise refuse(f"{where} names the file {short(unsafe)}, which could lie outside its folder", next_step=how)
    chosen = [one for one in below if not any(fnmatch.fnmatch(one.removeprefix(f"{inner}/"), name) for name in unread)]
    if not chosen:
        known = sorted({*names, *(str(folder) for one in names for folder in [*PurePosixPath(one).parents][:-1])})
        near, how = nearest_name(inner, known), f"it has {list_some(known) or 'no files'}"
        raise refuse(f"{where} has nothing that lorac reads{inner and f' at {inner!r}'}", nearest=near, next_step=how)
    return chosen


def _check_size(file: str, size: int, said: int | None, refuse: Refuse) -> None:
    if said is not None and size != said:
        raise refuse(f"{file} has {size} bytes, and its server says {said}", next_step="remove it, and load it again")


def _find_at_address(address: str, refuse: Refuse) -> Path:
    """Return the path of the address's copy in the cache. A copy is never changed: other content gets another copy."""
    place, where = _find_cache() / _hash(address), short(address)
    if _is_offline():
        kept = sorted(place.glob("*/*"), key=lambda path: path.parent.stat().st_mtime)
        if not kept:
            raise refuse(f"{where} is not in the cache, and HF_HUB_OFFLINE is set", next_step="unset it")
        return kept[-1]
    with contextlib.ExitStack() as stack:
        content = _open_web(address, stack) if address.startswith("http") else _list_store(address)
        root = next(iter(content), "").partition("/")[0]
        chosen = _choose(content, root, where, refuse)
        check_download(sum(content[one][0] or 0 for one in chosen), where)
        copy, done = place / _hash(repr([(one, *content[one][:2]) for one in sorted(chosen)])), 0
        if not copy.exists():
            with replace_atomically(copy) as staged:
                for one, target in ((one, staged / one) for one in chosen):
                    step(one)
                    said = content[one][0]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with content[one][2]() as source, target.open("xb") as file:
                        while (said is None or file.tell() <= said) and (chunk := source.read(_CHUNK)):
                            check_download(done := done + len(chunk), where)
                            file.write(chunk)
                    _check_size(f"'{one}' of {where}", target.stat().st_size, said, refuse)
    return copy / root


def _find_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorac" / "names"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _list_store(address: str) -> _RemoteFiles:
    """Return the files at an address in a store, by their paths relative to the folder above the address."""
    with translate_import_errors():
        import fsspec

        importlib.import_module(_STORES[address.partition(":")[0]])
    store, root = fsspec.url_to_fs(address.rstrip("/"))
    store.invalidate_cache()
    found, above = store.find(root, detail=True), len(root.rpartition("/")[0]) + 1
    own = [(path, info) for path, info in found.items() if path == root or path.startswith(f"{root}/")]
    return {path[above:]: (info.get("size"), str(info), partial(store.open, path, "rb")) for path, info in own}


def _open_web(address: str, stack: contextlib.ExitStack) -> _RemoteFiles:
    """Return the file at an address. No credentials are sent."""
    if "@" in urlsplit(address).netloc:
        raise ValueError("lorac reads no address with a user's name or password")
    answer = stack.enter_context(urllib.request.build_opener(_SameHost).open(address, timeout=_TIMEOUT))
    size, headers = answer.headers["content-length"], answer.headers
    tag = headers["etag"] or headers["last-modified"] or str(time.time_ns())
    name = str(headers.get_filename() or unquote(urlsplit(address).path).rpartition("/")[2] or "file")
    return {name: (size and int(size), tag, partial(contextlib.nullcontext, answer))}


class _SameHost(urllib.request.HTTPRedirectHandler):
    """A handler that follows redirects only within a host, so that the address names the host that is read."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.netloc != old.netloc or new.scheme not in {"https", old.scheme}:
            raise ValueError(f"it leads to another host; if you trust that one, give {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_CARD_FIELDS = ("base_model", "license", "license_name", "license_link")


def push_folder(folder: Path, place: str, facts: Mapping[str, object], snippet: str, options: Mapping[str, Any]) -> str:
    """Upload a folder with a card to a repository, which is created if it does not exist; return the commit's address.

    Args:
        folder: the folder of the files, to which the card is added.
        place: the name of the folder in a repository, without its revision.
        facts: subject -> finding, for the card.
        snippet: Python that loads the folder, with ``{name!r}`` for its name.
        options: the options of ``push_to_hub``; ``base_model`` is the name of the base on the hub, or None.

    Raises:
        OptionError: there is no such option.
        MissingExtra: huggingface_hub is not installed.
        FormatError: the hub takes no files of that name from this user, or cannot be reached.
    """
    check_known(options, ("private", "revision", "token", "message", *_CARD_FIELDS), "push_to_hub has no argument")
    with translate_import_errors():
        import huggingface_hub as hub
    api, revision, message = hub.HfApi(token=options.get("token")), options.get("revision"), options.get("message")
    repo, code = "/".join(place.split("/")[:2]), snippet.format(name=f"{place}@{revision}" if revision else place)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        hashes[path.relative_to(folder).as_posix()] = f"SHA-256 `{digest}`"
    own = {name: options[name] for name in _CARD_FIELDS if name in options}
    header = hub.ModelCardData(library_name="lorac", tags=["lorac", "adapter"], **own).to_yaml()
    first, last = ("\n".join(f"| {name} | {text} |" for name, text in rows.items()) for rows in (facts, hashes))
    table = "| | |\n| --- | --- |\n"
    card = f"---\n{header}\n---\n\n# {repo}\n\n{table}{first}\n\n```python\n{code}\n```\n\n{table}{last}\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    refuse, how = partial(FormatError, code="unreadable"), "check the name, and log in: hf auth login, or HF_TOKEN"
    with translate_errors(refuse, f"'{repo}' cannot be written on the hub", next_step=how):
        api.create_repo(repo, private=options.get("private"), exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        made = api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    return str(made.commit_url)
