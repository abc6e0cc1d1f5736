"""Caches of ONNX Runtime: rows that grow, leave, come back and are copied each answer as they would alone."""

import random

import pytest
import torch

import lorac
from lorac import ChoiceError, InputMismatch, Unavailable
from lorac.target.kv_cache import DecodeStep
from lorac.testing import assert_close
from tests.decoders import DECODERS, IDS, VOCABULARY, adapt_llama
from tests.parity import assert_parity
from tests.passes.test_cache_attention import COUNTS, parts
from tests.refusing import refuses

CAPACITY = 12


@pytest.fixture(scope="module")
def host():
    return DECODERS["llama"]()


@pytest.fixture(scope="module")
def adapters(host):
    return adapt_llama(host)


@pytest.fixture(scope="module", params=["live", "fused"])
def compiled(request, host, adapters, llama_folder):
    if request.param == "live":
        return lorac.load(llama_folder)
    return lorac.compile(host, adapters, target="onnxruntime", mode=request.param, active=None, cache=True)


@pytest.fixture(scope="module")
def eager(host, adapters):
    return lorac.compile(host, adapters, active=None)


def bound(compiled):
    return compiled.engine.written_program if compiled.engine.fused else compiled.switch.state.bound


def extended(compiled, cache, ids, counts, wanted=None):
    places = torch.tensor([[max(count - 1, 0)] for count in counts]) if wanted is None else wanted
    return bound(compiled).decode("main", cache, DecodeStep(ids=ids, counts=counts, wanted=places))


