"""Two LoRAs in one picture: merged, in regions (LoRA-Composer) and contrasted (CLoRA), on the tiny denoiser.

    python -m examples.compositions [seeds]

Each LoRA has learnt to paint what the prompt calls red in another colour: one yellow, one magenta. The picture is to
show a yellow square on the left and a magenta circle on the right. What is said of each way is a mean over seeds, with
its standard deviation; a seed is 16 pictures, the same noise for all ways.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

import lorac
from examples import denoiser
from examples.denoiser import Denoiser, Object
from lorac.diffusion.attention import rasterise
from lorac.diffusion.clora import ConceptPass, ContrastiveComposer, subject_mask
from lorac.diffusion.composer import Composer
from lorac.diffusion.regions import Region
from lorac.progress import progress

CONCEPTS: dict[str, Object] = {"yellow": ("red", "square"), "magenta": ("red", "circle")}
"""The colour that a LoRA paints -> the object that it is meant for, as the LoRA's own prompts call it."""
PLAIN: dict[str, Object] = {"yellow": ("green", "square"), "magenta": ("blue", "circle")}
"""Prompts for the same objects in words that no LoRA was trained on."""
BOXES = {"yellow": (0.25, 0.0, 0.75, 0.5), "magenta": (0.25, 0.5, 0.75, 1.0)}
PROMPT = denoiser.make_prompt(tuple(CONCEPTS.values()))
PLAIN_PROMPT = denoiser.make_prompt(tuple(PLAIN.values()))
WORDS = {"yellow": (1, 2), "magenta": (5, 6)}
"""Places of colour and shape in the prompt."""
LAYERS = ("up_blocks.1.attentions.0",)
"""The attention whose maps are contrasted; regions look at all of 8 x 8."""
STEPS, UPDATES, PICTURES = 20, 10, 16
RATE = {"regions": 5.0, "contrast": 2.0}


def learn_concept(base: Denoiser, colour: str, *, steps: int = 300, seed: int = 0) -> lorac.Adapter:
    """Return a LoRA of cross-attention that paints red things in another colour."""
    variant = lorac.LoRA(r=4, alpha=4, targets=["attn2.to_k", "attn2.to_v", "attn2.to_out.0"])
    compiled = lorac.compile(base.unet, {colour: variant})
    shown = [objects for objects in denoiser.SEEN if any(named == "red" for named, _ in objects)]

    def drawn(generator: torch.Generator) -> tuple[Tensor, ...]:
        chosen = [shown[i] for i in torch.randint(0, len(shown), (16,), generator=generator)]
        painted = [[(colour if named == "red" else named, shape) for named, shape in objects] for objects in chosen]
        images = torch.stack([denoiser.draw(objects, generator)[0] for objects in painted])
        return denoiser.to_latents(images), denoiser.encode(*map(denoiser.make_prompt, chosen))

    compiled.train()
    trained = [p for p in compiled.parameters() if p.requires_grad]
    predict = lambda z, t, ids: compiled(z, t, base.text_encoder(ids)).sample  # noqa: E731  (read in one line)
    denoiser.learn(predict, trained, drawn, steps=steps, rate=1e-2, seed=seed)
    compiled.eval()
    return compiled.adapters[colour]


class Watched(DDIMScheduler):
    """The denoiser's scheduler, which calls an observer before every step."""

    @classmethod
    def over(cls, watch: Callable[[Tensor], None]) -> Watched:
        """Return one that calls ``watch`` with the latents."""
        made = cls.from_config(denoiser.make_scheduler().config)
        made.watch = watch
        return made

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **options: Any) -> Any:
        self.watch(sample)
        return super().step(model_output, timestep, sample, **options)


