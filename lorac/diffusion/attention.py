"""Branches at the attentions of diffusers' denoisers: their maps, region-aware cross-attention, isolation of regions.

Each stands at the output projection of an attention and reads its queries, keys and values in this pass, where other
adapters act, too. Regions are boxes, given as fractions of height and width, and become masks for the size that a call
has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from lorac.argument_types import Bounds
from lorac.errors import InputMismatch, SiteError
from lorac.frontend.model_view import ModelView
from lorac.variants.base import BranchVariant, Context, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import constant, zeros

CROSS, SELF = "attn2.to_out.0", "attn1.to_out.0"
"""Ends of the paths of cross- and self-attention's output projections in diffusers' blocks."""
BARRED = -1e6
"""The bias on the logits of keys that a query must not see."""
_NO_GRID = "in:"
"""The name of the grid of a site outside all transformers of a U-Net."""
_SLACK = 1e-4
"""Tolerance of a box's edges, in cells of the grid: 0.3 of ten cells is exactly three."""


def rasterise(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the masks (n, height, width) of boxes (n, 4), as booleans.

    A box is (top, left, bottom, right), fractions of height and width. It covers the rows from ⌈top·height⌉ to
    ⌊bottom·height⌋, without the latter, and columns likewise; a box of zeros covers nothing.
    """
    top, left, bottom, right = boxes.unbind(-1)
    return _between(top, bottom, height)[:, :, None] & _between(left, right, width)[:, None, :]


def _between(begin: Tensor, end: Tensor, size: int) -> Tensor:
    """Return which of ``size`` cells lie between two fractions (n,), as (n, size)."""
    cells = torch.arange(size, device=begin.device)
    first, last = torch.ceil(begin * size - _SLACK), torch.floor(end * size + _SLACK)
    return (cells >= first[:, None]) & (cells < last[:, None])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return features (…, tokens, heads·size) as (…, heads, tokens, size)."""
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)


