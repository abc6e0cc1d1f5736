"""The model's tokenizer: from the caller, or from an artifact and loaded on first use."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorac.errors import ArtifactError, MissingExtra, WrongType, short, translate_import_errors, warn
from lorac.storage.open_file import OpenFile

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FOLDER = "tokenizer"
"""The artifact's folder of tokenizer files."""
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Files of a processor; it writes one of them beside its tokenizer."""


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer files of an artifact."""

    files: Mapping[str, OpenFile]

    @classmethod
    def among(cls, files: Mapping[str, OpenFile]) -> TokenizerFiles | None:
        """Return the tokenizer among an artifact's files, or None."""
        prefix = f"{TOKENIZER_FOLDER}/"
        own = {name.removeprefix(prefix): file for name, file in files.items() if name.startswith(prefix)}
        return cls(own) if own else None

    def save_pretrained(self, folder: Path) -> None:
        """Write the files into a folder, unchanged."""
        for name, file in self.files.items():
            file.copy_to(folder / name)

    def load(self) -> Any:
        """Load the tokenizer, or the processor, as one of transformers' own classes; no code that files name is run.

        Raises:
            MissingExtra: transformers is not installed.
            ArtifactError: transformers cannot read the files.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder))
            try:
                return read_processor(Path(folder))
            except MissingExtra:
                raise
            except Exception as error:  # for malformed files transformers raises errors of many types
                reason = str(error).strip().partition("\n")[0]
                raise ArtifactError(
                    f"the artifact's tokenizer cannot be loaded: {reason}",
                    next_step="load it elsewhere, and give it: compiled.tokenizer = ...",
                ) from error


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer from a folder, as one of transformers' own classes.

    Raises:
        MissingExtra: transformers is not installed.
        Exception: transformers cannot read the files.
    """
    with translate_import_errors():
        from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def read_processor(folder: Path) -> Any:
    """Load the processor from a folder, else the tokenizer; raises as ``read_tokenizer``.

    Where a processor's libraries are not installed, such as those for images, warn and load the tokenizer.
    """
    if any((folder / name).is_file() for name in _PROCESSOR_FILES):
        from transformers import AutoProcessor

        try:
            return AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except ImportError as error:
            reason = str(error).strip().partition("\n")[0]
            warn(f"the model's processor is left out, and text alone is read: {reason}")
    return read_tokenizer(folder)


def find_inner_tokenizer(processor: Any) -> Any:
    """Return a processor's tokenizer; return a tokenizer unchanged."""
    return getattr(processor, "tokenizer", processor)


def tokenizer_writer(tokenizer: object) -> Callable[[Path], object] | None:
    """Return the function that writes a tokenizer into a folder; None without a tokenizer.

    Raises:
        WrongType: the tokenizer has no such method.
    """
    if tokenizer is None:
        return None
    write: Callable[[Path], object] | None = getattr(tokenizer, "save_pretrained", None)
    if not callable(write):
        raise WrongType(
            f"the tokenizer is {short(tokenizer)}, which cannot be saved",
            next_step="give one of transformers, or anything with save_pretrained(folder)",
        )
    return write
