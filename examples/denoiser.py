"""A tiny text-to-image denoiser, trained once on pictures of coloured shapes, on which compositions can be measured.

    python -m examples.denoiser [steps]        trains it, keeps it in .cache, and says how often it is right

A picture has 16 x 16 pixels and shows one or two objects, "a red square and a blue circle", at places that the prompt
does not name, so that cross-attention has to find them. Instead of a VAE there is ``pixel_unshuffle``, which is exact:
latents are (12, 8, 8). The U-Net is diffusers' ``UNet2DConditionModel``, the text encoder one transformer layer on
embeddings of eight words. There is no ``<bos>``: attention that has such a token to rest on tells nothing of places.
The last steps of training also ask for attention on the objects (as TokenCompose does, arXiv 2312.03626), since that of
so small a network is right about places, but too soft to be measured.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorac.progress import progress

FILE = Path(__file__).resolve().parent.parent / ".cache" / "denoiser.safetensors"
WORDS = ("<pad>", "a", "and", "red", "green", "blue", "square", "circle")
COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1), "magenta": (1, -1, 1)}
"""Name -> its values in a picture, from -1 to 1; the last two are no words, and left to adapters."""
SHAPES = ("square", "circle")
SIDE, SIZE, TOKENS, WIDTH = 16, 6, 7, 32
LATENT = (12, SIDE // 2, SIDE // 2)
STEPS, GROUNDING = 5500, 1000
"""Steps of training, and further ones that look at attention, each on 32 pictures: about 15 minutes of one core."""
GROUNDING_WEIGHT = 0.05
Object = tuple[str, str]
"""A colour and a shape."""
PAIRS: tuple[tuple[Object, ...], ...] = tuple(
    ((first, shape), (second, other))
    for first in WORDS[3:6]
    for shape in SHAPES
    for second in WORDS[3:6]
    for other in SHAPES
    if first != second
)
UNSEEN = PAIRS[4::9]
"""Pairs that training leaves out."""
SEEN = (*(pair for pair in PAIRS if pair not in UNSEEN), *((pair[0],) for pair in PAIRS[::2]))
"""Pairs that training shows, besides single objects."""


class TextEncoder(nn.Module):
    """Embeddings of words and places, and one transformer layer: ids (b, 7) -> states (b, 7, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(len(WORDS), WIDTH), nn.Embedding(TOKENS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, 0.0, batch_first=True, norm_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.norm(self.layer(self.word(input_ids) + self.place.weight))


def make_unet(**fields: Any) -> Any:
    """Return the denoising network with random weights; ``fields`` change its configuration."""
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "sample_size": LATENT[1],
        "in_channels": LATENT[0],
        "out_channels": LATENT[0],
        "block_out_channels": (32, 48),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    return UNet2DConditionModel(**sizes | fields)


def make_scheduler(steps: int | None = None) -> Any:
    """Return the scheduler of training, or of sampling in so many steps."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True, set_alpha_to_one=True
    )
    if steps is not None:
        scheduler.set_timesteps(steps)
    return scheduler


def make_prompt(objects: Sequence[Object]) -> str:
    """Return the words for some objects."""
    return " and ".join(f"a {colour} {shape}" for colour, shape in objects)


def encode(*prompts: str) -> Tensor:
    """Return the numbers of the words (b, 7), padded with 0; "" is the empty prompt of guidance."""
    rows = [[WORDS.index(word) for word in prompt.split()] for prompt in prompts]
    return torch.tensor([row + [0] * (TOKENS - len(row)) for row in rows])


def stencil(shape: str) -> Tensor:
    """Return the pixels of a shape (6, 6): all, or a ring."""
    place = torch.arange(SIZE) - (SIZE - 1) / 2
    far = (place[:, None].square() + place.square()).sqrt()
    return torch.ones(SIZE, SIZE, dtype=torch.bool) if shape == "square" else (far < SIZE / 2 + 0.1) & (far > 1)


def draw(objects: Sequence[Object], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return a picture (3, 16, 16) from -1 to 1, and the pixels of each object (n, 16, 16); objects do not overlap."""
    while True:  # even places, so that the patches of pixel_unshuffle repeat
        at = 2 * torch.randint(0, (SIDE - SIZE) // 2 + 1, (len(objects), 2), generator=generator)
        if (at[0] - at[-1]).abs().max() > SIZE or len(objects) == 1:
            break
    image, masks = -torch.ones(3, SIDE, SIDE), torch.zeros(len(objects), SIDE, SIDE, dtype=torch.bool)
    for mask, (colour, shape), (row, column) in zip(masks, objects, at.tolist(), strict=True):
        mask[row : row + SIZE, column : column + SIZE] = stencil(shape)
        image[:, mask] = torch.tensor(COLOURS[colour], dtype=image.dtype)[:, None]
    return image, masks


def to_latents(images: Tensor) -> Tensor:
    """Return the latents (b, 12, 8, 8) of pictures (b, 3, 16, 16)."""
    return F.pixel_unshuffle(images, 2)


def to_images(latents: Tensor) -> Tensor:
    """Return the pictures (b, 3, 16, 16) of latents (b, 12, 8, 8)."""
    return F.pixel_shuffle(latents, 2)


def contains(image: Tensor, colour: str, shape: str, box: Tensor | None = None, *, least: float = 0.85) -> bool:
    """Return whether a picture shows a shape in a colour, in the pixels of a box (16, 16) where one is given.

    The shape must match in at least 85 % of its 6 x 6 pixels somewhere, and better than the other shape.
    """
    on = (image - torch.tensor(COLOURS[colour])[:, None, None]).abs().amax(0) < 1
    on = on if box is None else on & box.bool()
    patches = F.unfold(on[None, None].float(), SIZE)[0] > 0.5  # (36, places)
    scores = {s: (patches == stencil(s).reshape(-1, 1)).float().mean(0).max().item() for s in SHAPES}
    return max(scores, key=lambda s: scores[s]) == shape and scores[shape] >= least


@dataclass(frozen=True)
class Denoiser:
    """The two trained networks."""

    unet: Any
    text_encoder: TextEncoder

    @torch.no_grad()
    def states(self, *prompts: str) -> Tensor:
        """Return the states of prompts (b, 7, 32)."""
        return self.text_encoder(encode(*prompts))

    @torch.no_grad()
    def sample(
        self,
        latents: Tensor,
        *prompts: str,
        steps: int = 20,
        guidance: float = 1.0,
        unet: Callable[..., Any] | None = None,
    ) -> Tensor:
        """Return the pictures (b, 3, 16, 16) that latents (b, 12, 8, 8) become under prompts: one each, or one for all.

        ``unet`` is what denoises instead of the trained network, such as a compiled one. Guidance makes these pictures
        worse: of two objects both are right in .83 of the pictures with 1, which is none, and in .19 with 2.
        """
        unet, scheduler = unet or self.unet, make_scheduler(steps)
        states = self.states(*prompts).expand(len(latents), -1, -1)
        both = states if guidance == 1 else torch.cat([states, self.states("").expand_as(states)])
        for t in scheduler.timesteps:
            told, *plain = unet(latents.repeat(len(both) // len(states), 1, 1, 1), t, both).sample.split(len(latents))
            predicted = told if not plain else plain[0] + guidance * (told - plain[0])
            latents = scheduler.step(predicted, t, latents).prev_sample
        return to_images(latents)


def noise(count: int, seed: int = 0) -> Tensor:
    """Return latents to begin from (count, 12, 8, 8)."""
    return torch.randn(count, *LATENT, generator=torch.Generator().manual_seed(seed))


def learn(
    predict: Callable[..., Tensor],
    parameters: Sequence[Tensor],
    drawn: Callable[[torch.Generator], tuple[Tensor, ...]],
    *,
    steps: int,
    rate: float,
    seed: int = 0,
    penalty: Callable[..., Tensor] | None = None,
) -> float:
    """Train what predicts velocities (latents, timesteps, ids), with a moving average of its parameters at the end.

    Args:
        predict: (latents (b, 12, 8, 8), timesteps (b,), ids (b, 7)) -> velocities of the latents' shape.
        parameters: what is trained.
        drawn: generator -> latents of pictures, the ids of their prompts, and what else the penalty takes: a batch.
        steps: so many batches.
        rate: the highest rate of one cycle.
        seed: of batches, noise and timesteps.
        penalty: (ids, what else was drawn) -> what is added to the loss after a prediction.

    Returns:
        The mean loss of the last steps.
    """
    scheduler, generator = make_scheduler(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(parameters, rate, weight_decay=1e-4)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    mean, run = [p.detach().clone() for p in parameters], 0.0
    with progress("training", total=steps) as report:
        for index in range(steps):
            x, ids, *rest = drawn(generator)
            ids = ids * (torch.rand(len(x), 1, generator=generator) > 0.1)  # guidance needs the empty prompt
            t = torch.randint(0, 1000, (len(x),), generator=generator)
            added = torch.randn(x.shape, generator=generator)
            wanted = scheduler.get_velocity(x, added, t)
            loss = F.mse_loss(predict(scheduler.add_noise(x, added, t), t, ids), wanted)
            loss = loss if penalty is None else loss + penalty(ids, *rest)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            cycle.step()
            run = loss.item() if index == 0 else 0.98 * run + 0.02 * loss.item()
            with torch.no_grad():
                torch._foreach_lerp_(mean, list(parameters), 1 - min(0.995, (1 + index) / (10 + index)))
            report.step(f"loss {run:.3f}")
    with torch.no_grad():
        torch._foreach_copy_(list(parameters), mean)
    return run


class Grounding:
    """Diffusers' attention, which keeps the probabilities of cross-attention at 8 x 8 for a penalty."""

    def __init__(self) -> None:
        self.maps: list[Tensor] = []

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any
    ) -> Tensor:
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        made = (attn.to_q(hidden_states), attn.to_k(states), attn.to_v(states))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in made)
        maps = (q @ k.mT * attn.scale).softmax(-1)
        if encoder_hidden_states is not None and maps.shape[2] == LATENT[1] * LATENT[2]:
            self.maps.append(maps.mean(1))
        return attn.to_out[0]((maps @ v).transpose(1, 2).flatten(2))

    def penalty(self, ids: Tensor, masks: Tensor) -> Tensor:
        """Return the mean of (1 − share)², of the attention to each object's words on the object (b, 2, 64)."""
        maps, self.maps = torch.stack(self.maps, 1), []  # (b, layers, pixels, words)
        words = maps[..., [1, 2, 5, 6]].unflatten(-1, (2, 2))  # those of each object: colour and shape
        shares = (words * masks.mT[:, None, :, :, None]).sum(2) / words.sum(2)  # (b, layers, objects, words)
        shown = ids[:, [1, 5]].bool() & masks.any(-1)
        return GROUNDING_WEIGHT * (1 - shares.transpose(1, 2)[shown]).square().mean()


def train(steps: int = STEPS, grounding: int = GROUNDING, *, pictures: int = 8000, rows: int = 32) -> Denoiser:
    """Return a denoiser trained from scratch on so many pictures."""
    torch.manual_seed(0)
    found, generator = Denoiser(make_unet(), TextEncoder()), torch.Generator().manual_seed(1)
    shown = [SEEN[i] for i in torch.randint(0, len(SEEN), (pictures,), generator=generator)]
    drawings = [draw(objects, generator) for objects in shown]
    latents, ids = to_latents(torch.stack([image for image, _ in drawings])), encode(*map(make_prompt, shown))
    masks = torch.stack([F.pad(mask.float(), (0, 0, 0, 0, 0, 2 - len(mask))) for _, mask in drawings])
    masks = F.max_pool2d(masks, 2).flatten(2)

    def drawn(generator: torch.Generator) -> tuple[Tensor, ...]:
        at = torch.randint(0, pictures, (rows,), generator=generator)
        return latents[at], ids[at], masks[at]

    def predict(z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return found.unet(z, t, found.text_encoder(ids)).sample

    parameters, looking = [*found.unet.parameters(), *found.text_encoder.parameters()], Grounding()
    learn(predict, parameters, drawn, steps=steps, rate=2e-3)
    own = found.unet.attn_processors
    found.unet.set_attn_processor(looking)
    learn(predict, parameters, drawn, steps=grounding, rate=5e-4, seed=1, penalty=looking.penalty)
    found.unet.set_attn_processor(own)
    for network in (found.unet, found.text_encoder):
        network.eval().requires_grad_(False)
    return found


def load(file: Path = FILE) -> Denoiser:
    """Return the trained denoiser, from the cache if it is there; else it is trained now and kept there."""
    from safetensors.torch import load_file

    if not file.exists():
        store(train(), file)
    tensors, found = load_file(file), Denoiser(make_unet(), TextEncoder())
    for name in ("unet", "text_encoder"):
        own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        getattr(found, name).load_state_dict(own)
        getattr(found, name).eval().requires_grad_(False)
    return found


def store(trained: Denoiser, file: Path = FILE) -> None:
    """Write a denoiser to a file that is whole, or not there."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"unet.{key}": value for key, value in trained.unet.state_dict().items()}
    tensors |= {f"text_encoder.{key}": value for key, value in trained.text_encoder.state_dict().items()}
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        save_file({key: value.contiguous() for key, value in tensors.items()}, Path(folder) / file.name)
        os.replace(Path(folder) / file.name, file)


def accuracy(denoiser: Denoiser, pairs: Sequence[tuple[Object, ...]], *, count: int = 64, seed: int = 77) -> float:
    """Return how many of some sampled pictures show all objects of their prompts."""
    generator = torch.Generator().manual_seed(seed)
    shown = [pairs[i] for i in torch.randint(0, len(pairs), (count,), generator=generator)]
    images = denoiser.sample(noise(count, seed), *map(make_prompt, shown))
    return sum(all(contains(i, *o) for o in objects) for i, objects in zip(images, shown, strict=True)) / count


def main() -> None:
    """Train and keep the denoiser, unless it is there and no number of steps is given; judge it."""
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        store(train(int(sys.argv[1])))
    trained = load()
    for name, pairs in (("pairs", SEEN[: -len(PAIRS) // 2]), ("unseen pairs", UNSEEN), ("one object", SEEN[-12:])):
        print(f"{name}: all objects right in {accuracy(trained, pairs):.2f} of 64 pictures")


if __name__ == "__main__":
    main()
