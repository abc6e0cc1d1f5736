"""llama.cpp's adapter files: GGUF with the factors of LoRAs, ``<weight>.lora_a`` (r, in) and ``.lora_b`` (out, r).

Source: convert_lora_to_gguf.py and src/llama-adapter.cpp of llama.cpp. A file stores one alpha for all layers, and the
scale of a layer is alpha / r; if alpha is missing or 0, the scale is 1. The token embedding's A is stored as
(vocabulary, r).
"""

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorac.errors import SiteError, missing_site_error, nearest_name, require_base, short
from lorac.formats._errors import corrupt_error, unknown_name_error, unsupported_error
from lorac.formats._format import Evidence, Format
from lorac.formats._lora_pairs import (
    LINEAR,
    A,
    B,
    check_pair,
    check_read,
    find_layers,
    group_by_layer,
    make_lora,
    require_plain_lora,
    settings_at,
    transpose_matrix,
)
from lorac.formats.gguf.file import MAGIC, read_gguf
from lorac.formats.gguf.names import EMBEDDING, GgufNames
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.lora import LoRA

_SUFFIXES = {".lora_a": A, ".lora_b": B}
_GENERAL, _TYPE, _ARCHITECTURE = "general.", "general.type", "general.architecture"
_ADAPTER_TYPE, _ALPHA, _TOKENS = "adapter.type", "adapter.lora.alpha", "adapter.alora.invocation_tokens"
_IRRELEVANT = ("adapter.lora.task_name", "adapter.lora.prompt_prefix")
_KINDS = LINEAR | {SiteKind.EMBEDDING}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of tensors that llama.cpp computes with."""


class GgufFormat(Format):
    """llama.cpp's adapter files."""

    name = "gguf"
    looks_for = f"a file that begins with {MAGIC.decode()}"
    written_by = "llama.cpp's `convert_lora_to_gguf.py`"
    evidence = Evidence.LAYOUT
    magic = (0, MAGIC)
    methods = (LoRA,)
    invocations = True

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        path, (fields, stored) = file.path, read_gguf(file)
        alpha = _read_fields(path, fields)
        view = require_base(
            view,
            f"'{path}' names layers as llama.cpp does, and only the model tells which modules they are",
            next_step="load_adapter(path, model)",
        )
        names = GgufNames(view, f"'{path}'")
        stored_for = str(fields[_ARCHITECTURE])
        if stored_for != names.architecture:
            raise unsupported_error(
                f"'{path}' is for a model of the architecture '{stored_for}', and this one's is '{names.architecture}'",
                next_step="load the base model that the adapter was trained on",
            )
        tensors = {}
        for weight, keys in group_by_layer(stored, _SUFFIXES, path).items():
            if weight not in names.paths:
                raise missing_site_error(
                    f"'{path}' has tensors for '{weight}', which is not a layer of the model",
                    nearest=nearest_name(weight, names.paths),
                    next_step="load the model that the adapter was trained on; experts of a mixture are not read",
                )
            pair = {name: stored[key] for name, key in keys.items()}
            if weight == EMBEDDING and A in pair:
                pair[A] = transpose_matrix(pair[A])
            check_pair(path, weight, pair)
            tensors[names.paths[weight]] = {A: pair[A], B: names.from_file(weight, pair[B])}
        alphas = {layer: alpha or float(found[A].shape[0]) for layer, found in tensors.items()}
        made, tokens = make_lora(name, self.name, path, tensors, alphas, view), fields.get(_TOKENS)
        method = made.variant if tokens is None else replace(made.variant, invocation_tokens=tokens)  # type: ignore[call-arg]  # a LoRA
        return check_read(replace(made, variant=method), view)

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the factors; where one alpha for all layers does not give the scales, multiply the scales into B.

        Raises:
            FormatError: the adapter is not a plain LoRA, or lorac does not know llama.cpp's names of the model's
                layers.
            SiteError: llama.cpp does not adapt such a layer.
            BaseNeeded: no model is given.
        """
        variant = require_plain_lora(adapter, self.name)
        view = require_base(
            view,
            f"llama.cpp's names of the layers of adapter '{adapter.name}' depend on the model",
            next_step="save_adapter(adapter, path, format='gguf', model=model)",
        )
        names = GgufNames(view, "a GGUF file")
        weights = {layer: weight for weight, layer in names.paths.items()}
        sites = find_layers(adapter, view, self.name, _KINDS)
        here = {layer: settings_at(variant, layer) for layer in sites}
        alphas = {struct.unpack("<f", struct.pack("<f", one.scale * one.r))[0] for one in here.values()}  # as stored
        alpha = alphas.pop() if len(alphas) == 1 else 0.0
        tensors: dict[str, Tensor] = {}
        for layer, site in sites.items():
            weight = weights.get(layer)
            if weight is None or site.shares:
                fault = f"shares its weight with '{min(site.shares)}'" if site.shares else "has no name in llama.cpp"
                raise SiteError(
                    f"'{layer}' of adapter '{adapter.name}' {fault}, and llama.cpp does not adapt it",
                    next_step="add the module to exclude=, or use format='peft'",
                )
            a, b = adapter.tensors[layer][A], adapter.tensors[layer][B]
            b = names.to_file(weight, b if alpha else here[layer].scale * b)
            tensors[f"{weight}.lora_a"], tensors[f"{weight}.lora_b"] = a.mT if weight == EMBEDDING else a, b
        _write_file(path, names.architecture, alpha, tensors, variant.invocation_tokens)


def _read_fields(path: Path, fields: Mapping[str, object]) -> float:
    """Check the fields of a file, and return its alpha; 0 means that the scale is 1."""
    expected = {_TYPE: "adapter", _ADAPTER_TYPE: "lora"}
    for key, value in expected.items():
        if fields.get(key) != value:
            raise unsupported_error(
                f"'{path}' says {key}={fields.get(key)!r}, and lorac reads GGUF files with {key}={value!r}",
                next_step="give the adapter that convert_lora_to_gguf.py of llama.cpp wrote",
            )
    tokens = fields.get(_TOKENS, [0])
    if not isinstance(tokens, list) or not tokens or any(type(token) is not int or token < 0 for token in tokens):
        raise corrupt_error(f"'{path}' sets {_TOKENS}={short(tokens)}, which are not token ids")
    known = {*expected, _ARCHITECTURE, _ALPHA, _TOKENS, *_IRRELEVANT}
    unknown = next((key for key in fields if key not in known and not key.startswith(_GENERAL)), None)
    if unknown is not None:
        step = "it may change the result, so it is not ignored; a newer lorac may know it"
        raise unknown_name_error(f"'{path}' sets the unknown field '{unknown}'", unknown, known, step)
    alpha = fields.get(_ALPHA, 0.0)
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        raise corrupt_error(f"'{path}' sets {_ALPHA}={alpha!r}, which is not a finite number")
    if not isinstance(fields.get(_ARCHITECTURE), str):
        raise corrupt_error(f"'{path}' names no {_ARCHITECTURE}")
    return alpha


def _write_file(path: Path, architecture: str, alpha: float, tensors: dict[str, Tensor], tokens: Sequence[int]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(_TYPE, "adapter")
    writer.add_string(_ADAPTER_TYPE, "lora")
    writer.add_float32(_ALPHA, alpha)
    if tokens:
        writer.add_key_value(_TOKENS, [*tokens], gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
    for key, tensor in tensors.items():
        values: Any = tensor.detach().contiguous()
        if tensor.dtype not in _DTYPES:
            raise unsupported_error(
                f"'{key}' is {tensor.dtype}, and llama.cpp computes with {', '.join(map(str, _DTYPES))}",
                next_step="convert the adapter's tensors, or use format='peft'",
            )
        if tensor.dtype is torch.bfloat16:
            writer.add_tensor(key, values.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(key, values.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
