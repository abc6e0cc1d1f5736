"""X-LoRA: LoRAs in every layer, mixed token by token by a classifier that reads what the base makes of the text.

"X-LoRA: Mixture of Low-Rank Adapter Experts…", Buehler and Buehler 2024, arXiv 2402.07148; PEFT's XLORA. The scaling
pass, whose last hidden state the classifier reads, is one of the unadapted model, or one in which every expert weighs
``scaling_pass_value``. Only the classifier is trained.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from lorac.errors import AdapterError
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import infer_module_site
from lorac.ir.algebra.reduction import Params
from lorac.ir.sites import Site, SiteKind
from lorac.ir.slots.program_values import BASE, pass_value_name
from lorac.variants import _initialisers as _inits
from lorac.variants._experts import expert_specs, read_factors, stack_factors
from lorac.variants._routed import RoutedVariant
from lorac.variants._routing import top_k
from lorac.variants.adapter import Adapter
from lorac.variants.base import Context
from lorac.variants.params import InitContext, ParamSpec, Role

Tensor = torch.Tensor
SCALING_PASS = "scaling"
"""The pass before the call's own, where it is not one of the base."""


@dataclass(frozen=True, kw_only=True)
class XLoRA(RoutedVariant):
    """``y' = y + g·Σ_i σ_i·B_i·A_i·x``, σ = softmax(MLP(h)/temperature) of each token, h the last hidden state.

    h is that of a scaling pass, without gradients, in which σ_i = v at every token and site: of the unadapted model
    where v is 0. What top-k and its softmax make of σ they make of v too, as in PEFT; of experts that weigh the same
    those with the lowest indices are kept, where PEFT leaves it to torch which.

    A (experts·r, in) and B (out, experts·r) are the experts' factors stacked, each one's scale in its B. The classifier
    is one for the model, with ReLU and dropout between its layers. What each token's experts weigh (…, experts) is
    emitted as ``"router"``.

    Attributes:
        hidden: path of the module that gives the last hidden state (…, hidden_size): the last norm of most models.
        hidden_size: its width.
        r: rank of each expert.
        experts: their number.
        layerwise_scalings: whether each site has weights of its own; ``targets`` are then their paths in full.
        depth: layers of the classifier.
        size: width between them.
        activation: whether ReLU, and in training dropout, stands between them.
        dropout_p: the rate of that.
        enable_softmax: whether σ is normalised; else it is what the classifier gives.
        softmax_temperature: flattens it.
        top_k_lora: how many experts a token keeps, as they are weighed, ties to the lowest index; None: all.
        enable_softmax_topk: whether those that are left, and are not 0, are normalised.
        scaling_pass_value: v.
        global_scaling_weight: g.
        use_trainable_adapters: train A and B too.
    """

    hidden: str
    hidden_size: int
    r: int = 8
    experts: int = 4
    layerwise_scalings: bool = False
    depth: int = 1
    size: int = 2048
    activation: bool = True
    dropout_p: float = 0.2
    enable_softmax: bool = True
    softmax_temperature: float = 1.0
    top_k_lora: int | None = None
    enable_softmax_topk: bool = False
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    use_trainable_adapters: bool = False

    name: ClassVar[str] = "x_lora"
    paper: ClassVar[str] = "X-LoRA: Mixture of Low-Rank Adapter Experts, arXiv 2402.07148"
    kinds: ClassVar[frozenset[SiteKind]] = frozenset({SiteKind.LINEAR})
    emits: ClassVar[tuple[str, ...]] = ("router",)

    def for_model(self, view: ModelView, inputs: object = None) -> XLoRA:
        """As it is; refused where the structure of the model tells another width of what the classifier reads.

        Raises:
            AdapterError: naming both widths.
        """
        found = view.sites.get(self.hidden)
        if found is None and self.hidden in view.callable_paths:
            found = infer_module_site(self.hidden, view)
        if found is not None and found.out_features != self.hidden_size:
            raise AdapterError(
                f"the classifier of X-LoRA reads {self.hidden_size} values of a token, and '{self.hidden}' gives "
                f"{found.out_features}",
                next_step=f"give hidden_size={found.out_features}, or name another module in hidden=",
                code="shape_mismatch",
            )
        return self

    def params(self, site: Site) -> dict[str, ParamSpec]:
        ranks, role = self.experts * self.r, Role.TRAINABLE if self.use_trainable_adapters else Role.FROZEN
        return {
            **expert_specs(site, ranks, role),
            **self.classifier(),
        }

    def classifier(self) -> dict[str, ParamSpec]:
        """The tensors of the classifier: a weight and a bias for each of its layers.

        Raises:
            AdapterError: it is to weigh layers of which only names are known.
        """
        widths = [self.hidden_size, *[self.size] * (self.depth - 1), self.experts * self._layers()]
        found = {}
        for j, (inside, out) in enumerate(itertools.pairwise(widths)):
            found[f"classifier_{j}_weight"] = ParamSpec((out, inside), _inits.kaiming_uniform, shared=True)
            found[f"classifier_{j}_bias"] = ParamSpec((out,), _inits.uniform(inside**-0.5), shared=True)
        return found

    @property
    def routes(self) -> int:
        return self.experts

    def output_scale(self, p: Params) -> float:
        return self.global_scaling_weight

    def _layers(self) -> int:
        """For how many layers the classifier weighs the experts."""
        if not self.layerwise_scalings:
            return 1
        if isinstance(self.targets, str):
            raise AdapterError(
                f"layerwise_scalings=True weighs every site by its number, and targets={self.targets!r} gives none",
                next_step="give targets= the paths of the sites in full, in order; lorac.sites(model) has them",
            )
        return len(self.targets)

    @property
    def read(self) -> str:
        """What the classifier reads, as a value of the program."""
        return pass_value_name(SCALING_PASS, self.hidden) if self.scaling_pass_value else f"{BASE}:{self.hidden}"

    def reads_once(self) -> tuple[str, ...]:
        return (self.read,)

    def reads(self, site: Site) -> tuple[str, ...]:
        if self.layerwise_scalings and site.path not in self.targets:
            raise AdapterError(
                f"layerwise_scalings=True weighs the sites by their places in targets=, where '{site.path}' is none",
                next_step="give targets= the paths of the sites in full, in order; lorac.sites(model) has them",
            )
        return ("own:scalings",)

    def once(self, p: Params, ctx: Context) -> Mapping[str, Tensor]:
        z = ctx.value(self.read)
        for j in range(self.depth):
            if j and self.activation:
                z = F.dropout(F.relu(z), self.dropout_p, ctx.training)
            z = F.linear(z, getattr(p, f"classifier_{j}_weight"), getattr(p, f"classifier_{j}_bias"))
        return {"scalings": self.scalings(z.unflatten(-1, (self._layers(), self.experts)))}

    def scalings(self, logits: Tensor) -> Tensor:
        """σ (…, experts) of what the classifier gives (…, experts)."""
        return self._kept(torch.softmax(logits / self.softmax_temperature, dim=-1) if self.enable_softmax else logits)

    def _kept(self, weights: Tensor) -> Tensor:
        """What is left of weights (…, experts) behind top-k, and normalised over that."""
        if self.top_k_lora is not None:
            weights = weights * top_k(weights, self.top_k_lora)
        if not self.enable_softmax_topk:
            return weights
        out = weights == 0
        return torch.softmax(weights.masked_fill(out, -torch.inf), dim=-1).masked_fill(out, 0)

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if ctx.passing == SCALING_PASS:
            weights = self._kept(x.new_full((self.experts,), self.scaling_pass_value))
        else:
            weights = ctx.value("own:scalings")[..., self._place(ctx.site.path), :]
        ctx.emit("router", weights)
        mixed = F.linear(x, p.lora_A).unflatten(-1, (self.experts, self.r)) * weights.unsqueeze(-1)
        return y + self.output_scale(p) * F.linear(mixed.flatten(-2), p.lora_B)

    def _place(self, path: str) -> int:
        """Which of the classifier's layers a site is."""
        return self.targets.index(path) if self.layerwise_scalings else 0

    @staticmethod
    def from_loras(
        adapters: Sequence[Adapter],
        *,
        sites: Sequence[str] = (),
        name: str = "x_lora",
        seed: int = 0,
        **fields: object,
    ) -> Adapter:
        """One mixed adapter of several LoRAs, in their order; the classifier starts fresh.

        Each LoRA's scale is folded into its B, smaller ranks are padded with zeros (both exact), and a site that only
        some of them adapt gets zeros for the others.

        Args:
            adapters: plain LoRAs.
            sites: paths of the sites in the model's order, which numbers them; default: the adapters'.
            name: the new adapter's name.
            seed: of the classifier.
            **fields: the variant's; ``hidden`` and ``hidden_size`` at least.

        Raises:
            AdapterError: no LoRA, or one that is more than its two factors on linear layers.
            AdapterError: two were made for different models.
        """
        if not adapters:
            raise AdapterError("X-LoRA needs at least one LoRA", next_step="give adapters of lorac.LoRA")
        sources = [read_factors(adapter, "X-LoRA") for adapter in adapters]
        paths = dict.fromkeys(path for source in sources for path in source)
        order = [*(path for path in sites if path in paths), *(path for path in paths if path not in sites)]
        rank = max(a.shape[0] for source in sources for a, _ in source.values())
        variant = XLoRA(targets=tuple(order), r=rank, experts=len(sources), **fields)  # type: ignore[arg-type]  # its own
        generator = torch.Generator().manual_seed(seed)
        tensors: dict[str, dict[str, Tensor]] = {}
        shared: dict[str, Tensor] = {}
        for path in order:
            a, b = stack_factors(path, [source.get(path) for source in sources], rank, "X-LoRA")
            site = Site(path, SiteKind.LINEAR, b.shape[0], a.shape[1], a.dtype, None)
            for key, spec in variant.classifier().items() if not shared else ():
                context = InitContext(spec.shape, site, _refuse_base_weight, Params(), generator, name)
                shared[key] = spec.init(context).to(a.dtype)
            tensors[path] = {"lora_A": a, "lora_B": b}
        tensors = {path: {**own, **shared} for path, own in tensors.items()}
        return Adapter(name, variant, tensors, provenance={"experts": [adapter.name for adapter in adapters]})


def _refuse_base_weight() -> Tensor:
    raise AssertionError("the classifier of X-LoRA starts without looking at the base")
