"""The base class of file formats."""

import enum
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from lorac.errors import FormatError
from lorac.formats._errors import unsupported_error
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant


class Evidence(enum.IntEnum):
    """The kinds of evidence by which formats recognise their files, the strongest first."""

    METADATA = 0
    """Metadata that lorac writes."""
    LAYOUT = 1
    """The name of a file, its first bytes, or a configuration."""
    NAMES = 2
    """The names of tensors."""


class Format(ABC):
    """A way of storing an adapter on disk.

    A concrete subclass in a module of ``lorac.formats`` is registered. Another package registers a format by an entry
    point of the group ``lorac.formats``: the name of the format, and ``module:object`` of an instance.

    Attributes:
        name: the value of ``save_adapter(format=)`` that selects this format.
        looks_for: the evidence that ``recognises`` checks, as a phrase for error messages.
        methods: the methods whose adapters the files can store, for the documentation.
        written_by: the tools that write such files, for the documentation.
        evidence: the kind of that evidence. Of several formats that recognise a file, the strongest evidence wins.
        magic: an offset, and the bytes at that offset by which ``recognises`` identifies the files of the format.
        invocations: whether the files store invocation tokens, the token ids after which an adapter acts.
        refines: a format that also recognises these files; this format takes precedence over it.
    """

    name: ClassVar[str]
    looks_for: ClassVar[str]
    methods: ClassVar[tuple[type[Variant], ...]] = ()
    written_by: ClassVar[str] = ""
    evidence: ClassVar[Evidence] = Evidence.NAMES
    magic: ClassVar[tuple[int, bytes] | None] = None
    invocations: ClassVar[bool] = False
    refines: ClassVar[str | None] = None

    def recognises(self, file: AdapterFile) -> bool:
        """Return whether an existing file or folder is of this format.

        This method is cheap, and never raises on a damaged file. A format without ``magic`` overrides it.
        """
        return self.magic is not None and file.begins(self.magic[1], at=self.magic[0])

    @abstractmethod
    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        """Return the adapter; where the model is given, call ``check_adapter`` on it first.

        An exception that is not one of lorac's is reported as a damaged file.

        Args:
            file: a file or folder of this format.
            view: the base model of the adapter, if it is given; it is only read.
            name: the name of the adapter; None for the name that the file records, or ``file.adapter_name``.
        """

    def read_renamed(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        """Return the adapter as ``read`` does, with the model's names in place of the file's where the two differ."""
        raise unsupported_error(
            f"lorac repairs names only in PEFT's folders, and '{file}' is of the format '{self.name}'",
            next_step="write it as one first: `lorac convert ADAPTER OUT --to peft`",
        )

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write a file or folder; a format that does not override this method is read-only.

        Args:
            path: the path to write, which does not exist yet.
            view: the base model of the adapter, if it is given.
            target: the path to which ``path`` is moved afterwards.
        """
        raise FormatError(
            f"adapters cannot be saved in the format '{self.name}'",
            next_step="save in another format",
            code="unknown_format",
        )

    @property
    def writes(self) -> bool:
        """Whether adapters can be saved in this format."""
        return type(self).write is not Format.write
