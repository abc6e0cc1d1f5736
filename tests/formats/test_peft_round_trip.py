"""Every PEFT type loaded and saved, twice over: the keys, shapes and dtypes of PEFT's file, then the same bytes."""

import itertools
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lorac
from tests.peft_files import CONFIG, SMALL, WEIGHTS, save_small
from tests.zoo import ZOO


def layout(folder: Path) -> dict:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in load_file(folder / WEIGHTS).items()}


@pytest.mark.parametrize("kind", SMALL)
def test_saved_loaded_and_saved_again(kind, tmp_path):
    model = ZOO["plain_mlp"].model()
    folders = [save_small(tmp_path / "original", kind), tmp_path / "once", tmp_path / "twice"]
    for source, folder in itertools.pairwise(folders):
        lorac.save_adapter(lorac.load_adapter(source, model), folder, model=model)
    original, once, _ = map(layout, folders)
    # PEFT writes A and B of RandLoRA once more at every site.
    copies = {name for name in original if kind == "RANDLORA" and name.endswith((".up.randlora_A", ".down.randlora_A"))}
    copies |= {name.replace("randlora_A", "randlora_B") for name in copies}
    assert len(copies) == (4 if kind == "RANDLORA" else 0)
    assert once == {name: found for name, found in original.items() if name not in copies}
    for file in (WEIGHTS, CONFIG):
        assert (folders[1] / file).read_bytes() == (folders[2] / file).read_bytes()
