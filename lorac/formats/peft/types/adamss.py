"""PEFT type ADAMSS.

Source: peft.tuners.adamss of PEFT 0.21. A module has `adamss_newB` (R, in + 1), or (R, in) without a bias, and for each
group k of its rows `adamss_A.<k>` (r_k, R) and `adamss_B.<k>` (size, r_k). A file does not store the rows of a group:
PEFT computes the groups from the base's weight. lorac stores the A_k of a module in one tensor, padded to the largest
r_k, and concatenates the B_k.
"""

import re
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor

from lorac.errors import SiteError
from lorac.formats._config_fields import Applied, TrainingOnly, read_flag, read_int, read_number, read_size
from lorac.formats._errors import corrupt_error
from lorac.formats._site_layouts import matrix_site
from lorac.formats.peft.fields import LAYERS, WITHOUT_FAN, own, trained
from lorac.formats.peft.peft_type import Parameters, PeftType, Tensors, mismatched_shapes, take_tensors
from lorac.ir.sites.site import BaseReader, Site
from lorac.variants.adamss import AdaMSS

_GROUP = re.compile(r"(.*\.adamss_)([AB])\.(\d{1,6})")
_SIZES, _GROUPS = "adamss_sizes", "adamss_groups"
_EXPECTED = "newB is (R, in + 1), and groups are numbered from 0, A (r, R) and B (size, r) of each"
_SCHEDULE = {"asa_target_subspaces": 50, "init_warmup": 50, "final_warmup": 1000, "mask_interval": 100}
_AVERAGES = {"asa_importance_beta": 0.85, "asa_uncertainty_beta": 0.85, "asa_schedule_exponent": 3.0}


class AdamssType(PeftType[AdaMSS]):
    """ADAMSS."""

    peft_type = "ADAMSS"
    variants = {AdaMSS: {}}
    fields = {
        **WITHOUT_FAN,
        **LAYERS,
        **own(read_size, r=100, num_subspaces=5, subspace_rank=1),
        "use_dynamic_rank": Applied(False, to="use_dynamic_rank", read=read_flag),
        "svd_threshold": Applied(0.1, to="svd_threshold", read=read_number),
        "random_seed": Applied(0, to="random_seed", read=read_int),
        "init_weights": TrainingOnly("orthogonal"),
        # PEFT freezes groups during training.
        **trained(use_asa=False, **_SCHEDULE, **_AVERAGES),
    }
    suffixes = ("adamss_newB", "adamss_A", "adamss_B", _SIZES)
    needs_model = True
    derived = (_GROUPS,)

    def rename_keys(self, tensors: Tensors) -> Tensors:
        """Merge the tensors of numbered groups into one tensor each, and add the sizes of the groups."""
        numbered: defaultdict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, tensor in tensors.items():
            if match := _GROUP.fullmatch(key):
                numbered[match[1]][f"{match[2]}.{int(match[3])}"] = tensor
        joined = {key: tensor for key, tensor in tensors.items() if not _GROUP.fullmatch(key)}
        for key, found in numbered.items():
            downs, ups = ([found.get(f"{part}.{k}") for k in range(len(found) // 2)] for part in "AB")
            pairs = [(a, b) for a, b in zip(downs, ups, strict=True) if a is not None and b is not None]
            ranks = [
                a.shape[0] for a, b in pairs if a.ndim == b.ndim == 2 and a.shape == (b.shape[1], pairs[0][0].shape[1])
            ]
            if 2 * len(ranks) != len(found) or not all(ranks):
                raise mismatched_shapes(key.removesuffix(".adamss_"), found, _EXPECTED)
            joined |= {
                f"{key}A": torch.stack([F.pad(a, (0, 0, 0, max(ranks) - len(a))) for a, _ in pairs]),
                f"{key}B": torch.cat([F.pad(b, (0, max(ranks) - b.shape[1])) for _, b in pairs]),
                f"{key}sizes": torch.tensor([len(b) for _, b in pairs]),
            }
        return joined

    def read_site(self, variant: AdaMSS, path: str, stored: Tensors) -> tuple[Site, dict[str, Tensor]]:
        tensors = take_tensors(path, stored, dict(zip(self.suffixes, (2, 3, 2, 1), strict=True)), _EXPECTED)
        return matrix_site(path, 1, 1), tensors

    def check_site(self, site: Site, tensors: Tensors) -> None:
        super().check_site(site, tensors)
        (groups, _, rank), rows = tensors["adamss_A"].shape, site.out_features
        if groups < rows <= rank:  # the left singular vectors are orthonormal: all distances between rows are equal
            raise SiteError(
                f"all rows of '{site.path}' are equally near to each other in {rank} singular vectors, and rounding "
                "decides how PEFT groups them",
                next_step=f"train with r below {rows} or num_subspaces={rows}, or add the module to exclude=",
            )

    def complete_site(self, variant: AdaMSS, site: Site, tensors: Parameters, base: BaseReader) -> Parameters:
        self.check_site(site, tensors)
        sizes = tensors.pop(_SIZES)
        spare = max(variant.subspace_rank - tensors["adamss_B"].shape[1], 0)
        tensors["adamss_A"] = F.pad(tensors["adamss_A"], (0, 0, 0, spare))
        tensors["adamss_B"] = F.pad(tensors["adamss_B"], (0, spare))
        whole = super().complete_site(variant, site, tensors, base)
        if not torch.equal(torch.bincount(whole[_GROUPS][0], minlength=len(sizes)), sizes):
            raise corrupt_error(
                f"the base's weight at '{site.path}' gives other groups of rows than the file, which does not name "
                "its rows",
                next_step="load the base model that the adapter was trained on",
            )
        return whole

    def write_site(self, variant: AdaMSS, site: Site, tensors: Tensors) -> dict[str, Tensor]:
        downs, labels = tensors["adamss_A"], tensors[_GROUPS][0].cpu()
        ups = tensors["adamss_B"].split(torch.bincount(labels, minlength=len(downs)).tolist())
        written = {"adamss_newB": tensors["adamss_newB"]}
        for group, (down, up) in enumerate(zip(downs, ups, strict=True)):
            used = (down != 0).any(1) | (up != 0).any(0)
            rank = max([n + 1 for n, one in enumerate(used.tolist()) if one], default=1)
            written |= {f"adamss_A.{group}": down[:rank], f"adamss_B.{group}": up[:, :rank]}
        return written
