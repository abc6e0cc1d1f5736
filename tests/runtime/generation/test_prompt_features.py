"""Images in prompts, over ONNX Runtime's caches: each row's tokens and logits are those of PEFT for the row alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import lorac
from lorac.testing import assert_close
from tests.image_models import FAMILIES, IMAGE, PIXELS, TYPES, batch, made, opposite, row
from tests.limits import LEAST_DIFFERENCE
from tests.refusing import refuses

OPTIONS: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
LOGITS = {"output_logits": True}
_MADE: dict[str, tuple[Any, Any]] = {}


@pytest.fixture(params=["llava", *(pytest.param(name, marks=pytest.mark.medium("llava")) for name in [*FAMILIES][1:])])
def both(request: pytest.FixtureRequest) -> tuple[str, Any, Any]:
    """A family, PEFT's model, and the same compiled once for all tests."""
    family = request.param
    if family not in _MADE:
        peft = made(family)
        example = batch(family, (3, 3), seed=7)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "forward reads 'image_grid_thw' as numbers", lorac.LoracWarning)
            _MADE[family] = peft, lorac.compile(peft, target="onnxruntime", cache=True, example_inputs=example)
    return family, *_MADE[family]


def _expect(peft: Any, family: str, index: int, adapter: str | None, **options: Any) -> Any:
    """Return PEFT's answer for one row alone, without its prompt."""
    alone = row(batch(family), index)
    if adapter is None:
        with peft.disable_adapter():
            output = peft.generate(**alone, **OPTIONS, **options)
    else:
        peft.set_adapter(adapter)
        output = peft.generate(**alone, **OPTIONS, **options)
    return output.sequences[0, alone["input_ids"].shape[1] :], output


def _check_rows(output: Any, peft: Any, family: str, adapters: list[str | None]) -> None:
    width = batch(family)["input_ids"].shape[1]
    for index, adapter in enumerate(adapters):
        tokens, expected = _expect(peft, family, index, adapter, **LOGITS)
        assert torch.equal(output.sequences[index, width:][: len(tokens)], tokens)
        for logits, others in zip(output.logits, expected.logits, strict=True):
            assert_close(logits[index], others[0])


@pytest.mark.parametrize("adapters", [["one"] * 3, ["one", "two", None]], ids=["together", "by row"])
def test_rows_get_the_tokens_and_logits_of_peft(both: tuple[str, Any, Any], adapters: list[str | None]) -> None:
    family, peft, compiled = both
    choice = adapters[0] if len(set(adapters)) == 1 else adapters
    output = compiled.generate(**batch(family), adapters=choice, **OPTIONS, **LOGITS)
    _check_rows(output, peft, family, adapters)
    assert len(output.sequences.unique(dim=0)) == 3


def test_images_and_adapters_of_the_tower_change_answers(both: tuple[str, Any, Any]) -> None:
    family, _, compiled = both
    given = batch(family)
    first = compiled.generate(**given, adapters="one", **OPTIONS, **LOGITS).logits[0]
    other = compiled.generate(**opposite(family), adapters="one", **OPTIONS, **LOGITS)
    assert (other.logits[0] - first).abs().max() > LEAST_DIFFERENCE * first.abs().max()


def test_beams_get_the_tokens_of_peft(both: tuple[str, Any, Any]) -> None:
    family, peft, compiled = both
    given = batch(family)
    output = compiled.generate(**given, adapters="two", **OPTIONS, num_beams=3)
    for index in range(3):
        tokens, _ = _expect(peft, family, index, "two", num_beams=3)
        assert torch.equal(output.sequences[index, given["input_ids"].shape[1] :][: len(tokens)], tokens)


