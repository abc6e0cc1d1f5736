"""Files of sd-scripts (kohya) and LyCORIS: a module's name is its path with underscores for dots.

Modules of Stable Diffusion XL's U-Net and of the transformers of Flux and SD3 have the names of the authors' code.
"""

from collections.abc import Mapping
from typing import ClassVar

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layouts import LAYOUTS
from lorac.formats._image_files.original_names import Place
from lorac.formats._image_files.places import PipelineModel
from lorac.formats._image_files.spellings import DENOISERS, is_underscored
from lorac.formats._image_files.writer import ImageFormat
from lorac.formats.reading import AdapterFile

_WITH_ENDING = ("lora_down", "lora_up", "a1", "a2", "b1", "b2")
_TEXT_MODEL = "text_model."


class KohyaFormat(ImageFormat):
    """sd-scripts' and LyCORIS's files."""

    name = "kohya"
    looks_for = "a safetensors file with names such as lora_unet_<module>.lora_down.weight"
    written_by = "sd-scripts; LyCORIS; ComfyUI"
    refines = "diffusers"
    methods = tuple(variant for layout in LAYOUTS for variant in layout.variants)
    leaves: ClassVar[Mapping[str, str]] = {
        "dora_scale": "dora_scale",
        **{leaf: leaf for layout in LAYOUTS for leaf in layout.leaves if leaf != "lora_bias"},
        **{leaf: f"{leaf}.weight" for leaf in _WITH_ENDING},
    }
    stores_alpha = True

    def recognises(self, file: AdapterFile) -> bool:
        return any(map(is_underscored, file.peek_names()))

    def name_module(self, component: PipelineModel, module: str, pipeline: Mapping[str, PipelineModel]) -> str:
        beginning = _find_beginning(component, pipeline)
        if "CLIPText" in type(component.model).__name__:
            module = _TEXT_MODEL + module.removeprefix(_TEXT_MODEL)
        return beginning + module.replace(".", "_")

    def list_places(self, component: PipelineModel) -> Mapping[str, Place]:
        return component.original if component.uses_original_names else {}


def _find_beginning(component: PipelineModel, pipeline: Mapping[str, PipelineModel]) -> str:
    """Return the prefix that sd-scripts gives the names of a component."""
    if component.name in DENOISERS:
        return "lora_unet_"
    numbered = "text_encoder_2" in pipeline or any(other.uses_original_names for other in pipeline.values())
    names = {
        "model": "lycoris_",
        "text_encoder": "lora_te1_" if numbered else "lora_te_",
        "text_encoder_2": "lora_te3_" if "T5" in type(component.model).__name__ else "lora_te2_",
        "text_encoder_3": "lora_te3_",
    }
    if component.name not in names:
        raise unsupported_error(
            f"sd-scripts and LyCORIS have no name for the component '{component.name}'",
            next_step="use format='diffusers', or 'native'",
        )
    return names[component.name]


FORMAT = KohyaFormat()
