"""HiPA: a LoRA that gives one step from pure noise the high frequencies of many steps.

    step = OneStep.of(unet, scheduler, vae=vae)
    compiled = lorac.compile(step, {"hipa": RECIPE}, example_inputs=(noise, context))
    train_one_step(compiled, batches)                     # (noise, context, target), such as those of make_target
    compiled.export(target="onnxruntime", mode="baked")   # one call of the U-Net and the decoder, the timestep folded

arXiv 2311.18158. The LoRA is a plain one; the loss (``lorac.diffusion.high_frequencies``) is new, and the timestep is a
constant of the program. No code is public: sites, rank and optimizer are inferred.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lorac.diffusion._steps import take_steps
from lorac.diffusion.high_frequencies import HighFrequencyLoss
from lorac.errors import ChoiceError, Unavailable
from lorac.frontend.host import Host
from lorac.progress import progress
from lorac.session.compiled import CompiledModule
from lorac.variants.lora import LoRA

RECIPE = LoRA(r=16, alpha=16, targets=("to_q", "to_k", "to_v", "to_out.0"), exclude=r"vae\..*")
"""The U-Net's attention alone; on Stable Diffusion 2's U-Net these are the paper's 3.3 million trained values."""
Batch = tuple[Tensor, Tensor, Tensor]
"""Noise, the prompts' embeddings, and the images that one step from this noise is to give."""


class OneStep(nn.Module):
    """A U-Net and a decoder as one model from noise to image, at one timestep, which is a constant of its program.

    Sites are called ``unet.<path>`` and ``vae.<path>``, as in a pipeline, so that an adapter trained here is one of
    ``{"unet": unet}`` too.

    Args:
        unet: called with latents, the timestep and embeddings.
        timestep: the one from which noise is taken away, usually the last.
        alpha_bar: ā at that timestep.
        predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
        vae: has ``decode``; without one the result are the latents.
        scaling: latents divided by it are the decoder's input.
        folds: compute the values that depend on the timestep alone once, here (``fold_timestep``).
    """

    def __init__(
        self,
        unet: nn.Module,
        *,
        timestep: int,
        alpha_bar: float,
        predicts: str = "epsilon",
        vae: nn.Module | None = None,
        scaling: float = 1.0,
        folds: bool = True,
    ) -> None:
        super().__init__()
        if predicts not in _CLEAN:
            raise ChoiceError(f"no rule turns '{predicts}' into images", next_step=f"give {', '.join(_CLEAN)}")
        self.unet, self.vae = fold_timestep(unet, timestep) if folds else unet, vae
        self.timestep, self.alpha_bar, self.predicts, self.scaling = timestep, alpha_bar, predicts, scaling

    @classmethod
    def of(
        cls,
        unet: nn.Module,
        scheduler: Any,
        *,
        timestep: int | None = None,
        vae: nn.Module | None = None,
        folds: bool = True,
    ) -> "OneStep":
        """Return the step that a pipeline's scheduler takes.

        Args:
            unet, vae: the pipeline's.
            scheduler: of diffusers, with ``alphas_cumprod``.
            timestep: default: the last.
            folds: as ``OneStep`` takes it.

        Raises:
            Unavailable: the scheduler has no table of ā.
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        if table is None:
            raise Unavailable(
                f"{type(scheduler).__name__} has no alphas_cumprod, which a step is computed from",
                next_step="give timestep= and alpha_bar= to OneStep yourself, or a scheduler such as DDIMScheduler",
            )
        at = len(table) - 1 if timestep is None else timestep
        scaling = 1.0 if vae is None else float(vae.config.scaling_factor)  # type: ignore[union-attr, arg-type]  # of diffusers
        predicts = scheduler.config.prediction_type
        return cls(
            unet, timestep=at, alpha_bar=float(table[at]), predicts=predicts, vae=vae, scaling=scaling, folds=folds
        )

    def forward(self, noise: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None) -> Tensor:
        """Return images, or latents without a decoder, from noise (b, c, h, w) and embeddings (b, length, d)."""
        more = {} if added_cond_kwargs is None else {"added_cond_kwargs": added_cond_kwargs}
        predicted = self.unet(noise, self.timestep, encoder_hidden_states, return_dict=False, **more)[0]
        latents = predict_clean(noise, predicted, self.alpha_bar, self.predicts)
        if self.vae is None:
            return latents
        return self.vae.decode(latents / self.scaling, return_dict=False)[0]  # type: ignore[operator]  # of diffusers


class ConstantModule(nn.Module):
    """A module that returns one value for every input.

    Args:
        value: the value that it returns.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def forward(self, *given: object) -> Tensor:
        """Return the value."""
        return self.get_buffer("value")