def test_prompts_come_in_chunks_and_from_a_prompt_cache(both: tuple[str, Any, Any]) -> None:
    family, peft, compiled = both
    prompts = lorac.PromptCache()
    for options in ({"prefill_chunk_size": 3}, {"prompt_cache": prompts}, {"prompt_cache": prompts}):
        output = compiled.generate(**batch(family), adapters="one", **options, **OPTIONS, **LOGITS)
        _check_rows(output, peft, family, ["one"] * 3)
    other = opposite(family)
    cached = compiled.generate(**other, adapters="one", prompt_cache=prompts, **OPTIONS)
    assert torch.equal(cached.sequences, compiled.generate(**other, adapters="one", **OPTIONS).sequences)


def test_text_alone_gets_the_tokens_of_peft(both: tuple[str, Any, Any]) -> None:
    family, peft, compiled = both
    ids = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])
    peft.set_adapter("one")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family in TYPES:
        given["token_type_ids"] = TYPES[family](ids)
    output = compiled.generate(**given, adapters="one", **OPTIONS, **LOGITS)
    expected = peft.generate(**given, **OPTIONS, **LOGITS)
    assert torch.equal(output.sequences, expected.sequences)
    assert_close(output.logits[0], expected.logits[0])  # later ones of a row that ended are of its padding
    if family.startswith("paligemma"):
        del given["token_type_ids"]
        with refuses("input_mismatch", match="needs token_type_ids to know which tokens see later"):
            compiled.generate(**given, adapters="one", **OPTIONS)


def test_an_artifact_answers_alike(both: tuple[str, Any, Any], tmp_path: Path) -> None:
    family, _, compiled = both
    compiled.save(tmp_path / "saved")
    given = batch(family)
    loaded = lorac.load(tmp_path / "saved").generate(**given, adapters="two", **OPTIONS).sequences
    assert torch.equal(loaded, compiled.generate(**given, adapters="two", **OPTIONS).sequences)


def test_rejects_other_numbers_of_placeholders_and_features(both: tuple[str, Any, Any]) -> None:
    family, _, compiled = both
    given = batch(family)
    ids = given["input_ids"].clone()
    ids[0, ids[0].tolist().index(IMAGE)] = 9
    count = int(given["input_ids"].eq(IMAGE).sum())
    with refuses("input_mismatch", match=f"{count - 1} tokens for .*gives {count} features"):
        compiled.generate(**given | {"input_ids": ids}, adapters="one", **OPTIONS)
    main = PIXELS
    with refuses("input_mismatch", match=main):
        compiled.generate(**given | {main: given[main][..., :4]}, adapters="one", **OPTIONS)
    with pytest.raises(lorac.LoracError, match=f"'{main}' is not an array of numbers"):
        compiled.generate(**given | {main: "x"}, adapters="one", **OPTIONS)
    missing = {name: value for name, value in given.items() if name not in {"mm_token_type_ids", "image_grid_thw"}}
    if missing.keys() != given.keys():
        with refuses("input_mismatch", match="gives pixel_values and no image_grid_thw"):
            compiled.generate(**missing, adapters="one", **OPTIONS)
        grids = {"image_grid_thw": given["image_grid_thw"]}
        with refuses("input_mismatch", match="computed from mm_token_type_ids, and the call has none"):
            compiled.generate(**missing | grids, adapters="one", **OPTIONS)


@pytest.mark.medium("an option that no other test of a small tier gives")
def test_rejects_types_of_tokens_that_do_not_fit(both: tuple[str, Any, Any]) -> None:
    family, _, compiled = both
    given = batch(family)
    types = torch.zeros_like(given["input_ids"])
    if family not in TYPES:
        with refuses("input_mismatch", match="takes no token_type_ids"):
            compiled.generate(**given, token_type_ids=types, adapters="one", **OPTIONS)
        return
    with refuses("input_mismatch", match="token_type_ids has the shape"):
        compiled.generate(**given | {"token_type_ids": types[:, 1:]}, adapters="one", **OPTIONS)
    if family.startswith("paligemma"):
        types[:, -3] = 1
        with refuses("input_mismatch", match="not in one piece"):
            compiled.generate(**given | {"token_type_ids": types}, adapters="one", **OPTIONS)


