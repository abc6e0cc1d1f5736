"""Mistakes with names: those of other libraries, of nothing, and of no text, each with what its answer suggests."""

from __future__ import annotations

import copy

from torch.export import Dim

import lorac
from tests.mistakes import Mistake, lora, sites

WORDS = [
    Mistake("another target's name", lambda w: w.compile(target="onnx"), lambda w, said: w.compile(target="eager")),
    Mistake("a target that does not exist", lambda w: w.compile(target="coreml")),
    Mistake(
        "a device as the target",
        lambda w: w.compile(target="cuda"),
        lambda w, said: w.again(target="onnxruntime", device="cpu", example_inputs=w.inputs, self_test=False),
    ),
    Mistake("another mode's name", lambda w: w.compile(mode="merged")),
    Mistake("an option that the target lacks", lambda w: w.compile(quantize=True), lambda w, said: w.quantised()),
    Mistake(
        "another library's option",
        lambda w: w.again(target="onnxruntime", load_in_4bit=True),
        lambda w, said: w.quantised(),
    ),
    Mistake("a cache in eager mode", lambda w: w.compile(cache=True), lambda w, said: w.compile(target="eager")),
    Mistake(
        "an axis that is a text",
        lambda w: w.captured(example_inputs=w.inputs, dynamic_shapes={name: {0: "rows"} for name in w.inputs}),
        lambda w, said: w.captured(
            example_inputs=w.inputs, dynamic_shapes={name: {0: Dim("rows")} for name in w.inputs}
        ),
    ),
    Mistake("an option as text", lambda w: w.compile(self_test="no")),
    Mistake("a name of another family's layers", lambda w: w.compile({"a": lora(targets=["c_attn"])}), sites),
    Mistake(
        "a target's abbreviation",
        lambda w: w.compile(target="ort"),
        lambda w, said: w.again(target="onnxruntime", example_inputs=w.inputs, self_test=False),
    ),
    Mistake(
        "a number as a choice's name",
        lambda w: w.eager.swap({5: 1}),
        lambda w, said: w.again().add_adapter(lora(), "5"),
    ),
    Mistake(
        "removing nothing",
        lambda w: w.eager.remove_adapter(None),
        lambda w, said: w.again().add_adapter(lora(), name="other"),
    ),
    Mistake(
        "PEFT's method for another adapter",
        lambda w: w.eager.set_adapter("style"),
        lambda w, said: (w.again().swap("sql"), w.compile({"a": lora(), "b": lora()}).swap({"a": 0.7, "b": 0.3})),
    ),
    Mistake(
        "diffusers' method for another file",
        lambda w: w.program.load_lora_weights(w.path("sql")),
        lambda w, said: w.compile({"a": lora()}).add_adapter(w.path("sql"), name="sql"),
    ),
    Mistake(
        "a copy of a compiled model",
        lambda w: copy.deepcopy(w.program),
        lambda w, said: (
            w.program.save(w.path("copied")),
            lorac.load(w.path("copied")),
            w.eager.export(target="eager"),
        ),
    ),
    Mistake(
        "labels in a program without them",
        lambda w: w.call(w.program, labels=w.inputs["ids"]),
    ),
]
