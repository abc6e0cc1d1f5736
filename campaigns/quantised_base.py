"""How far a compiled base of bitsandbytes is from the library's own: the figure of the warning of rounded inputs.

    python -m campaigns.quantised_base

Needs bitsandbytes. Prints, for 8 bits and NF4 in two dtypes of products, ‖y − y_library‖ / ‖y_library‖ of the logits
without an adapter, on ONNX Runtime and in eager mode, and the same as the warning gives it.
"""

from __future__ import annotations

import copy
import re
import warnings

import torch
import transformers
from torch import nn

import lorac

IDS = torch.arange(3, 35).reshape(2, 16)


def make_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model


def quantise(model: nn.Module, kind: str, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose projections are layers of bitsandbytes."""
    import bitsandbytes as bnb

    made = copy.deepcopy(model).to(dtype)
    for path, module in list(made.named_modules()):
        if isinstance(module, nn.Linear) and path.endswith("_proj"):
            owner, _, leaf = path.rpartition(".")
            if kind == "nf4":
                layer = bnb.nn.Linear4bit(
                    module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4"
                )
                layer.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
            else:
                layer = bnb.nn.Linear8bitLt(module.in_features, module.out_features, bias=False, has_fp16_weights=False)
                layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(made.get_submodule(owner), leaf, layer)
    return made.to("cpu").eval()


@torch.no_grad()
def main() -> None:
    model = make_model()
    for kind in ("int8", "nf4"):
        for dtype in (torch.float32, torch.bfloat16):
            quantised = quantise(model, kind, dtype)
            expected = quantise(model, kind, dtype)(IDS).logits.float()  # a call may repack weights
            for target in ("onnxruntime", "eager"):
                method = lorac.LoRA(r=2, targets=["q_proj"])
                with warnings.catch_warnings(record=True) as said:
                    warnings.simplefilter("always")
                    try:
                        compiled = lorac.compile(
                            quantised, {"a": method}, target=target, example_inputs={"input_ids": IDS}
                        )
                        found = compiled(input_ids=IDS, adapters=None).logits.float()
                    except lorac.LoracError as error:
                        print(f"{kind} {dtype} {target}: refused: {error.what}")
                        continue
                figures = re.findall(r"outputs differ by (\S+)", " ".join(str(one.message) for one in said))
                share = float(torch.dist(found, expected) / expected.norm())
                print(
                    f"{kind} {dtype} {target}: {share:.1e}{''.join(f', by the warning {one}' for one in figures)}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
