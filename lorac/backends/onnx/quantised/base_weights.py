"""The base weights of a quantised program, for adapters that are computed from weights.

Every method changes the weight with which the program computes. So W is the dequantised weight in float32, as for
PEFT's methods on a quantised layer. Only the program's own bytes are stored; no file has the model's original weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.backends.onnx.model_files import WEIGHTS_FILE, graph_file
from lorac.backends.onnx.quantised.codec import Codec, EncodedMatrix
from lorac.backends.onnx.weight_locations import walk_stored_weights
from lorac.errors import ArtifactError
from lorac.frontend.quantised_weights import QUANTISATION_LEVELS
from lorac.storage.strict_json import dump_json, parse_json
from lorac.storage.tensor_file import TensorFile, TensorLocation
from lorac.target.engine import ProgramFiles

if TYPE_CHECKING:
    from lorac.backends.onnx.quantised.quantisation_report import QuantisationReport, QuantisedProduct

_METADATA_KEY = "quantised"
"""The entry of a file's metadata that lists the quantised tensors whose parts the file holds."""
_COMPARED_FIRST = 8
"""The number of values of a row that are compared first."""


@dataclass(frozen=True, eq=False)
class QuantisedTensor:
    """A tensor that a program stores quantised: a range of rows of one of its matrices.

    Attributes:
        encoded: the rows.
        transposed: whether the tensor is the transpose of the rows.
        graph: the graph with the matrix.
        begin: the number of the first row in the matrix.
        names: part of ``encoded`` -> the graph's constant that has this part of the whole matrix.
    """

    encoded: EncodedMatrix
    transposed: bool
    graph: str = ""
    begin: int = 0
    names: Mapping[str, str] = field(default_factory=dict)

    def decode(self) -> Tensor:
        """Return the dequantised tensor, with which the program computes."""
        matrix = torch.from_numpy(np.ascontiguousarray(self.encoded.decode()))
        return matrix.t() if self.transposed else matrix


def find_quantised(
    reports: Mapping[str, QuantisationReport], tensors: Mapping[str, Tensor]
) -> dict[str, QuantisedTensor]:
    """Find the tensors that programs store quantised, whole or as part of a fused matrix, possibly transposed.

    Tensors are matched by value, since equal tensors have equal codes.

    Args:
        reports: graph -> the report of its quantisation.
    """
    known = [(graph, quantised) for graph, report in reports.items() for quantised in report.quantised.values()]
    found = {name: _find_tensor(known, tensor) for name, tensor in tensors.items()}
    return {name: stored_tensor for name, stored_tensor in found.items() if stored_tensor is not None}


