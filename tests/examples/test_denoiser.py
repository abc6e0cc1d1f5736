"""The denoiser's pictures, words and files; its training, by a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from examples import denoiser

pytest.importorskip("diffusers")
OBJECTS = (("red", "square"), ("yellow", "circle"))


def test_a_picture_shows_its_objects() -> None:
    image, masks = denoiser.draw(OBJECTS, torch.Generator().manual_seed(0))
    assert not masks.all(0).any() and [int(mask.sum()) for mask in masks] == [36, 28]
    assert all(denoiser.contains(image, *shown) for shown in OBJECTS)
    assert not denoiser.contains(image, "red", "circle") and not denoiser.contains(image, "magenta", "square")
    assert not denoiser.contains(image, "red", "square", box=masks[1])
    assert denoiser.to_images(denoiser.to_latents(image[None])).equal(image[None])


def test_prompts_are_words() -> None:
    assert denoiser.make_prompt(OBJECTS[:1]) == "a red square"
    assert denoiser.encode("", "a red square and a blue circle").tolist() == [[0] * 7, [1, 3, 6, 2, 1, 5, 7]]
    assert set(denoiser.UNSEEN).isdisjoint(denoiser.SEEN)


@pytest.mark.slow  # an example; nothing of the package depends on it
def test_stores_and_loads_the_trained_model(tmp_path: Path) -> None:
    trained = denoiser.train(2, 2, pictures=8, rows=2)
    file = tmp_path / "cache" / "denoiser.safetensors"
    denoiser.store(trained, file)
    assert [found.name for found in file.parent.iterdir()] == [file.name]
    pictures = [one.sample(denoiser.noise(1), "a red square", steps=2) for one in (trained, denoiser.load(file))]
    assert pictures[0].shape == (1, 3, 16, 16) and pictures[0].equal(pictures[1])
