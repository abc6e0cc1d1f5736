"""The rows of a recipe: every file that is read, every set of columns, and labels as TRL gives them."""

import functools
import gzip
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import transformers
import trl
from PIL import Image

import lorac
from lorac.trainer.data import load_rows
from tests.hub import Hub, use_hub
from tests.trainer.runs import CPU, PAIRS, TEXTS, tokenizer, write_rows
from tests.zoo import ZOO

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TALKS = [
    [("system", "be brief"), ("user", "hi"), ("assistant", "yo"), ("user", "one and one"), ("assistant", "two")],
    [("user", "2+2"), ("assistant", "4"), ("user", "thanks")],
]
ANSWERING = [
    "cohere",
    "deepseekv3",
    "glm4moe",
    "gptoss",
    "lfm2",
    "llama3",
    "phi3_5",
    "qwen2_5",
    "qwen3",
    "nemotron_3_nano",
]
ANSWERING += ["qwen3_5_think"]  # its prompt for an answer ends in the beginning of a thought
MESSAGES = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in TALKS]
PARTS = [
    {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in talk]} for talk in TALKS
]
SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system"}
SHARED = [{"conversations": [{"from": SHAREGPT[role], "value": text} for role, text in talk]} for talk in TALKS]
LOAD = functools.partial(load_rows, task="sft", tokenizer=tokenizer(), arguments=SimpleNamespace())


def labels(rows, template, folder, **arguments):
    """Return the labels that TRL makes of some rows."""
    config = trl.SFTConfig(output_dir=str(folder), **CPU, assistant_only_loss=True, max_length=None, **arguments)
    model, processing = ZOO["tiny_llama"].fresh(), tokenizer((TEMPLATES / f"{template}.jinja").read_text())
    return trl.SFTTrainer(model, config, train_dataset=rows, processing_class=processing).train_dataset["labels"]


@pytest.mark.medium("a template with channels and a plain one; a plain template", keep=["llama3"])
@pytest.mark.slow(
    "a template with thoughts, one with channels and two plain ones",
    keep=["gptoss", "qwen3_5_think", "llama3", "phi3_5"],
)
@pytest.mark.parametrize("template", ANSWERING)
def test_labels_are_trls_however_a_turn_is_written(template, tmp_path):
    expected = labels(datasets.Dataset.from_list(MESSAGES), template, tmp_path)
    assert all({-100} < {*row} for row in expected)
    for written in (MESSAGES, PARTS, SHARED):
        file = write_rows(tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl", written)
        assert labels(LOAD(file), template, tmp_path) == expected


def test_an_instruction_is_a_prompt_and_its_output_the_completion(tmp_path):
    rows = [
        {"instruction": "add", "input": "1 and 1", "output": "2"},
        {"instruction": "wave", "input": "", "output": "o/"},
    ]
    found = LOAD(write_rows(tmp_path / "rows.jsonl", rows))
    asked = [row["prompt"][0]["content"] for row in found]
    assert asked == ["add\n\n1 and 1", "wave"]
    assert found[1]["completion"] == [{"role": "assistant", "content": "o/"}]
    with pytest.raises(lorac.OptionError, match=r"(?s)tokenizer's chat_template.*as `chat_template: "):
        load_rows(str(tmp_path / "rows.jsonl"), "sft", tokenizer(None), SimpleNamespace())


def test_rejects_a_recipe_that_names_no_data():
    recipe = lorac.trainer.Recipe(adapters={"mine": {"method": "lora"}})
    with pytest.raises(lorac.OptionError, match=r"(?s)data names no rows.*python-docs"):
        LOAD(recipe.data)


def test_every_kind_of_file_is_read(tmp_path):
    rows = datasets.Dataset.from_list([{"text": text} for text in TEXTS])
    for name in ("a", "b", "c", "d", "e"):
        (tmp_path / name).mkdir()
    write_rows(tmp_path / "a" / "rows.jsonl", list(rows))
    rows.to_parquet(tmp_path / "b" / "rows.parquet")
    rows.to_csv(tmp_path / "c" / "rows.csv")
    rows.save_to_disk(str(tmp_path / "d"))
    for index, text in enumerate(TEXTS):
        (tmp_path / "e" / f"{index}.{'md' if index else 'txt'}").write_text(text)
    for name in ("a", "b", "c", "d", "e", "a/rows.jsonl", "e/0.txt"):
        assert list(LOAD(str(tmp_path / name))["text"]) == list(TEXTS[: 1 if name == "e/0.txt" else 3])
    assert len(LOAD("python-docs")) > 50
    assert max(map(len, LOAD("python-source")["text"])) > 10_000


def test_columns_of_other_tasks_pass(tmp_path):
    found = load_rows(write_rows(tmp_path / "pairs.jsonl", PAIRS), "dpo", tokenizer(), SimpleNamespace())
    assert list(found) == PAIRS


def test_images_lie_in_a_folder_for_each_label(tmp_path):
    for index, label in enumerate(("four", "nine")):
        (tmp_path / label).mkdir()
        pixels = np.full((8, 8, 3), 255 * index, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / label / "0.png")
    processor = transformers.ViTImageProcessor(size={"height": 4, "width": 4})
    found = load_rows(str(tmp_path), "image-classification", processor, SimpleNamespace())
    assert found["pixel_values"][1].shape == (3, 4, 4)
    assert [float(found[i]["pixel_values"].mean()) for i in (0, 1)] == [-1, 1]
    assert [int(label) for label in found["labels"]] == [0, 1]


def test_joins_several_places_and_names_columns(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b", "id": 1}])
    second = write_rows(tmp_path / "b.jsonl", [{"question": "c", "response": "d", "id": "x", "more": 1}])
    named = {"path": second, "columns": {"prompt": "question", "completion": "response"}}
    with pytest.raises(lorac.OptionError, match="cannot be joined"):
        LOAD([first, named])
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}])
    assert [*LOAD([first, named])] == [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    with pytest.raises(lorac.OptionError, match="has no column 'respons'\n  nearest: response"):
        LOAD({"path": second, "columns": {"completion": "respons", "prompt": "question"}})
    texts = write_rows(tmp_path / "c.jsonl", [{"text": "e"}])
    with pytest.raises(lorac.OptionError, match="has no column in common"):
        LOAD([first, texts])
    for wrong, match in (
        ({"path": first, "wieght": 1}, "data has no field 'wieght'\n  nearest: weight"),
        ({"path": first, "weight": 0.0}, r"data takes no weight=0\.0"),
        ({"path": first, "columns": ["prompt"]}, "data takes no columns="),
        ({"weight": 1.0}, "data takes no path=None"),
        ([], "data names no rows"),
    ):
        with pytest.raises(lorac.OptionError, match=match):
            LOAD(wrong)


def test_mixes_places_by_their_weights(tmp_path):
    places = [
        {"path": write_rows(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(60)]), "weight": weight}
        for name, weight in (("a", 3.0), ("b", 1))
    ]
    mixed = LOAD(places, arguments=SimpleNamespace(seed=1))["text"]
    assert {*mixed} == {f"{name}{i}" for name in "ab" for i in range(60)}
    of_a = sum(text.startswith("a") for text in mixed)
    assert 2 < of_a / (len(mixed) - of_a) < 4.5
    assert list(mixed) == list(LOAD(places, arguments=SimpleNamespace(seed=1))["text"])
    assert list(mixed) != list(LOAD(places, arguments=SimpleNamespace(seed=2))["text"])