def replace_quantised(reports: Mapping[str, QuantisationReport], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with which programs compute, dequantised if programs store them quantised."""
    computed, made = dict(tensors), dict[object, Tensor]()
    for name, stored_tensor in find_quantised(reports, tensors).items():
        tensor = tensors[name]
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())  # tied tensors share one result
        computed[name] = made[key] if key in made else made.setdefault(key, stored_tensor.decode())
    return computed


def _find_tensor(known: list[tuple[str, QuantisedProduct]], tensor: Tensor) -> QuantisedTensor | None:
    if tensor.dim() != 2 or tensor.dtype != torch.float32 or not tensor.numel():
        return None
    for transposed, (graph, quantised) in itertools.product((False, True), known):
        rows = (tensor.t() if transposed else tensor).detach().cpu().numpy()
        count, columns = quantised.encoded.shape
        if columns != rows.shape[1] or count < len(rows):
            continue
        original = quantised.original()
        alike = (original[:, :_COMPARED_FIRST] == rows[0, :_COMPARED_FIRST]).all(1)
        for begin in map(int, np.flatnonzero(alike)):
            if np.array_equal(original[begin : begin + len(rows)], rows):
                encoded = quantised.encoded.rows(begin, len(rows))
                return QuantisedTensor(encoded, transposed, graph, begin, quantised.names)
    return None


def tensors_and_notes(quantised_tensors: Mapping[str, QuantisedTensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the parts of quantised tensors for a file, and the file's metadata about them."""
    tensors, notes = dict[str, Tensor](), {}
    for name, stored_tensor in quantised_tensors.items():
        codec = stored_tensor.encoded.codec
        tensors |= {f"{name}:{part}": torch.from_numpy(array) for part, array in stored_tensor.encoded.parts().items()}
        notes[name] = {
            "bits": codec.bits,
            "block": codec.block,
            "symmetric": codec.symmetric,
            **({"table": codec.table} if codec.table else {}),
            "columns": stored_tensor.encoded.columns,
            "transposed": stored_tensor.transposed,
        }
    return tensors, {_METADATA_KEY: dump_json(notes)} if notes else {}


def locate_parts(
    files: ProgramFiles, graphs: Iterable[str], quantised_tensors: Mapping[str, QuantisedTensor]
) -> dict[str, TensorLocation]:
    """Return the locations of quantised tensors' parts in programs' files, by the names of ``tensors_and_notes``."""
    offsets = {(graph, name): at for graph in graphs for name, at, _ in walk_stored_weights(files, graph)}
    found = {}
    for name, stored_tensor in quantised_tensors.items():
        constants = {part: (stored_tensor.graph, constant) for part, constant in stored_tensor.names.items()}
        stored = {part: offsets[constant] for part, constant in constants.items() if constant in offsets}
        for part, offset in stored.items():
            first = offset + stored_tensor.begin * stored_tensor.encoded.parts()[part][:1].nbytes
            found[f"{name}:{part}"] = TensorLocation(graph_file(stored_tensor.graph, WEIGHTS_FILE), first, False)
    return found


def dequantised_weights(file: TensorFile) -> Mapping[str, Tensor]:
    """Return the base weights in a file; quantised ones are dequantised when they are read.

    Raises:
        ArtifactError: the metadata of a quantised tensor does not fit its parts.
    """
    return DequantisedWeights(file) if _METADATA_KEY in file.notes else file


class DequantisedWeights(Mapping[str, Tensor]):
    """The base weights in a file with quantised tensors.

    Raises:
        ArtifactError: the metadata of a quantised tensor does not fit its parts.
    """

    def __init__(self, file: TensorFile) -> None:
        self._file = file
        self._metadata: JsonMapping = parse_json(file.notes[_METADATA_KEY], self._damaged)
        self._parts = {f"{name}:{part}" for name in self._metadata for part in ("packed", "scales", "zeros")}
        for name in self._metadata:
            self._check(name)

    def __getitem__(self, name: str) -> Tensor:
        return self._read(name).decode() if name in self._metadata else self._file[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self._metadata, *self._file} - self._parts))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._metadata or (name in self._file and name not in self._parts)

    def _read(self, name: str) -> QuantisedTensor:
        entry = self._metadata[name]
        codec = Codec(entry["bits"], entry["block"], entry["symmetric"], entry.get("table", ""))
        parts = ("packed", "scales") if codec.symmetric else ("packed", "scales", "zeros")
        arrays = {part: self._file[f"{name}:{part}"].numpy() for part in parts}
        return QuantisedTensor(EncodedMatrix(codec, entry["columns"], **arrays), entry["transposed"])

    def _check(self, name: str) -> None:
        """Check that the parts of a quantised tensor have consistent shapes."""
        try:
            encoded = self._read(name).encoded
            rows, blocks = encoded.scales.shape
            codec, columns = encoded.codec, encoded.columns
            fits = codec.bits in {4, 8} and blocks == -(-columns // codec.block)
            fits &= not codec.table or (codec.table in QUANTISATION_LEVELS and codec.bits == 4 and codec.symmetric)
            fits &= encoded.packed.shape == (rows, blocks, codec.block * codec.bits // 8)
            fits &= encoded.zeros is None or encoded.zeros.shape == (rows, -(-blocks * codec.bits // 8))
        except (LookupError, TypeError, ValueError, ZeroDivisionError):
            fits = False
        if not fits:
            raise self._damaged(f"contradicts the parts of '{name}'")

    def _damaged(self, reason: str) -> ArtifactError:
        return ArtifactError(
            f"the metadata of '{self._file.file.where}' {reason}", next_step="copy the whole folder again"
        )
