"""Tokenizers: the model's own, as it was given or as an artefact holds it, loaded when it is first asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorac.errors import ArtifactError, MissingExtra, WrongType, short
from lorac.storage.open_file import OpenFile

TOKENIZER_FOLDER = "tokenizer"
"""Where an artefact has its files."""


@dataclass(frozen=True)
class TokenizerFiles:
    """A tokenizer as an artefact holds it.

    Attributes:
        files: its files by name, held.
    """

    files: Mapping[str, OpenFile]

    @classmethod
    def among(cls, files: Mapping[str, OpenFile]) -> TokenizerFiles | None:
        """Those of an artefact's files that are the tokenizer's; None where there are none."""
        own = {name: file for name, file in files.items() if name.startswith(f"{TOKENIZER_FOLDER}/")}
        return cls({name.removeprefix(f"{TOKENIZER_FOLDER}/"): file for name, file in own.items()}) if own else None

    def save_pretrained(self, folder: Path) -> None:
        """Write the files into a folder, as they are."""
        for name, file in self.files.items():
            file.copy_to(folder / name)

    def loaded(self) -> Any:
        """The tokenizer, of a class of transformers' own: nothing that the files name is run.

        Raises:
            MissingExtra: transformers is not installed.
            ArtifactError: the files are no tokenizer that it knows.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder))
            try:
                return read_tokenizer(Path(folder))
            except MissingExtra:
                raise
            except Exception as error:  # whatever files that anybody may have written make transformers raise
                reason = str(error).strip().partition("\n")[0]
                raise ArtifactError(
                    f"the artefact's tokenizer cannot be loaded: {reason}",
                    next_step="load it elsewhere, and give it: compiled.tokenizer = ...",
                ) from error


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder, of a class of transformers' own.

    Raises:
        MissingExtra: transformers is not installed.
        Exception: the files are none that it reads.
    """
    try:
        from transformers import AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingExtra("transformers", "hf") from error
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def tokenizer_writer(tokenizer: Any) -> Callable[[Path], object] | None:
    """What writes a tokenizer into a folder; None where there is none.

    Raises:
        WrongType: it has no such method.
    """
    if tokenizer is None:
        return None
    write: Callable[[Path], object] | None = getattr(tokenizer, "save_pretrained", None)
    if not callable(write):
        raise WrongType(
            f"the tokenizer is {short(tokenizer)}, which cannot be saved",
            next_step="give one of transformers', or anything with save_pretrained(folder)",
        )
    return write