class Compositions:
    """The ways to have both concepts in one picture; each turns noise into pictures and figures."""

    def __init__(self, base: Denoiser, loras: Mapping[str, lorac.Adapter]) -> None:
        self.base, self.loras = base, dict(loras)
        self.states, self.empty = base.states(PROMPT)[0], base.states("")[0]
        both = dict.fromkeys(loras, 1.0)
        self.summed = ContrastiveComposer(base.unet, Watched.over(self._watch_sum), loras, style=both, stride=1)
        self.contrasted = ContrastiveComposer(
            base.unet, Watched.over(self._watch_contrast), loras, stride=1, layers=LAYERS
        )
        tokens = denoiser.TOKENS
        self.composed = Composer(base.unet, Watched.over(self._watch_regions), tokens=tokens, r=4, stride=1)
        self.seen: list[dict[str, float]] = []
        self.maps: list[Sequence[Tensor]] = []

    def plain(self, noise: Tensor) -> Tensor:
        """Return what the denoiser alone makes of noise."""
        return self.base.sample(noise, PROMPT, steps=STEPS)

    def merged(self, noise: Tensor) -> Tensor:
        """Return pictures by the sum of both LoRAs."""
        return self._finish(self.summed(noise, [ConceptPass(self.states, self.empty)], steps=STEPS, guidance=1.0))

    def regions(self, noise: Tensor, rate: float = RATE["regions"]) -> Tensor:
        """Return pictures with a LoRA and a prompt of its own for each box."""
        options: dict[str, Any] = {"steps": STEPS, "guidance": 1.0, "updates": UPDATES, "begins_in_boxes": False}
        plain = self.base.states(PLAIN_PROMPT)[0]
        return self._finish(self.composed(noise, plain, self.empty, self.places, rate=rate, **options))

    @property
    def places(self) -> list[Region]:
        """The boxes with their prompts, "a red square" and "a red circle"."""
        return [
            Region(box, self.base.states(denoiser.make_prompt([CONCEPTS[c]]))[0], self.empty, (1, 2), self.loras[c])
            for c, box in BOXES.items()
        ]

    def contrast(self, noise: Tensor, rate: float = RATE["contrast"]) -> Tensor:
        """Return pictures by CLoRA: a plain pass, and one for each LoRA, in whose prompt its own object is red."""
        passes = [ConceptPass(self.base.states(PLAIN_PROMPT)[0], self.empty)]
        for colour, words in WORDS.items():
            prompt = denoiser.make_prompt(tuple((PLAIN | {colour: CONCEPTS[colour]}).values()))
            passes.append(ConceptPass(self.base.states(prompt)[0], self.empty, colour, 1.0, words))
        groups = [[(j, word) for j in range(len(passes)) for word in words] for words in WORDS.values()]
        options: dict[str, Any] = {"steps": STEPS, "guidance": 1.0, "updates": UPDATES, "refinements": 3}
        masks: dict[str, Any] = {"reduce": "sum", "upsampling": "bilinear"}
        return self._finish(self.contrasted(noise, passes, groups, rate=rate, decays=True, **options, **masks))

    def figures(self, images: Tensor) -> dict[str, float]:
        """Return what was seen in the steps of the last pictures, and what they show."""
        found = {name: statistics.fmean(step[name] for step in self.seen) for name in self.seen[0]}
        boxes = {c: rasterise(torch.tensor([box]), denoiser.SIDE, denoiser.SIDE)[0] for c, box in BOXES.items()}
        shown = [[denoiser.contains(i, c, CONCEPTS[c][1]) for c in CONCEPTS] for i in images]
        placed = [[denoiser.contains(i, c, CONCEPTS[c][1], boxes[c]) for c in CONCEPTS] for i in images]
        found |= {
            "both shown": statistics.fmean(map(all, shown)),
            "both in their boxes": statistics.fmean(map(all, placed)),
        }
        return found | {f"{c} in its box": statistics.fmean(row[n] for row in placed) for n, c in enumerate(CONCEPTS)}

    def _finish(self, latents: Tensor) -> Tensor:
        return denoiser.to_images(latents)

    # ── Observations ─────────────────────────────────────────────────────────────────────────────────────────────────
    def _watch_sum(self, latents: Tensor) -> None:
        maps = self.summed.maps(self.summed.engine, latents, 1)[:, 0]
        self._note([maps[..., list(words)].sum(-1) for words in WORDS.values()])

    def _watch_regions(self, latents: Tensor) -> None:
        maps = self.composed.maps(latents)
        self._note([maps[:, n][..., [1, 2]].sum(-1) for n in range(len(BOXES))])

    def _watch_contrast(self, latents: Tensor) -> None:
        maps = self.contrasted.maps(self.contrasted.engine, latents, 3)
        self._note([maps[:, 0][..., list(words)].sum(-1) for words in WORDS.values()])

    def _note(self, subjects: Sequence[Tensor]) -> None:
        """Note the attention to both subjects, two maps (b, 8, 8): their shares in the boxes, and their overlap."""
        self.maps.append(subjects)
        masks = rasterise(torch.tensor(list(BOXES.values())), *subjects[0].shape[1:])
        shares = [
            ((maps * mask).sum((1, 2)) / maps.sum((1, 2))).mean() for maps, mask in zip(subjects, masks, strict=True)
        ]
        one, two = (subject_mask(maps[..., None], 0.5) for maps in subjects)
        overlap = (one & two).sum((1, 2)) / (one | two).sum((1, 2)).clamp(min=1)
        self.seen.append({"share in box": float(sum(shares)) / len(shares), "overlap": float(overlap.mean())})


def measure(ways: Compositions, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return way -> figure -> its value for each seed."""
    runs: dict[str, Callable[[Tensor], Tensor]] = {
        "merged": ways.merged,
        "regions, no updates": lambda noise: ways.regions(noise, 0.0),
        "regions": ways.regions,
        "contrast, no updates": lambda noise: ways.contrast(noise, 0.0),
        "contrast": ways.contrast,
    }
    found: dict[str, dict[str, list[float]]] = {name: {} for name in runs}
    with progress("compositions", total=len(runs) * seeds) as report:
        for name, seed in ((name, seed) for seed in range(seeds) for name in runs):
            report.step(f"{name}, seed {seed}")
            ways.seen = []
            for figure, value in ways.figures(runs[name](denoiser.noise(PICTURES, seed))).items():
                found[name].setdefault(figure, []).append(value)
    return found


def main() -> None:
    """Train the LoRAs and print the table."""
    torch.set_num_threads(1)
    seeds, base = int(sys.argv[1]) if len(sys.argv) > 1 else 5, denoiser.load()
    ways = Compositions(base, {c: learn_concept(base, c, seed=n) for n, c in enumerate(CONCEPTS)})
    found = measure(ways, seeds)
    figures = list(next(iter(found.values())))
    print(f"{'':<22}" + "".join(f"{name:>22}" for name in figures))
    for name, values in found.items():
        told = (f"{statistics.fmean(v):.2f} ± {statistics.pstdev(v):.2f}" for v in values.values())
        print(f"{name:<22}" + "".join(f"{text:>22}" for text in told))
    area = statistics.fmean((b[2] - b[0]) * (b[3] - b[1]) for b in BOXES.values())
    print(f"boxes cover {area:.2f} of the picture each; {seeds} seeds of {PICTURES} pictures")


if __name__ == "__main__":
    main()
