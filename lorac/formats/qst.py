"""QST's own folders: the side network of a Llama in six files of torch.save.

Source: YouAreSpecialToMe/QST, ``save_qst_state`` of QSTLlamaForCausalLM. Its files number layers from 0, ``lorac.QST``
from 1. Numbers of heads come from the model; no file stores them.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lorac.adapters.adapter_sites import add_adapted_modules
from lorac.adapters.fit import check_adapter
from lorac.argument_types import JsonMapping
from lorac.errors import nearest_name, require_base, unused_error
from lorac.formats._errors import corrupt_error, unsupported_error, wrong_method_error
from lorac.formats._format import Evidence, Format
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.qst import QST

_ALPHA = "lm_head_z_path.pt"
"""The file of one tensor without a name."""
_TABLE: Mapping[str, Mapping[str, str]] = {
    "qst_layers_parameters.pt": {
        **{f"#.self_attn.{name}_proj.weight": f"side_#_{name}" for name in "qkvo"},
        **{f"#.mlp.{name}_proj.weight": f"side_#_{name}" for name in ("gate", "up", "down")},
        "#.input_layernorm.weight": "side_#_input_norm",
        "#.post_attention_layernorm.weight": "side_#_post_norm",
    },
    "qst_z_parameters.pt": {"#": "gamma_#"},
    "qst_downsample_parameters.pt": {
        **{f"#.adapter_{half}.weight": f"down_#_{half}" for half in "AB"},
        **{f"#.post_layer_norm.{leaf}": f"down_#_norm_{leaf}" for leaf in ("weight", "bias")},
    },
    "qst_norm_parameters.pt": {"weight": "norm"},
    "qst_upsample_parameters.pt": {"weight": "up_weight", "bias": "up_bias"},
    _ALPHA: {"": "alpha"},
}
"""File -> key -> parameter, with # for the number of a layer."""
_FORM = MappingProxyType({"downsample": "adapter", "own_first": False, "vectors": True, "sigmoid": True})
"""The form of the authors' code."""
_NUMBER = re.compile(r"\d+")


class QstFormat(Format):
    """QST's own folders."""

    name = "qst"
    looks_for = f"a folder with {next(iter(_TABLE))}"
    written_by = "QST's authors"
    methods = (QST,)
    evidence = Evidence.LAYOUT

    def recognises(self, file: AdapterFile) -> bool:
        return file.has(next(iter(_TABLE)))

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        path = file.path
        view = require_base(view, f"'{path}' does not hold the number of attention heads, and the model does")
        stored: dict[str, tuple[str, Tensor]] = {}  # parameter -> its file and key, and its tensor
        for part_name in _TABLE:
            if not file.has(part_name):
                raise corrupt_error(f"'{file}' lacks {part_name}", next_step="copy or download the whole folder")
            part = file.inside(part_name)
            content = part.read_pickle()
            for key, tensor in part.check_tensors({"": content} if part_name == _ALPHA else content).items():
                place = f"'{key}' in '{part.path}'" if key else f"'{part.path}'"
                table, shape = _TABLE[part_name], _NUMBER.sub("#", key, count=1)
                if shape not in table:
                    raise unused_error(
                        f"'{part.path}' holds '{key}', which is not a tensor of a Llama's side network",
                        nearest=nearest_name(shape, table),
                        next_step=f"its keys are {', '.join(table)}, with the number of a layer for #",
                    )
                stored[_shift(table[shape], key, 1)] = place, tensor
        own = {parameter: tensor for parameter, (_, tensor) in stored.items()}
        variant = QST.of(view.module, **_FORM, **_read_sizes(path, own, view.module))
        [site] = [one for one in view.callable_paths if re.fullmatch(str(variant.targets), one)]
        provenance = {"format": self.name, "source": str(path)}
        adapter = Adapter(name or file.adapter_name, variant, {site: own}, provenance=provenance)
        specs = variant.params(add_adapted_modules(adapter, view).sites[site])
        _check_shapes(path, stored, {parameter: spec.shape for parameter, spec in specs.items()})
        check_adapter(adapter, view)
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the six files.

        Raises:
            FormatError: the adapter is of another method, or has a setting that the authors' code lacks.
        """
        variant = adapter.variant
        if not isinstance(variant, QST):
            raise wrong_method_error(adapter, self.name, QST.name)
        form = {**_FORM, "causal": True, "rope_theta": 10000.0, "mask": variant.mask}
        other = next((name for name, value in form.items() if getattr(variant, name) != value), None)
        if other is not None or adapter.replaced:
            misfit = next(iter(adapter.replaced)) if other is None else f"{other}={getattr(variant, other)!r}"
            raise unsupported_error(
                f"the format '{self.name}' cannot store {misfit} of adapter '{adapter.name}'",
                next_step="use format='native', which holds every adapter",
            )
        [own] = adapter.tensors.values()
        files: dict[str, dict[str, Tensor]] = {file: {} for file in _TABLE}
        for parameter, tensor in own.items():
            file, key = _find_key(parameter)
            files[file][key] = tensor.detach().contiguous().clone()
        path.mkdir()
        for file, tensors in files.items():
            torch.save(tensors[""] if file == _ALPHA else tensors, path / file)


def _shift(name: str, numbered: str, by: int) -> str:
    """Replace # in a name by a layer number: the number in another name plus an offset."""
    found = _NUMBER.search(numbered)
    return name if found is None else name.replace("#", str(int(found[0]) + by))


def _find_key(parameter: str) -> tuple[str, str]:
    """Return the file that stores a parameter, and the parameter's key in it."""
    shape = _NUMBER.sub("#", parameter, count=1)
    file = next(file for file, table in _TABLE.items() if shape in table.values())
    return file, _shift(next(key for key, one in _TABLE[file].items() if one == shape), parameter, -1)


def _read_sizes(folder: Path, own: Mapping[str, Tensor], model: nn.Module) -> JsonMapping:
    """Return the fields of the variant that the shapes show, and the model's eps."""
    up, down = own.get("up_weight"), own.get("down_1_A")
    if up is None or down is None or up.ndim != 2 or down.ndim != 2 or not up.shape[1]:
        raise corrupt_error(
            f"'{folder}' lacks 'weight' of the upsampler or '0.adapter_A.weight', or these are not matrices"
        )
    eps = getattr(getattr(model, "config", None), "rms_norm_eps", 1e-6)
    return {"r": max(1, len(up) // up.shape[1]), "bottleneck": max(1, len(down)), "eps": eps}


def _check_shapes(
    folder: Path, stored: Mapping[str, tuple[str, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse tensors whose shapes do not fit a side network of the model; errors name the file and key."""
    for parameter in shapes:
        if parameter not in stored:
            file, key = _find_key(parameter)
            raise corrupt_error(f"'{folder / file}' lacks '{key}'", next_step="give the model that it was trained on")
    for parameter, (place, tensor) in stored.items():
        if tuple(tensor.shape) != shapes.get(parameter):
            raise corrupt_error(
                f"{place} has the shape {tuple(tensor.shape)}, where the model's side network has "
                f"{shapes.get(parameter, 'no such tensor')}",
                next_step="give the model that it was trained on",
            )
