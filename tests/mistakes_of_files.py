"""Mistakes with files and folders, each with the correction that its message suggests."""

from __future__ import annotations

import huggingface_hub
import torch
import transformers
from safetensors.torch import save_file

import lorac
from examples.pipelines import tiny_unet
from tests.mistakes import Mistake, World, lora


def _fresh_at(w: World, name: str) -> str:
    return w.path(f"new_{name}")


def _image_lora(w: World) -> str:
    layer, path = "lora_unet_conv_in", w.path("style.safetensors")
    pair = {"lora_down.weight": torch.ones(2, 4, 3, 3), "lora_up.weight": torch.ones(8, 2, 1, 1)}
    save_file({f"{layer}.{name}": tensor for name, tensor in pair.items()}, path)
    return path


FILES = [
    Mistake(
        "an adapter loaded as a compiled model",
        lambda w: lorac.load(w.path("sql")),
        lambda w, said: (w.compile({"a": w.path("sql")}), lorac.load_adapter(w.path("sql"))),
    ),
    Mistake(
        "a compiled model loaded as an adapter",
        lambda w: lorac.load_adapter(w.path("compiled")),
        lambda w, said: lorac.load(w.path("compiled")),
    ),
    Mistake(
        "a compiled model given as an adapter",
        lambda w: w.compile({"a": w.path("compiled")}),
        lambda w, said: lorac.load(w.path("compiled")),
    ),
    Mistake(
        "loading where nothing is",
        lambda w: lorac.load(w.path("compild")),
        lambda w, said: lorac.load(w.path("compiled")),
    ),
    Mistake(
        "loading a compiled model's program",
        lambda w: lorac.load(w.path("compiled/model.onnx")),
        lambda w, said: lorac.load(w.path("compiled")),
    ),
    Mistake(
        "loading a model's folder as a compiled one",
        lambda w: lorac.load(w.path("base")),
        lambda w, said: transformers.AutoModel.from_pretrained,
    ),
    Mistake("loading from an address", lambda w: lorac.load_adapter("ftp://server/some-lora")),
    Mistake(
        "loading by a name on the hub, where there is no network",
        lambda w: lorac.load_adapter("someone/some-lora"),
        lambda w, said: huggingface_hub.snapshot_download,
    ),
    Mistake(
        "an image model's adapter loaded without the model",
        lambda w: lorac.load_adapter(_image_lora(w)),
        lambda w, said: lorac.load_adapter(_image_lora(w), {"unet": tiny_unet(16)}),
    ),
    Mistake("a path that no file can have", lambda w: lorac.load("a\0b")),
    Mistake(
        "loading a web page's folder",
        lambda w: lorac.load(w.path("app")),
        lambda w, said: w.program.save(_fresh_at(w, "own")),
    ),
    Mistake(
        "loading for another target's name",
        lambda w: lorac.load(w.path("compiled"), target="onnx"),
        lambda w, said: lorac.load(w.path("compiled"), target="onnxruntime"),
    ),
    Mistake("an emitted program loaded to train", lambda w: lorac.load(w.path("compiled"), target="eager")),
    Mistake(
        "saving over a web page",
        lambda w: w.program.save(w.path("app")),
        lambda w, said: w.program.save(_fresh_at(w, "app")),
    ),
    Mistake("saving over somebody's file", lambda w: w.program.save(w.path("notes.txt"))),
    Mistake("saving nowhere", lambda w: w.program.save(None)),
    Mistake(
        "saving an adapter in an unknown format",
        lambda w: lorac.save_adapter(w.eager.adapters["sql"], w.path("x"), format="pfet"),
        lambda w, said: lorac.save_adapter(w.eager.adapters["sql"], _fresh_at(w, "peft"), format="peft", model=w.model),
    ),
    Mistake(
        "saving an adapter of no file without its model",
        lambda w: lorac.save_adapter(w.eager.adapters["sql"], w.path("x")),
        lambda w, said: (
            lorac.save_adapter(w.eager.adapters["sql"], _fresh_at(w, "with_model"), model=w.model),
            lorac.save_adapter(w.eager.adapters["sql"], _fresh_at(w, "file"), format="native"),
        ),
    ),
    Mistake(
        "saving a file over a folder",
        lambda w: lorac.save_adapter(w.eager.adapters["sql"], w.path("sql"), format="native"),
    ),
    Mistake(
        "saving a model as an adapter",
        lambda w: lorac.save_adapter(w.eager, w.path("x")),
        lambda w, said: lorac.save_adapter(next(iter(w.eager.adapters.values())), _fresh_at(w, "first"), model=w.model),
    ),
    Mistake(
        "saving a method as an adapter",
        lambda w: lorac.save_adapter(lora(), w.path("x")),
        lambda w, said: lorac.save_adapter(
            next(iter(w.eager.adapters.values())), _fresh_at(w, "second"), model=w.model
        ),
    ),
    Mistake("loading an adapter that is loaded", lambda w: lorac.load_adapter(w.eager.adapters["sql"])),
    Mistake("sites of a path", lambda w: lorac.sites(w.path("base")), lambda w, said: lorac.sites(w.model)),
    Mistake(
        "factors of a path",
        lambda w: lorac.factors(w.path("sql")),
        lambda w, said: lorac.factors(lorac.load_adapter(w.path("sql"))),
    ),
    Mistake(
        "factors that the base is needed for",
        lambda w: lorac.factors(w.compile({"a": lorac.DoRA(r=2, targets=["q_proj"])}).adapters["a"]),
        lambda w, said: lorac.factors(
            w.compile({"a": lorac.DoRA(r=2, targets=["q_proj"])}).adapters["a"], model=w.model
        ),
    ),
    Mistake(
        "experts that are no LoRA",
        lambda w: lorac.MeteoRA.from_loras([w.compile({"a": lorac.DoRA(r=2, targets=["q_proj"])}).adapters["a"]]),
        lambda w, said: lorac.MeteoRA.from_loras(list(w.eager.adapters.values())),
    ),
]
