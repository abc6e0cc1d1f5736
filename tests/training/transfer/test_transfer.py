"""Trans-LoRA: prompts are written, filtered and answered, and an adapter of another base learns the answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import lorac
from lorac.testing import assert_close
from lorac.training import transfer
from lorac.training.transfer import Task, TransferSettings
from tests.refusing import refuses
from tests.training.transfer.speakers import ALL, LETTERS, characters, llama, speaking

TASK = Task(name="letters", seeds=("abc", "hgf"))
ASKED = Task(name="d", seeds=TASK.seeds, question=" {name}?", yes="y", no="n")
"""The same for models of characters, whose answers are one each."""


def drawn(length: int = 3, letters: str = LETTERS) -> Any:
    """Prompts of random letters, the same for one seed."""

    def draw(count: int, seed: int) -> list[str]:
        stream = random.Random(seed)
        return ["".join(stream.choices(letters, k=length)) for _ in range(count)]

    return draw


def every(prompts: Sequence[str]) -> list[bool]:
    return [True] * len(prompts)


def test_keeps_accepted_prompts_in_order() -> None:
    found = transfer.synthesise_prompts(drawn(), every, 20, rows=8)
    first = [prompt for seed in (0, 8, 16) for prompt in drawn()(8, seed)][:20]
    assert found.prompts == tuple(first) and found.tried == 24
    odd = transfer.synthesise_prompts(drawn(), lambda prompts: [prompt < "n" for prompt in prompts], 20)
    assert len(odd.prompts) == 20 and all(prompt < "n" for prompt in odd.prompts)


def test_each_prompt_is_taken_once() -> None:
    found = transfer.synthesise_prompts(drawn(1, "abcd"), every, 4)
    assert sorted(found.prompts) == ["a", "b", "c", "d"]
    assert len(set(transfer.synthesise_prompts(drawn(1, "ab"), every, 9, dedupe=False).prompts)) == 2


def test_rejects_a_run_without_accepted_prompts() -> None:
    with refuses("batches_needed", match="0 of 40 generated prompts belong to the task, and 4"):
        transfer.synthesise_prompts(drawn(), lambda prompts: [False] * len(prompts), 4, tries=40)
    with refuses("batches_needed", match="0 of 16 generated prompts belong to the task"):
        transfer.synthesise_prompts(lambda count, seed: [""] * count, every, 4, tries=16)


def test_extracts_only_the_prompt_of_a_continuation() -> None:
    assert TASK.written(" is it so?\nAnswer: no\nQuestion: and so?") == "is it so?"
    assert TASK.asking().endswith("Question: abc\nQuestion: hgf\nQuestion:")
    assert TASK.about("abc") == "abc\nIs the above question from letters dataset? Answer:"


def test_a_tie_counts_as_no() -> None:
    """The head has one row for both answers, so that no prompt tells them apart."""
    model, tokenizer = llama(16, 0), characters()
    yes, no = (tokenizer(letter)["input_ids"][0] for letter in "yn")
    prompts = ["ab", "c", "hello"]
    likelier = transfer.compare_answers(speaking(model), prompts, "y", "n", adapters="a")
    assert transfer.compare_answers(speaking(model), prompts, "n", "y", adapters="a") == [not one for one in likelier]
    model.lm_head.weight.data[no] = model.lm_head.weight.data[yes]
    assert not any(transfer.compare_answers(speaking(model), prompts, "y", "n", adapters="a"))
    assert not any(transfer.compare_answers(speaking(model), prompts, "n", "y", adapters="a"))
    with pytest.raises(lorac.Unavailable, match="begin with the same token"):
        transfer.compare_answers(speaking(model), prompts, "yes", "yy", adapters="a")


def test_labels_are_the_answers_alone() -> None:
    tokenizer = characters()
    (batch,) = transfer.make_training_batches(tokenizer, [("abc", "de"), ("f", "g")], rows=2)
    rows = {tokenizer.decode(ids[mask.bool()]): labels for ids, mask, labels in zip(*batch.values(), strict=True)}
    end = tokenizer.eos_token_id
    assert rows["abcde<end>"].tolist() == [-100] * 3 + [*tokenizer("de")["input_ids"], end]
    assert rows["fg<end>"].tolist() == [-100, *tokenizer("g")["input_ids"], end, -100, -100, -100]
    with refuses("batches_needed"):
        transfer.make_training_batches(tokenizer, [])


def test_continuations_do_not_depend_on_other_rows() -> None:
    """Rows are padded on the left; answers are what each prompt gives alone, with the adapter and without."""
    compiled = speaking(llama(16, 0))
    for tensor in compiled.adapters["a"].parameters():
        torch.nn.init.normal_(tensor, std=0.5, generator=torch.Generator().manual_seed(1))
    prompts = ["abc", "a", "hello there"]
    for adapters in (None, "a"):
        options = {"adapters": adapters, "max_new_tokens": 5, "do_sample": False}
        alone = [transfer.continue_prompts(compiled, [prompt], **options)[0] for prompt in prompts]
        assert transfer.continue_prompts(compiled, prompts, **options) == alone
    with_it = transfer.answer_prompts(compiled, prompts, adapters="a", max_new_tokens=5)
    assert [answer for _, answer in with_it] == alone
    assert alone != transfer.continue_prompts(compiled, prompts, max_new_tokens=5, do_sample=False)


@pytest.mark.slow("its parts, one by one")
def test_the_filter_learns_and_the_adapter_goes_over(tmp_path: Path) -> None:
    """A source that says the last letter again, in capitals, of three small letters: another base learns it from that.

    Prompts are drawn of both cases; the discriminator, which learnt of each, lets small letters through. No data are
    used but two seeds and what the source says.
    """
    source = speaking(
        llama(32, 0), source=lorac.LoRA(r=8, alpha=16, targets=ALL), discriminator=lorac.LoRA(r=8, targets=ALL)
    )
    tokenizer = source.tokenizer
    few = LETTERS[:8]
    pool = drawn(3, few)(150, 7)
    own = [(prompt, prompt[-1].upper()) for prompt in pool]
    transfer.fit(source, transfer.make_training_batches(tokenizer, own, rows=30, epochs=15), adapters="source", lr=1e-2)
    big = [prompt.upper() for prompt in drawn(3, few)(60, 8)]
    transfer.train_discriminator(source, ASKED, pool[:60], big, epochs=15, lr=1e-2, rows=30)
    held = drawn(3, few)(40, 9)
    filtered = transfer.make_prompt_filter(source, ASKED, adapters="discriminator")
    assert sum(filtered(held)) >= 36 and sum(filtered([prompt.upper() for prompt in held])) <= 4

    target = speaking(llama(24, 5), target=lorac.DoRA(r=8, alpha=16, targets=ALL))
    before = right(target, held, "target")
    small, large = drawn(3, few), drawn(3, few.upper())
    settings = TransferSettings(count=120, max_new_tokens=2, epochs=20, lr=1e-2, rows=30)
    found = transfer.transfer(
        source,
        target,
        ASKED,
        settings=settings,
        draw=lambda count, seed: [*small(count // 2, seed), *large(count // 2, seed)],
    )
    assert len(found.pairs) <= 120 and found.tried >= 240
    assert all(prompt.islower() for prompt, _ in found.pairs[:5])
    assert found.pairs[:8] == tuple(
        transfer.answer_prompts(source, [p for p, _ in found.pairs[:8]], adapters="source", max_new_tokens=2)
    )
    assert right(source, held, "source") > 30
    assert before < 10
    assert right(target, held, "target") > 25
    lorac.save_adapter(found.adapter, tmp_path / "f", model=None, format="native")
    ASKED.save(tmp_path / "bundle")
    assert Task.load(tmp_path / "bundle") == ASKED


def right(compiled: Any, prompts: Sequence[str], adapters: str) -> int:
    said = transfer.answer_prompts(compiled, prompts, adapters=adapters, max_new_tokens=2)
    return sum(answer == prompt[-1].upper() for prompt, answer in said)


def test_the_loss_of_distillation_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.tensor([[-100, 4, -100], [-100, 0, 1]])
    p, q = teacher.softmax(-1), student.softmax(-1)
    at = [(0, 0), (1, 0), (1, 1)]
    expected = sum((p[place] * (p[place] / q[place]).log()).sum() for place in at) / len(at)
    assert_close(transfer.distillation_loss(student, teacher, labels), torch.as_tensor(expected))
    assert not transfer.distillation_loss(teacher, teacher, labels).item()


@pytest.mark.medium("its parts, one by one")
def test_probabilities_go_over_too() -> None:
    """A target that learns the source's probabilities comes nearer to them than one that learns its answers."""
    source = speaking(llama(16, 0), source=lorac.LoRA(r=2, targets=ALL))
    for tensor in source.adapters["source"].parameters():
        torch.nn.init.normal_(tensor, std=0.5, generator=torch.Generator().manual_seed(1))
    prompts = drawn()(16, 3)
    left = []
    for soft in (True, False):
        target = speaking(llama(24, 5), target=lorac.LoRA(r=8, alpha=16, targets=ALL))
        settings = TransferSettings(count=16, max_new_tokens=4, epochs=15, lr=1e-2, soft=soft)
        done = transfer.transfer(
            source, target, ASKED, settings=settings, draw=lambda count, seed: prompts, accept=every
        )
        (batch,) = transfer.make_training_batches(source.tokenizer, done.pairs, rows=16)
        with torch.no_grad():
            mine, theirs = target(**batch, adapters="target"), source(**batch, adapters="source")
        left.append(float(transfer.distillation_loss(mine.logits, theirs.logits, batch["labels"])))
    assert left[0] < left[1]
    target.tokenizer.add_tokens(["<more>"])
    with pytest.raises(lorac.Unavailable, match="another vocabulary"):
        transfer.transfer(source, target, ASKED, settings=TransferSettings(soft=True))


