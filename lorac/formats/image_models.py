"""Files of image models: diffusers', and those of sd-scripts and LyCORIS."""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layouts import LAYOUTS
from lorac.formats._image_files.methods import join_methods, write_configs
from lorac.formats._image_files.original_names import Place
from lorac.formats._image_files.places import PipelineModel
from lorac.formats._image_files.spellings import DENOISERS, is_dotted, is_underscored
from lorac.formats._image_files.writer import ImageFormat
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant
from lorac.variants.dora import DoRA
from lorac.variants.lora import LoRA

WEIGHTS = "pytorch_lora_weights.safetensors"


class DiffusersFormat(ImageFormat):
    """LoRA files of diffusers' pipelines: one file with tensors of several models, which are named as in the pipeline.

    lorac writes PEFT's names, ``<component>.<module>.lora_A.weight``. It also reads the names of earlier releases
    (``.lora.down.weight``, ``.lora_linear_layer.down.weight``, ``.processor.to_q_lora``), and the mixtures that
    diffusers 0.42 itself writes.
    """

    name = "diffusers"
    looks_for = f"a safetensors file, or a folder with {WEIGHTS}, with names such as unet.<module>.lora_A.weight"
    written_by = "diffusers"
    methods = (DoRA, LoRA)
    leaves: ClassVar[Mapping[str, str]] = {
        "lora_down": "lora_A.weight",
        "lora_up": "lora_B.weight",
        "lora_bias": "lora_B.bias",
        "dora_scale": "lora_magnitude_vector",
    }
    stores_alpha = False

    def recognises(self, file: AdapterFile) -> bool:
        return any(map(is_dotted, _find_weights(file).peek_names()))

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        return super().read(_find_weights(file), view, name or file.path.stem)

    def name_module(self, component: PipelineModel, module: str, pipeline: Mapping[str, PipelineModel]) -> str:
        if component.name == "model":
            raise unsupported_error(
                f"a {type(component.model).__name__} has no name in diffusers' pipelines",
                next_step="give model= by its name there: {'unet': model}; or use format='peft' or 'kohya'",
            )
        return f"{component.name}.{module}"

    def list_places(self, component: PipelineModel) -> Mapping[str, Place]:
        return {}

    def write_norms(self, norms: Tensor) -> Tensor:
        return norms.flatten() if norms.ndim == 2 else norms.transpose(0, 1)

    def describe(self, methods: Mapping[str, Mapping[str, Variant]]) -> dict[str, str]:
        joined = {}
        for component, at in methods.items():
            variant = join_methods(at)
            if not isinstance(variant, LoRA | DoRA):
                raise unsupported_error(
                    f"diffusers gives '{component}' one LoRA or DoRA, and the adapter has {variant.name} there",
                    next_step="use format='kohya', or 'native'",
                )
            joined[component] = variant
        return write_configs(joined)


def _find_weights(file: AdapterFile) -> AdapterFile:
    return file if file.is_file else file.inside(WEIGHTS)


_WITH_ENDING = ("lora_down", "lora_up", "a1", "a2", "b1", "b2")
_TEXT_MODEL = "text_model."


class KohyaFormat(ImageFormat):
    """Files of sd-scripts (kohya) and LyCORIS: a module's name is its path with underscores for dots.

    Modules of Stable Diffusion XL's U-Net and of the transformers of Flux and SD3 have the names of the authors' code.
    """

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
        numbered = "text_encoder_2" in pipeline or any(other.uses_original_names for other in pipeline.values())
        beginnings = {
            **dict.fromkeys(DENOISERS, "lora_unet_"),
            "model": "lycoris_",
            "text_encoder": "lora_te1_" if numbered else "lora_te_",
            "text_encoder_2": "lora_te3_" if "T5" in type(component.model).__name__ else "lora_te2_",
            "text_encoder_3": "lora_te3_",
        }
        if component.name not in beginnings:
            raise unsupported_error(
                f"sd-scripts and LyCORIS have no name for the component '{component.name}'",
                next_step="use format='diffusers', or 'native'",
            )
        if "CLIPText" in type(component.model).__name__:
            module = _TEXT_MODEL + module.removeprefix(_TEXT_MODEL)
        return beginnings[component.name] + module.replace(".", "_")

    def list_places(self, component: PipelineModel) -> Mapping[str, Place]:
        return component.original if component.uses_original_names else {}
