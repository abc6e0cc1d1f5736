"""X-LoRA: LoRAs in every layer, mixed per token by a classifier that reads the base's last hidden state.

"X-LoRA: Mixture of Low-Rank Adapter Experts…", Buehler and Buehler 2024, arXiv 2402.07148; PEFT's XLORA. The
classifier reads the last hidden state of a scaling pass: of the unadapted model, or of a pass in which every expert has
the weight ``scaling_pass_value``. Only the classifier is trained.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.nn.functional as F

from lorac.argument_types import Bounds, Count, Positive, Rate
from lorac.errors import AdapterError, shape_error
from lorac.frontend.model_view import ModelView
from lorac.frontend.module_sites import infer_module_site
from lorac.ir.slots.program_values import BASE, pass_value_name
from lorac.variants._mixtures import LoraMixture, RoutedVariant, top_k_mask
from lorac.variants.adapter import Adapter
from lorac.variants.base import Context, Params, ParamSpec, Role, Site, Tensor
from lorac.variants.initialisers import kaiming_uniform, uniform
from lorac.variants.low_rank import factor_specs

SCALING_PASS = "scaling"
"""The name of the scaling pass, if it is not a pass of the base."""


@dataclass(frozen=True, kw_only=True)
class XLoRA(LoraMixture, RoutedVariant):
    """``y' = y + g·Σ_i σ_i·B_i·A_i·x``, σ = softmax(MLP(h)/temperature) of each token, h the last hidden state.

    h comes from a scaling pass without gradients, in which σ_i = v at every token and site; for v = 0 that is a pass of
    the unadapted model. Top-k and its softmax apply to v as to σ, as in PEFT; among equal weights the lowest indices
    are kept, where PEFT leaves the choice to torch.

    A (experts·r, in) and B (out, experts·r) are the experts' stacked factors; each expert's scale is in its B. The
    model has one classifier, with ReLU and dropout between its layers. The experts' weights (…, experts) of each token
    are emitted as ``"router"``.

    Attributes:
        hidden: path of the module whose output is the last hidden state (…, hidden_size), in most models the last norm.
        hidden_size: width of the last hidden state.
        r: rank of each expert.
        experts: number of experts.
        layerwise_scalings: whether each site has separate weights; ``targets`` must then list the sites' full paths.
        depth: number of layers of the classifier.
        size: width between the classifier's layers.
        activation: whether to apply ReLU, and in training dropout, between the layers.
        dropout_p: rate of the classifier's dropout.
        enable_softmax: whether σ is a softmax; else it is the classifier's output.
        softmax_temperature: divisor of the logits before the softmax.
        top_k_lora: number of experts per token, ties to the lowest index; None: all.
        enable_softmax_topk: whether to apply a softmax to the remaining non-zero weights.
        scaling_pass_value: v.
        global_scaling_weight: g.
        use_trainable_adapters: whether A and B are trained too.
        scales: alpha/r of each expert if it is not folded into B, so that an optimizer's step equals PEFT's.
    """

    hidden: str
    hidden_size: Count
    r: Count = 8
    experts: Count = 4
    layerwise_scalings: bool = False
    depth: Count = 1
    size: Count = 2048
    activation: bool = True
    dropout_p: Rate = 0.2
    enable_softmax: bool = True
    softmax_temperature: Positive = 1.0
    top_k_lora: Annotated[int | None, Bounds(1, "experts")] = None
    enable_softmax_topk: bool = False
    scaling_pass_value: float = 0.0
    global_scaling_weight: float = 1.0
    use_trainable_adapters: bool = False
    scales: tuple[float, ...] = ()

    name = "x_lora"
    paper = "X-LoRA: Mixture of Low-Rank Adapter Experts, arXiv 2402.07148"

    @classmethod
    def from_loras(cls, adapters: Sequence[Adapter], **settings: Any) -> Adapter:
        """Make one adapter from several LoRAs, as ``LoraMixture`` does; if B is trained, its scale is not folded in.

        Raises:
            AdapterError, OptionError: as in ``LoraMixture``.
        """
        made = super().from_loras(adapters, **settings)
        found = [{getattr(one.variant.at_path(path), "scale", 0.0) for path in one.tensors} for one in adapters]
        if not settings.get("use_trainable_adapters") or any(len(each) != 1 or 0 in each for each in found):
            return made
        scales = tuple(scale for each in found for scale in each)
        assert isinstance(made.variant, XLoRA)
        for tensors in made.tensors.values():
            b = tensors["lora_B"]
            tensors["lora_B"] = b / b.new_tensor(scales).repeat_interleave(made.variant.r)
        return replace(made, variant=replace(made.variant, scales=scales))

    def for_model(self, view: ModelView, inputs: object = None) -> "XLoRA":
        """Check the width that the classifier reads; return this variant.

        Raises:
            AdapterError: the model's hidden state has another width.
        """
        found = view.sites.get(self.hidden)
        if found is None and self.hidden in view.callable_paths:
            found = infer_module_site(self.hidden, view)
        if found is not None and found.out_features != self.hidden_size:
            raise shape_error(
                f"X-LoRA's classifier reads {self.hidden_size} values, and '{self.hidden}' gives {found.out_features}",
                next_step=f"give hidden_size={found.out_features}, or name another module in hidden=",
            )
        return self

    def params(self, site: Site) -> dict[str, ParamSpec]:
        role = Role.TRAINABLE if self.use_trainable_adapters else Role.FROZEN
        return factor_specs(site, self.experts * self.r, role) | self.classifier()

    def classifier(self) -> dict[str, ParamSpec]:
        """Return the tensors of the classifier: a weight and a bias for each of its layers.

        Raises:
            AdapterError: ``layerwise_scalings`` is on, and ``targets`` does not list the sites.
        """
        widths = [self.hidden_size, *[self.size] * (self.depth - 1), self.experts * self._layers()]
        found = {}
        for j, (inside, out) in enumerate(itertools.pairwise(widths)):
            found[f"classifier_{j}_weight"] = ParamSpec((out, inside), kaiming_uniform, shared=True)
            found[f"classifier_{j}_bias"] = ParamSpec((out,), uniform(inside**-0.5), shared=True)
        return found

    def output_scale(self, p: Params) -> float:
        return self.global_scaling_weight

    def _layers(self) -> int:
        """Return the number of sites that have separate weights."""
        if not self.layerwise_scalings:
            return 1
        if isinstance(self.targets, str):
            raise AdapterError(
                f"layerwise_scalings=True needs a list of the sites in targets=, not {self.targets!r}",
                next_step="list the full paths of the sites in targets=, in order; lorac.sites(model) has them",
            )
        return len(self.targets)

    @property
    def classifier_input(self) -> str:
        """The name of the program value that the classifier reads."""
        return pass_value_name(SCALING_PASS, self.hidden) if self.scaling_pass_value else f"{BASE}:{self.hidden}"

    def reads_once(self) -> tuple[str, ...]:
        return (self.classifier_input,)

    def reads(self, site: Site) -> tuple[str, ...]:
        if self.layerwise_scalings and site.path not in self.targets:
            raise AdapterError(
                f"layerwise_scalings=True needs every site in targets=, which does not list '{site.path}'",
                next_step="list the full paths of the sites in targets=, in order; lorac.sites(model) has them",
            )
        return ("own:scalings",)

    def once(self, p: Params, ctx: Context) -> Mapping[str, Tensor]:
        z = ctx.value(self.classifier_input)
        for j in range(self.depth):
            if j and self.activation:
                z = F.dropout(F.relu(z), self.dropout_p, ctx.training)
            z = F.linear(z, getattr(p, f"classifier_{j}_weight"), getattr(p, f"classifier_{j}_bias"))
        return {"scalings": self.scalings(z.unflatten(-1, (self._layers(), self.experts)))}

    def scalings(self, logits: Tensor) -> Tensor:
        """Return σ (…, experts) from the classifier's logits (…, experts)."""
        weights = torch.softmax(logits / self.softmax_temperature, dim=-1) if self.enable_softmax else logits
        return self._select(weights)

    def _select(self, weights: Tensor) -> Tensor:
        """Apply top-k to weights (…, experts), and a softmax to the rest with ``enable_softmax_topk``."""
        if self.top_k_lora is not None:
            weights = weights * top_k_mask(weights, self.top_k_lora)
        if not self.enable_softmax_topk:
            return weights
        excluded = weights == 0
        return torch.softmax(weights.masked_fill(excluded, -torch.inf), dim=-1).masked_fill(excluded, 0)

    def branch(self, x: Tensor, y: Tensor, p: Params, ctx: Context) -> Tensor:
        if ctx.passing == SCALING_PASS:
            weights = self._select(x.new_full((self.experts,), self.scaling_pass_value))
        else:
            index = self.targets.index(ctx.site.path) if self.layerwise_scalings else 0
            weights = ctx.value("own:scalings")[..., index, :]
        ctx.emit("router", weights)
        return y + self.output_scale(p) * self.mix(F.linear(x, p.lora_A), weights, p)