@pytest.mark.parametrize("seeds", [(), ("a\nb",), (" ",)])
def test_tasks_that_are_none(seeds: Any) -> None:
    with pytest.raises(lorac.OptionError, match="prompts of one line each"):
        Task(name="n", seeds=seeds)


def test_refusals(tmp_path: Path) -> None:
    bare = lorac.compile(llama(16, 0), {"a": lorac.LoRA(r=2, targets=ALL)})
    with pytest.raises(lorac.Unavailable, match="has no tokenizer"):
        transfer.answer_prompts(bare, ["a"], adapters="a")
    with refuses("corrupt_file", match="does not hold a readable task"):
        Task.load(tmp_path)
    with pytest.raises(lorac.AdapterNotFound):
        transfer.transfer(speaking(llama(16, 0)), speaking(llama(16, 0)), ASKED, settings=TransferSettings(count=2))


def test_prompts_are_written_in_the_manner_of_the_seeds() -> None:
    """Each of one line, the same for one seed and others for another."""
    draw = transfer.make_prompt_source(speaking(llama(16, 0)), TASK, max_new_tokens=6)
    first = draw(4, 1)
    assert draw(4, 1) == first != draw(4, 2)
    assert all("\n" not in prompt and len(prompt) <= 6 for prompt in first) and len(set(first)) > 1


@pytest.mark.parametrize("text", ["[1]", '{"name": 1e400}', '{"nam": "x"}', "[" * 10_000, '{"name": "x", "name": "y"}'])
def test_rejects_a_damaged_task(text: str, tmp_path: Path) -> None:
    ASKED.save(tmp_path)
    (tmp_path / "transfer.json").write_text(text)
    with refuses("corrupt_file"):
        Task.load(tmp_path)
    ASKED.save(tmp_path)
    (tmp_path / "seeds.jsonl").write_text(text)
    with refuses("corrupt_file"):
        Task.load(tmp_path)
