"""Other tools with the same host and a LoRA on all its linear layers, on a GPU: PEFT, and Torch-TensorRT.

PEFT runs the adapter beside the base and switches it on and off. Torch-TensorRT compiles the merged model; another
choice is a refit of its engine by the weights of a model that is merged otherwise.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
from typing import Any

from benchmarks import common

PEFT, TORCH_TENSORRT = "PEFT", "Torch-TensorRT"


def found() -> tuple[str, ...]:
    """Those that are installed."""
    return (PEFT, *((TORCH_TENSORRT,) if importlib.util.find_spec("torch_tensorrt") else ()))


def sides(peer: str, given: argparse.Namespace, shape: tuple[int, int], device: str) -> dict[str, common.Side]:
    """Return the timed operations of a peer: a call, and a swap to the base and back.

    Args:
        peer: one of ``found``.
        given: the benchmark's options, of which ``dtype`` says what is computed in.
        shape: rows and length of a call.
        device: where it runs.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    host = common.host(given).to(device=device, dtype=getattr(torch, given.dtype))
    wrapped: Any = get_peft_model(host, LoraConfig(r=given.rank, lora_alpha=given.rank, target_modules="all-linear"))
    wrapped.eval()
    inputs = {name: torch.from_numpy(value).to(device) for name, value in common.tokens(given, shape).items()}
    return _of_peft(wrapped, inputs) if peer == PEFT else _of_torch_tensorrt(wrapped, inputs)


def _of_peft(wrapped: Any, inputs: dict[str, Any]) -> dict[str, common.Side]:
    def swap() -> None:
        wrapped.base_model.disable_adapter_layers()
        wrapped.base_model.enable_adapter_layers()

    return {"call": _timed(lambda: wrapped(**inputs)), "swap": _timed(swap)}


def _of_torch_tensorrt(wrapped: Any, inputs: dict[str, Any]) -> dict[str, common.Side]:
    import torch
    import torch_tensorrt

    base = copy.deepcopy(wrapped).unload()
    programs = [torch.export.export(model, (), inputs) for model in (base, wrapped.merge_and_unload())]
    options = {"kwarg_inputs": inputs, "immutable_weights": False}
    compiled = torch_tensorrt.dynamo.compile(programs[1], **options)

    def swap() -> None:
        for program in programs:
            torch_tensorrt.dynamo.refit_module_weights(compiled, program, kwarg_inputs=inputs, in_place=True)

    return {"call": _timed(lambda: compiled(**inputs)), "swap": _timed(swap)}


def _timed(work: common.Side) -> common.Side:
    """Work, and the wait for what it had a GPU do."""
    import torch

    def done() -> None:
        with torch.no_grad():
            work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return done
