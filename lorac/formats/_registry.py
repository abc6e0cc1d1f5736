"""The registry of formats, and functions that read and write adapters in any of them.

Formats are looked up by name at each call, so a format may read adapters of another format.
"""

import functools
import importlib
import operator
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from lorac.adapters.fit import check_values
from lorac.argument_types import check_type
from lorac.discovery import find_classes, list_entry_points
from lorac.errors import FormatError, LoracError, OptionError, WrongType, nearest_name, warn
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._format import Evidence, Format
from lorac.formats._outlines import AdapterOutline
from lorac.formats.checkpoint import CheckpointFormat
from lorac.formats.reading import PICKLES, AdapterFile
from lorac.frontend.model_view import Model, ModelView
from lorac.limits import charge_reading
from lorac.storage.atomic_folders import MANIFEST, read_consistently, replace_atomically
from lorac.storage.paths import parse_path, suggest_name, translate_os_errors
from lorac.storage.remote import find_source
from lorac.variants.adapter import Adapter
from lorac.variants.base import invocation_of

T = TypeVar("T")
_INVERSION = frozenset({"emb_params", "string_to_param", "clip_l"})
"""Names in files of textual inversion, by their trainers."""
GROUP = "lorac.formats"
"""The package of lorac's own formats, and the entry-point group of others."""


@functools.cache
def formats() -> dict[str, Format]:
    """Return every format by name: lorac's own, then those of other packages.

    A format of another package that cannot be imported is skipped with a warning. One of lorac's own takes precedence
    over another package's of the same name.
    """
    classes = find_classes(importlib.import_module(GROUP), Format)  # type: ignore[type-abstract]  # as a root
    known = {cls.name: cls() for cls in sorted(classes, key=operator.attrgetter("name"))}
    for name, entry_point in list_entry_points(GROUP).items():
        if name in known:
            continue
        try:
            offered = entry_point.load()
            step = "it must be an instance of a subclass of Format"
            check_type(offered, Format, "its entry point", next_step=step)
            known[name] = offered
        except Exception as error:  # importing another package's code may raise any exception
            warn(f"the format '{name}' of another package is left out: {type(error).__name__}: {error}")
    return known


def load_adapter(
    path: str | os.PathLike[str], model: Model | None = None, name: str | None = None, *, fix_names: bool = False
) -> Adapter:
    """Read an adapter of any format.

    Every tensor is used or covered by a rule of the format, and every configuration field is known. With the model,
    every site, shape and recorded base hash is checked too. Memory and time beyond the size of the file are limited, by
    ``lorac.budget``.

    Args:
        path: a PEFT folder, a file of lorac's own, or any other format of ``formats()``; or a name on the hub, in a
            store or on a web server, such as ``user/repo@revision`` or ``s3://bucket/folder``, which is downloaded.
        model: the base model of the adapter, a copy of it, or its components by name; it is only read.
        name: the adapter's name; by default the name of the folder, or the name that the file records.
        fix_names: replace the layer names of a PEFT file by the model's where the two differ: by a prefix that moved or
            is doubled, or by names that DDP or torch.compile add. Ambiguous names are refused.

    Returns:
        The adapter. Its tensors have the file's dtype, matrices the shape (out, in).

    Raises:
        FormatError: the file is damaged, of an unknown format, or has content that no rule of the format covers.
        AdapterError: a tensor does not fit its site, or the adapter was trained on other base weights.
        SiteError: the model lacks a site, or lorac cannot adapt it.
    """
    view = None if model is None else ModelView.of(model, resizes=True)
    return _read(path, lambda file: _read_adapter(file, view, name, fix_names=fix_names))


def load_checkpoint(path: str | os.PathLike[str], model: Model | None = None) -> dict[str, Adapter]:
    """Load every adapter of a Trainer checkpoint by its name; raises as ``load_adapter``."""
    view = None if model is None else ModelView.of(model)
    return _read(path, lambda file: CheckpointFormat().read_all(file, view))


