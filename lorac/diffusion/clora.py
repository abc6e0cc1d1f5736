"""CLoRA: several LoRAs in one picture, by contrast between their attention maps, and without training.

    composer = ContrastiveComposer(unet, scheduler, {"cat": "cat.safetensors", "dog": "dog.safetensors"})
    latents = composer(noise, [
        ConceptPass(states=plain, negative=empty),                                         # "a cat and a dog"
        ConceptPass(states=my_cat, negative=empty, adapter="cat", words=(2, 3)),           # "a <c1> cat and a dog"
        ConceptPass(states=my_dog, negative=empty, adapter="dog", words=(6, 7)),           # "a cat and a <c2> dog"
    ], groups=[[(0, 2), (1, 3), (2, 2)], [(0, 5), (1, 6), (2, 7)]])

Every step predicts the noise once for each LoRA with a prompt of its own, all as rows of one call. In the first steps
gradients in eager mode move the latents, so that maps of one concept agree and those of different concepts do not. Each
LoRA's noise is taken where its words are attended to. Meral et al. 2024, arXiv 2403.19776.

Defaults are those of the authors' function; their notebook has ``updates=50`` of 100 steps, ``refinements=21`` and
``threshold=0.4``. Two defaults differ: maps are those of the prompts alone, and a step's noise is predicted after its
last update. ``negative_maps=True, noise_first=True`` does both as their code does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorac.diffusion.attention import AttentionMaps, select_maps
from lorac.diffusion.constraints import RATE, update_rate
from lorac.diffusion.scheduling import Embeddings, NoiseScheduler, call_rows, find_conditions
from lorac.errors import InputMismatch
from lorac.progress import progress
from lorac.session.api import compile as compile_model
from lorac.session.compiled import Compiled
from lorac.session.request.sources import AdapterSource

MAPS = "attention_maps"
"""Name of the adapter that gives maps."""
REFINED, LAST = (0, 10, 20), 30
"""Steps with several updates, and the step that ends them."""
Reduction = Literal["sum", "union"]
Upsampling = Literal["nearest", "bilinear"]
Group = Sequence[tuple[int, int]]
"""A concept: (pass, place of one of its words in the pass's prompt)."""


@dataclass(frozen=True, eq=False)
class ConceptPass:
    """One prediction of the noise in every step.

    Attributes:
        states: of the prompt, by the text encoder with the same adapter.
        negative: of the negative prompt.
        adapter: name of the LoRA that acts; None: none.
        strength: of the LoRA.
        words: places of the words whose maps say where the pass's noise is taken; the first pass's noise is also taken
            wherever no other is.
    """

    states: Embeddings
    negative: Embeddings
    adapter: str | None = None
    strength: float = 1.0
    words: Sequence[int] = ()


def contrast(maps: Tensor, concepts: Sequence[int], temperature: float = 0.5) -> Tensor:
    """Return the NT-Xent loss (…,) of maps (…, n, pixels); ``concepts`` numbers the concept of each.

    Maps are scaled to values from 0 to 1 and compared by cosine. The mean is over ordered pairs of maps of one concept.

    Raises:
        InputMismatch: no concept has two maps.
    """
    low, high = maps.amin(-1, keepdim=True), maps.amax(-1, keepdim=True)
    embedded = F.normalize((maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny), dim=-1)
    scores = embedded @ embedded.mT / temperature
    number = torch.tensor(concepts, device=maps.device)
    same = number[:, None] == number
    pairs = same & ~torch.eye(len(number), dtype=torch.bool, device=maps.device)
    if not pairs.any():
        raise InputMismatch(
            "no concept has two maps to compare",
            next_step="name each concept's word in the first pass too: groups=[[(0, 2), (1, 3)], ...]",
        )
    others = scores.masked_fill(same, -torch.inf).logsumexp(-1, keepdim=True)
    return (torch.logaddexp(scores, others) - scores)[..., pairs].mean(-1)


def subject_mask(maps: Tensor, threshold: float = 0.3, reduce: Reduction = "union") -> Tensor:
    """Return where attention to some words is above a share of its maximum, as booleans (…, height, width).

    Args:
        maps: attention of each pixel to each word (…, height, width, words).
        threshold: the share.
        reduce: of several words the maps are added before, or the masks united after.
    """
    maps = maps.sum(-1, keepdim=True) if reduce == "sum" else maps
    return (maps > threshold * maps.amax((-3, -2), keepdim=True)).any(-1)


def add_background(masks: Tensor, first: Tensor | bool = False) -> Tensor:
    """Turn masks (…, n, height, width) into weights (…, n + 1, height, width); the part without a mask comes first.

    Args:
        masks: of the passes after the first.
        first: the first pass's own mask (…, height, width), which is added to that part.
    """
    return torch.cat([(~masks.any(-3) | first).unsqueeze(-3), masks], -3).float()


def fuse(predictions: Tensor, weights: Tensor, upsampling: Upsampling = "nearest") -> Tensor:
    """Return the mean (b, channels, H, W) of predictions (passes, b, channels, H, W) by weights (b, passes, h, w)."""
    weights = F.interpolate(weights, predictions.shape[-2:], mode=upsampling).transpose(0, 1).unsqueeze(2)
    return (predictions * weights).sum(0) / weights.sum(0)


class ContrastiveComposer:
    """A denoiser with several LoRAs; each call makes latents.

    Args:
        unet: a U-Net of diffusers; left as it was.
        scheduler: of diffusers.
        loras: by the names that passes choose them by.
        style: LoRAs that act in all passes, with their strengths.
        stride: cells of the latent per cell of the maps that are compared.
        layers: parts of the paths of the attentions whose maps count; default: all with maps of that size.
        target, **options: of ``lorac.compile``, for the program that denoises.
    """

    def __init__(
        self,
        unet: nn.Module,
        scheduler: NoiseScheduler,
        loras: Mapping[str, AdapterSource],
        *,
        style: Mapping[str, float] | None = None,
        stride: int = 4,
        layers: Sequence[str] = (),
        target: str = "eager",
        **options: object,
    ) -> None:
        self.scheduler, self.stride, self.layers = scheduler, stride, tuple(layers)
        self.conditions = find_conditions(unet)
        self.always = {MAPS: 1.0, **(style or {})}
        adapters: dict[str, AdapterSource] = {MAPS: AttentionMaps(), **loras}
        self.eager: Compiled = compile_model(unet, adapters, active=self.always, aux=["maps"])
        self.engine = self.eager
        if target != "eager" or options:
            self.engine = compile_model(  # type: ignore[call-overload]  # it checks the options
                unet, dict(self.eager.adapters), target, active=self.always, aux=["maps"], **options
            )

    @torch.no_grad()
    def __call__(  # noqa: PLR0913  (the method's own settings)
        self,
        latents: Tensor,
        passes: Sequence[ConceptPass],
        groups: Sequence[Group] = (),
        *,
        steps: int = 50,
        guidance: float = 7.5,
        rate: float = RATE,
        updates: int = LAST,
        decays: bool = False,
        refinements: int = 1,
        threshold: float = 0.3,
        reduce: Reduction = "union",
        upsampling: Upsampling = "nearest",
        negative_maps: bool = False,
        noise_first: bool = False,
        on_update: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Return the latents (b, channels, H, W) that noise of that shape becomes.

        Args:
            latents: noise of standard deviation 1.
            passes: the first is that of the background.
            groups: words of each concept; none: the latents are not moved.
            steps: of the scheduler.
            guidance: factor of classifier-free guidance; 1: none.
            rate: of the updates; 0: none.
            updates: the number of first steps that update the latents.
            decays: whether the rate falls as √s, with s from 1 to ½ over all steps.
            refinements: the number of updates in the steps 0, 10 and 20; others have one.
            threshold, reduce: as for ``subject_mask``.
            upsampling: how masks become as large as latents; ``"bilinear"`` blends at their borders.
            negative_maps: whether maps are means over prompts and negative prompts, as in the authors' code.
            noise_first: whether noise and masks of a step are those before its last update, as in the authors' code.
            on_update: gets the step and the loss (b,) of each row before each update.

        Raises:
            InputMismatch: no concept has two maps, no attention has maps of the size that ``stride`` says, or a prompt
                lacks an input that the U-Net takes besides states.
        """
        self.scheduler.set_timesteps(steps)
        latents = latents * self.scheduler.init_noise_sigma
        moving = updates if groups and rate else 0
        with progress("composing", total=steps) as report:
            for i, t in enumerate(self.scheduler.timesteps):
                report.step(f"step {i + 1} of {steps}")
                read = latents
                for _ in range(0 if i >= moving else refinements if i in REFINED else 1):
                    read = latents
                    loss, slope = self.slope(latents, t, passes, groups, negative_maps)
                    latents = latents - (update_rate(i, steps, rate) if decays else rate) * slope
                    if on_update is not None:
                        on_update(i, loss)
                read = read if noise_first else latents
                prompts = self._list_prompts(passes, negative_maps or guidance != 1)
                predicted = self._run(self.engine, read, t, passes, prompts)
                maps = self.maps(self.engine, read, len(passes), negative_maps)
                masks = torch.stack(
                    [subject_mask(maps[:, j][..., list(one.words)], threshold, reduce) for j, one in enumerate(passes)],
                    1,
                )
                weights = add_background(masks[:, 1:], masks[:, 0])
                noise = [fuse(one, weights, upsampling) for one in predicted]
                guided = noise[0] if guidance == 1 else noise[1] + guidance * (noise[0] - noise[1])
                latents = self.scheduler.step(guided, t, latents).prev_sample
        return latents

    def predict(self, latents: Tensor, t: Tensor, passes: Sequence[ConceptPass], guidance: float) -> Tensor:
        """Return the noise (1 or 2, passes, b, channels, H, W) of prompts and, with guidance, of negative ones."""
        return self._run(self.engine, latents, t, passes, self._list_prompts(passes, guidance != 1))

    def _list_prompts(self, passes: Sequence[ConceptPass], has_negative: bool) -> list[Embeddings]:
        return [one.states for one in passes] + [one.negative for one in passes if has_negative]

    def _run(
        self, program: Compiled, latents: Tensor, t: Tensor, passes: Sequence[ConceptPass], prompts: list[Embeddings]
    ) -> Tensor:
        choices = [self.always | ({} if one.adapter is None else {one.adapter: one.strength}) for one in passes]
        rows = [choices[n % len(choices)] for n in range(len(prompts)) for _ in latents]
        noise: Tensor = program(**call_rows(self.scheduler, latents, t, prompts, self.conditions), adapters=rows).sample
        return noise.unflatten(0, (-1, len(passes), len(latents)))

    @torch.enable_grad()
    def slope(
        self,
        latents: Tensor,
        t: Tensor,
        passes: Sequence[ConceptPass],
        groups: Sequence[Group],
        negative_maps: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss of each row (b,), and its gradient by the latents."""
        latents = latents.detach().requires_grad_()
        self._run(self.eager, latents, t, passes, self._list_prompts(passes, negative_maps))
        maps = self.maps(self.eager, latents, len(passes), negative_maps).flatten(2, 3)
        chosen = torch.stack([maps[:, at, :, word] for group in groups for at, word in group], 1)
        loss = contrast(chosen, [number for number, group in enumerate(groups) for _ in group])
        (slope,) = torch.autograd.grad(loss.sum(), latents)
        return loss.detach(), slope

    def maps(self, program: Compiled, latents: Tensor, passes: int, negative_maps: bool = False) -> Tensor:
        """Return the attention in a program's last call, which had these latents and number of passes.

        Returns:
            (b, passes, height, width, words), the mean over heads and over the attentions that count, and with
            ``negative_maps`` over prompts and negative prompts.
        """
        grid = latents.shape[-2] // self.stride, latents.shape[-1] // self.stride
        found = torch.stack(select_maps(program.aux["maps"], grid, self.layers)).mean(0)
        found = found.unflatten(0, (-1, passes, len(latents)))
        found = found.mean(0) if negative_maps else found[0]
        return found.transpose(0, 1).unflatten(2, grid)
