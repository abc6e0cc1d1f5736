"""Federated training by stacked factors: clients of any ranks, whose rounds add up to one adapter exactly.

The mean of Bₖ times the mean of Aₖ is not the mean of Bₖ·Aₖ; stacked factors give the latter exactly. Wang et al. 2024,
arXiv 2409.05976.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import nn

from lorac.errors import AdapterNotFound, ChoiceError, nearest_name
from lorac.merging.merge import merge
from lorac.session.api import compile
from lorac.session.compiled import CompiledModule
from lorac.session.request.sources import AdapterSource
from lorac.variants.adapter import Adapter
from lorac.variants.base import Variant

Train = Callable[[str, CompiledModule], object]
"""Function (client's name, model) that trains the client's adapter in the model."""
STACK = "stack"
"""Name of the adapter with all earlier rounds."""


class Contribution(NamedTuple):
    """A client's contribution to a round.

    Attributes:
        adapter: the adapter that the client trained.
        weight: the client's weight in the round, such as its number of samples.
    """

    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class FederatedStack:
    """The rounds of a federation; each changes the model by Σ pₖ·ΔWₖ, pₖ a client's share of the round's weights.

    The model does not change: clients train next to the stack, which is active and frozen. So every client can be
    removed exactly, and the whole is one adapter that is swapped like any other.

    Attributes:
        rounds: for each round, client -> its contribution.
    """

    rounds: tuple[Mapping[str, Contribution], ...] = ()

    @property
    def clients(self) -> tuple[str, ...]:
        """The names of all clients, in the order of their first contributions."""
        return tuple(dict.fromkeys(client for one in self.rounds for client in one))

    def add_round(self, adapters: Mapping[str, Adapter], weights: Mapping[str, float] | None = None) -> FederatedStack:
        """Return the stack with one more round.

        Args:
            adapters: client -> the adapter that the client trained next to this stack.
            weights: client -> the client's weight, above 0; default: 1 each.

        Raises:
            ChoiceError: a client has no weight, or a weight that is not above 0; or there is no client.
        """
        given = dict.fromkeys(adapters, 1.0) if weights is None else weights
        if given.keys() != adapters.keys() or not adapters or min(given.values()) <= 0:
            raise ChoiceError(
                f"the round has the clients {', '.join(adapters) or 'none'} and the weights {dict(given)}",
                next_step="give each client a weight above 0, such as the number of its samples",
            )
        contributions = {client: Contribution(adapter, float(given[client])) for client, adapter in adapters.items()}
        return replace(self, rounds=(*self.rounds, contributions))

    def without(self, client: str) -> FederatedStack:
        """Return the stack without a client; in each round the other clients' shares add up to 1 again.

        Raises:
            AdapterNotFound: no round has a client of that name.
        """
        if client not in self.clients:
            raise AdapterNotFound(
                f"no round has a client '{client}'",
                nearest=nearest_name(client, self.clients),
                next_step=f"the clients are {', '.join(self.clients) or 'none'}",
            )
        left = [{name: one for name, one in contributions.items() if name != client} for contributions in self.rounds]
        return replace(self, rounds=tuple(contributions for contributions in left if contributions))

    def merged(self, name: str = STACK) -> Adapter | None:
        """Return all rounds as one adapter, or None without rounds. LoRAs become a LoRA of the sum of their ranks."""
        parts: dict[str, Adapter] = {}
        shares: dict[str, float] = {}
        for number, contributions in enumerate(self.rounds):
            total = sum(weight for _, weight in contributions.values())
            for client, (adapter, weight) in sorted(contributions.items()):
                parts[f"{number}:{client}"] = adapter
                shares[f"{number}:{client}"] = weight / total
        return merge(parts, "cat", shares, name=name) if parts else None

    def train_round(
        self, model: nn.Module, methods: Mapping[str, Variant], train: Train, weights: Mapping[str, float] | None = None
    ) -> FederatedStack:
        """Train a fresh adapter for each client, next to the stack; return the stack with this round.

        Args:
            model: the base, which is not changed.
            methods: client -> its method; ranks and targets may differ. If the method starts as the base, a round
                starts with the outputs of the stack.
            train: called with each client's name and the model in training mode, in which only the client's adapter
                requires gradients.
            weights: as ``add_round`` takes them.
        """
        stack = self.merged()
        before = {} if stack is None else {STACK: stack}
        trained = {}
        for client, method in methods.items():
            name = f"{client}-{len(self.rounds)}"  # the name seeds a fresh adapter
            adapters: dict[str, AdapterSource] = {**before, name: method}
            compiled = compile(model, adapters, active=dict.fromkeys(adapters, 1.0))
            for adapter in before:
                for tensor in compiled.adapters[adapter].parameters():
                    tensor.requires_grad_(False)
            train(client, compiled.train())
            trained[client] = compiled.adapters[name]
        return self.add_round(trained, weights)