@pytest.mark.medium("other types of tokens than in test_rows_get_the_tokens_and_logits_of_peft")
def test_types_decide_which_tokens_see_later_ones(both: tuple[str, Any, Any]) -> None:
    family, peft, compiled = both
    if family not in TYPES:
        pytest.skip("its tokens have no types")
    peft.set_adapter("one")
    alone = row(batch(family), 1)
    others = {**alone, "token_type_ids": 1 - alone["token_type_ids"]}
    found = []
    for given in (alone, others) if family != "gemma3" else (alone,):
        output = compiled.generate(**given, adapters="one", **OPTIONS, **LOGITS)
        expected = peft.generate(**given, **OPTIONS, **LOGITS)
        assert torch.equal(output.sequences, expected.sequences)
        for logits, expected_logits in zip(output.logits, expected.logits, strict=True):
            assert_close(logits, expected_logits)
        found.append(output.logits[0])
    assert len(found) == 1 or (found[0] - found[1]).abs().max() > LEAST_DIFFERENCE * found[1].abs().max()


def test_rejects_a_draft(both: tuple[str, Any, Any]) -> None:
    family, _, compiled = both
    with refuses("unavailable", match="= is for the model that answers"):
        compiled.generate(**batch(family), adapters="one", draft=None, **OPTIONS)


def test_plain_calls_take_text_whose_ids_are_checked(both: tuple[str, Any, Any]) -> None:
    family, peft, compiled = both
    ids = torch.tensor([[7, 8, 9]])
    if family.startswith("paligemma"):
        with refuses("input_mismatch", match="needs token_type_ids to know which tokens see later"):
            compiled(input_ids=ids, adapters="one")
        return
    peft.set_adapter("one")
    assert_close(compiled(input_ids=ids, adapters="one").logits, peft(input_ids=ids).logits)
    for wrong in (64, -3):
        with pytest.raises(lorac.LoracError, match=f"'input_ids' holds the id {wrong}"):
            compiled(input_ids=ids.where(ids != 8, wrong))
    with pytest.raises(lorac.LoracError, match=f"no input '{PIXELS}'"):
        compiled(**{name: value for name, value in batch(both[0]).items() if name in {"input_ids", PIXELS}})


@pytest.mark.medium("other adapters of test_rows_get_the_tokens_and_logits_of_peft")
@pytest.mark.parametrize("target", [r".*language_model.*q_proj", r".*multi_modal_projector.linear_1"])
def test_adapters_of_the_text_or_of_the_tower_alone(target: str) -> None:
    host = made("llava").unload()
    peft = get_peft_model(host, LoraConfig(r=2, target_modules=target, init_lora_weights=False), "one").eval()
    example = batch("llava", (3, 3), seed=7)
    compiled = lorac.compile(peft, target="onnxruntime", cache=True, example_inputs=example)
    output = compiled.generate(**batch("llava"), adapters="one", **OPTIONS, **LOGITS)
    _check_rows(output, peft, "llava", ["one"] * 3)


def test_rejects_pictures_beyond_the_bounds_of_the_tower() -> None:
    host = made("llava").unload()
    embeddings = next(m for m in host.model.vision_tower.modules() if type(m).__name__ == "CLIPVisionEmbeddings")
    plain = type(embeddings)

    class Bounded(plain):  # type: ignore[misc, valid-type]
        def forward(self, pixel_values: torch.Tensor, **options: Any) -> Any:
            torch._check_tensor_all(pixel_values.abs() < 50)
            return super().forward(pixel_values, **options)

    embeddings.__class__ = Bounded
    compiled = lorac.compile(host, target="onnxruntime", cache=True, example_inputs=batch("llava", (3, 3), seed=7))
    given = batch("llava")
    compiled.generate(**given, **OPTIONS)
    with refuses("input_mismatch", match=r"the model checks them at .*test_prompt_features\.py"):
        compiled.generate(**{**given, PIXELS: given[PIXELS] * 1e4}, **OPTIONS)
