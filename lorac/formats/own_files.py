"""Files of methods' authors that a table of keys, or PEFT's reader, can read."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size, required
from lorac.formats._config_fields import Applied, read_number, read_size
from lorac.formats._errors import corrupt_error, unsupported_error, wrong_method_error
from lorac.formats._format import Evidence, Format
from lorac.formats.peft.keys import PREFIX
from lorac.formats.peft.reader import PICKLED, read_folder
from lorac.formats.peft.types.lora import LATENT
from lorac.formats.peft.writer import CONFIG, WEIGHTS, write_folder
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.autolora import AutoLoRA
from lorac.variants.hydra import Hydra
from lorac.variants.lora_xs import LoRAXS
from lorac.variants.meteora import MeteoRA
from lorac.variants.miss import BAT, MiSS
from lorac.variants.plp import PLP

_GATE, _SUFFIX = "model_dict.", ".weight_lora"


class AutoLoraFormat(Format):
    """The gates of AutoLoRA's merger: refused by name, since the file lacks the LoRAs that the gates weight.

    Source: the authors' repository; keys are ``model_dict.<path of a layer, with ___ for dots>.weight_lora`` and so on.
    """

    name = "autolora"
    looks_for = f"a file with tensors {_GATE}<layer>{_SUFFIX}"
    written_by = "AutoLoRA's authors (refused: the error says how to load them)"
    methods = (AutoLoRA,)

    def recognises(self, file: AdapterFile) -> bool:
        names = file.peek_names() if file.suffix == ".safetensors" else ()
        return any(name.startswith(_GATE) and name.endswith(_SUFFIX) for name in names)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        raise unsupported_error(
            f"'{file}' holds the gates of AutoLoRA's merger, and the LoRAs that they fuse lie elsewhere",
            next_step="load these, and give them to lorac.AutoLoRA.from_loras with gates=, this file's tensors by name",
        )


_BLOCK = "miss_block"


class BoneFormat(AuthorsFormat):
    """Bone's own files: ``<layer>.bone``, with three axes for the block affine transformation (BAT) and two for MiSS.

    Source: JL-er/Bone and RWKV-PEFT. ``lorac.formats.peft.types.miss`` has PEFT's later names of both.
    """

    name = "bone"
    looks_for = "a file with tensors <layer>.bone"
    written_by = "Bone's authors; RWKV-PEFT"
    methods = (BAT, MiSS)
    rows = (KeyRow("base_model.model.*.bone", "*", _BLOCK), KeyRow("*.bone", "*", _BLOCK))
    mark = re.compile(r"\.bone$")
    weights = "bone.pt"

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> BAT | MiSS:
        axes = {stored[_BLOCK].ndim: path for path, stored in tensors.items()}
        if len(axes) > 1 or not axes.keys() <= {2, 3}:
            raise unsupported_error(
                f"'{file}' has blocks of {' and '.join(map(str, sorted(axes)))} axes, one at '{min(axes.values())}'",
                next_step="give a file of one version: Bone's first has blocks of 3 axes, and MiSS has blocks of 2",
            )
        if 3 in axes:
            return BAT(r=find_size(tensors, _BLOCK, 1, file))
        return MiSS(r=find_size(tensors, _BLOCK, 0, file))


class BreakForMakeFormat(AuthorsFormat):
    """Break-for-Make's own files: diffusers' LoRA of a U-Net, with ``unet.`` twice before the path of a layer.

    Source: ICTMCG/Break-for-make. Keys are ``unet.unet.<layer>.lora.up.weight`` and ``down``. The first half of the
    rows of ``up`` and of the columns of ``down`` is frozen; the scale is 1.
    """

    name = "break_for_make"
    looks_for = "a file with tensors unet.unet.<layer>.lora.up.weight"
    written_by = "Break-for-Make's authors"
    methods = (PLP,)
    refines = "diffusers"
    rows = tuple(KeyRow(f"unet.unet.*.lora.{half}.weight", "*", half) for half in ("up", "down"))
    mark = re.compile(r"^unet\.unet\..*\.lora\.(up|down)\.weight$")
    weights = "pytorch_lora_weights.safetensors"

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> PLP:
        find_size(tensors, "up", 1, file)
        return PLP(r=find_size(tensors, "down", 0, file, axes=2))

    def to_parameters(self, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        up, down = stored["up"], stored["down"]
        top, left = len(up) // 2, down.shape[1] // 2
        found = {"up_frozen": up[:top], "up_learned": up[top:]}
        found |= {"down_frozen": down[:, :left], "down_learned": down[:, left:]}
        return {name: part.contiguous() for name, part in found.items()}

    def to_stored(self, adapter: Adapter, path: str) -> Tensors:
        own = adapter.tensors[path]
        if getattr(adapter.variant, "identity_init", False):
            raise unsupported_error(
                f"adapter '{adapter.name}' leaves out the product of its frozen halves, and the format '{self.name}' "
                "cannot say so",
                next_step="use format='native', or lorac.to_lora(adapter, model)",
            )
        return {
            "up": torch.cat([own["up_frozen"], own["up_learned"]]),
            "down": torch.cat([own["down_frozen"], own["down_learned"]], dim=1),
        }


_LAYERS = {"mlp.fc2": "mlp.hydra_mlp", "attn.proj": "attn.hydra_proj"}
_BRANCHES = {"par": "parallel", "seq": "sequential"}
_VISION = [
    KeyRow(f"*.{stem}_{branch}.{half}_proj.{leaf}", f"*.{layer}", f"{name}_{half}{end}")
    for layer, stem in _LAYERS.items()
    for branch, name in _BRANCHES.items()
    for half in ("down", "up")
    for leaf, end in (("weight", ""), ("bias", "_bias"))
]
_LANGUAGE = [
    KeyRow(f"*.output.hydra_{branch}.hydra_{factor}.weight", "*.output.dense", f"{name}_{half}")
    for branch, name in _BRANCHES.items()
    for factor, half in (("A", "down"), ("B", "up"))
]


class HydraFormat(AuthorsFormat):
    """Hydra's own files.

    Source: extremebird/Hydra. The file of a vision model holds ``blocks.<n>.mlp.hydra_mlp_par.down_proj.weight`` and so
    on for the layers ``mlp.fc2`` and ``attn.proj``, and the head. The file of a language model holds
    ``output.hydra_par.hydra_A.weight`` and so on for the layer ``output.dense``.
    """

    name = "hydra"
    looks_for = "a file with tensors …hydra_mlp_par…, …hydra_proj_par… or …hydra_par…"
    written_by = "Hydra's authors"
    methods = (Hydra,)
    rows = (*_VISION, *_LANGUAGE)
    mark = re.compile(r"\.hydra_(mlp_|proj_)?(par|seq)\.")
    weights = "hydra.pt"
    settings = {"scale": required("scale", read_number)}
    trained = ("head.",)

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> Hydra:
        biased = any("parallel_down_bias" in stored for stored in tensors.values())
        return Hydra(
            r=find_size(tensors, "parallel_down", 0, file),
            r_sequential=find_size(tensors, "sequential_down", 0, file),
            scale=values["scale"],
            branch_bias=biased,
        )


class LoraXsFormat(Format):
    """Folders of LoRA-XS and LoRA-SB: PEFT's LoRA folder, plus a matrix (r, r) per layer.

    Source: MohammadrezaBanaei/LoRA-XS, RaghavSinghal10/lora-sb; keys as in ``lorac.formats.peft.types.lora``. PEFT
    itself reads such a folder as a LoRA without the matrices, so the format has a name of its own.
    """

    name = "lora_xs"
    looks_for = f"a folder with {CONFIG}, and tensors <layer>_{LATENT}"
    written_by = "LoRA-XS's and LoRA-SB's authors"
    methods = (LoRAXS,)
    evidence = Evidence.LAYOUT
    refines = "peft"

    def recognises(self, file: AdapterFile) -> bool:
        folder = file.folder_with(CONFIG, WEIGHTS, PICKLED)
        weights = next((name for name in (WEIGHTS, PICKLED) if folder.has(CONFIG, name)), None)
        return weights is not None and any(name.endswith(LATENT) for name in folder.inside(weights).peek_names())

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        adapter = read_folder(file.folder_with(CONFIG, WEIGHTS, PICKLED), view, name)
        adapter.provenance["format"] = self.name
        return adapter

    def write(self, adapter: Adapter, path: Path, view: ModelView | None, target: Path) -> None:
        """Write the folder.

        Raises:
            FormatError: the adapter is of another method.
            BaseNeeded: the adapter comes from no file and no model is given.
        """
        if type(adapter.variant) is not LoRAXS:
            raise wrong_method_error(adapter, self.name, LoRAXS.name)
        write_folder(adapter, path, view, of_fork=True)


class MeteoraFormat(AuthorsFormat):
    """MeteoRA's own checkpoints: PEFT's keys with the experts' factors stacked, and the keys of ``moe_gate``.

    Source: NJUDeepEngine/meteora. The file may hold the whole model, which is then compared with the base.
    """

    name = "meteora"
    looks_for = "a file with tensors base_model.model.<layer>.moe_gate.weight"
    written_by = "MeteoRA's authors"
    methods = (MeteoRA,)
    rows = tuple(KeyRow(f"{PREFIX}*.{name}.weight", "*", name) for name in ("lora_A", "lora_B", "moe_gate"))
    mark = re.compile(r"\.moe_gate\.weight$")
    weights = "model.safetensors"
    settings = {
        "lora_alpha": required("alpha", read_number),
        "top_k": required("top_k", read_size),
        "temperature": Applied(1.0, to="temperature", read=read_number),
    }

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> MeteoRA:
        experts, rows = find_size(tensors, "moe_gate", 0, file), find_size(tensors, "lora_A", 0, file)
        if rows % max(experts, 1):
            raise corrupt_error(f"'{file}' has {rows} rows of lora_A, which {experts} experts do not divide")
        fields = {field.to: values[name] for name, field in self.settings.items() if field.to}
        return MeteoRA(r=rows // experts, experts=experts, **fields)

    def name_copy(self, key: str) -> str | None:
        return key.removeprefix(PREFIX).replace(".base_layer.", ".") if "lora_" not in key else None