def fed(compiled, counts=COUNTS, ids=IDS, cache=None):
    """A cache whose rows got so many of the ids, and the last logits of each row that any call gave."""
    cache = cache or compiled.engine.new_cache("main", len(ids), CAPACITY)
    last = {}
    for brought in counts:
        logits = extended(compiled, cache, parts(ids, cache.lengths, brought), brought)
        last |= {row: logits[row, 0] for row, count in enumerate(brought) if count}
    return cache, torch.stack([last.get(row, torch.zeros(VOCABULARY)) for row in range(len(ids))])


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=[])
@pytest.mark.slow("live programs", cases=["fused-*"])
@torch.no_grad()
@pytest.mark.parametrize("choice", [None, "one", "two", {"one": 0.7, "two": 0.3}], ids=str)
def test_ragged_rows_answer_as_the_host_does(compiled, eager, choice):
    compiled.swap(choice)
    cache, last = fed(compiled)
    expected = eager(input_ids=IDS, adapters=choice).logits[[0, 1], [9, 9]]
    assert cache.lengths == (10, 10)
    if choice is None:
        assert_close(last, expected)
    else:
        assert_parity(last, expected, eager(input_ids=IDS, adapters=None).logits[[0, 1], [9, 9]])


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_a_plain_call_answers_every_token(compiled, eager):
    compiled.swap("one")
    mask = torch.tensor([[1] * 10, [1] * 4 + [0] * 6])
    found, expected = compiled(input_ids=IDS, attention_mask=mask).logits, eager(input_ids=IDS, adapters="one").logits
    base = eager(input_ids=IDS, adapters=None).logits
    for row, length in ((0, 10), (1, 4)):
        assert_parity(found[row, :length], expected[row, :length], base[row, :length])
    assert not found[1, 4:].any()
    array = compiled(input_ids=IDS.numpy(), attention_mask=mask.numpy()).logits
    assert torch.equal(torch.from_numpy(array), found)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_accepts_a_plain_call_with_one_token(compiled, eager):
    compiled.swap("one")
    found, expected = compiled(input_ids=IDS[:, :1]).logits, eager(input_ids=IDS[:, :1], adapters="one").logits
    assert_parity(found, expected, eager(input_ids=IDS[:, :1], adapters=None).logits)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_rows_that_leave_and_come_are_none_of_the_others_business(compiled):
    compiled.swap("one")
    alone, expected = fed(compiled, [[6], [1]], IDS[1:])
    assert alone.lengths == (7,)
    cache, _ = fed(compiled, [[5, 6]])
    cache.select([1])
    cache.select([0, 0, 0])
    assert cache.lengths == (6, 6, 6)
    logits = extended(compiled, cache, IDS[1, 6].expand(3, 1), [1, 0, 1])
    assert_close(logits[[0, 2], 0], expected.expand(2, -1))
    assert cache.lengths == (7, 6, 7)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_a_row_leaves_and_another_joins_without_the_others_being_moved(compiled):
    compiled.swap("one")
    cache, _ = fed(compiled, [[3, 6]])
    cache.grow(rows=3)
    before = {name: buffer.data_ptr() for name, buffer in cache.buffers.items()}
    stays = [buffer[1].clone() for buffer in cache.buffers.values()]
    other, _ = fed(compiled, [[4]], IDS[:1])
    cache.join(other)
    assert (cache.lengths, cache.capacity, other.lengths) == ((3, 6, 4), CAPACITY, (4,))
    assert cache.remove([0]) == [2, 1]
    assert cache.lengths == (4, 6)
    assert {name: buffer.data_ptr() for name, buffer in cache.buffers.items()} == before
    assert all(torch.equal(buffer[1], row) for buffer, row in zip(cache.buffers.values(), stays, strict=True))
    logits = extended(compiled, cache, torch.stack([IDS[0, 4:5], IDS[1, 6:7]]), [1, 1])
    assert_close(logits[:1, 0], fed(compiled, [[5]], IDS[:1])[1])
    assert_close(logits[1:, 0], fed(compiled, [[7]], IDS[1:])[1])


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_rows_that_come_and_go_at_random_answer_as_they_would_alone(compiled):
    compiled.swap("one")
    generator = random.Random(0)
    expected = compiled(input_ids=IDS).logits
    cache, texts = compiled.engine.new_cache("main", 0, 4), []
    for _ in range(60):
        event = generator.random()
        if event < 0.3 and len(texts) < 6:
            text, length = generator.randrange(2), generator.randrange(1, 6)
            cache.join(fed(compiled, [[length]], IDS[text : text + 1])[0])
            texts.append(text)
        elif event < 0.5 and texts:
            order = cache.remove({generator.randrange(len(texts)) for _ in range(2)})
            texts = [texts[row] for row in order]
        done = [row for row, length in enumerate(cache.lengths) if length == IDS.shape[1]]
        texts = [texts[row] for row in cache.remove(done)]
        if texts:
            places = torch.tensor(cache.lengths)
            ids = IDS[texts, places][:, None]
            assert_close(extended(compiled, cache, ids, [1] * len(texts))[:, 0], expected[texts, places])


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_a_cache_of_another_program_does_not_join(compiled):
    cache, _ = fed(compiled, [[3, 6]])
    other = lorac.compile(DECODERS["gpt2"](), target="onnxruntime", cache=True, self_test=False)
    with refuses("input_mismatch", match="to another program"):
        cache.join(other.engine.new_cache("main", 1, 4))
    assert cache.lengths == (3, 6)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_cropped_tokens_leave_no_trace(compiled):
    compiled.swap("one")
    cache, _ = fed(compiled, [[6, 6]])
    kept = cache.copy()
    cache.crop([3, 6])
    wrong = extended(compiled, cache, torch.full((2, 3), 5), [3, 2])
    cache.crop([3, 6])
    again, right = fed(compiled, [[3, 0]], cache=cache)[0], extended(compiled, kept, IDS[:, 6:7], [1, 1])
    assert torch.equal(extended(compiled, again, IDS[:, 6:7], [1, 1]), right)
    assert not torch.equal(wrong[:, 0], right[:, 0])


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_longer_rows_are_admitted_by_growing(compiled):
    compiled.swap("one")
    short, expected = fed(compiled)
    cache, _ = fed(compiled, [[4, 2]])
    cache.grow(40)
    assert cache.capacity == 40
    assert torch.equal(fed(compiled, COUNTS[1:], cache=cache)[1], expected)
    assert short.capacity == CAPACITY


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_padding_beyond_the_capacity_is_room_of_its_own(compiled):
    """A row that is nearly full beside one that brings much: together they need more than either."""
    compiled.swap("one")
    cache = compiled.engine.new_cache("main", 2, 10)
    extended(compiled, cache, parts(IDS, (0, 0), [9, 0]), [9, 0])
    logits = extended(compiled, cache, parts(IDS, (9, 0), [1, 9]), [1, 9])
    alone = fed(compiled, [[9]], IDS[1:])[1]
    assert_close(logits[1], alone)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_a_swap_acts_on_later_tokens(compiled):
    compiled.swap("one")
    cache, _ = fed(compiled, [[6, 6]])
    other = cache.copy()
    compiled.swap("two")
    one, two = (extended(compiled, held, IDS[:, 6:7], [1, 1]) for held in (cache, other))
    assert torch.equal(one, two)
    compiled.swap("one")
    other.crop([6, 6])
    assert not torch.equal(extended(compiled, other, IDS[:, 6:7], [1, 1]), one)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
