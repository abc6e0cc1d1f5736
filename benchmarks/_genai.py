"""onnxruntime-genai, which text is measured beside: where it is found, its builder, and its loop.

It runs on the onnxruntime of this environment, in the same process. It is no dependency of the benchmarks: where it is
not installed, ``pip install --no-deps --target FOLDER onnxruntime-genai`` puts it into a folder of its own, which
``--genai FOLDER`` names.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

NAME = "onnxruntime-genai"
HOW = f"pip install --no-deps --target FOLDER {NAME}, then --genai FOLDER"
NOWHERE = "none"
OPTION = common.Option(
    "genai", "", smoke=NOWHERE, help=f"where {NAME} is, if not in the environment; {NOWHERE}: go without"
)


def found(given: argparse.Namespace) -> bool:
    """Whether it can be imported; from now on by its name."""
    if given.genai == NOWHERE:
        return False
    if given.genai and given.genai not in sys.path:
        sys.path.append(given.genai)
    return importlib.util.find_spec("onnxruntime_genai") is not None


def note(given: argparse.Namespace) -> str:
    """Describe what was measured, or how to measure it."""
    if not found(given):
        return f"{NAME} is not here, or not wanted, and was not measured: {HOW}"
    return f"{NAME} {importlib.metadata.version(NAME)} from {given.genai or 'the environment'}, in the same process"


LAST_LOGITS = ("prune_lm_head=true",)
"""Options of its builder for a model as lean as it can be: logits of the last place only."""


def build(
    model: Path,
    out: Path,
    precision: str = "fp32",
    adapter: Path | None = None,
    options: Sequence[str] = LAST_LOGITS,
) -> None:
    """Run its builder, which writes a model for the CPU.

    Args:
        model: a folder of transformers'.
        out: where to write.
        precision: ``"fp32"`` or ``"int4"``.
        adapter: a folder of PEFT's, put into the graph for good.
        options: the builder's own, as NAME=VALUE.
    """
    from onnxruntime_genai.models.builder import create_model, parse_extra_options

    told = [*options, *([f"adapter_path={adapter}"] if adapter else [])]
    with contextlib.ExitStack() as stack:
        for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(redirect(io.StringIO()))
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.INFO)
        scratch = stack.enter_context(tempfile.TemporaryDirectory())
        what = (None, str(model), str(out), precision, "cpu", scratch)
        create_model(*what, **parse_extra_options(*what, told))


def load(folder: Path, threads: int) -> Any:
    """Return a model that the builder wrote, whose threads wait as lorac's do: all sides share one machine.

    What ends its texts is the vocabulary's last id, so that hardly one ends.
    """
    import onnxruntime_genai

    from lorac.backends.onnxruntime.inference_session import SPIN_SETTINGS
    from lorac.backends.onnxruntime.options import OnnxRuntimeOptions

    config = onnxruntime_genai.Config(str(folder))
    vocabulary = json.loads((folder / "genai_config.json").read_text())["model"]["vocab_size"]
    decoder = {"session_options": {"intra_op_num_threads": threads, **SPIN_SETTINGS[OnnxRuntimeOptions().spinning]}}
    config.overlay(json.dumps({"model": {"eos_token_id": [vocabulary - 1], "decoder": decoder}}))
    return onnxruntime_genai.Model(config)


def begin(model: Any, ids: Any, capacity: int) -> Any:
    """Return a generator that has read these rows of ids and chosen a token for each."""
    import onnxruntime_genai

    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(max_length=capacity, do_sample=False, batch_size=len(ids))
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(ids.astype("int32"))
    generator.generate_next_token()
    return generator
