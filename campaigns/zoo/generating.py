"""Generation of one model of the zoo on ONNX Runtime over a cache, against PEFT's rows alone: a column for each form.

A form is *ok* where tokens are PEFT's, as each row alone gives them; *ties* where they part at a token whose score PEFT
itself does not tell from another's; *refused* where lorac refuses it in words; *wrong* and *untyped* as elsewhere.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import lorac
from campaigns.zoo import calls
from campaigns.zoo.checking import HOST_CANNOT, OK, REFUSED, UNTYPED, WRONG, find_cause

FORMS = ("greedy", "ragged", "rows", "beams", "int4", "images")
NONE = "–"
"""The outcome of a form that a model does not have: it sees no images, or does not generate."""
TIES = "ties"
_LENGTHS, _NEW = (6, 3, 5), 6
_CLOSE = 1e-3
"""How near two scores of PEFT's are, as a share of the spread, where either may be chosen."""
Record = dict[str, Any]
Prompt = Mapping[str, Tensor]


def can_generate(model: nn.Module) -> bool:
    """Return whether transformers' generate is a model's."""
    return bool(getattr(model, "can_generate", lambda: False)())


def check_generation(model: Any, peft: Any) -> Record:
    """Return the outcome of each form.

    Args:
        model: the base.
        peft: PEFT's model, with one adapter that is on.
    """
    prompts = _prompts(model)
    settings = peft.generation_config
    # The zoo's models are made without a cache, in which FSMT's own generate masks no later tokens.
    settings.update(max_length=None, forced_eos_token_id=None, forced_bos_token_id=None, use_cache=True, num_beams=1)
    if model.config.is_encoder_decoder and settings.decoder_start_token_id is None and settings.bos_token_id is None:
        settings.decoder_start_token_id = 1  # LongT5 states none
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        right = _tried(lambda: _expect(peft, prompts))
        if isinstance(right, dict):
            return {form: {**right, "outcome": HOST_CANNOT} for form in FORMS}
        images = _images(model, peft)
        compiled = _tried(lambda: _compile(peft, prompts[0]))
        if isinstance(compiled, dict):
            return {form: compiled for form in FORMS} | {"images": images}
        batch, (expected, mixed, beams) = _batch(model, prompts), right
        name = next(iter(compiled.adapters))
        return {
            "greedy": compare(expected[:1], lambda: _tokens(compiled, prompts[0])),
            "ragged": compare(expected, lambda: _tokens(compiled, batch)),
            "rows": compare(mixed, lambda: _tokens(compiled, batch, adapters=[name, None, name])),
            "beams": compare(beams, lambda: _tokens(compiled, batch, num_beams=3)),
            "int4": compare([], lambda: _tokens(_compile(peft, prompts[0], weights="int4"), batch)),
            "images": images,
        }


def _expect(peft: Any, prompts: list[Prompt]) -> tuple[list[Any], list[Any], list[Any]]:
    """Return PEFT's tokens of each row alone: with the adapter, without it in the second row, and by beams."""
    expected = [_tokens(peft, prompt) for prompt in prompts]
    with peft.disable_adapter():
        base = _tokens(peft, prompts[1])
    return expected, [expected[0], base, expected[2]], [_tokens(peft, prompt, num_beams=3) for prompt in prompts]


def _compile(peft: Any, prompt: Prompt, **options: Any) -> Any:
    """Compile PEFT's model with a cache."""
    example = {name: value.repeat(2, *[1] * (value.dim() - 1)) for name, value in prompt.items()}
    if peft.config.is_encoder_decoder:
        example["decoder_input_ids"] = torch.full((2, 4), 3)
    return lorac.compile(peft, target="onnxruntime", cache=True, example_inputs=example, **options)


def _prompts(model: Any) -> list[Prompt]:
    """Return three prompts of a row each, of other lengths where they are texts."""
    main = model.main_input_name
    found = []
    for seed, length in enumerate(_LENGTHS):
        call = dict(calls.call(model, 1, length, seed))
        keep = {"input_ids", "attention_mask"} if main == "input_ids" else {main, "attention_mask"}
        found.append({name: value for name, value in call.items() if name in keep and isinstance(value, Tensor)})
    return found


def _batch(model: Any, prompts: list[Prompt]) -> Prompt:
    """Return prompts as one batch: padded on the left, and on the right in front of a decoder."""
    side = "right" if model.config.is_encoder_decoder else "left"
    fill = {"input_ids": getattr(model.config.get_text_config(decoder=True), "pad_token_id", 0) or 0}
    if "input_ids" not in prompts[0]:
        return {name: torch.cat([prompt[name] for prompt in prompts]) for name in prompts[0]}
    prompts = [{**prompt, "attention_mask": torch.ones_like(prompt["input_ids"])} for prompt in prompts]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        name: pad([p[name][0] for p in prompts], batch_first=True, padding_side=side, padding_value=fill.get(name, 0))
        for name in prompts[0]
    }


def _tokens(model: Any, prompt: Prompt, **options: Any) -> Any:
    """Return the new tokens of each row, and the scores of the first one."""
    found = model.generate(
        **prompt, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, return_dict_in_generate=True,
        output_scores=True, **options,
    )  # fmt: skip
    return found.sequences[:, -_NEW:], torch.stack(list(found.scores), 1) if "num_beams" not in options else None


def compare(expected: list[Any], made: Callable[[], Any]) -> Record:
    """Compare tokens with PEFT's; without expectations, they have only to come."""
    found = _tried(made)
    if isinstance(found, dict):
        return found
    for row, (tokens, scores) in enumerate(expected):
        parted = (found[0][row] != tokens[0]).nonzero()
        if len(parted) and (scores is None or not _tie(scores[0, int(parted[0])])):
            return {"outcome": WRONG, "class": "tokens", "message": f"row {row} has other tokens", "lines": []}
        if len(parted):
            return {"outcome": TIES}
    return {"outcome": OK}


def _tie(scores: Tensor) -> bool:
    """Return whether the best two scores are as near as rounding may bring them."""
    finite = scores[scores.isfinite()]
    best, second = finite.topk(2).values.tolist()
    return best - second <= _CLOSE * float(finite.max() - finite.min())


def _images(model: Any, peft: Any) -> Record:
    """Return the outcome of a prompt with an image."""
    names = inspect.signature(model.forward).parameters
    if "pixel_values" not in names or model.main_input_name != "input_ids":
        return {"outcome": NONE}
    prompt = {name: value for name, value in calls.call(model, 1, 6, 0).items() if isinstance(value, Tensor)}
    expected = _tried(lambda: _tokens(peft, prompt))
    if isinstance(expected, dict):
        return {"outcome": NONE}
    return compare([expected], lambda: _tokens(_compile(peft, prompt), prompt))


def _tried(make: Callable[[], Any]) -> Any:
    """Return a value, or a record of the error."""
    try:
        return make()
    except lorac.LoracError as error:
        return {**find_cause(error), "outcome": REFUSED, "next": error.next_step}
    except Exception as error:
        return {**find_cause(error), "outcome": UNTYPED}
