"""The names in files: prefixes of components, and leaves of a module's tensors."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

DENOISERS = ("unet", "transformer")
"""The components that make an image out of noise; a pipeline has one of them."""
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "lora_unet_": DENOISERS,
    "oft_unet_": DENOISERS,
    "lycoris_unet_": DENOISERS,
    "lora_transformer_": DENOISERS,
    "lycoris_": DENOISERS,
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3", "text_encoder_2"),  # Flux's second text encoder is SD3's third
    "unet.": DENOISERS,
    "transformer.": DENOISERS,
    "transformer_2.": ("transformer_2",),
    "diffusion_model.": DENOISERS,
    "": DENOISERS,
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
}
"""How the names of a component's tensors begin -> its name in pipelines; the first that the model has."""
BARE = re.compile(r"(double_blocks|single_blocks|blocks|transformer_blocks|single_transformer_blocks)\.\d+\.")
"""How names begin in files that name no component: those of XLabs, DiffSynth and others, of a transformer alone."""
LEAVES: Mapping[str, str] = {
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora.down.weight": "lora_down",
    "lora.up.weight": "lora_up",
    "lora_linear_layer.down.weight": "lora_down",
    "lora_linear_layer.up.weight": "lora_up",
    "lora_A.default.weight": "lora_down",
    "lora_B.default.weight": "lora_up",
    "down.weight": "lora_down",
    "up.weight": "lora_up",
    "lora_mid.weight": "lora_mid",
    "lora_B.bias": "lora_bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "dora_scale",
    "alpha": "alpha",
    **{name: name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{name: name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    **{name: name for name in ("oft_blocks", "rescale", "weight", "on_input")},
    **{name: name for name in ("diff", "diff_b", "w_norm", "b_norm")},
    **{f"{name}.weight": name for name in ("a1", "a2", "b1", "b2")},
}
"""How the name of a tensor of a module ends -> its name in layouts."""
DIFFERENCES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}
"""Tensors that are the difference of a whole parameter -> its name."""
_OF_LYCORIS = ("weight", "on_input")
"""Ends of names that are tensors of methods only where dots end the name of the module."""
_LEAF_OF_ATTENTION = re.compile(r"\.(to_(?:q|k|v|out)|(?:q|k|v|out)_proj)_lora\.(down|up)\.weight$")
"""The oldest spelling of diffusers: <attention>.processor.to_q_lora.down.weight."""
_OLD_OUTPUT = re.compile(r"\.to_out$")


@dataclass(frozen=True)
class TensorName:
    """A name in a file, parsed.

    Attributes:
        key: the name in the file.
        component: the prefix, a key of ``COMPONENTS``.
        module: the name of the module in the file.
        leaf: the layout's name of the tensor.
    """

    key: str
    component: str
    module: str
    leaf: str


def parse_name(key: str, components: Iterable[str]) -> TensorName | None:
    """Split a name into its parts; return None where its prefix or its leaf is unknown.

    Args:
        components: known prefixes.
    """
    component = max((known for known in components if known and key.startswith(known)), key=len, default=None)
    if component is None and BARE.match(key):
        component = ""
    if component is None:
        return None
    rest = _LEAF_OF_ATTENTION.sub(r".\1.lora.\2.weight", key[len(component) :].replace(".processor.", "."))
    parts = rest.split(".")
    for first in range(1, len(parts)):
        leaf = LEAVES.get(".".join(parts[first:]))
        if leaf is not None and not (leaf in _OF_LYCORIS and component.endswith(".")):
            return TensorName(key, component, _OLD_OUTPUT.sub(".to_out.0", ".".join(parts[:first])), leaf)
    return None


def is_underscored(key: str) -> bool:
    """Return whether a name has the form of sd-scripts and LyCORIS, which write a module's path with underscores."""
    return "." in key and any(key.startswith(beginning) for beginning in COMPONENTS if beginning.endswith("_"))


def is_dotted(key: str) -> bool:
    """Return whether a name is a component's LoRA tensor as diffusers writes it."""
    named = parse_name(key, [component for component in COMPONENTS if component.endswith(".")])
    return named is not None and named.leaf.startswith(("lora_", "magnitude"))
