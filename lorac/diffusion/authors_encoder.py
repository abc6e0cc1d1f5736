"""The encoder of adapters in a file of AutoLoRA's authors.

    encoder = read_authors_encoder("epoch-lora_encoder-19.safetensors")
    Retriever(encoder, text_encoder, tokenizer)     # FLUX's first text encoder, CLIP's, and its tokenizer

Source: lzws/AutoLoRA, `retriever.py` and `train_retriever.py`. The encoder and the adapters that it reads name sites as
FLUX's layers in DiffSynth, such as ``blocks.0.attn.a_to_qkv``.
"""

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorac.diffusion.weight_encoder import WeightEncoder, projection_name, submodule_name
from lorac.errors import FormatError
from lorac.storage.paths import translate_os_errors

_DOUBLE = ("attn.{}_to_qkv", "attn.{}_to_out", "ff_{}.0", "ff_{}.2", "norm1_{}.linear")
_LAYERS = {
    "blocks": [layer.format(side) for side in "ab" for layer in _DOUBLE],
    "single_blocks": ["to_qkv_mlp", "proj_out", "norm.linear"],
}
"""Kinds of blocks and the layers of each, in the order of the encoder's tokens, which a file has lost."""
_PARTS = {"attn.to_q": "self_attn.q_proj", "attn.to_k": "self_attn.k_proj", "attn.to_v": "self_attn.v_proj"}
_PARTS |= {"attn.to_out": "self_attn.out_proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
"""Part of an encoder's block in a file -> its name in lorac."""
_PART = re.compile(r"(?<=^encoders\.\d\.)(attn\.to_\w+|fc\d)")


def read_authors_encoder(file: str | Path) -> WeightEncoder:
    """Return the encoder that the authors' training wrote, ready for a ``Retriever``.

    Raises:
        FormatError: the file cannot be read, or is not one of theirs, with one input for each site.
    """
    try:
        with translate_os_errors(file, FormatError, "read", "unreadable"):
            theirs = {name: tensor.float() for name, tensor in load_file(file).items()}
        inputs = {name.split(".")[2].replace("___", "."): name for name in theirs if name.endswith(".x")}
        split = {path: path.split(".", 2) for path in inputs}
        order = [(kind, layer) for kind, layers in _LAYERS.items() for layer in layers]
        places = {path: (kind, int(block), order.index((kind, layer))) for path, (kind, block, layer) in split.items()}
        sizes, renamed = dict[str, tuple[int, int]](), dict[str, Tensor]()
        for path in sorted(inputs, key=places.__getitem__):
            layer = f"embedder.proj_dict.{submodule_name(split[path][2])}"
            sizes[path] = theirs[inputs[path]].shape[-1], theirs[f"{layer}.weight"].shape[-1]
            own = f"embedder.proj_dict.{projection_name(path, sizes[path][1])}"
            renamed |= {f"{own}.{end}": theirs[f"{layer}.{end}"] for end in ("weight", "bias")}
        blocks = {name.split(".")[1] for name in theirs if name.startswith("encoders.")}
        encoder = WeightEncoder(sizes, len(theirs["final_layer_norm.bias"]), layers=len(blocks))
        rest = {_PART.sub(lambda part: _PARTS[part[0]], n): t for n, t in theirs.items() if ".proj_dict." not in n}
        encoder.load_state_dict(renamed | rest)
    except (SafetensorError, KeyError, IndexError, ValueError, RuntimeError) as error:
        raise FormatError(
            f"'{file}' is not an encoder of AutoLoRA's authors (width 768, one input for each layer of FLUX)",
            next_step="give the file epoch-lora_encoder-<n>.safetensors that their train_retriever.py wrote; "
            "Retriever.load takes a folder of Retriever.save",
            code="unknown_format",
        ) from error
    return encoder.eval()
