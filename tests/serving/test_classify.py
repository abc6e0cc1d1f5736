"""Classes of texts, of adapters with labels of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import transformers

import lorac
from lorac.testing import assert_close
from tests.decoders import VOCABULARY
from tests.serving.models import make_app, make_tokenizer, serve

TEXTS = ["First", "a second one", "x"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model of two labels, an adapter of five with names, and one of three without."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=24, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1},
    )  # fmt: skip
    host = transformers.BertForSequenceClassification(config).eval()
    folder, sources = tmp_path_factory.mktemp("classifiers"), {}
    for name, labels in (("topic", 5), ("tone", 3)):
        compiled = lorac.compile(host, {name: lorac.LoRA(r=2, targets=["query"], modules_to_save=["classifier"])})
        adapter = compiled.adapters[name]
        for key, tensor in adapter.replaced.items():
            adapter.replaced[key] = torch.randn(labels, *tensor.shape[1:])
        lorac.save_adapter(adapter, folder / name, format="peft", model=host)
        sources[name] = folder / name
    names = {str(place): f"topic {place}" for place in range(5)}
    Path(folder, "topic", "config.json").write_text(json.dumps({"id2label": names}))
    compiled = lorac.compile(host, sources, active=None)
    compiled.tokenizer = make_tokenizer()
    return compiled


@pytest.fixture(scope="module")
def http(classifier: Any) -> Iterator[httpx2.Client]:
    with serve(make_app(classifier)) as url, httpx2.Client(base_url=url) as client:
        yield client


def logits(classifier: Any, text: str, choice: Any) -> torch.Tensor:
    ids = torch.tensor([classifier.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        found: torch.Tensor = classifier(input_ids=ids, adapters=choice).logits[0]
    return found


@pytest.mark.parametrize("path", ["/v1/classify", "/classify"])
def test_answers_with_the_classes_and_labels_of_each_adapter(path: str, classifier: Any, http: httpx2.Client) -> None:
    choices = ["topic", None, "tone"]
    answer = http.post(path, json={"model": "base", "input": TEXTS, "adapters": choices}).json()
    assert answer["object"] == "list"
    assert answer["model"] == "base"
    assert answer["id"].startswith("classify-")
    assert answer["usage"] == {"prompt_tokens": 18, "total_tokens": 18}
    labels = {
        "topic": [f"topic {place}" for place in range(5)],
        None: ["no", "yes"],
        "tone": [f"LABEL_{place}" for place in range(3)],
    }
    for index, (text, choice, found) in enumerate(zip(TEXTS, choices, answer["data"], strict=True)):
        expected = logits(classifier, text, choice).softmax(0)
        assert found["index"] == index
        assert found["num_classes"] == len(expected)
        assert found["label"] == labels[choice][int(expected.argmax())]
        assert_close(torch.tensor(found["probs"]), expected)


def test_returns_logits_without_the_activation(classifier: Any, http: httpx2.Client) -> None:
    answer = http.post("/v1/classify", json={"model": "topic", "input": "First", "use_activation": False}).json()
    assert_close(torch.tensor(answer["data"][0]["probs"]), logits(classifier, "First", "topic"))


def test_predictions_have_no_outputs_of_other_adapters(classifier: Any, http: httpx2.Client) -> None:
    inputs = {"input_ids": [[5, 6, 7]]}
    for name, labels in (("tone", 3), ("base", 2)):
        answer = http.post("/v1/predict", json={"model": name, "inputs": inputs}).json()
        assert len(answer["outputs"]["logits"][0]) == labels


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"model": "topics"}, 404, "topics"),
        ({"input": []}, 400, "input"),
        ({"input": "x" * 40}, 400, "40 tokens in text 0, and the model reads 1 to 24"),
        ({"truncate_prompt_tokens": 3}, 400, "truncate_prompt_tokens"),
    ],
)
def test_rejects_by_name(fields: dict[str, Any], status: int, text: str, http: httpx2.Client) -> None:
    answer = http.post("/v1/classify", json={"model": "topic", "input": "x", **fields})
    assert answer.status_code == status
    assert text in answer.json()["error"]["message"]


def test_rejects_embeddings_of_a_classifier(http: httpx2.Client) -> None:
    answer = http.post("/v1/embeddings", json={"model": "topic", "input": "x"})
    assert answer.status_code >= 400
    assert "last_hidden_state" in answer.json()["error"]["message"]
