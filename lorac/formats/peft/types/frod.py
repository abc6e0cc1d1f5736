"""PEFT type FROD.

Source: peft.tuners.frod of PEFT 0.21. A module has `frod_lambda_l` (in,) and `frod_lambda_s_values` (nnz,). Modules
whose paths have the same last name share `base_model.frod_V.<role>` (in, in), `base_model.frod_s_indices.<role>` (2,
nnz) and `base_model.frod_s_size.<role>` (2,), with both sizes in. No file has U: PEFT computes it from V and the base's
weight.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lorac.argument_types import JsonMapping
from lorac.formats._config_fields import Applied, TrainingOnly, read_number, write_number
from lorac.formats._errors import corrupt_error, unsupported_error
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import COMMON, LAYERS, SEEDED, bias
from lorac.formats.peft.peft_type import PeftType, Tensors, take_tensors
from lorac.ir.sites.site import Site
from lorac.variants.frod import FRoD, role_of


class FrodType(PeftType[FRoD]):
    """FROD."""

    peft_type = "FROD"
    variants = {FRoD: {}}
    fields = {
        **COMMON,
        **LAYERS,
        **SEEDED,
        "sparse_rate": Applied(0.01, to="sparse_rate", read=read_number, write=write_number),
        "regularization_alpha": TrainingOnly(1e-3, to="regularization_alpha", read=read_number),
        "frod_dropout": TrainingOnly(0.0, to="dropout", read=read_number),
        "bias": bias("frod"),
        "progressbar": TrainingOnly(True),
        "runtime_offload_base_weight": TrainingOnly(False),
    }
    suffixes = ("frod_lambda_l", "frod_lambda_s_values")
    shared = ("frod_V", "frod_s_indices", "frod_s_size")
    conv1d = True
    needs_model = True
    derived = ("frod_U",)

    def read_site(self, variant: FRoD, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        own = {name: stored[f"{name}.{role_of(path)}"] for name in self.shared if f"{name}.{role_of(path)}" in stored}
        own |= {name: stored[name] for name in self.suffixes if name in stored}
        axes = {"frod_V": 2, "frod_s_indices": 2, "frod_s_size": 1, "frod_lambda_l": 1, "frod_lambda_s_values": 1}
        expected = "frod_V is (in, in), frod_s_indices (2, nnz), frod_s_size (in, in), and the lambdas (in,) and (nnz,)"
        tensors = take_tensors(path, own, axes, expected)
        if tensors.pop("frod_s_size").tolist() != [len(tensors["frod_lambda_l"])] * 2:
            raise corrupt_error(f"frod_s_size at '{path}' is not the size of frod_V", next_step=expected)
        return matrix_site(path, 1, 1), {name: tensor for name, tensor in tensors.items() if tensor.numel()}

    def draw_shared(self, values: JsonMapping, out_features: int, in_features: int) -> Sequence[Tensor]:
        raise unsupported_error(
            "the file lacks frod_V, and PEFT's decomposition of the base gives another matrix on another machine",
            next_step="save the adapter with PEFT again, with save_projection=True",
        )

    def write_site(self, variant: FRoD, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        size, empty = torch.tensor([site.in_features] * 2), torch.zeros(2, 0, dtype=torch.int64)
        found = {"frod_s_indices": empty, "frod_lambda_s_values": tensors["frod_V"].new_zeros(0), "frod_s_size": size}
        role = role_of(site.path)
        return {
            f"{name}.{role}" if name in self.shared else name: tensor for name, tensor in {**found, **tensors}.items()
        }
