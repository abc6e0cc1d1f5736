"""The rows of a recipe, in the columns that TRL and transformers take."""

from __future__ import annotations

import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorac.errors import OptionError, nearest_name, short, translate_errors, translate_import_errors
from lorac.storage.paths import parse_path

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
COLUMNS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "sft": (("text",), ("messages",), ("prompt", "completion"), ("instruction", "output"), ("conversations",)),
    "dpo": (("chosen", "rejected"),),
    "kto": (("prompt", "completion", "label"),),
    "sequence-classification": (("text", "label"),),
    "image-classification": (("image", "label"),),
}
"""Task -> the sets of columns that its rows may have."""
READERS: Mapping[str, str] = {
    **{".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text", ".md": "text"},
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".bmp"), "imagefolder"),
}
"""Suffix -> the reader of ``datasets``."""
BUNDLED = ("python-docs", "python-source")
"""Names of texts bundled with Python."""
_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("messages", "conversations"), (list,)),
    **dict.fromkeys(("prompt", "completion", "chosen", "rejected"), (str, list)),
    **dict.fromkeys(("text", "instruction", "output"), (str,)),
}
"""Column -> the types of its values."""
_TALKS = ("prompt", "completion", "chosen", "rejected", "messages")
_SHAREGPT = {"human": "user", "gpt": "assistant"}
_SOURCE_FILES = 200


def load_rows(data: str, task: str, tokenizer: Any, arguments: Any) -> Dataset:
    """Load the rows of some data.

    Args:
        data: a name of ``BUNDLED``; a folder that ``datasets`` saved; or a file or a folder of one of ``READERS``: a
            text is a row, and images lie in a folder for each label.
        task: a key of ``COLUMNS``. ``instruction``, ``input`` and ``output`` become a prompt and its completion,
            ShareGPT's ``conversations`` become ``messages``.
        tokenizer: transformers', or of images the processor.
        arguments: those of the trainer.

    Raises:
        OptionError: the data does not exist, cannot be read, or lacks the task's columns; the tokenizer lacks a
            chat template, or an end of text, which the rows need; a turn's content is not text.
        MissingExtra: ``datasets`` is not installed.
    """
    rows = _read(data)
    columns = next((found for found in COLUMNS[task] if {*found} <= {*rows.column_names}), None)
    if columns is None or not len(rows):
        known = ", or ".join(" and ".join(found) for found in COLUMNS[task])
        found = f"the columns {', '.join(rows.column_names)}" if len(rows) else "no row"
        raise OptionError(f"'{data}' has {found}", next_step=f"task: {task} takes {known}")
    kinds = {**_KINDS, "label": (bool, int) if task == "kto" else (str, int)}
    for name in (name for name in columns if name in kinds):
        wrong = next(((n, value) for n, value in enumerate(rows[name], 1) if not isinstance(value, kinds[name])), None)
        if wrong is not None:
            names = " or ".join(kind.__name__ for kind in kinds[name])
            what = f"row {wrong[0]} of '{data}' has the {name} {short(wrong[1])}"
            raise OptionError(what, next_step=f"give it a value of Python's type {names}, or leave the row out")
    if task.endswith("classification"):
        return _encode(rows, task, tokenizer)
    if "instruction" in columns:
        rows = rows.map(_ask, remove_columns=rows.column_names)
    if "conversations" in columns:
        rows = rows.rename_column("conversations", "messages")
    talks = [name for name in _TALKS if name in rows.column_names and isinstance(rows[0][name], list)]
    needed, given = ("chat_template", "chat_template_path") if talks else ("eos_token", "eos_token")
    if not getattr(tokenizer, needed) and getattr(arguments, given, None) is None:
        what = f"the rows of '{data}' need the tokenizer's {needed}, and it has none"
        raise OptionError(what, next_step=f"name one by {given}:")
    if not talks:
        return rows
    return rows.map(lambda row, n: {name: _plain_turns(row[name], n + 1) for name in talks}, with_indices=True)


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


def _read(data: str) -> Dataset:
    with translate_import_errors():
        import datasets
    if data == "python-docs":
        from pydoc_data.topics import topics

        return datasets.Dataset.from_dict({"text": [topics[name] for name in sorted(topics)]})
    if data == "python-source":
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:_SOURCE_FILES]
        return datasets.Dataset.from_dict({"text": [file.read_text("utf-8", "replace") for file in files]})
    path = parse_path(data, "data", OptionError)
    files = [file for file in sorted(path.rglob("*")) or [path] if file.suffix.lower() in READERS and file.is_file()]
    kinds = {READERS[file.suffix.lower()] for file in files}
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if len(kinds) != 1 and not is_saved:
        reason = "holds files of several kinds" if kinds else "holds no rows" if path.exists() else "does not exist"
        raise OptionError(
            f"'{data}' {reason}",
            nearest=nearest_name(data, BUNDLED, alike=0.6),
            next_step=f"give {', '.join(READERS)}, a folder of one kind, or {', '.join(BUNDLED)}",
        )
    options = {"sample_by": "document"} if kinds == {"text"} else {}
    with translate_errors(OptionError, f"'{data}' cannot be read", next_step="give every row the same fields"):
        if is_saved:
            rows = datasets.load_from_disk(str(path))
        else:
            rows = datasets.load_dataset(*kinds, data_files=[*map(str, files)], **options)
    return rows["train"] if isinstance(rows, dict) else rows


def _ask(row: Row) -> Row:
    prompt = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
    turns = {"prompt": ("user", prompt), "completion": ("assistant", row["output"])}
    return {name: [{"role": role, "content": text}] for name, (role, text) in turns.items()}


def _plain_turns(turns: Sequence[Any], number: int) -> list[Row]:
    """Give every turn of a row a role and a text: a template would print anything else as Python does."""
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise OptionError(f"the conversation of row {number} has no turns", next_step="leave its row out")
    plain = []
    for turn in turns:
        fields = dict(turn) if isinstance(turn, Mapping) else {"content": turn}
        role, content = fields.pop("from", fields.pop("role", None)), fields.pop("value", fields.pop("content", None))
        if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
            content = "".join(part["text"] for part in content)
        is_text = isinstance(content, str) or (content is None and fields.get("tool_calls"))
        if not isinstance(role, str) or not is_text:
            raise OptionError(
                f"a turn of row {number} has the role {short(role)} and the content {short(content)}",
                next_step="give each a role, and a text or parts of the type text as content",
            )
        plain.append({**fields, "role": _SHAREGPT.get(role, role), "content": content})
    return plain


def _encode(rows: Dataset, task: str, processor: Any) -> Dataset:
    """Return rows as a classifier takes them, with the label's number."""
    from datasets import Value

    def encode(batch: Mapping[str, list[Any]]) -> Mapping[str, Any]:
        if task == "sequence-classification":
            return processor(batch["text"], truncation=True)
        return processor([image.convert("RGB") for image in batch["image"]])

    if rows.features["label"] == Value("string"):
        rows = rows.class_encode_column("label")
    others = [name for name in rows.column_names if name != "label"]
    encoded = rows.rename_column("label", "labels").map(encode, batched=True, remove_columns=others)
    return encoded if task == "sequence-classification" else encoded.with_format("torch")
