"""The gates of AutoLoRA's merger: refused by name, since the file lacks the LoRAs that the gates weight.

Source: the authors' repository; keys are ``model_dict.<path of a layer, with ___ for dots>.weight_lora`` and so on.
"""

from lorac.formats._errors import unsupported_error
from lorac.formats._format import Format
from lorac.formats.reading import AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adapter import Adapter
from lorac.variants.autolora import AutoLoRA

_PREFIX, _SUFFIX = "model_dict.", ".weight_lora"


class AutoLoraFormat(Format):
    """Files of AutoLoRA's gates."""

    name = "autolora"
    looks_for = f"a file with tensors {_PREFIX}<layer>{_SUFFIX}"
    written_by = "AutoLoRA's authors (refused: the error says how to load them)"
    methods = (AutoLoRA,)

    def recognises(self, file: AdapterFile) -> bool:
        names = file.peek_names() if file.suffix == ".safetensors" else ()
        return any(name.startswith(_PREFIX) and name.endswith(_SUFFIX) for name in names)

    def read(self, file: AdapterFile, view: ModelView | None, name: str | None) -> Adapter:
        raise unsupported_error(
            f"'{file}' holds the gates of AutoLoRA's merger, and the LoRAs that they fuse lie elsewhere",
            next_step="load these, and give them to lorac.AutoLoRA.from_loras with gates=, this file's tensors by name",
        )


FORMAT = AutoLoraFormat()
