"""Calibration: second moments of the inputs of a model's linear layers, collected in calls of the model."""

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorac.errors import OptionError
from lorac.frontend.fast_path import disable_fast_path
from lorac.frontend.host import Host
from lorac.frontend.model_runner import seed_random_numbers
from lorac.ir.sites.site import BaseReader, Site, SiteKind
from lorac.progress import progress

Call = Mapping[str, object]
"""Arguments of a call of a model by name, such as a tokenizer returns."""
_TEXTS, _TOKENS = 16, 256
"""How many texts a model writes for its own calibration, and how long they are."""
_MOST_BYTES = 256 << 20
"""The memory for second moments that are collected at once."""


class Calibration:
    """Second moments of linear layers' inputs, collected on demand for a few consecutive layers at a time.

    Args:
        model: the model, which is not modified.
        sites: its sites, by path.
        base: a reader of its weights.
        calls: the arguments of calls; if empty, the model generates texts from a seed.

    Attributes:
        missed: the requested layers that no call reached.

    Raises:
        OptionError: no calls are given, and the model cannot generate text.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], base: BaseReader, calls: Sequence[Call]) -> None:
        self._model = Host.of(model).copy().model.eval()
        self._layers = {path: site for path, site in sites.items() if site.kind is SiteKind.LINEAR and site.is_layer}
        self._base, self._calls = base, list(calls) or self._write_texts()
        self._moments: dict[str, Tensor | None] = {}
        self.missed: list[str] = []

    @torch.no_grad()
    def find(self, modules: Sequence[str], matrix: Tensor) -> Tensor | None:
        """Return the second moments (in, in) of the inputs of a product with a matrix (out, in).

        Args:
            modules: modules around the product, outermost first. The last is the layer, or contains the layers whose
                weights are concatenated in the matrix; then the layer is the one whose weight equals the matrix's
                beginning.

        Returns:
            None if no call reached the layer.
        """
        around = modules[-1] if modules else ""
        paths = [
            path
            for path, site in self._layers.items()
            if f"{path}.".startswith(f"{around}." if around else "") and site.in_features == matrix.shape[1]
        ]
        nearest = min(paths, key=lambda path: self._distance(path, matrix), default=None)
        if nearest is not None and nearest not in self._moments:
            # The layer and those after it, as many as fit into the memory limit.
            order, chosen, size = list(self._layers), list[str](), 0
            for path in order[order.index(nearest) :]:
                size += 4 * self._layers[path].in_features ** 2
                if chosen and size > _MOST_BYTES:
                    break
                chosen.append(path)
            self._moments = dict.fromkeys(chosen) | self._collect(chosen)
        found = None if nearest is None else self._moments[nearest]
        if found is None:
            self.missed.append(nearest or around)
        return found

    def _distance(self, path: str, matrix: Tensor) -> float:
        return float((self._base.weight(self._layers[path])[0].float() - matrix[0]).norm())

    @torch.no_grad()
    def _collect(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """Call the model, and return the second moments of the inputs of these layers."""
        moments, latest = dict[str, Tensor](), list[tuple[Tensor, Tensor]]()

        def add(path: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0]
            if not latest or latest[0][0] is not x:  # layers that read the same tensor share its moments
                rows = x.flatten(0, -2).float()
                found = moments[path] if path in moments else torch.zeros(rows.shape[1], rows.shape[1])
                latest[:] = [(x, found.addmm_(rows.t(), rows))]
            moments[path] = latest[0][1]

        modules = {path: self._model.get_submodule(path) for path in paths}
        handles = [module.register_forward_pre_hook(functools.partial(add, path)) for path, module in modules.items()]
        try:
            reporting = progress("calibration", total=len(self._calls))
            with seed_random_numbers(self._model, 0), disable_fast_path(self._model), reporting as report:
                for number, call in enumerate(self._calls):
                    report.step(f"call {number + 1} of {len(self._calls)}")
                    self._call(number, call)
                    latest.clear()
        finally:
            for handle in handles:
                handle.remove()
        return moments

    def _call(self, number: int, call: Call) -> None:
        try:
            self._model(**call)
        except Exception as error:  # a model may raise any exception for unsuitable arguments
            raise OptionError(
                f"the model cannot be called with calibration[{number}]: {error}",
                next_step="give its arguments by name, such as [{'input_ids': ids}, ...]",
            ) from error

    def _write_texts(self) -> list[Call]:
        """Return texts that the model generates by sampling."""
        model: object = self._model
        config, generate = getattr(model, "config", None), getattr(model, "generate", None)
        if not callable(generate) or getattr(config, "is_encoder_decoder", True):
            raise OptionError(
                "algorithm='gptq' needs calls of the model, and this model cannot write texts for them",
                next_step="give some: calibration=[{'input_ids': ids}, ...]",
            )
        first = getattr(config, "bos_token_id", None) or 0
        length = min(_TOKENS, getattr(config, "max_position_embeddings", None) or _TOKENS)
        with progress("calibration") as report, seed_random_numbers(self._model, 0):
            report.step(f"the model writes {_TEXTS} texts")
            begun = torch.full((_TEXTS, 1), first)
            # Texts should be varied, so do not stop early, and sample from all tokens.
            settings = {"do_sample": True, "top_k": 0, "min_length": length, "max_length": length, "pad_token_id": 0}
            texts: Tensor = generate(begun, **settings)
        return [{"input_ids": text[None]} for text in texts]