@torch.no_grad()
def fold_timestep(unet: nn.Module, timestep: int) -> nn.Module:
    """Return a U-Net over the same weights with the values that depend on one timestep alone as constants.

    These are the timestep's embedding, and each block's projection of it where nothing else is added to the embedding,
    as Stable Diffusion XL adds sizes and a pooled prompt. The layers that computed them are no longer sites. A network
    without such an embedding is returned as it is.

    Args:
        unet: of diffusers; only read.
        timestep: the only one that it is called at.
    """
    if getattr(unet, "time_embedding", None) is None:
        return unet
    folded: Any = Host.of(unet).copy(share_buffers=True).model
    first = next(unet.parameters())
    frequencies = folded.time_proj(torch.tensor([timestep], device=first.device)).to(first.dtype)
    embedding = folded.time_embedding(frequencies)
    folded.time_embedding = ConstantModule(embedding)
    added = (getattr(unet, name, None) for name in ("add_embedding", "class_embedding"))
    if all(module is None for module in added):
        for block in [block for block in folded.modules() if getattr(block, "time_emb_proj", None) is not None]:
            block.time_emb_proj = ConstantModule(block.time_emb_proj(block.nonlinearity(embedding)))
    return folded


def predict_clean(noisy: Tensor, predicted: Tensor, alpha_bar: float, predicts: str) -> Tensor:
    """Return the estimate of the clean latents, computed in float32 at least.

    Args:
        noisy: z at a timestep.
        predicted: the network's output for it.
        alpha_bar: ā of the timestep; where it is small, noise amplifies errors by 1/√ā.
        predicts: ``"epsilon"``, ``"v_prediction"`` or ``"sample"``.
    """
    wide = torch.promote_types(noisy.dtype, torch.float32)
    found = _CLEAN[predicts](noisy.to(wide), predicted.to(wide), alpha_bar**0.5, (1 - alpha_bar) ** 0.5)
    return found.to(noisy.dtype)


_CLEAN: dict[str, Callable[[Tensor, Tensor, float, float], Tensor]] = {
    "epsilon": lambda z, found, signal, noise: (z - noise * found) / signal,
    "v_prediction": lambda z, found, signal, noise: signal * z - noise * found,
    "sample": lambda z, found, signal, noise: found,
}
"""Prediction type of a scheduler -> the clean latents, from (z, prediction, √ā, √(1 − ā))."""


@torch.no_grad()
def make_target(
    unet: Callable[..., Any],
    scheduler: Any,
    noise: Tensor,
    context: Tensor,
    *,
    steps: int = 50,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the base's image from the same noise in many steps: HiPA's target.

    Args:
        unet: the base, or a compiled one whose adapters are off.
        scheduler: of diffusers, deterministic (DDIM); its timesteps are set.
        noise: (b, c, h, w).
        context: the prompts' embeddings (b, length, d).
        steps: their number.
        decode: latents -> images; default: the latents.
    """
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    with progress("target", total=steps) as report:
        for timestep in scheduler.timesteps:
            report.step(f"timestep {int(timestep)}")
            given = scheduler.scale_model_input(latents, timestep)
            predicted = unet(given, timestep, context, return_dict=False)[0]
            latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents if decode is None else decode(latents)


def train_one_step(
    compiled: CompiledModule,
    batches: Iterable[Batch],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = HighFrequencyLoss(),  # noqa: B008  (frozen)
    rate: float = 1e-4,
    to_images: Callable[[Tensor], Tensor] | None = None,
    total: int | None = None,
) -> list[float]:
    """Train the adapters of a compiled ``OneStep`` on one pass over the batches, and return the losses.

    Args:
        compiled: of target eager.
        batches: noise, embeddings and targets; gradients reach the adapters through the decoder.
        loss: (images, targets) -> a number.
        rate: AdamW's, without weight decay.
        to_images: makes images of the model's output, where that is not the decoder's.
        total: number of batches, for the bar.
    """
    optimizer = torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    outputs = ((compiled(noise, context), target) for noise, context, target in batches)
    losses = (loss(images if to_images is None else to_images(images), target) for images, target in outputs)
    return take_steps(compiled, optimizer, losses, "one step", total)
