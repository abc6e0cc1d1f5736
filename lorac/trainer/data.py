"""The rows of a recipe, in the columns that TRL and transformers take."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorac.argument_types import matches_type
from lorac.errors import (
    OptionError,
    check_known,
    nearest_name,
    not_one_of,
    short,
    translate_errors,
    translate_import_errors,
)
from lorac.storage.remote import HubName, find_source, parse_name
from lorac.trainer.recipe import TASKS, DataSpec

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
READERS: Mapping[str, str] = {
    **{".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"},
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "imagefolder"),
}
"""Suffix -> the reader of ``datasets``."""
BUNDLED = ("python-docs", "python-source")
"""Names of texts bundled with Python."""
_ANSWERS = ("prompt", "completion")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_SOURCE: Mapping[str, Any] = {
    **{"path": str, "columns": Mapping[str, str] | None, "weight": float | None},
    **dict.fromkeys(("split", "name"), str | None),
}
"""Field of a place of rows -> its type."""
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("messages", "conversations", "images"), (list,)),
    **dict.fromkeys((*_ANSWERS, "chosen", "rejected"), (str, list)),
    **dict.fromkeys(("text", "instruction", "output"), (str,)),
}
"""Column -> the types of its values."""
_WORDS: Mapping[type, str] = {str: "a text", list: "a list", bool: "true or false", int: "a whole number"}
_TALKS = (*_ANSWERS, "chosen", "rejected", "messages")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_SOURCE_FILES = 200


def load_rows(
    data: DataSpec | Sequence[DataSpec], task: str, tokenizer: Any, arguments: Any, *, streaming: bool = False
) -> Any:
    """Load the rows of some data.

    Args:
        data: a name of ``BUNDLED``; a folder that ``datasets`` saved; a file or a folder of one of ``READERS``, perhaps
            compressed: a text is a row, and images lie in a folder for each label; or the name of a data set on the
            hub. ``{"path": ..., "columns": {<the task's column>: <the data's>}, "split": ..., "name": ...,
            "weight": ...}`` says more. Several are joined one after the other, or mixed where one has a weight: each
            row is drawn from one of them by its weight, until all rows of each were drawn.
        task: a key of ``TASKS``. ``instruction``, ``input`` and ``output`` become a prompt and its completion,
            ShareGPT's ``conversations`` become ``messages``; ``images`` are files, from the folder of their rows.
        tokenizer: transformers', or of images the processor.
        arguments: those of the trainer.
        streaming: read rows as they are needed, and check them then.

    Raises:
        OptionError: the data does not exist, cannot be read, or lacks the task's columns; the tokenizer lacks a
            chat template, or an end of text, which the rows need; a turn's content is not text.
        MissingExtra: ``datasets`` is not installed.
    """
    with translate_import_errors():
        import datasets
    places = [data] if isinstance(data, str | Mapping) else data
    given: list[dict[str, Any]] = [{"path": one} if isinstance(one, str) else dict(one) for one in places]
    if not given:
        raise OptionError("data names no rows", next_step=f"give a file, a folder, or {', '.join(BUNDLED)}")
    for one in given:
        check_known(one, _SOURCE, "data has no field")
        for name, kind in _SOURCE.items():
            value = one.get(name)
            if not matches_type(value, kind) or (name == "weight" and value is not None and value <= 0):
                what = f"data takes no {name}={short(value)}"
                raise OptionError(what, next_step="it takes a number above 0" if name == "weight" else "it takes text")
    weights = [one.get("weight") for one in given]
    found = [_load_source(one, task, tokenizer, arguments, streaming) for one in given]
    if len(found) > 1:
        shared = set.intersection(*({*_name_columns(rows)} for rows in found))
        found = [rows.select_columns([name for name in _name_columns(rows) if name in shared]) for rows in found]
        _find_columns([*shared], " and ".join(repr(one["path"]) for one in given), task, converted=True)
    with translate_errors(OptionError, "the data cannot be joined", next_step="give each the same kinds of columns"):
        if len(found) == 1 or not any(weights):
            rows = found[0] if len(found) == 1 else datasets.concatenate_datasets(found)
        else:
            parts = [weight or 1.0 for weight in weights]
            chances = [part / sum(parts) for part in parts]
            rows = datasets.interleave_datasets(found, chances, arguments.seed, stopping_strategy="all_exhausted")
    return _encode(rows, task, tokenizer) if task.endswith("classification") or task == "seq2seq" else rows


def _name_columns(rows: Any) -> list[str]:
    """Return the columns of rows; of streamed rows, those of the first."""
    return rows.column_names or list(next(iter(rows), ()))


def _find_columns(names: Sequence[str], data: str, task: str, *, converted: bool = False) -> tuple[str, ...]:
    """Return the columns of a task in some data; with ``converted``, the columns after the conversion of rows."""
    sets = [found for found in TASKS[task].columns if not (converted and {*found} & {"instruction", "conversations"})]
    columns = next((found for found in sets if {*found} <= {*names}), None)
    if columns is None:
        known = ", or ".join(" and ".join(found) for found in sets)
        found = f"the columns {', '.join(names)}" if names else "no row" if not converted else "no column in common"
        step = f"task: {task} takes {known}; columns: names those of yours that are called otherwise"
        raise OptionError(f"{data} has {found}", next_step=step)
    return columns


def _load_source(source: Mapping[str, Any], task: str, tokenizer: Any, arguments: Any, streaming: bool) -> Any:
    """Load the rows of one place, checked, with the task's columns."""
    import datasets

    data, own = source["path"], source.get("columns") or {}
    rows, folder = _read(source, streaming)
    if lacking := next((name for name in own.values() if name not in _name_columns(rows)), None):
        raise not_one_of(f"'{data}' has no column", lacking, _name_columns(rows))
    if own:
        rows = rows.remove_columns([name for name in own if name in rows.column_names and name not in own.values()])
        rows = rows.rename_columns({theirs: name for name, theirs in own.items()})
    names = _name_columns(rows)
    columns = _find_columns(names if streaming or len(rows) else (), f"'{data}'", task)
    kinds = {**_KINDS, "label": (bool, int) if task == "kto" else (str, int)}
    kinds |= dict.fromkeys(_ANSWERS, (str,)) if task == "seq2seq" else {}
    kinds = {name: kinds[name] for name in columns if name in kinds}

    def check(row: Row, number: int) -> Row:
        for name, kind in kinds.items():
            if not isinstance(row[name], kind):
                wanted = " or ".join(_WORDS.get(one, one.__name__) for one in kind)
                what = f"row {number + 1} of '{data}' has the {name} {short(row[name])}"
                raise OptionError(what, next_step=f"give it {wanted}, or leave the row out")
        return row

    if streaming:
        rows = rows.map(check, with_indices=True)
    for number, row in enumerate(() if streaming else rows.select_columns([*kinds])):
        check(row, number)
    if task.endswith("classification") or task == "seq2seq":
        return rows
    if "instruction" in columns:
        rows = rows.map(_ask, remove_columns=names)
    if "conversations" in columns:
        rows = rows.rename_column("conversations", "messages")
    if task == "vlm":
        rows = rows.map(lambda row, n: {"images": [*_find_images(row, n, folder)]}, with_indices=True)
        rows = rows.cast_column("images", datasets.List(datasets.Image()))
    first = next(iter(rows))
    talks = [name for name in _TALKS if isinstance(first.get(name), list)]
    needed, given = ("chat_template", "chat_template_path") if talks else ("eos_token", "eos_token")
    text = getattr(tokenizer, "tokenizer", tokenizer)
    if not (getattr(tokenizer, needed, None) or getattr(text, needed)) and getattr(arguments, given, None) is None:
        what = f"the rows of '{data}' need the tokenizer's {needed}, and it has none"
        step = "one of TRL's or a file, as `chat_template: chatml`" if talks else "a token, as `eos_token: </s>`"
        raise OptionError(what, next_step=f"give it in the recipe: {step}")
    if not talks:
        return rows

    def convert(row: Row, number: int) -> Row:
        return {name: _plain_turns(row[name], number + 1, images=task == "vlm") for name in talks}

    return rows.map(convert, with_indices=True)


