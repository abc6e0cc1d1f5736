"""DoRA's trained norms of the rows or columns of W', which a file may add to the tensors of any method.

dora_scale               (out, 1, …), or (1, in, 1, …) from LyCORIS with wd_on_out=False
lora_magnitude_vector    (out,), or (1, out, 1, …) at convolutions, from PEFT
"""

from collections.abc import Mapping

from torch import Tensor

from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import Method, StoredModule
from lorac.ir.sites.site import Site
from lorac.variants.base import Variant
from lorac.variants.chain import Chain
from lorac.variants.dora import DoRA, Magnitude
from lorac.variants.lora import LoRA

PEFT, LYCORIS = "magnitude", "dora_scale"
MAGNITUDES = (PEFT, LYCORIS)
_FIRST, _SECOND = "part0_", "part1_"
"""The prefixes of the tensors of the two parts of a ``Chain``."""


def add_magnitude(method: Method, module: StoredModule) -> Method:
    """Add the norms that a module has, if any, to its method.

    Raises:
        AdapterError: the norms have a shape that the site does not allow.
        FormatError: PEFT does not combine norms with the method.
    """
    leaf = next((leaf for leaf in MAGNITUDES if leaf in module.tensors), None)
    if leaf is None:
        return method
    variant, tensors = method
    if len([other for other in MAGNITUDES if other in module.tensors]) > 1:
        raise unsupported_error(
            f"'{module.keys[LYCORIS]}' and '{module.keys[PEFT]}' are both the magnitude of one module",
            next_step="save the adapter again from its trainer: the file holds two adapters, or one in two spellings",
        )
    scale = module.tensors[leaf]
    # Norms of the columns have a first axis of length 1, though the weight has more rows.
    is_row = scale.ndim > 1 and scale.shape[0] == 1 and (module.site.out_features > 1 or scale.shape[1] > 1)
    columns = leaf == LYCORIS and is_row
    length = module.columns[0] if columns else module.site.out_features
    shape = (length,) if module.length(leaf) == length else (1, length)
    vector = module.matrix(leaf, *shape).flatten()
    if isinstance(variant, LoRA) and not columns and not variant.lora_bias:
        return DoRA(r=variant.r, alpha=variant.alpha), {**tensors, "magnitude": vector}
    chain = Chain(parts=(variant, Magnitude(columns=columns)))
    return chain, {**{_FIRST + name: t for name, t in tensors.items()}, f"{_SECOND}magnitude": vector}


def take_magnitude(
    variant: Variant, tensors: Mapping[str, Tensor], site: Site
) -> tuple[Variant, dict[str, Tensor], Tensor | None]:
    """Split a method and its tensors into those without norms, and the norms in LyCORIS's shape, or None."""
    rest = dict(tensors)
    ones = (1,) * max(len(site.kernel) - 1, 1)
    if isinstance(variant, DoRA):
        return variant, rest, rest.pop("magnitude").reshape(-1, *ones)
    if not isinstance(variant, Chain) or len(variant.parts) != 2 or not isinstance(variant.parts[1], Magnitude):
        return variant, rest, None
    norms = rest.pop(f"{_SECOND}magnitude").reshape(-1, *ones)
    inner = {name.removeprefix(_FIRST): tensor for name, tensor in rest.items()}
    return variant.parts[0], inner, norms.transpose(0, 1) if variant.parts[1].columns else norms