def outline_adapter(path: str | os.PathLike[str], model: Model, name: str) -> AdapterOutline:
    """Read an adapter as ``load_adapter`` does but without its values: tensors stay on the meta device where possible.

    Raises:
        FormatError, AdapterError, SiteError: as ``load_adapter``.
    """
    view = ModelView.of(model)
    return _read(path, lambda file: AdapterOutline(file.path, lambda file: _read_adapter(file, view, name)))


def read_values(
    path: str | os.PathLike[str], outlines: Mapping[bytes, AdapterOutline]
) -> tuple[AdapterOutline, Tensor] | None:
    """Read the values of an adapter whose headers match those of an outline.

    Args:
        outlines: by the hash of the headers (``AdapterFile.hash_headers``).

    Returns:
        The outline and the values (``AdapterOutline.read_values``); None if no outline has its headers, or if the file
        has to be read by its format.

    Raises:
        FormatError, AdapterError: as ``load_adapter``.
    """

    def read(file: AdapterFile) -> tuple[AdapterOutline, Tensor] | None:
        outline = outlines.get(file.hash_headers()[0])
        values = None if outline is None else outline.read_values(file)
        return None if outline is None or values is None else (outline, values)

    return _read(path, read)


def _read(path: str | os.PathLike[str], read: Callable[[AdapterFile], T]) -> T:
    path = find_source(path, "the path of lorac.load_adapter", FormatError, "unreadable")
    with translate_os_errors(path, FormatError, "read", "unreadable"):
        return read_consistently(path, lambda: charge_reading(path, lambda: read(AdapterFile(path))))


def _read_adapter(file: AdapterFile, view: ModelView | None, name: str | None, *, fix_names: bool = False) -> Adapter:
    format = _find_format(file)
    try:
        adapter = (format.read_renamed if fix_names else format.read)(file, view, name)
    except (OptionError, WrongType) as error:  # a hyper-parameter value that the method does not accept
        fault, nearest = f"'{file}': {error.what}", error.nearest
        raise unsupported_error(fault, nearest=nearest, next_step=error.next_step) from error
    except (LoracError, OSError):
        raise
    except Exception as error:
        if type(format).__module__.startswith("lorac."):
            raise
        raise corrupt_error(
            f"'{file}' cannot be read as '{format.name}': {type(error).__name__}: {error}",
            next_step="copy or download the file again; if it is whole, tell the author of the format",
        ) from error
    if view is None:
        check_values(adapter)
    return adapter


def save_adapter(
    adapter: Adapter, path: str | os.PathLike[str], format: str = "peft", model: Model | None = None
) -> None:
    """Write an adapter; equal adapters give equal bytes.

    The files are written under a temporary name and then renamed, so an error leaves the old files unchanged. An
    existing folder keeps the files that do not belong to an adapter.

    Args:
        path: the folder ("peft") or file ("native").
        model: the base model, whose hash is recorded with the adapter. It is required where the format has its own
            layout for convolutions or embeddings and the adapter was not read from a file.

    Raises:
        FormatError: the format does not exist or cannot store the adapter, or the operating system refuses the file.
        BaseNeeded: the format needs the model.
        WrongType: ``adapter`` is not an adapter.
        AdapterError, SiteError: the adapter does not fit the model.
    """
    check_type(adapter, Adapter, "the adapter to save", next_step="give one of compiled.adapters.values()")
    writable = {name: found for name, found in formats().items() if found.writes}
    if format not in writable:
        raise FormatError(
            f"adapters cannot be saved in the format '{format}'",
            nearest=nearest_name(format, writable),
            next_step=f"formats to save in: {', '.join(writable)}",
            code="unknown_format",
        )
    if invocation_of(adapter.variant) and not writable[format].invocations:
        raise unsupported_error(
            f"adapter '{adapter.name}' has invocation_tokens, which the format '{format}' cannot store",
            next_step=f"save it as {' or '.join(name for name, one in writable.items() if one.invocations)}",
        )
    target = parse_path(path, "the path of lorac.save_adapter", FormatError, "unreadable")
    view = None if model is None else ModelView.of(model, resizes=True)
    with translate_os_errors(target, FormatError, "written", "unreadable"), replace_atomically(target) as staged:
        writable[format].write(adapter, staged, view, target)
        if target.is_file() if staged.is_dir() else target.is_dir():
            kind = "a file" if staged.is_dir() else "a folder"
            raise FormatError(
                f"'{target}' is {kind}, which the format '{format}' does not write", next_step="give another path"
            )