def attend(q: Tensor, k: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Return softmax(q·kᵀ/√d + bias) of q (…, pixels, d) and k (…, tokens, d)."""
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1)


@dataclass(frozen=True, kw_only=True)
class AttentionBranch(BranchVariant):
    """A branch at the output projection of attentions.

    Attributes:
        heads: number of heads where ``heads_pattern`` has none; ``for_model`` reads both off the model.
        heads_pattern: module path -> its number of heads.
    """

    targets: str | Sequence[str] = (CROSS,)
    heads: Annotated[int, Bounds(1)] = 8
    heads_pattern: Mapping[str, int] = field(default_factory=dict)

    patterned = {"heads_pattern": "heads"}  # noqa: RUF012  (a class variable of the base, which the dataclass leaves)
    crosses = True
    """Whether it acts in cross-attention; if not, in self-attention."""

    def for_model(self, view: ModelView, inputs: object = None) -> "AttentionBranch":
        """Return this variant with the number of heads of each attention.

        Raises:
            SiteError: a site is not the output projection of such an attention, or the model has no such attention.
        """
        if not any(map(self._is_ours, view.module.modules())):
            raise SiteError(
                f"{self.name} acts in {self._kind}, and a {type(view.module).__name__} has none of these; the "
                "method's paper does not define it for the joint attention of Flux and SD3",
                next_step="take a U-Net, such as Stable Diffusion's or SDXL's; any pipeline of lorac.diffusion.compile "
                "takes other adapters for each image, adapters=[...]",
            )
        found = {}
        for site in self.named_sites(view):
            attention = view.module.get_submodule(attention_path(site.path))
            heads = getattr(attention, "heads", None)
            if not self._is_ours(attention) or not isinstance(heads, int):
                raise SiteError(
                    f"{self.name} acts at the output projections of {self._kind}, and '{site.path}' is not one",
                    next_step=f"leave targets= at its default, {type(self).targets}",
                )
            if _NO_GRID in self.reads(site):
                raise SiteError(
                    f"'{site.path}' is not in a transformer of a U-Net, whose input tells the rows and columns of "
                    "pixels",
                    next_step="take a U-Net, such as Stable Diffusion's or SDXL's",
                )
            found[site.path] = heads
        return replace(self, heads_pattern=found)

    @property
    def _kind(self) -> str:
        return "cross-attention" if self.crosses else "self-attention"

    def _is_ours(self, module: nn.Module) -> bool:
        """Return whether a module is an attention of diffusers that this branch can act in."""
        joint = getattr(module, "add_k_proj", None) is not None
        return getattr(module, "is_cross_attention", None) is self.crosses and not joint

    def projections(self, site: Site) -> tuple[str, str, str]:
        """Return the names of the values q, k and v of the attention whose output projection a site is."""
        at = attention_path(site.path)
        return f"{at}.to_q", f"{at}.to_k", f"{at}.to_v"


@dataclass(frozen=True, kw_only=True)
class AttentionMaps(AttentionBranch):
    """``y' = y``; gives the attention probabilities, as the extra output ``maps`` (b, pixels, tokens).

    They are means over heads, of all cross-attentions or of those that ``targets`` names.
    """

    name = "attention_maps"
    emits = ("maps",)

    def reads(self, site: Site) -> tuple[str, ...]:
        return self.projections(site)[:2]

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {}

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        q, k = (split_heads(ctx.value(name), self.heads) for name in self.reads(ctx.site))
        ctx.emit("maps", attend(q, k).mean(-3))
        return y


@dataclass(frozen=True, kw_only=True)
class RegionAttention(AttentionBranch):
    """Cross-attention in which every region has its own words, keys, values and output projection.

    In a region n, y' is the mean over the regions there of O_n = Out_n(softmax(Q·K_nᵀ/√d)·V_n), where Q is the
    model's own query and K_n, V_n and Out_n are those of a concept; elsewhere it is y, bit for bit. Without boxes it is
    y everywhere. The extra output ``region_maps`` (b, n, pixels, tokens) has softmax(Q·K_nᵀ/√d) of the whole grid.

    Its tensors are buffers, written between calls: ``boxes`` (n, 4) as ``rasterise`` takes them; ``keys`` and
    ``values`` (groups, n, tokens, features) of a concept's words; ``out_A`` (n, r, in) and ``out_B`` (n, out, r), the
    change of the output projection. ``groups`` (1,) says how many prompts the rows of a call belong to, in equal parts:
    two with classifier-free guidance.

    Attributes:
        regions: how many boxes there may be.
        tokens: number of words of a region's prompt.
        r: rank of a concept's change of the output projection.
        groups: largest number of groups.
    """

    regions: Annotated[int, Bounds(1)] = 2
    tokens: Annotated[int, Bounds(1)] = 77
    r: Annotated[int, Bounds(1)] = 4
    groups: Annotated[int, Bounds(1)] = 2

    name = "region_attention"
    paper = "LoRA-Composer: Leveraging Low-Rank Adaptation for Multi-Concept Customization, arXiv 2403.11627"
    emits = ("region_maps",)

    def reads(self, site: Site) -> tuple[str, ...]:
        return (self.projections(site)[0], *_output_reads(site), grid_name(site.path))

    def params(self, site: Site) -> dict[str, ParamSpec]:
        words = (self.groups, self.regions, self.tokens, site.in_features)
        return {
            "boxes": ParamSpec((self.regions, 4), zeros, Role.BUFFER, shared=True),
            "groups": ParamSpec((1,), constant(1.0), Role.BUFFER, shared=True),
            "keys": ParamSpec(words, zeros, Role.BUFFER),
            "values": ParamSpec(words, zeros, Role.BUFFER),
            "out_A": ParamSpec((self.regions, self.r, site.in_features), zeros, Role.BUFFER),
            "out_B": ParamSpec((self.regions, site.out_features, self.r), zeros, Role.BUFFER),
        }

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        names = self.reads(ctx.site)
        q = split_heads(ctx.value(names[0]), self.heads).unsqueeze(1)  # (b, 1, heads, pixels, size)
        rows = torch.arange(x.shape[0], device=x.device)
        group = torch.floor(rows * p.groups / x.shape[0]).clamp(0, self.groups - 1).long()
        k, v = (split_heads(words[group], self.heads) for words in (p.keys, p.values))
        attention = attend(q, k)
        ctx.emit("region_maps", attention.mean(2))
        outputs = (attention @ v).transpose(2, 3).flatten(3)  # (b, n, pixels, features)
        outputs = _project(outputs, ctx) + outputs @ p.out_A.mT @ p.out_B.mT
        inside = rasterise(p.boxes, *ctx.value(names[-1]).shape[-2:]).flatten(1).unsqueeze(-1)  # (n, pixels, 1)
        count = inside.sum(0)
        return torch.where(count > 0, (inside * outputs).sum(1) / count.clamp(min=1), y)


@dataclass(frozen=True, kw_only=True)
class ConceptIsolation(AttentionBranch):
    """Self-attention in which queries of one region do not see the keys of other regions; others see all.

    The extra output ``self_maps`` (b, pixels, pixels) has the probabilities, as means over heads. ``boxes`` (n, 4) is a
    buffer, as ``rasterise`` takes it; outside all boxes y' is y, bit for bit.

    Attributes:
        regions: how many boxes there may be.
    """

    targets: str | Sequence[str] = (SELF,)
    crosses = False
    regions: Annotated[int, Bounds(1)] = 2

    name = "concept_isolation"
    paper = RegionAttention.paper
    emits = ("self_maps",)

    def reads(self, site: Site) -> tuple[str, ...]:
        return (*self.projections(site), *_output_reads(site), grid_name(site.path))

    def params(self, site: Site) -> dict[str, ParamSpec]:
        return {"boxes": ParamSpec((self.regions, 4), zeros, Role.BUFFER, shared=True)}

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        names = self.reads(ctx.site)
        q, k, v = (split_heads(ctx.value(name), self.heads) for name in names[:3])
        inside = rasterise(p.boxes, *ctx.value(names[-1]).shape[-2:]).flatten(1)  # (n, pixels)
        others = inside.sum(0) > inside.long()  # (n, pixels): whether another region covers the pixel
        barred = (inside.unsqueeze(-1) & others.unsqueeze(-2)).any(0)
        attention = attend(q, k, BARRED * barred)
        ctx.emit("self_maps", attention.mean(-3))
        outputs = _project((attention @ v).transpose(-3, -2).flatten(-2), ctx)
        return torch.where(inside.any(0).unsqueeze(-1), outputs, y)


def attention_path(path: str) -> str:
    """Return the path of the attention whose output projection is at ``path``."""
    return path.removesuffix(".to_out.0")


def grid_name(path: str) -> str:
    """Return the name of the value (b, channels, height, width) that the transformer around a site reads.

    Without such a transformer it is ``_NO_GRID``.
    """
    return f"{_NO_GRID}{path.rpartition('.transformer_blocks.')[0]}"


def _output_reads(site: Site) -> tuple[str, ...]:
    """Return the names of the values of the output projection: its weight and, where it has one, its bias."""
    return (f"weight:{site.path}", *([] if site.bias is None else [f"param:{site.bias}"]))


def _project(x: Tensor, ctx: Context) -> Tensor:
    """Apply the base's output projection."""
    weight, *bias = (ctx.value(name) for name in _output_reads(ctx.site))
    return F.linear(x, weight, *bias)


def select_maps(maps: Mapping[str, Tensor], grid: tuple[int, int], layers: Sequence[str] = ()) -> list[Tensor]:
    """Return the maps of a call that have one size.

    Args:
        maps: site path -> maps (b, …, pixels, words), as in ``Compiled.aux``.
        grid: height and width of the maps.
        layers: parts of the paths of the attentions that count; none: all.

    Raises:
        InputMismatch: there are none.
    """
    named = {path: found for path, found in maps.items() if not layers or any(part in path for part in layers)}
    found = [one for one in named.values() if one.shape[-2] == grid[0] * grid[1]]
    if not found:
        raise InputMismatch(
            f"none of the attentions to count has maps of {grid[0]} x {grid[1]} pixels; their maps have "
            f"{', '.join(sorted({str(one.shape[-2]) for one in named.values()}, key=int)) or 'no'} pixels",
            next_step="make the composer with the stride= of one of the model's resolutions, and without layers=",
        )
    return found
