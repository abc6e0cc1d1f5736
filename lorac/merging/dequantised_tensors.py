"""The float values of a checkpoint whose matrices are quantised by bitsandbytes, GPTQ, AWQ or transformers' fp8.

Each library stores a matrix in several parts. Their layouts are in bitsandbytes.functional (QuantState), AutoGPTQ's and
GPTQModel's torch kernels, AutoAWQ's utils.packing_utils and transformers.integrations.finegrained_fp8 and fbgemm_fp8.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import list_some, unmergeable_error
from lorac.formats.reading import corrupt_error
from lorac.frontend.quantised_weights import decode_4_bits
from lorac.storage.open_file import OpenFile
from lorac.storage.sharded_tensors import ShardedTensors

Parts = Mapping[str, Tensor]
"""Name of a part, without the path of its layer -> tensor."""
_AWQ_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])
_STATE = "weight.quant_state.bitsandbytes__"
_AS_BEFORE = "give the model as it was before quantisation"


@dataclass(frozen=True)
class QuantisedLayout:
    """The parts in which a library stores a matrix.

    Attributes:
        mark: a part that only layers of this layout have.
        parts: the parts that every such layer has; the matrix is written to the file of the first part.
        optional: further parts; parts for the rounding of inputs are not used.
        shape: function (parts, settings) -> (out, in).
        decode: function (parts, settings) -> the matrix (out, in) in float32.
    """

    mark: str
    parts: tuple[str, ...]
    optional: tuple[str, ...]
    shape: Callable[[Parts, JsonMapping], tuple[int, ...]]
    decode: Callable[[Parts, JsonMapping], Tensor]


class DequantisedTensors(Mapping[str, Tensor]):
    """The tensors of a model's folder in floating point; each is read and dequantised on access.

    Args:
        stored: the folder's tensors as stored.
        folder: the folder, for messages.
        settings: its ``quantization_config``.

    Attributes:
        shards, index, index_name: as in ``ShardedTensors``.

    Raises:
        CompileError: lorac does not know the library's layout.
        FormatError: a part is missing, or belongs to no layer.
    """

    def __init__(self, stored: ShardedTensors, folder: Path, settings: JsonMapping) -> None:
        self._stored, self._folder, self._settings = stored, folder, settings
        self._layers: dict[str, tuple[QuantisedLayout, dict[str, str]]] = {}
        method, bits = settings.get("quant_method"), settings.get("bits", settings.get("w_bit"))
        reason = None
        if method not in LAYOUTS:
            reason = f"by {method}, whose layout lorac does not know"
        elif method in {"gptq", "awq"} and bits not in {2, 4, 8}:
            reason = f"by {method} to {bits} bits"
        elif method == "awq" and (bits != 4 or str(settings.get("version", "gemm")).lower() != "gemm"):
            reason = f"by awq to {bits} bits in the layout {settings.get('version')}"
        if reason is not None:
            raise unmergeable_error(
                f"'{folder}' is quantised {reason}; known are {', '.join(LAYOUTS)}", next_step=_AS_BEFORE
            )
        for layout in LAYOUTS[str(method)]:
            self._layers |= self._find_layers(layout)
        used = {key for _, parts in self._layers.values() for key in parts.values()}
        self._outline = {name: one for name, one in stored.outline().items() if name not in used}
        unknown = [name for name, one in self._outline.items() if one.itemsize < 2 and one.dtype is not torch.bool]
        if unknown or not self._layers:
            raise unmergeable_error(
                f"'{folder}' holds {list_some(unknown) if unknown else 'no matrix'} in a layout of "
                f"{method} that lorac does not know",
                next_step=_AS_BEFORE,
            )
        sizes: Counter[torch.dtype] = Counter()
        for one in self._outline.values():
            sizes[one.dtype] += one.numel() if one.is_floating_point() else 0
        self._dtype = sizes.most_common(1)[0][0] if sizes.total() else torch.float32
        for name, (layout, _) in self._layers.items():
            with self._refuse_mismatch(name):
                shape = layout.shape(self._parts(name), settings)
                self._outline[name] = torch.empty(shape, dtype=self._dtype, device="meta")
        self.shards = {shard: DequantisedShard(self, shard, one.file) for shard, one in stored.shards.items()}
        self.index, self.index_name = stored.index, stored.index_name

    def _find_layers(self, layout: QuantisedLayout) -> dict[str, tuple[QuantisedLayout, dict[str, str]]]:
        found = {}
        for key in self._stored:
            layer = key.removesuffix(f".{layout.mark}")
            if layer == key:
                continue
            known = (*layout.parts, *layout.optional)
            parts = {part: f"{layer}.{part}" for part in known if f"{layer}.{part}" in self._stored}
            missing = [part for part in layout.parts if part not in parts]
            if missing:
                raise corrupt_error(
                    f"'{self._folder}' lacks '{layer}.{missing[0]}', a part of a quantised matrix",
                    next_step="download the whole folder again",
                )
            found[f"{layer}.weight"] = (layout, parts)
        return found

    def _parts(self, name: str) -> dict[str, Tensor]:
        return {part: self._stored[key] for part, key in self._layers[name][1].items()}

    @contextmanager
    def _refuse_mismatch(self, name: str) -> Iterator[None]:
        """Raise ``FormatError`` if a layer's parts do not fit together in the block."""
        try:
            yield
        except (ValueError, LookupError, RuntimeError, TypeError) as error:
            reason = str(error).partition("\n")[0]
            raise corrupt_error(
                f"'{self._folder}' holds parts of '{name}' that do not belong together: {reason}",
                next_step="download the whole folder again",
            ) from error

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._layers:
            return self._stored[name]
        with self._refuse_mismatch(name):
            found = self._layers[name][0].decode(self._parts(name), self._settings)
            found = found.reshape(self._outline[name].shape)
        return found.to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._outline)

    def __len__(self) -> int:
        return len(self._outline)

    def outline(self) -> dict[str, Tensor]:
        """Return all tensors on the meta device: their shapes and dtypes."""
        return dict(self._outline)

    def shard_of(self, name: str) -> str:
        """Return the name of the file to which a tensor is written: the file of its first part."""
        if name not in self._layers:
            return self._stored.shard_of(name)
        layout, parts = self._layers[name]
        return self._stored.shard_of(parts[layout.parts[0]])


