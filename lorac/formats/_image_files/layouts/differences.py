"""Differences of whole weights.

Source: LyCORIS, lycoris/modules/full.py; sd-scripts' extractions. ``diff`` is W' − W (out, in, *kernel), ``diff_b`` is
b' − b (out,).
"""

from torch import Tensor

from lorac.errors import SiteError
from lorac.formats._errors import unsupported_error
from lorac.formats._image_files.layout import Method, ModuleLayout, StoredModule, Tensors
from lorac.ir.sites.site import Site
from lorac.variants.edit import Edit

_PARTS = {"diff": "delta", "diff_b": "e"}


class DifferenceLayout(ModuleLayout[Edit]):
    """The difference of a weight, and of its bias."""

    required = ("diff",)
    optional = ("diff_b",)
    variants = (Edit,)
    rows = ("delta", "e")

    def read(self, module: StoredModule) -> Method:
        tensors = {"delta": module.matrix("diff", module.site.out_features, *module.columns)}
        if "diff_b" in module.tensors:
            if module.site.bias is None:
                raise SiteError(
                    f"'{module.keys['diff_b']}' is of '{module.site.path}', which has no bias",
                    next_step="load the base model that the adapter was trained on",
                )
            tensors["e"] = module.matrix("diff_b", module.site.out_features).flatten()
        return Edit(parts=dict.fromkeys(tensors, 1)), tensors

    def write(self, variant: Edit, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        if "delta" not in tensors or not tensors.keys() <= {*_PARTS.values()}:
            raise unsupported_error(
                f"these files hold an edit of '{site.path}' as a difference alone, and not by {', '.join(tensors)}",
                next_step="lorac.to_lora makes a LoRA of a pair; or use format='native'",
            )
        written = {leaf: tensors[part] for leaf, part in _PARTS.items() if part in tensors}
        return {**written, "diff": written["diff"].reshape(site.kernel)}