def test_a_call_that_brings_nothing_changes_nothing(compiled):
    cache, _ = fed(compiled, [[2, 2]])
    assert extended(compiled, cache, IDS[:, :1], [0, 0]).shape == (2, 1, VOCABULARY)
    assert cache.lengths == (2, 2)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
def test_returns_the_limits_of_the_cache(compiled):
    keeps = compiled.engine.cache_spec("main")
    assert (keeps.limit, keeps.vocabulary) == (64, VOCABULARY)


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@torch.no_grad()
def test_saves_and_loads_a_program_with_a_cache(compiled, tmp_path):
    compiled.swap("one")
    _, expected = fed(compiled)
    compiled.save(tmp_path / "saved")
    loaded = lorac.load(tmp_path / "saved")
    assert torch.equal(fed(loaded)[1], expected)
    assert loaded.engine.cache_spec("main") == compiled.engine.cache_spec("main")


@pytest.mark.medium("the live program, and generation/test_cached_generation.py has fused weights", cases=["fused*"])
@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"attention_mask": [[0] * 4 + [1] * 6] * 2}, InputMismatch, "hides more than the ends of rows"),
        ({"attention_mask": [[1] * 9] * 2}, InputMismatch, "hides more than the ends of rows"),
        ({"position_ids": [[1] * 10] * 2}, ChoiceError, "no input 'position_ids'"),
        ({"input_ids": None}, ChoiceError, "takes input_ids and attention_mask alone"),
        ({"input_ids": [1, 2, 3]}, InputMismatch, r"takes \[batch, length\]"),
        ({"input_ids": [[1, VOCABULARY]]}, ChoiceError, f"the id {VOCABULARY}"),
    ],
    ids=str,
)
def test_rejects_calls_that_the_cache_does_not_support(compiled, given, error, text):
    inputs = {"input_ids": IDS} | {
        name: None if value is None else torch.tensor(value) for name, value in given.items()
    }
    with pytest.raises(error, match=text):
        compiled(**{"input_ids": IDS, **inputs})


def test_a_program_without_a_cache_makes_none(host):
    compiled = lorac.compile(host, target="eager")
    assert compiled.engine.cache_spec("main") is None
    with pytest.raises(Unavailable, match="keeps no cache"):
        compiled.engine.new_cache("main", 1, 8)


@pytest.mark.medium("passes/test_cache_attention.py runs the same graph without ONNX Runtime", cases=["llama4"])
@pytest.mark.slow("chunks, whose biases ONNX Runtime's op is given", keep=["llama4"])
@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_every_architecture(name):
    model = DECODERS[name]()
    compiled = lorac.compile(model, target="onnxruntime", cache=True)
    _, last = fed(compiled)
    assert_close(last, model(IDS).logits[[0, 1], [9, 9]])
