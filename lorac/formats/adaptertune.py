"""AdapterTune's own checkpoints: ``{"model", "optimizer", "epoch"}`` with ``blocks.<n>.adapter.down.weight`` and so on.

Source: salimkhazem/adaptertune. The file holds a whole timm model with blocks one level deeper, at
``blocks.<n>.block``. The parameters other than the adapter's and the head's are compared with the base.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.errors import require_base, unused_error
from lorac.formats._authors import AuthorsFormat, KeyRow, Tensors, find_size, required
from lorac.formats._config_fields import Field, read_number
from lorac.formats.reading import PICKLES, AdapterFile
from lorac.frontend.model_view import ModelView
from lorac.variants.adaptertune import AdapterTune

_MODEL, _OF_TRAINING = "model", {"optimizer", "epoch"}
_BLOCK = re.compile(r"(.*\bblocks\.\d+)\.(.+)")
_SETTINGS: Mapping[str, Field] = {"adapter_alpha": required("alpha", read_number)}


class AdapterTuneFormat(AuthorsFormat):
    """AdapterTune's own checkpoints."""

    name = "adaptertune"
    looks_for = "a file with tensors blocks.<n>.adapter.down.weight"
    written_by = "AdapterTune's authors"
    methods = (AdapterTune,)
    rows = tuple(
        KeyRow(f"*.adapter.{half}.{leaf}", "*", f"{half}{end}")
        for half in ("down", "up")
        for leaf, end in (("weight", ""), ("bias", "_bias"))
    )
    mark = re.compile(r"\bblocks\.\d+\.adapter\.(down|up)\.weight$")
    weights = "best.pt"
    settings = _SETTINGS
    trained = ("head.",)

    def make_variant(self, values: JsonMapping, tensors: Mapping[str, Tensors], file: Path) -> AdapterTune:
        return AdapterTune(r=find_size(tensors, "down", 0, file), alpha=values["adapter_alpha"])

    def read_tensors(self, file: AdapterFile) -> dict[str, Tensor]:
        if file.suffix not in PICKLES:
            return file.read_tensors()
        loaded = file.read_pickle()
        if not isinstance(loaded, dict) or _MODEL not in loaded:
            return file.check_tensors(loaded)
        unknown = next((key for key in loaded if key not in {_MODEL, *_OF_TRAINING}), None)
        if unknown is not None:
            raise unused_error(
                f"'{file}' holds '{unknown}', which is not a part of AdapterTune's checkpoints",
                next_step=f"they hold {_MODEL}, {', '.join(sorted(_OF_TRAINING))}",
            )
        return file.check_tensors(loaded[_MODEL])

    def write_tensors(self, file: Path, tensors: Tensors, view: ModelView | None) -> None:
        """Write the whole model, which the authors' code loads.

        Raises:
            BaseNeeded: no model is given.
        """
        view = require_base(view, "AdapterTune's checkpoints hold the whole model")
        # In a file, the names of parameters within blocks have one more level.
        whole = {_BLOCK.sub(r"\1.block.\2", name): view.tensor(name) for name in view.module.state_dict()}
        contiguous = {key: tensor.detach().contiguous().clone() for key, tensor in {**whole, **tensors}.items()}
        torch.save({_MODEL: contiguous}, file)

    def name_copy(self, key: str) -> str | None:
        found = _BLOCK.fullmatch(key)
        if found is None:
            return key
        return f"{found[1]}.{found[2].removeprefix('block.')}" if found[2].startswith("block.") else None