def test_reads_compressed_files_and_splits(tmp_path):
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write('{"text": "a"}\n')
    assert list(LOAD(str(tmp_path / "rows.jsonl.gz"))["text"]) == ["a"]
    (tmp_path / "parts").mkdir()
    for split in ("train", "test"):
        write_rows(tmp_path / "parts" / f"{split}.jsonl", [{"text": split}])
    for split in ("train", "test"):
        assert list(LOAD({"path": str(tmp_path / "parts"), "split": split})["text"]) == [split]
    with pytest.raises(lorac.OptionError, match="has no split 'tset'\n  nearest: test"):
        LOAD({"path": str(tmp_path / "parts"), "split": "tset"})


def test_reads_a_data_set_of_the_hub(tmp_path, monkeypatch):
    with Hub() as hub:
        hub.add("datasets/me/rows", {"train.jsonl": b'{"text": "of train"}\n', "test.jsonl": b'{"text": "of test"}\n'})
        use_hub(hub, tmp_path, monkeypatch)
        assert list(LOAD("me/rows")["text"]) == ["of train"]
        assert list(LOAD({"path": "me/rows", "split": "test"})["text"]) == ["of test"]
        with pytest.raises(lorac.OptionError, match="there is no 'me/row' on"):
            LOAD("me/row")


def test_streams_rows_and_checks_them_as_they_are_read(tmp_path):
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": MESSAGES[1]["messages"]}, {"messages": []}])
    rows = iter(LOAD(file, streaming=True))
    assert next(rows) == MESSAGES[1]
    with pytest.raises(lorac.OptionError, match="the conversation of row 2 has no turns"):
        next(rows)
    file = write_rows(tmp_path / "texts.jsonl", [{"text": "a"}, {"text": None}])
    with pytest.raises(lorac.OptionError, match=r"row 2 of .* has the text None"):
        [*LOAD(file, streaming=True)]
    assert next(iter(LOAD("python-docs", streaming=True)))["text"]
