"""Batches of rows from many requests: rows of the same form share a call."""

import asyncio
import concurrent.futures
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lorac.errors import InputMismatch, Unavailable, drop_frames
from lorac.ir.slots.choice import ChoiceSpec
from lorac.ir.slots.layouts import drop_marked
from lorac.runtime.scheduling.scheduler import check_line
from lorac.session.compiled import Compiled

Outputs: TypeAlias = Mapping[str, Tensor]


@dataclass(eq=False)
class _RowJob:
    """Rows of one request.

    Attributes:
        inputs: name -> (rows, …).
        choices: the choices of adapters, one per row.
        tenant: the tenant of the request.
        result: the future of the rows of every output.
    """

    inputs: Mapping[str, Tensor]
    choices: Sequence[ChoiceSpec]
    tenant: str
    result: concurrent.futures.Future[Outputs] = field(default_factory=concurrent.futures.Future)

    @property
    def form(self) -> object:
        """The names, sizes and dtypes of the rows: jobs of the same form can share a call."""
        return sorted((name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in self.inputs.items())


@final
class RowBatches:
    """A thread that computes rows: waiting jobs of the same form share a call of the model.

    Args:
        compiled: the model; each output has one row per row of the inputs.
        rows: the most rows of a call that several requests share.
        waiting: the most requests that wait.
    """

    def __init__(self, compiled: Compiled, rows: int, waiting: int) -> None:
        self._compiled, self._rows = compiled, rows
        self._waiting, self._jobs, self._changed, self._closing = waiting, list[_RowJob](), threading.Condition(), False
        self._turns, self._numbers = dict[str, int](), itertools.count()
        self._thread = threading.Thread(target=self._work, name="lorac-rows", daemon=True)
        self._thread.start()

    async def compute(self, inputs: Mapping[str, Tensor], choices: Sequence[ChoiceSpec], tenant: str = "") -> Outputs:
        """Return the rows of every output, by name.

        Raises:
            OverBudget: no further request of the tenant may wait (code ``queue_full``).
            LoracError: as a call of the model.
        """
        job = _RowJob(inputs, choices, tenant)
        with self._changed:
            check_line([one.tenant for one in self._jobs], tenant, 1, self._waiting)
            self._jobs.append(job)
            self._changed.notify()
        try:
            return await asyncio.wrap_future(job.result)
        finally:
            del job  # else an error references this frame, and the job references the error: a cycle

    def close(self) -> None:
        """Wait until the waiting jobs have been computed, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while jobs := self._gather():
            self._run([job for job in jobs if job.result.set_running_or_notify_cancel()])
            del jobs  # else the last outputs stay in memory while no request comes

    def _gather(self) -> list[_RowJob]:
        """Wait for jobs, and return the next call's jobs, longest unserved tenant first; an empty list at the end."""
        jobs, count = list[_RowJob](), 0
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            for job in sorted(self._jobs, key=lambda one: self._turns.get(one.tenant, -1)):
                if not jobs or (job.form == jobs[0].form and count + len(job.choices) <= self._rows):
                    jobs.append(job)
                    count += len(job.choices)
            for job in jobs:
                self._jobs.remove(job)
                self._turns[job.tenant] = next(self._numbers)
        return jobs

    def _run(self, jobs: Sequence[_RowJob]) -> None:
        """Compute some jobs in one call; if that fails, compute each job in a call of its own."""
        try:
            found = self._call(jobs) if jobs else []
        except Exception as error:
            if len(jobs) == 1:
                drop_frames(error)
                jobs[0].result.set_exception(error)
                return
            for job in jobs:
                self._run([job])
            return
        for job, outputs in zip(jobs, found, strict=True):
            job.result.set_result(outputs)

    def _call(self, jobs: Sequence[_RowJob]) -> list[Outputs]:
        inputs = {name: torch.cat([job.inputs[name] for job in jobs]) for name in jobs[0].inputs}
        choices = [choice for job in jobs for choice in job.choices]
        chosen = {} if self._compiled.mode == "baked" else {"adapters": choices}
        with torch.no_grad():
            outputs = _name_outputs(self._compiled(**inputs, **chosen))
        odd = [name for name, output in outputs.items() if not output.dim() or len(output) != len(choices)]
        if odd:
            raise InputMismatch(
                f"the output '{odd[0]}' has no row for each of the {len(choices)} rows of the inputs",
                next_step="serve a model whose outputs have the batch in front",
            )
        drop: Callable[[Tensor], Tensor] = drop_marked if self._compiled.resized else torch.Tensor.contiguous
        counts = [len(job.choices) for job in jobs]
        ends = itertools.accumulate(counts)
        return [
            {name: drop(output[end - count : end]) for name, output in outputs.items()}
            for count, end in zip(counts, ends, strict=True)
        ]


def _name_outputs(output: object) -> dict[str, Tensor]:
    """Return a model's output tensors by name; the tensors of a tuple by number."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        named = {str(name): value for name, value in output.items()}
    else:
        named = {str(place): value for place, value in enumerate(pytree.tree_leaves(output))}
    found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    if not found:
        raise Unavailable("the model gives no tensors", next_step="serve a model whose outputs are named tensors")
    return found
