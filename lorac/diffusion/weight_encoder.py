"""AutoLoRA's encoder of adapters: a LoRA's weights as one vector, which depends on its changes alone.

arXiv 2508.02107. It computes as its code (lzws/AutoLoRA) does at its width of 768, whose files
``lorac.diffusion.authors_encoder`` reads.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorac.adapters.factors import factors
from lorac.errors import AdapterError, OptionError, missing_site_error, nearest_name
from lorac.frontend.model_view import Model
from lorac.ir.algebra.changes import LowRank
from lorac.variants.adapter import Adapter

_HEAD = 64
"""Width of an attention head, CLIP's."""
_INDEX = re.compile(r"\.\d+(?=\.|$)")
Sizes = Mapping[str, tuple[int, int]]
"""Path of a site -> its numbers of inputs and outputs."""
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Path of a site -> A (n, in, R) and B (n, R, out) of n adapters, zeros where one does not touch it."""


class WeightEncoder(nn.Module):
    """``e = mean(LN(blocks(W_type(x_l·A_l·B_l) + position_l)))``: a token for each site l, two causal CLIP blocks.

    x_l is a learned input of the site, or several, and W reads their answers side by side. Sites share W if their paths
    differ only in numbers of blocks and they have equally many outputs.

    Args:
        sizes: the sites, in the model's order.
        width: of the result, that of the text encoder's embeddings.
        layers: number of blocks.
        probes: number of inputs of each site. The paper's single one sees one direction of a change; with few adapters
            to learn from, more inputs tell them apart better.

    Raises:
        OptionError: there are no probes.
    """

    def __init__(self, sizes: Sizes, width: int, *, layers: int = 2, probes: int = 1) -> None:
        super().__init__()
        if probes < 1:
            raise OptionError(f"an encoder with probes={probes} reads nothing", next_step="give 1 or more")
        self.sizes, self.width, self.probes = dict(sizes), width, probes
        sites = nn.ModuleDict({submodule_name(path): SiteProbe(takes, probes) for path, (takes, _) in sizes.items()})
        kinds = {projection_name(path, gives): probes * gives for path, (_, gives) in sizes.items()}
        projections = nn.ModuleDict({kind: nn.Linear(reads, width) for kind, reads in kinds.items()})
        self.embedder = nn.ModuleDict({"model_dict": sites, "proj_dict": projections})
        self.position_embeds = nn.Parameter(torch.zeros(1, len(sizes), width))
        self.encoders = nn.ModuleList(ClipBlock(width) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width)

    def forward(self, pairs: Pairs) -> Tensor:
        """Return vectors (n, width) of n adapters (``stack_pairs``)."""
        tokens = []
        for path, (a, b) in pairs.items():
            answer = self.embedder.get_submodule(f"model_dict.{submodule_name(path)}")(a, b)
            tokens.append(self.embedder.get_submodule(f"proj_dict.{projection_name(path, b.shape[-1])}")(answer))
        hidden = torch.stack(tokens, 1) + self.position_embeds
        for block in self.encoders:
            hidden = block(hidden)
        return self.final_layer_norm(hidden).mean(1)

    def stack_pairs(self, adapters: Sequence[Adapter], model: Model | None = None) -> Pairs:
        """Return the factors of adapters, site by site, ready to be encoded together.

        Args:
            adapters: of methods with low-rank changes, each scale in its factors.
            model: where a method's change depends on it.

        Raises:
            AdapterError: a change is not low-rank.
            SiteError: an adapter touches a site that the encoder was not made for, or one of other sizes.
        """
        found = [read_pairs(adapter, model) for adapter in adapters]
        for adapter, pairs in zip(adapters, found, strict=True):
            self._check(adapter.name, pairs)
        return {path: _stack([pairs.get(path) for pairs in found], sizes) for path, sizes in self.sizes.items()}

    def _check(self, name: str, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for path, (a, b) in pairs.items():
            if self.sizes.get(path) != (len(a), b.shape[-1]):
                raise missing_site_error(
                    f"this encoder was not made for '{path}' ({len(a)} inputs, {b.shape[-1]} outputs), which '{name}' "
                    "changes",
                    nearest=nearest_name(path, self.sizes),
                    next_step="train a retriever on adapters of this model",
                )


class SiteProbe(nn.Module):
    """The learned inputs x (1, count, in) of a site, to which an adapter answers x·A·B.

    Args:
        size: in.
        count: number of inputs.
    """

    def __init__(self, size: int, count: int = 1) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.randn(1, count, size))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the answers (n, count·out) of n adapters, side by side."""
        return (self.x @ a @ b).flatten(1)


class ClipBlock(nn.Module):
    """CLIP's transformer block on tokens (n, tokens, width), each of which attends to itself and those before it.

    Args:
        width: of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // _HEAD)
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self.self_attn, name, nn.Linear(width, width))
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the block's output."""
        given = self.layer_norm1(hidden)
        q, k, v = (
            self.self_attn.get_submodule(name)(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        hidden = hidden + self.self_attn.get_submodule("out_proj")(attended)
        wide = self.mlp.get_submodule("fc1")(self.layer_norm2(hidden))
        return hidden + self.mlp.get_submodule("fc2")(wide * torch.sigmoid(1.702 * wide))


def find_sizes(adapters: Iterable[Adapter], model: Model | None = None) -> dict[str, tuple[int, int]]:
    """Return the sites of all adapters with their sizes, sorted by path; raises as ``read_pairs``."""
    found = {path: (len(a), b.shape[-1]) for adapter in adapters for path, (a, b) in read_pairs(adapter, model).items()}
    return dict(sorted(found.items()))


def read_pairs(adapter: Adapter, model: Model | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A (in, R) and B (R, out) of an adapter's change of each site, in float32.

    Raises:
        AdapterError: a change is not low-rank, or is more than a product.
    """
    found = {}
    for path, change in factors(adapter, model).items():
        folded = change.folded() if isinstance(change, LowRank) else None
        if folded is None or folded.scales:
            raise AdapterError(
                f"the change of '{path}' by '{adapter.name}' ({adapter.variant.name}) is not a product of two factors",
                next_step="make a LoRA of it first: lorac.to_lora(adapter, model, rank=…)",
            )
        found[path] = (folded.a.detach().float(), folded.b.detach().float())
    return found


def _stack(pairs: Sequence[tuple[Tensor, Tensor] | None], sizes: tuple[int, int]) -> tuple[Tensor, Tensor]:
    takes, gives = sizes
    rank = max((pair[0].shape[1] for pair in pairs if pair is not None), default=1)
    a, b = torch.zeros(len(pairs), takes, rank), torch.zeros(len(pairs), rank, gives)
    for index, pair in enumerate(pairs):
        if pair is not None:
            a[index, :, : pair[0].shape[1]], b[index, : len(pair[1])] = pair
    return a, b


def submodule_name(path: str) -> str:
    """Return a path as the name of a submodule."""
    return path.replace(".", "___")


def projection_name(path: str, gives: int) -> str:
    """Return the name of the projection of a site's answer, which sites of one kind share."""
    return f"{submodule_name(_INDEX.sub('', path))}___{gives}"
