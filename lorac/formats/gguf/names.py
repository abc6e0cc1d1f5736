"""The names of layers in GGUF, and the order of their rows, as llama.cpp's converter chooses them per architecture.

The names come from the library ``gguf``, which lorac queries for every layer of the model. In some architectures
llama.cpp rotates adjacent features of queries and keys, while transformers rotates the two halves of a head. For these
the converter reorders the rows of both projections, and therefore the rows of a LoRA's B too.
"""

from collections.abc import Mapping
from typing import Any, final

from torch import Tensor

from lorac.errors import nearest_name, translate_import_errors
from lorac.formats._errors import unsupported_error
from lorac.frontend.model_view import ModelView

_PREFIX = "model."
"""The prefix in files of the paths of a model without its output layer."""
_REORDERED = (".attn_q.weight", ".attn_k.weight")
WEIGHT = ".weight"
EMBEDDING = "token_embd.weight"


ARCHITECTURES: Mapping[str, str] = {
    "arcee": "arcee",
    "bert": "bert",
    "cohere": "command-r",
    "cohere2": "cohere2",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "granite": "granite",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen2_moe": "qwen2moe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
"""model_type of transformers -> the architecture whose converter leaves weights as they are, but for these rows."""
_NEIGHBOURS = frozenset({"arcee", "granite", "llama", "olmo", "smollm3"})
"""Architectures in which llama.cpp rotates neighbouring features, and transformers halves."""


@final
class GgufNames:
    """The layers of one model, by their names in GGUF.

    Args:
        view: the model.
        subject: the file that needs the names, for the error.

    Attributes:
        architecture: the model's architecture in GGUF.
        paths: name of a weight in GGUF -> path of its site.

    Raises:
        FormatError: the model's architecture is not in the table.
        MissingExtra: ``gguf`` is not installed.
    """

    def __init__(self, view: ModelView, subject: str) -> None:
        with translate_import_errors():
            import gguf
        config: Any = getattr(view.module, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        model_type = str(getattr(config, "model_type", "without a config"))
        architecture = ARCHITECTURES.get(model_type)
        if architecture is None:
            raise unsupported_error(
                f"{subject} names layers as llama.cpp does, and its names for a model of type '{model_type}' are not "
                "known here",
                nearest=nearest_name(model_type, ARCHITECTURES),
                next_step=f"use format='peft', which takes all models, or a model of type {', '.join(ARCHITECTURES)}",
            )
        number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
        table = gguf.get_tensor_name_map(number, config.num_hidden_layers)
        self.architecture, self.paths = architecture, dict[str, str]()
        inner = f"{getattr(view.module, 'base_model_prefix', '')}."
        for path in view.sites:
            spellings = (path, _PREFIX + path, path.removeprefix(inner))
            name = next(filter(None, (table.get_name(f"{one}{WEIGHT}", (WEIGHT,)) for one in spellings)), None)
            if name is not None:
                self.paths.setdefault(name, path)
        heads = config.num_attention_heads  # of queries, and then of keys
        self._heads = heads, getattr(config, "num_key_value_heads", None) or heads

    def to_file(self, name: str, b: Tensor) -> Tensor:
        """Permute the rows of B (out, r) from transformers' order to llama.cpp's."""
        return self._reorder(name, b, (2, -1))

    def from_file(self, name: str, b: Tensor) -> Tensor:
        """Permute the rows of B (out, r) from llama.cpp's order to transformers'."""
        return self._reorder(name, b, (-1, 2))

    def _reorder(self, name: str, b: Tensor, sizes: tuple[int, int]) -> Tensor:
        """Transpose the two axes into which a head's rows are split; return B unchanged where the rows do not fit."""
        ends = [end for end in _REORDERED if name.endswith(end)] if self.architecture in _NEIGHBOURS else []
        heads = self._heads[_REORDERED.index(ends[0])] if ends else 1
        if not ends or b.shape[0] % (2 * heads):
            return b
        return b.unflatten(0, (heads, *sizes)).transpose(1, 2).reshape(b.shape)
