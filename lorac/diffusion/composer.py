"""LoRA-Composer: several concepts in one picture, each in its box, from LoRAs as they are and without training.

    composer = Composer(unet, scheduler, tokens=77, target="onnxruntime")
    latents = composer(noise, states, negative, [
        Region(box=(0.2, 0.0, 1.0, 0.5), states=cat, negative=empty, words=(2, 3), concept=cat_lora),
        Region(box=(0.2, 0.5, 1.0, 1.0), states=dog, negative=empty, words=(2, 3), concept=dog_lora),
    ])

In every box the concept's own keys, values and output projections take the place of the model's in cross-attention, and
self-attention does not look from one box into another. At most 25 first steps move the latents, by gradients in eager
mode, so that attention to the concepts lies in their boxes. Yang et al. 2024, arXiv 2403.11627.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lorac.diffusion.attention import ConceptIsolation, RegionAttention, rasterise, select_maps
from lorac.diffusion.constraints import RATE, begin_in_boxes, concept_loss, leak_loss, update_rate
from lorac.diffusion.regions import Region, write_regions
from lorac.diffusion.scheduling import Embeddings, NoiseScheduler, call_rows, find_conditions
from lorac.frontend.model_view import ModelView
from lorac.progress import progress
from lorac.session.api import compile as compile_model
from lorac.session.compiled import Compiled
from lorac.variants.base import BranchVariant

MAPS, LEAKS = "region_maps", "self_maps"
FIRST, LAST = 5, 25
"""The step from which a rising loss ends the updates of a row, and the step that ends them anyhow."""


class Composer:
    """A denoiser with room for regions; each call makes latents.

    To use a LoRA for the background, merge it into the denoiser first (``lorac.merge_into``).

    Args:
        unet: a U-Net of diffusers; left as it was.
        scheduler: of diffusers.
        regions: the largest number of regions.
        tokens: number of tokens of a region's prompt.
        r: the largest rank of a concept.
        isolates: whether self-attention keeps regions apart.
        stride: cells of the latent per cell of the maps whose attention the constraints look at.
        layers: parts of the paths of the attentions whose maps count; default: all with maps of that size.
        target, **options: of ``lorac.compile``, for the program that denoises.
    """

    def __init__(  # noqa: PLR0913  (the method's own settings)
        self,
        unet: nn.Module,
        scheduler: NoiseScheduler,
        *,
        regions: int = 2,
        tokens: int = 77,
        r: int = 4,
        isolates: bool = True,
        stride: int = 4,
        layers: Sequence[str] = (),
        target: str = "eager",
        **options: object,
    ) -> None:
        self.view, self.scheduler, self.stride, self.layers = ModelView.of(unet), scheduler, stride, tuple(layers)
        self.conditions = find_conditions(unet)
        variants: dict[str, BranchVariant] = {"regions": RegionAttention(regions=regions, tokens=tokens, r=r)}
        if isolates:
            variants["isolation"] = ConceptIsolation(regions=regions)
        active = dict.fromkeys(variants, 1.0)
        aux = [MAPS, *([LEAKS] if isolates else [])]
        self.eager: Compiled = compile_model(unet, variants, active=active, aux=aux)
        self.engine = self.eager
        if target != "eager" or options:
            self.engine = compile_model(unet, dict(self.eager.adapters), target, active=active, **options)  # type: ignore[call-overload]  # it checks them

    @torch.no_grad()
    def __call__(  # noqa: PLR0913  (the method's own settings)
        self,
        latents: Tensor,
        states: Embeddings,
        negative: Embeddings,
        regions: Sequence[Region],
        *,
        steps: int = 50,
        guidance: float = 7.5,
        rate: float = RATE,
        updates: int = LAST,
        begins_in_boxes: bool = True,
        on_update: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the latents (b, channels, H, W) that noise of that shape becomes.

        Args:
            latents: noise of standard deviation 1.
            states, negative: of the global prompt and its negative.
            regions: concepts and their places; none: the model's own pictures.
            steps: of the scheduler.
            guidance: factor of classifier-free guidance; 1: none.
            rate: of the updates, times √s with s from 1 to ½ over all steps; 0: none.
            updates: the number of first steps that may update the latents.
            begins_in_boxes: whether noise is moved into the boxes before the first step.
            on_update: gets the step and the loss (b,) of each row before its update.

        Raises:
            InputMismatch: there are more regions than places, or states of another number of tokens, or
                a prompt lacks an input that the U-Net takes besides states.
            AdapterError: the output projection of a concept has a change that is not of the composer's rank.
        """
        self.place(regions)
        self.scheduler.set_timesteps(steps)
        latents = self._begin(latents, states, regions) if begins_in_boxes and regions else latents
        latents = latents * self.scheduler.init_noise_sigma
        moving = updates if rate and regions else 0
        going, last = torch.tensor(True), torch.tensor(torch.inf)  # of each row: its loss has not risen; its last loss
        prompts = [states] if guidance == 1 else [states, negative]
        with progress("composing", total=steps) as report:
            for i, t in enumerate(self.scheduler.timesteps):
                report.step(f"step {i + 1} of {steps}")
                if i < moving and going.any():
                    loss, slope = self.slope(latents, t, states, regions)
                    going, last = going & ((loss <= last) | (i < FIRST)), loss
                    if on_update is not None:
                        on_update(i, loss)
                    latents = latents - update_rate(i, steps, rate) * slope * going[:, None, None, None]
                guided, *plain = self._run(self.engine, latents, t, prompts).chunk(len(prompts))
                noise = guided if not plain else plain[0] + guidance * (guided - plain[0])
                latents = self.scheduler.step(noise, t, latents).prev_sample
        return latents

    def place(self, regions: Sequence[Region]) -> None:
        """Write regions into the programs; the next call sees them.

        Raises:
            InputMismatch, AdapterError: as ``__call__`` says.
        """
        write_regions([self.eager, self.engine], regions, self.view)

    def _run(self, program: Compiled, latents: Tensor, t: Tensor, prompts: Sequence[Embeddings]) -> Tensor:
        """Return the predicted noise for latents under each of some prompts, one after the other."""
        for tensors in program.adapters["regions"].tensors.values():
            tensors["groups"].fill_(len(prompts))
        predicted: Tensor = program(**call_rows(self.scheduler, latents, t, prompts, self.conditions)).sample
        return predicted

    @torch.enable_grad()
    def slope(self, latents: Tensor, t: Tensor, states: Embeddings, regions: Sequence[Region]) -> tuple[Tensor, Tensor]:
        """Return the loss of each row (b,), and its gradient by the latents."""
        latents = latents.detach().requires_grad_()
        self._run(self.eager, latents, t, [states])
        loss = self.loss(regions, latents)
        (slope,) = torch.autograd.grad(loss.sum(), latents)
        return loss.detach(), slope

    def loss(self, regions: Sequence[Region], latents: Tensor) -> Tensor:
        """Return the constraints' loss (b,) of the eager program's last call, which was for these latents."""
        masks, maps = self.masks(regions, latents), self.maps(latents)
        losses = [concept_loss(maps[:, n][..., list(r.words)], masks[n]) for n, r in enumerate(regions)]
        if LEAKS in self.eager.aux:
            leaks = self._select(LEAKS, latents)
            losses += [leak_loss(leaks, mask) for mask in masks]
        return torch.stack(losses).sum(0)

    def maps(self, latents: Tensor) -> Tensor:
        """Return the attention of regions to their words in the eager program's last call (b, n, height, width, words).

        It is the mean over heads and over the attentions that count.
        """
        return self._select(MAPS, latents).unflatten(2, self._grid(latents))

    def _select(self, name: str, latents: Tensor) -> Tensor:
        return torch.stack(select_maps(self.eager.aux[name], self._grid(latents), self.layers)).mean(0)

    def masks(self, regions: Sequence[Region], latents: Tensor) -> Tensor:
        """Return the masks of regions on the grid of the maps (n, height, width)."""
        return rasterise(torch.tensor([region.box for region in regions]), *self._grid(latents))

    def _grid(self, latents: Tensor) -> tuple[int, int]:
        return latents.shape[-2] // self.stride, latents.shape[-1] // self.stride

    def _begin(self, latents: Tensor, states: Embeddings, regions: Sequence[Region]) -> Tensor:
        """Move noise into the boxes (``begin_in_boxes``)."""
        self._run(self.eager, latents * self.scheduler.init_noise_sigma, self.scheduler.timesteps[0], [states])
        maps = self.maps(latents)
        words = torch.stack([maps[:, n][..., list(r.words)].sum(-1) for n, r in enumerate(regions)], 1)
        return begin_in_boxes(latents, words, self.masks(regions, latents))
