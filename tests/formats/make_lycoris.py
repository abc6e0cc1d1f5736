"""Make ``tests/formats/lycoris.safetensors``: two layers, and of each of LyCORIS's algorithms a file and its answers.

LyCORIS is no dependency of the tests; run this where it is found, which may be a folder of its own:

    pip install --no-deps --target LIBRARY lycoris-lora==4.1.3 einops toml
    PYTHONPATH=LIBRARY:. python tests/formats/make_lycoris.py

The names in it are ``model/<parameter>``, ``input/<layer>``, ``<case>/file/<name>`` and ``<case>/output/<layer>``.
"""

from pathlib import Path

import torch
from lycoris import LycorisNetwork, create_lycoris
from safetensors.torch import save_file
from torch import nn

from tests.formats.lycoris_cases import CASES


def make_model() -> nn.ModuleDict:
    """Return the layers."""
    return nn.ModuleDict({"conv": nn.Conv2d(4, 8, 3, padding=1), "fc": nn.Linear(12, 16)})


def make_case(fields: dict, layers: nn.ModuleDict, inputs: dict) -> dict:
    """Return the tensors of one case by their names behind it."""
    LycorisNetwork.apply_preset({"target_name": ["conv", "fc"], "target_module": ["Conv2d", "Linear"]})
    sizes = {"linear_dim": 2, "linear_alpha": 1.0, "conv_dim": 2, "conv_alpha": 1.0}
    network = create_lycoris(layers, 1.0, **{**sizes, **fields}).eval()
    network.apply_to()
    start = {name: tensor.detach().clone() for name, tensor in network.named_parameters()}
    outputs = {
        layer: move_layer(network, start, layer, layers, inputs, whole=fields["algo"] == "full") for layer in layers
    }
    found = {f"file/{name}": tensor.detach().clone() for name, tensor in network.state_dict().items()}
    found |= {f"output/{name}": tensor.detach() for name, tensor in outputs.items()}
    network.restore()
    return found


def move_layer(network, start: dict, layer: str, layers: nn.ModuleDict, inputs: dict, *, whole: bool):
    """Return the output of a layer, after its tensors are moved so far that the adapter changes it by a fourth."""
    base = layers[layer](inputs[layer])
    for size in (0.8**step for step in range(-6, 40)):
        for name, tensor in ((name, tensor) for name, tensor in network.named_parameters() if layer in name):
            noise = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * size
            tensor.data = start[name] + noise if whole or "dora" in name or "rescale" in name else noise
        moved = layers[layer](inputs[layer])
        if (moved - base).norm() < 0.25 * base.norm():
            return moved
    raise AssertionError(f"{layer} cannot be moved a little")


def main() -> None:
    """Write the file."""
    torch.manual_seed(0)
    layers = make_model()
    inputs = {"conv": torch.randn(2, 4, 5, 5), "fc": torch.randn(3, 12)}
    weights = {name: tensor.clone() for name, tensor in layers.state_dict().items()}
    found = {f"model/{name}": tensor for name, tensor in weights.items()}
    found |= {f"input/{name}": tensor for name, tensor in inputs.items()}
    for case, fields in CASES.items():
        layers = make_model()
        layers.load_state_dict(weights)
        with torch.no_grad():
            made = make_case(fields, layers, inputs)
        found |= {f"{case}/{name}": tensor.contiguous() for name, tensor in made.items()}
    save_file(found, Path(__file__).parent / "lycoris.safetensors")


if __name__ == "__main__":
    main()
