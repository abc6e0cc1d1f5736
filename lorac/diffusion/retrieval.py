"""AutoLoRA's retrieval: adapters found by a prompt, from their weights alone.

    retriever = Retriever(WeightEncoder(weight_encoder.find_sizes(adapters), width), text_encoder, tokenizer)
    train_retriever(retriever, [("a red dress", adapter), …])
    retriever.save("retriever")
    find_adapters(Retriever.load("retriever"), "a red dress", "folder of adapters")   # `lorac retrieve` does this

arXiv 2508.02107. The best of them run together with ``lorac.AutoLoRA.from_loras``, whose gates are trained by
``lorac.diffusion.gates``.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorac.diffusion._steps import take_steps
from lorac.diffusion.weight_encoder import Pairs, WeightEncoder
from lorac.errors import ChoiceError, FormatError, translate_import_errors
from lorac.formats import is_adapter, load_adapter
from lorac.frontend.model_view import Model
from lorac.progress import progress
from lorac.storage.atomic_folders import replace_atomically
from lorac.storage.paths import parse_path, translate_os_errors
from lorac.storage.remote import find_source
from lorac.variants.adapter import Adapter

FILE, TEXT = "retriever.safetensors", "text_encoder"
_SCALE = 10.0
Pooling = Literal["pooler", "mean"]


@dataclass(frozen=True)
class Match:
    """An adapter that a prompt found.

    Attributes:
        name: the adapter's, that of its file or folder.
        score: the cosine of the prompt's and the adapter's vectors.
        path: where it lies, or None.
    """

    name: str
    score: float
    path: Path | None = None


@dataclass(frozen=True)
class Retriever:
    """Adapters and prompts as vectors of one space; the text encoder is never trained.

    Attributes:
        encoder: of adapters.
        text_encoder: a text model of transformers, or a compiled one; CLIP's in the paper.
        tokenizer: its tokenizer.
        pooling: the text encoder's own pooled vector (CLIP), or the mean of its words' (sentence encoders).
    """

    encoder: WeightEncoder
    text_encoder: Any
    tokenizer: Any
    pooling: Pooling = "pooler"

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return unit vectors (n, width)."""
        given = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        answer = self.text_encoder(**given)
        if self.pooling == "pooler":
            return F.normalize(answer.pooler_output.float(), dim=-1)
        mask = given["attention_mask"][..., None].float()
        return F.normalize((answer.last_hidden_state.float() * mask).sum(1) / mask.sum(1), dim=-1)

    @torch.no_grad()
    def embed_adapters(self, adapters: Sequence[Adapter], model: Model | None = None) -> Tensor:
        """Return unit vectors (n, width); raises as ``WeightEncoder.stack_pairs``."""
        return F.normalize(self.encoder(self.encoder.stack_pairs(adapters, model)), dim=-1)

    def rank(self, prompt: str, index: Mapping[str, Tensor], *, top: int = 3) -> list[Match]:
        """Return the best of some adapters, the best first.

        Args:
            prompt: names the wanted concept.
            index: name -> vector (width,) of an adapter (``embed_adapters``).
            top: how many.
        """
        if not index or top < 1:
            raise ChoiceError(
                f"top={top} adapters cannot be chosen from {len(index)}",
                next_step="give one adapter at least, and top= above 0",
            )
        scores = torch.stack(list(index.values())) @ self.embed_prompts([prompt])[0]
        best = scores.argsort(descending=True, stable=True)[:top]
        names = list(index)
        return [Match(names[place], float(scores[place])) for place in best.tolist()]

    def save(self, folder: str | Path) -> None:
        """Write the encoder, the text encoder and its tokenizer into a folder that replaces an older one."""
        settings = {"sizes": self.encoder.sizes, "width": self.encoder.width, "pooling": self.pooling}
        settings |= {"layers": len(self.encoder.encoders), "probes": self.encoder.probes}
        tensors = {name: tensor.contiguous() for name, tensor in self.encoder.state_dict().items()}
        with replace_atomically(Path(folder)) as staged:
            staged.mkdir()
            save_file(tensors, staged / FILE, {"retriever": json.dumps(settings)})
            self.text_encoder.save_pretrained(staged / TEXT)
            self.tokenizer.save_pretrained(staged / TEXT)

    @classmethod
    def load(cls, folder: str | Path) -> "Retriever":
        """Read the folder of ``save``.

        Raises:
            MissingExtra: transformers is not installed.
            FormatError: the folder holds no retriever, or a damaged one.
        """
        with translate_import_errors():
            from transformers import AutoModel, AutoTokenizer

        place = parse_path(folder, "the folder of Retriever.load", FormatError, "unreadable")
        if not (place / FILE).is_file():
            raise FormatError(
                f"there is no retriever in '{place}'",
                next_step=f"give the folder that Retriever.save wrote, which holds {FILE}",
                code="unknown_format",
            )
        try:
            tensors = load_file(place / FILE)
            with safe_open(place / FILE, framework="pt") as opened:
                settings = json.loads(opened.metadata()["retriever"])
            sizes = {path: (int(takes), int(gives)) for path, (takes, gives) in settings["sizes"].items()}
            probes = settings.get("probes", 1)  # older files have one, and do not say so
            encoder = WeightEncoder(sizes, settings["width"], layers=settings["layers"], probes=probes)
            encoder.load_state_dict(tensors)
            pooling = settings["pooling"]
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FormatError(
                f"'{place / FILE}' was not written by a retriever: {error}",
                next_step="train the retriever again, and save it",
                code="corrupt_file",
            ) from error
        text = AutoModel.from_pretrained(place / TEXT)
        text = getattr(text, "text_model", text) if pooling == "pooler" else text
        return cls(encoder.eval(), text.eval(), AutoTokenizer.from_pretrained(place / TEXT), pooling)


