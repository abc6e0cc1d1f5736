"""mlx-lm's folders: adapter_config.json with adapters.safetensors.

Source: tuner/utils.py, tuner/lora.py and tuner/dora.py of mlx-lm 0.32. ``fine_tune_type`` decides the keys:

    ======  ===============================================================================================
        lora    ``<path>.lora_a`` (in, r) and ``.lora_b`` (r, out), one scale for all layers; embeddings too
        dora    the same and ``<path>.m`` (out,), with PEFT's formula
        full    parameters by their names in the model, which they replace
    ======  ===============================================================================================
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from lorac.adapters.fit import sort_by_site
from lorac.argument_types import JsonMapping
from lorac.errors import require_base
from lorac.formats._config_fields import (
    Applied,
    Field,
    Irrelevant,
    TrainingOnly,
    encode_config,
    read_choice,
    read_fields,
    read_mapping,
    read_number,
    read_size,
    write_json,
    write_sealed,
)
from lorac.formats._errors import corrupt_error, native_or_lora, unsupported_error
from lorac.formats._format import Evidence, Format
from lorac.formats._lora_pairs import (
    LINEAR,
    A,
    B,
    check_pair,
    check_read,
    find_layers,
    group_by_layer,
    settings_at,
    transpose_matrix,
)
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.ir.sites.site import Site, SiteKind
from lorac.variants.adapter import Adapter
from lorac.variants.base_parameters import Full
from lorac.variants.dora import DoRA
from lorac.variants.lora import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_PEFT_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAGNITUDE = "magnitude"
_SUFFIXES = {".lora_a": A, ".lora_b": B, ".m": _MAGNITUDE}
_KINDS = LINEAR | {SiteKind.EMBEDDING}
_LAYER = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.\d+\.(.+)")
"""The path of a module in a block -> its path within the block, by which mlx-lm names the layers to adapt."""


_OF_THE_RUN = (
    "batch_size clear_cache_threshold config data grad_accumulation_steps grad_checkpoint iters learning_rate "
    "lora_layers lr_schedule mask_prompt max_seq_length num_layers optimizer optimizer_config project_name report_to "
    "resume_adapter_file save_every seed steps_per_eval steps_per_report val_batches"
)
_OF_THE_COMMAND = "adapter_path model test test_batches train trust_remote_code wandb"
_FIELDS: Mapping[str, Field] = {
    "fine_tune_type": Applied("lora", read=read_choice("lora", "dora", "full")),
    "lora_parameters": Applied({}, read=read_mapping),
    **dict.fromkeys(_OF_THE_RUN.split(), TrainingOnly()),
    **dict.fromkeys(_OF_THE_COMMAND.split(), Irrelevant()),
}
_LORA_FIELDS: Mapping[str, Field] = {
    "rank": Applied(to="r", read=read_size),
    "scale": Applied(read=read_number, next_step="write the scale of the run into it; mlx-lm refuses the file, too"),
    "dropout": TrainingOnly(0.0, to="dropout", read=read_number),
    "keys": Irrelevant(),
    # Releases before 0.21 multiplied the scale by alpha / rank; later ones ignore alpha.
    "alpha": Irrelevant(),
}


class MlxFormat(Format):
    """mlx-lm's folders."""

    name = "mlx"
    looks_for = f"a folder with {CONFIG} and {WEIGHTS}"
    written_by = "mlx-lm"
    evidence = Evidence.LAYOUT
    refines = "peft"
    methods = (LoRA, DoRA, Full)

    def recognises(self, file: AdapterFile) -> bool:
        folder = file.folder_with(CONFIG, WEIGHTS)
        return folder.has(CONFIG, WEIGHTS) and folder.names.isdisjoint(_PEFT_WEIGHTS)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        opened = file.folder_with(CONFIG, WEIGHTS)
        folder, weights, name = opened.path, opened.inside(WEIGHTS), name or opened.adapter_name
        raw, tensors = opened.inside(CONFIG).read_json(), weights.read_tensors()
        values = read_fields(raw, _FIELDS, folder / CONFIG)
        weights.check_seal(encode_config(raw), tensors)
        adapter = (
            _read_full(name, folder, tensors, view)
            if values["fine_tune_type"] == "full"
            else _read_factors(name, folder, values, tensors, view)
        )
        adapter.provenance |= {"format": self.name, "source": str(folder), "config": raw}
        adapter.tensors = sort_by_site(adapter.tensors, view)
        adapter.variant = replace(adapter.variant, targets=adapter.sites)
        return check_read(adapter, view)

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the configuration and the tensors.

        Raises:
            FormatError: mlx-lm lacks the method, or the layers have several ranks or scales.
            SiteError: mlx-lm does not adapt such a layer with the method.
            BaseNeeded: the adapter was not read from a file, and no model is given.
        """
        variant = adapter.variant
        config: JsonMapping = {"fine_tune_type": "full", "num_layers": -1}
        if isinstance(variant, Full):
            sites = find_layers(adapter, view, self.name, _KINDS)
            weights = {
                f"{layer}.weight": _transpose_table(site, adapter.tensors[layer]["weight"])
                for layer, site in sites.items()
            }
            tensors = {**weights, **adapter.replaced}
        elif isinstance(variant, LoRA | DoRA) and not adapter.replaced and not getattr(variant, "lora_bias", False):
            config, tensors = _write_factors(adapter, variant, view, self.name)
        else:
            fault = (
                "also replaces parameters or has biases"
                if isinstance(variant, LoRA | DoRA)
                else f"is of {variant.name}"
            )
            raise unsupported_error(
                f"adapter '{adapter.name}' {fault}, and mlx-lm's files cannot store that",
                next_step=native_or_lora(variant),
            )
        path.mkdir()
        write_sealed(path / WEIGHTS, tensors, {"format": "mlx"}, encode_config(config))
        write_json(path / CONFIG, config)


def _read_factors(
    name: str, folder: Path, values: JsonMapping, tensors: Mapping[str, Tensor], view: ModelView | None
) -> Adapter:
    """Build the LoRA or DoRA of a folder."""
    parameters = read_fields(values["lora_parameters"], _LORA_FIELDS, folder / CONFIG)
    r, is_dora = parameters["rank"], values["fine_tune_type"] == "dora"
    method, expected = (DoRA, {A, B, _MAGNITUDE}) if is_dora else (LoRA, {A, B})
    variant = method(r=r, alpha=r * parameters["scale"], dropout=float(parameters["dropout"]))
    adapter = Adapter(name, variant)
    for layer, keys in group_by_layer(tensors, _SUFFIXES, folder).items():
        stored = {part: _turn(part, tensors[key]) for part, key in keys.items()}
        if stored.keys() != expected:
            raise corrupt_error(
                f"'{folder}' has the tensors {', '.join(sorted(keys.values()))} at '{layer}'; {variant.name} needs "
                f"{', '.join(sorted(layer + suffix for suffix, part in _SUFFIXES.items() if part in expected))}"
            )
        rank = check_pair(folder, layer, stored)
        if rank != r:
            raise corrupt_error(f"'{folder}' has the rank {rank} at '{layer}', and {CONFIG} says {r}")
        kind = SiteKind.LINEAR if view is None or layer not in view.sites else view.sites[layer].kind
        if _MAGNITUDE in stored and (kind is not SiteKind.LINEAR or stored[_MAGNITUDE].shape != stored[B].shape[:1]):
            raise unsupported_error(
                f"'{folder}' has DoRA at the embedding '{layer}': mlx-lm scales its rows, and lorac its columns",
                next_step="train it without the embedding",
            )
        adapter.tensors[layer] = stored
    return adapter


def _turn(part: str, tensor: Tensor) -> Tensor:
    """Convert a parameter between lorac and mlx-lm, in either direction: transpose a matrix, and keep a magnitude."""
    return tensor if part == _MAGNITUDE else transpose_matrix(tensor)


def _read_full(name: str, folder: Path, tensors: Mapping[str, Tensor], view: ModelView | None) -> Adapter:
    """Read the weights of layers as parameters of ``Full``, and all other parameters as replacements."""
    view = require_base(
        view,
        f"'{folder}' holds parameters by name, and only the model tells which are weights of layers",
        next_step="load_adapter(path, model)",
    )
    adapter = Adapter(name, Full())
    layers = {site.weight: site for site in view.sites.values() if site.weight}
    for key, tensor in tensors.items():
        site = layers.get(key)
        if site is None:
            adapter.replaced[key] = tensor
        elif site.kind in _KINDS and not site.stack:
            adapter.tensors[site.path] = {"weight": _transpose_table(site, tensor)}
        else:
            raise unsupported_error(
                f"'{folder}' has a {site.kind} weight '{key}', and mlx-lm stores such weights in another order",
                next_step="train the adapter without that layer",
            )
    if not tensors:
        raise corrupt_error(f"'{folder}' holds no tensors")
    return adapter


def _transpose_table(site: Site, matrix: Tensor) -> Tensor:
    """Convert a site's matrix between lorac and mlx-lm, in either direction: transpose that of an embedding."""
    return transpose_matrix(matrix) if site.kind is SiteKind.EMBEDDING else matrix


def _write_factors(
    adapter: Adapter, variant: LoRA | DoRA, view: ModelView | None, format: str
) -> tuple[JsonMapping, dict[str, Tensor]]:
    sites = find_layers(adapter, view, format, _KINDS if isinstance(variant, LoRA) else LINEAR)
    settings = {(here.r, here.scale) for here in (settings_at(variant, layer) for layer in sites)}
    if len(settings) != 1:
        raise unsupported_error(
            f"mlx-lm's files have one rank and one scale for all layers, and adapter '{adapter.name}' has "
            f"{len(settings)}",
            next_step="use format='peft' or 'native'",
        )
    [(r, scale)] = settings
    names = {part: suffix for suffix, part in _SUFFIXES.items()}
    tensors = {
        layer + names[part]: _turn(part, tensor) for layer in sites for part, tensor in adapter.tensors[layer].items()
    }
    found = {layer: _LAYER.fullmatch(layer) for layer in sites}
    keys = sorted({layer if match is None else match[1] for layer, match in found.items()})
    return {
        "fine_tune_type": variant.name,
        "lora_parameters": {"rank": r, "scale": scale, "dropout": variant.dropout, "keys": keys},
        "num_layers": -1,
    }, tensors
