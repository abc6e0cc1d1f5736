"""One of two processes that train every rule by accelerate over gloo: ``python -m tests.training.two_processes FILE``.

The environment says which one it is, as torchrun does; the first writes what comes of it into the file it is given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from tests.training.every_rule import ROWS, RULES, batch, tensors_of
from tests.training.loops import trained

STEPS = 5


def main(file: Path) -> None:
    found = {}
    for name, ruled in RULES.items():
        if ruled.alone:
            continue
        accelerator = Accelerator(
            cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=ruled.unused)]
        )
        assert accelerator.num_processes == 2
        half = ROWS // 2
        rows = slice(accelerator.process_index * half, (accelerator.process_index + 1) * half)
        compiled = ruled.compiled()
        model, optimizer = accelerator.prepare(compiled, ruled.optimizer(compiled))
        if ruled.rule is not None:
            ruled.rule(model, optimizer)
        for step in range(STEPS):
            optimizer.zero_grad()
            accelerator.backward(model(**batch(step, rows))["loss"])
            accelerator.clip_grad_norm_(trained(model), 0.5)
            optimizer.step()
        found[name] = tensors_of(compiled)
    if accelerator.is_main_process:
        torch.save(found, file)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