def matching_loss(prompts: Tensor, adapters: Tensor) -> Tensor:
    """Return 10·mean(−log softmax over columns − log softmax over rows) of the cosines, without a temperature.

    Args:
        prompts, adapters: unit vectors (n, width), the i-th of both belong together.
    """
    scores = prompts @ adapters.mT
    columns, rows = scores.log_softmax(0).diagonal(), scores.log_softmax(1).diagonal()
    return -_SCALE * (columns + rows).mean()


def train_retriever(
    retriever: Retriever,
    pairs: Sequence[tuple[str | Sequence[str], Adapter]],
    *,
    steps: int = 2000,
    batch: int = 32,
    rate: float = 1e-4,
    seed: int = 0,
    model: Model | None = None,
) -> list[float]:
    """Train the encoder of adapters so that each is near its prompts, and return the losses.

    Args:
        retriever: its encoder is changed in place.
        pairs: an adapter's concept, in one wording or several, and the adapter. Adapters of one concept share their
            wordings, and no batch holds two of them.
        steps, batch, rate: of AdamW; the paper's 20 epochs have 100 steps each.
        seed: of batches and wordings.
        model: as ``WeightEncoder.stack_pairs`` takes it.
    """
    wordings = [(words,) if isinstance(words, str) else tuple(words) for words, _ in pairs]
    groups: dict[tuple[str, ...], list[int]] = {}
    for place, words in enumerate(wordings):
        groups.setdefault(words, []).append(place)
    known = list(dict.fromkeys(text for words in wordings for text in words))
    vectors = dict(zip(known, retriever.embed_prompts(known), strict=True))
    encoder, chosen = retriever.encoder, random.Random(seed)
    stacked = encoder.stack_pairs([adapter for _, adapter in pairs], model)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=rate)

    def compute_losses() -> Iterator[Tensor]:
        for _ in range(steps):
            concepts = chosen.sample(list(groups), min(batch, len(groups)))
            places = torch.tensor([chosen.choice(groups[one]) for one in concepts])
            drawn: Pairs = {path: (a[places], b[places]) for path, (a, b) in stacked.items()}
            prompts = torch.stack([vectors[chosen.choice(one)] for one in concepts])
            yield matching_loss(prompts, F.normalize(encoder(drawn), dim=-1))

    return take_steps(encoder, optimizer, compute_losses(), "retriever", steps)


def find_adapters(
    retriever: Retriever, prompt: str, folder: str | Path, *, top: int = 3, model: Model | None = None
) -> list[Match]:
    """Return the adapters of a folder that fit a prompt best, the best first.

    Args:
        retriever: trained on adapters of the same model.
        prompt: names the wanted concept.
        folder: holds adapters, one file or folder each.
        top: how many.
        model: as ``WeightEncoder.stack_pairs`` takes it.

    Raises:
        FormatError: there is no adapter, or one cannot be read.
        SiteError, AdapterError: as ``WeightEncoder.stack_pairs``.
    """
    place = find_source(folder, "the folder of adapters", FormatError, "unreadable")
    with translate_os_errors(place, FormatError, "read", "unreadable"):
        paths = [inner for inner in sorted(place.iterdir()) if is_adapter(inner)]
    if not paths:
        raise FormatError(
            f"there are no adapters in '{place}'",
            next_step="give the folder that holds them, one file or folder each",
            code="unknown_format",
        )
    index: dict[str, Tensor] = {}
    with progress("reading adapters", total=len(paths)) as report:
        for path in paths:
            report.step(path.name)
            index[str(path)] = retriever.embed_adapters([load_adapter(path, model)], model)[0]
    found = retriever.rank(prompt, index, top=top)
    return [Match(Path(one.name).stem, one.score, Path(one.name)) for one in found]