def is_adapter(path: Path) -> bool:
    """Return whether any format recognises a file or folder."""
    file = AdapterFile(path)
    return any(format.recognises(file) for format in formats().values())


def _find_format(file: AdapterFile) -> Format:
    path = file.path
    if not path.exists():
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        raise FormatError(
            f"there is no adapter at '{path}'",
            nearest=nearest_name(path.name, [sibling.name for sibling in siblings]),
            next_step=suggest_name(path) or "give the path of a file or folder",
            code="unknown_format",
        )
    for evidence in Evidence:  # weaker evidence is considered only where no format has stronger evidence
        matching = [f for f in formats().values() if f.evidence is evidence and f.recognises(file)]
        found = [one for one in matching if one.name not in {other.refines for other in matching}]
        if len(found) > 1:
            raise FormatError(
                f"'{path}' fits two formats: '{found[0].name}' ({found[0].looks_for}) and '{found[1].name}' "
                f"({found[1].looks_for})",
                next_step="move the files or tensors of one of them into another folder",
                code="unknown_format",
            )
        if found:
            return found[0]
    if file.is_file and file.suffix == ".safetensors":
        file.header  # noqa: B018  (the error for a damaged file says more)
    kind, separator, step = (_describe_other(file) or "").partition(": ")
    raise FormatError(
        f"'{path}' is {kind}"
        if separator
        else f"'{path}' is an adapter of no known format; docs/formats.md says how formats are recognised: "
        + ", ".join(formats()),
        next_step=step or "give the folder that PEFT wrote, or a file of lorac's own",
        code="unknown_format",
    )


def _describe_other(file: AdapterFile) -> str | None:
    """Return the kind of a path that is not an adapter and the next step, where it is a common mistake; else None."""
    if not file.path.is_dir() and not file.path.is_file():
        return "neither a file nor a folder: give the path of one"
    names = file.peek_names()
    lone = [name for name in sorted(file.names or {file.path.name}) if name.startswith("adapter_model.")]
    if lone or any(".lora_A." in name for name in names):
        return f"without adapter_config.json next to {(lone or [file.path.name])[0]}: download the whole folder"
    if _INVERSION & names or any(name.startswith("<") and name.endswith(">") for name in names):
        return "an embedding of textual inversion, not an adapter: load_textual_inversion of a pipeline loads it"
    path = file.path
    inner = sorted(path.iterdir()) if path.is_dir() else [path]
    if not inner:
        return "an empty folder: give the one that PEFT wrote"
    if path.name == MANIFEST or (path / MANIFEST).is_file():
        return "a compiled model, not an adapter: lorac.load(folder) runs it, with its adapters in it"
    # PEFT writes an adapter that is not named 'default' into a subfolder with the adapter's name.
    if nested := [one for one in inner if one != path and is_adapter(one)]:
        return f"a folder of adapters: did you mean {', '.join(repr(str(one)) for one in nested[:3])}?"
    if (path / "config.json").is_file():
        return "a model, not an adapter: give the folder that PEFT wrote of the adapter, or a file of lorac's own"
    if any(name.endswith("norm.weight") for name in names):
        return "the weights of a whole model: `lorac extract TUNED BASE OUT` makes an adapter of the folders of two"
    is_pickle = file.suffix in PICKLES and path.is_file()
    other = "a pickle of no known adapter: give the folder that PEFT wrote, or a file of lorac's own"
    return file.describe_mistake() or (other if is_pickle else None)