def _find_images(row: Row, number: int, folder: Path) -> Iterator[Any]:
    for image in row["images"]:
        found = folder / image if isinstance(image, str) else image
        if isinstance(found, Path) and not found.is_file():
            what = f"row {number + 1} names the image {short(image)}, which '{folder}' does not have"
            raise OptionError(what, next_step="give paths from the folder of the rows' file")
        yield str(found) if isinstance(found, Path) else found


def check_ids(rows: Dataset, tokenizer: Any, size: int) -> None:
    """Check that an embedding of some size has the tokens of rows.

    Raises:
        OptionError: the tokenizer has more tokens, and a row holds one of these.
    """
    names = [name for name in rows.column_names if name.endswith("ids")] if len(tokenizer) > size else ()
    most = max((max(ids, default=0) for name in names for ids in rows[name]), default=0)
    if most >= size:
        raise OptionError(
            f"a row holds token {most}: the tokenizer has {len(tokenizer)} tokens, and the model's embedding {size}",
            next_step="give the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) first",
        )


def _read(source: Mapping[str, Any], streaming: bool) -> tuple[Any, Path]:
    """Read the rows of a place, and return them with the folder that they lie in."""
    import datasets

    data, split, name = source["path"], source.get("split"), source.get("name")
    options: dict[str, Any] = {"streaming": streaming}
    if data in BUNDLED:
        if data == "python-docs":
            from pydoc_data.topics import topics

            texts = [topics[name] for name in sorted(topics)]
        else:
            files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:_SOURCE_FILES]
            texts = [file.read_text("utf-8", "replace") for file in files]
        rows = datasets.Dataset.from_dict({"text": texts})
        return rows.to_iterable_dataset() if streaming else rows, Path()
    on_hub = isinstance(parse_name(data), HubName)
    path = find_source(data, "data", OptionError, repo_type="dataset")
    files = [file for file in sorted(path.rglob("*")) or [path] if _find_reader(file) and file.is_file()]
    kinds = {_find_reader(file) for file in files}
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    has_splits = (on_hub or split is not None or name is not None) and path.is_dir() and not is_saved
    if len(kinds) != 1 and not is_saved and not (kinds and has_splits):
        reason = "holds files of several kinds" if kinds else "holds no rows" if path.exists() else "does not exist"
        raise OptionError(
            f"the data '{data}' {reason}",
            nearest=nearest_name(data, BUNDLED, alike=0.6),
            next_step=f"give {', '.join(READERS)}, a folder of one kind, or {', '.join(BUNDLED)}",
        )
    with translate_errors(
        OptionError, f"'{data}' cannot be read", next_step="mend the file; its rows need the same fields"
    ):
        if is_saved:
            rows = datasets.load_from_disk(str(path))
        elif has_splits:  # as the folder's card and the names of its files say
            rows = datasets.load_dataset(str(path), name, **options)
        else:
            options |= {"sample_by": "document"} if kinds == {"text"} else {}
            rows = datasets.load_dataset(*kinds, data_files=[*map(str, files)], **options)
        if isinstance(rows, dict):
            check_known([split or "train"], rows, f"'{data}' has no split")
            rows = rows[split or "train"]
        if streaming and isinstance(rows, datasets.Dataset):
            rows = rows.to_iterable_dataset()
    return rows, path if path.is_dir() else path.parent


