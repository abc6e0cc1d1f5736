"""Adapters without values; files with the same headers fill them.

A format reads the headers of one file and checks all but the values. Of another file with the same headers and
configuration the values alone are read and checked, if the adapter holds the tensors of its file as they are.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from lorac.adapters.fit import check_finite, find_infinite_sums
from lorac.errors import LoracError
from lorac.formats.reading import AdapterFile, Outline, mismatched_seal
from lorac.limits import pause_clock
from lorac.storage.tensor_file import raw_bytes
from lorac.storage.tensor_hash import agrees_with_hash, describe_tensor, hash_described
from lorac.variants.adapter import Adapter


class AdapterOutline:
    """An adapter whose values were not read; some formats allow that.

    Args:
        path: the file or folder.
        read: reads it by its format.

    Attributes:
        adapter: the adapter; its tensors are on the meta device unless the format looks at their values.
        sites, replaced: the adapter's tensors by their names in the file; None if the adapter lies in several files, or
            its format computes its tensors.
    """

    def __init__(self, path: Path, read: Callable[[AdapterFile], Adapter]) -> None:
        outline = Outline()
        self.sites: Mapping[str, Mapping[str, str]] | None = None
        self.replaced: Mapping[str, str] = {}
        try:
            self.adapter = read(AdapterFile(path, outline))
        except (LoracError, NotImplementedError, RuntimeError):  # the format looks at values, or the file is damaged
            self.adapter = read(AdapterFile(path))
            return
        if len(outline.files) != 1 or len(outline.sealed) > 1:
            return
        [(file, tensors)] = outline.files.items()
        self._inside = None if file.path == path else file.path.name
        self._header, places = file.common_header, file.header.places
        self._dtype = next(iter(tensors.values())).dtype if tensors else torch.bool
        keys = {id(tensor): key for key, tensor in tensors.items() if tensor.dtype == self._dtype}
        # Whole numbers may be positions, which are to be checked.
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

    def fill(self, file: AdapterFile, name: str) -> Adapter | None:
        """Return the adapter of another file with the same headers (``AdapterFile.hash_headers``).

        Returns:
            It with the values of the file, which are checked; None if its format has to read the file.

        Raises:
            FormatError: the values are not those that lorac sealed.
            AdapterError: a value is NaN or infinite.
        """
        if self.sites is None:
            return None
        weights = file if self._inside is None else file.inside(self._inside)
        header, block = weights.common_header, weights.read_values()
        if block.nbytes != self._nbytes:
            return None
        flat, raw, size = block.view(self._dtype), raw_bytes(block), self._dtype.itemsize
        tensors = {key: flat[begin:end].view(shape) for key, (begin, end, shape) in self._spans.items()}
        with pause_clock():
            if find_infinite_sums({"all": flat}):
                check_finite(tensors, f"'{weights}'")
            if header.seal is not None and self._sealed is not None:
                text = self._sealed.replace(f'"name":"{self._header.name}"', f'"name":"{header.name}"', 1)
                values = [raw[begin * size : end * size] for begin, end, _ in self._spans.values()]
                hashed = hash_described(text, self._described, values)
                if hashed != header.seal and not agrees_with_hash(header.seal, text, tensors):
                    raise mismatched_seal(weights.path)
        return Adapter(
            name,
            self.adapter.variant,
            {path: {own: tensors[key] for own, key in keys.items()} for path, keys in self.sites.items()},
            {own: tensors[key] for own, key in self.replaced.items()},
            {**self.adapter.provenance, "source": str(file)},
        )