@dataclass(frozen=True, eq=False)
class DequantisedShard:
    """A file in the folder of ``DequantisedTensors``.

    Attributes:
        tensors: the tensors of the folder.
        name: the name of the file.
        file: the file with quantised matrices.
    """

    tensors: DequantisedTensors
    name: str
    file: OpenFile

    @property
    def notes(self) -> Mapping[str, str]:
        """The file's metadata."""
        return {"format": "pt"}

    def outline(self) -> dict[str, Tensor]:
        """Return the tensors that are written to the file, on the meta device."""
        return {key: one for key, one in self.tensors.outline().items() if self.tensors.shard_of(key) == self.name}


def _shape_of_weight(parts: Parts, settings: JsonMapping) -> tuple[int, ...]:
    return tuple(parts["weight"].shape)


def _read_state(parts: Parts) -> JsonMapping:
    """Return bitsandbytes' metadata of a 4-bit matrix, which is JSON in a byte tensor."""
    packed = next(tensor for part, tensor in parts.items() if part.startswith(_STATE))
    state: JsonMapping = json.loads(bytes(packed.tolist()))
    return state


def _decode_4_bits(parts: Parts, settings: JsonMapping) -> Tensor:
    state, scale = _read_state(parts), parts["weight.absmax"]
    if "weight.nested_absmax" in parts:
        wide = parts["weight.nested_absmax"].float().repeat_interleave(state["nested_blocksize"])[: len(scale)]
        scale = parts["weight.nested_quant_map"].float()[scale.long()] * wide + state["nested_offset"]
    return decode_4_bits(parts["weight"], parts["weight.quant_map"], scale, state["blocksize"])


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Unpack int32 (…, n) into numbers (…, n·32/bits), lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)


def _decode_gptq(parts: Parts, settings: JsonMapping) -> Tensor:
    bits, scales = settings["bits"], parts["scales"].float()
    whole, zeros = _unpack(parts["qweight"].mT, bits), _unpack(parts["qzeros"], bits)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zeros = zeros + 1  # the first version stores zeros minus one
    group = parts["g_idx"].long()
    return (whole - zeros[group].mT) * scales[group].mT


def _decode_awq(parts: Parts, settings: JsonMapping) -> Tensor:
    scales = parts["scales"].float()
    whole, zeros = (
        _unpack(parts[name], 4).unflatten(-1, (-1, 8))[..., _AWQ_ORDER].flatten(-2) for name in ("qweight", "qzeros")
    )
    group = len(whole) // len(scales)
    return ((whole - zeros.repeat_interleave(group, 0)) * scales.repeat_interleave(group, 0)).mT


def _decode_fp8(parts: Parts, settings: JsonMapping) -> Tensor:
    scale = parts.get("weight_scale_inv", parts.get("weight_scale"))
    weight, block = parts["weight"], settings.get("weight_block_size") or (1, 1)
    assert scale is not None
    scale = scale.float().reshape(1, 1) if scale.numel() == 1 else scale.float()
    for axis, size in enumerate(weight.shape):
        count = scale.shape[axis]
        each = block[axis] if -(-size // block[axis]) == count else size // count
        scale = scale.repeat_interleave(each, axis).narrow(axis, 0, size)
    return weight.float() * scale


_ROUNDING = ("input_scale", "activation_scale", "input_scale_ub")
_FP8 = QuantisedLayout("weight_scale_inv", ("weight", "weight_scale_inv"), _ROUNDING, _shape_of_weight, _decode_fp8)
_FP8_ROWS = QuantisedLayout("weight_scale", ("weight", "weight_scale"), _ROUNDING, _shape_of_weight, _decode_fp8)
LAYOUTS: Mapping[str, tuple[QuantisedLayout, ...]] = {
    "bitsandbytes": (
        QuantisedLayout(
            "SCB",
            ("weight", "SCB"),
            ("weight_format",),
            _shape_of_weight,
            lambda parts, _: parts["weight"].float() * (parts["SCB"].float() / 127)[:, None],
        ),
        QuantisedLayout(
            "weight.absmax",
            ("weight", "weight.absmax", "weight.quant_map"),
            ("weight.nested_absmax", "weight.nested_quant_map", f"{_STATE}nf4", f"{_STATE}fp4"),
            lambda parts, _: tuple(_read_state(parts)["shape"]),
            _decode_4_bits,
        ),
    ),
    "gptq": (
        QuantisedLayout(
            "qweight",
            ("qweight", "qzeros", "scales", "g_idx"),
            (),
            lambda parts, settings: (parts["qweight"].shape[1], parts["qweight"].shape[0] * 32 // settings["bits"]),
            _decode_gptq,
        ),
    ),
    "awq": (
        QuantisedLayout(
            "qweight",
            ("qweight", "qzeros", "scales"),
            (),
            lambda parts, _: (parts["qweight"].shape[1] * 8, parts["qweight"].shape[0]),
            _decode_awq,
        ),
    ),
    "fp8": (_FP8, _FP8_ROWS),
    "fbgemm_fp8": (_FP8_ROWS,),
}
"""``quant_method`` of a configuration -> the layouts of its matrices."""
