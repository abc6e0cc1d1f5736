"""Adapters without values, into which the values of files with the same headers are read.

A format reads the headers of one file and checks everything except the values. For another file with the same headers
and configuration only the values are read and checked, if the adapter's tensors are the file's tensors unchanged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lorac.adapters.fit import check_finite, find_infinite_sums
from lorac.adapters.stored import AdapterStructure
from lorac.errors import LoracError
from lorac.formats.reading import AdapterFile, Outline, mismatched_seal
from lorac.limits import pause_clock
from lorac.storage.tensor_file import raw_bytes
from lorac.storage.tensor_hash import agrees_with_hash, describe_tensor, hash_described
from lorac.variants.adapter import Adapter


class AdapterOutline(AdapterStructure):
    """An adapter whose values have not been read; where the format needs the values, the adapter is read completely.

    Args:
        path: the file or folder.
        read: a function that reads the adapter by its format.

    Attributes:
        adapter: the adapter; its tensors are on the meta device unless the format reads their values.
        sites, replaced: the adapter's tensors by their names in the file; None if the adapter consists of several
            files, or if its format computes its tensors.
    """

    def __init__(self, path: Path, read: Callable[[AdapterFile], Adapter]) -> None:
        outline = Outline()
        self.sites: Mapping[str, Mapping[str, str]] | None = None
        self.replaced: Mapping[str, str] = {}
        try:
            self.adapter = read(AdapterFile(path, outline))
        except (LoracError, NotImplementedError, RuntimeError):  # the format reads values, or the file is damaged
            self.adapter = read(AdapterFile(path))
            return
        if len(outline.files) != 1 or len(outline.sealed) > 1:
            return
        [(file, tensors)] = outline.files.items()
        self._inside = None if file.path == path else file.path.name
        self._header, places = file.common_header, file.header.places
        self._dtype = next(iter(tensors.values())).dtype if tensors else torch.bool
        keys = {id(tensor): key for key, tensor in tensors.items() if tensor.dtype == self._dtype}
        # Integers may be positions, which have to be checked.
        if not self._dtype.is_floating_point or not all(id(tensor) in keys for tensor in self.adapter.parameters()):
            return
        if len(keys) != len(tensors) or any(names != tensors.keys() for _, names in outline.sealed):
            return
        self._sealed = outline.sealed[0][0] if outline.sealed else None
        first, itemsize = min(place.begin for place in places.values()), self._dtype.itemsize
        self._nbytes = sum(place.size for place in places.values())
        self._spans = {
            key: (begin := (place.begin - first) // itemsize, begin + place.size // itemsize, tuple(place.shape))
            for key, place in sorted(places.items())
        }
        self._described = [describe_tensor(key, self._dtype, shape) for key, (_, _, shape) in self._spans.items()]
        self.replaced = {name: keys[id(tensor)] for name, tensor in self.adapter.replaced.items()}
        self.sites = {
            path: {name: keys[id(tensor)] for name, tensor in at.items()} for path, at in self.adapter.tensors.items()
        }

    def read_values(self, file: AdapterFile) -> torch.Tensor | None:
        """Read and check the values of another file with the same headers (``AdapterFile.hash_headers``).

        Returns:
            The values in the order of the file; None if the file has to be read by its format.

        Raises:
            FormatError: the values differ from those that lorac sealed.
            AdapterError: a value is NaN or infinite.
        """
        if self.sites is None:
            return None
        weights = file if self._inside is None else file.inside(self._inside)
        header, block = weights.common_header, weights.read_values()
        if block.nbytes != self._nbytes:
            return None
        values, raw, size = block.view(self._dtype), raw_bytes(block), self._dtype.itemsize
        with pause_clock():
            if find_infinite_sums({"all": values}):
                check_finite(self._view(values), f"'{weights}'")
            if header.seal is not None and self._sealed is not None:
                text = self._sealed.replace(f'"name":"{self._header.name}"', f'"name":"{header.name}"', 1)
                parts = [raw[begin * size : end * size] for begin, end, _ in self._spans.values()]
                hashed = hash_described(text, self._described, parts)
                if hashed != header.seal and not agrees_with_hash(header.seal, text, self._view(values)):
                    raise mismatched_seal(weights.path)
        return values

    def make_adapter(self, name: str, values: torch.Tensor) -> Adapter:
        assert self.sites is not None
        tensors = self._view(values)
        return Adapter(
            name,
            self.adapter.variant,
            {path: {own: tensors[key] for own, key in keys.items()} for path, keys in self.sites.items()},
            {own: tensors[key] for own, key in self.replaced.items()},
            dict(self.adapter.provenance),
        )

    def _view(self, values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {key: values[begin:end].view(shape) for key, (begin, end, shape) in self._spans.items()}