def _find_reader(file: Path) -> str | None:
    """Return the reader of a file, perhaps a compressed one."""
    return READERS.get((file.with_suffix("") if file.suffix.lower() in _COMPRESSED else file).suffix.lower())


def _ask(row: Row) -> Row:
    prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    turns = {"prompt": ("user", prompt), "completion": ("assistant", row["output"])}
    return {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}


def _plain_turns(turns: Sequence[Any], number: int, *, images: bool = False) -> list[Row]:
    """Give every turn of a row a role and a text: a template would print anything else as Python does."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise OptionError(f"the conversation of row {number} has no turns", next_step="leave its row out")
    plain = []
    for turn in turns:
        fields = dict(turn) if isinstance(turn, Mapping) else {"content": turn}
        role, content = fields.pop("from", fields.pop("role", None)), fields.pop("value", fields.pop("content", None))
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "".join(part["text"] for part in content)
        if images and isinstance(content, list) and any(isinstance(part, Mapping) for part in content):
            parts = [{key: value for key, value in part.items() if value is not None} for part in content]
            plain.append({**fields, "role": role, "content": parts})
            continue
        is_text = isinstance(content, str) or (content is None and fields.get("tool_calls"))
        if not isinstance(role, str) or not is_text:
            raise OptionError(
                f"a turn of row {number} has the role {short(role)} and the content {short(content)}",
                next_step="give each a role, and a text or parts of the type text as content",
            )
        plain.append({**fields, "role": _SHAREGPT.get(role, role), "content": content})
    return plain


def _encode(rows: Dataset, task: str, processor: Any) -> Dataset:
    """Return rows as a classifier takes them, with the label's number, or as a seq2seq model does."""
    from datasets import Value

    def encode(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        if task == "seq2seq":
            return processor(batch["prompt"], text_target=batch["completion"], truncation=True)
        if task == "sequence-classification":
            return processor(batch["text"], truncation=True)
        return processor([image.convert("RGB") for image in batch["image"]])

    if task == "seq2seq":
        return rows.map(encode, batched=True, remove_columns=_name_columns(rows))
    if rows.features["label"] == Value("string"):
        rows = rows.class_encode_column("label")
    others = [name for name in rows.column_names if name != "label"]
    encoded = rows.rename_column("label", "labels").map(encode, batched=True, remove_columns=others)
    return encoded if task == "sequence-classification" else encoded.with_format("torch")
