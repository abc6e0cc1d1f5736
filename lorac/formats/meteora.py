"""MeteoRA's own checkpoints: PEFT's keys with the experts' factors stacked, and the keys of ``moe_gate``.

Source: NJUDeepEngine/meteora. The file may hold the whole model, which is then compared with the base.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from lorac.argument_types import JsonMapping
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size, required
from lorac.formats._config_fields import Applied, Field, read_number, read_size
from lorac.formats._errors import corrupt_error
from lorac.variants.meteora import MeteoRA

_PREFIX = "base_model.model."
_SETTINGS: Mapping[str, Field] = {
    "lora_alpha": required("alpha", read_number),
    "top_k": required("top_k", read_size),
    "temperature": Applied(1.0, to="temperature", read=read_number),
}


class MeteoraFormat(AuthorsFormat):
    """MeteoRA's own checkpoints."""

    name = "meteora"
    looks_for = "a file with tensors base_model.model.<layer>.moe_gate.weight"
    written_by = "MeteoRA's authors"
    methods = (MeteoRA,)
    rows = tuple(KeyRow(f"{_PREFIX}*.{name}.weight", "*", name) for name in ("lora_A", "lora_B", "moe_gate"))
    mark = re.compile(r"\.moe_gate\.weight$")
    weights = "model.safetensors"
    settings = _SETTINGS

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> MeteoRA:
        experts, rows = find_size(tensors, "moe_gate", 0, file), find_size(tensors, "lora_A", 0, file)
        if rows % max(experts, 1):
            raise corrupt_error(f"'{file}' has {rows} rows of lora_A, which {experts} experts do not divide")
        fields = {field.to: values[name] for name, field in self.settings.items() if field.to}
        return MeteoRA(r=rows // experts, experts=experts, **fields)

    def name_copy(self, key: str) -> str | None:
        return key.removeprefix(_PREFIX).replace(".base_layer.", ".") if "lora_" not in key else None


FORMAT = MeteoraFormat()
