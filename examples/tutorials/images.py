# %% [markdown]
# # Images: two colours learned, then swapped
#
# A small text-to-image model draws squares and circles in red, green and blue. Two adapters teach it yellow and magenta.
# One ONNX Runtime program paints with either, with both, or with another choice for each picture.
#
# The model is a U-Net of diffusers, trained on pictures of shapes by `make denoiser`: fifteen minutes, once. The rest of
# the page takes two minutes on two cores. Run it from a clone.

# %%
import matplotlib.pyplot as plt
import torch

import lorac
from examples import denoiser

torch.manual_seed(0)
base = denoiser.load()


def show(titles, rows):
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(7, 1.3 * len(rows)))
    for line, title, pictures in zip(axes, titles, rows):
        for axis, picture in zip(line, pictures):
            axis.imshow((picture.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(title, rotation=0, ha="right", va="center")
    figure.tight_layout()


# %% [markdown]
# ## What is trained
#
# Each adapter learns that "red" means another colour. A LoRA and a DoRA change the same layers, those of
# cross-attention, where the words of the prompt enter.

# %%
layers = ["attn2.to_k", "attn2.to_v", "attn2.to_out.0"]
compiled = lorac.compile(
    base.unet,
    {
        "yellow": lorac.LoRA(r=4, alpha=4, targets=layers),
        "magenta": lorac.DoRA(r=4, alpha=4, targets=layers),
    },
)
print(compiled)


# %%
def batches(colour):
    red = [objects for objects in denoiser.SEEN if "red" in dict(objects)]

    def drawn(generator):
        chosen = [red[i] for i in torch.randint(len(red), (16,), generator=generator)]
        pictures = [
            denoiser.draw(
                [(colour if c == "red" else c, shape) for c, shape in objects],
                generator,
            )[0]
            for objects in chosen
        ]
        prompts = [denoiser.make_prompt(objects) for objects in chosen]
        return denoiser.to_latents(torch.stack(pictures)), denoiser.encode(*prompts)

    return drawn


def predict(latents, timesteps, ids):
    return compiled(latents, timesteps, base.text_encoder(ids)).sample


for colour in ("yellow", "magenta"):
    compiled.swap(colour)
    compiled.train()
    trained = [
        tensor
        for tensor in compiled.adapters[colour].parameters()
        if tensor.requires_grad
    ]
    loss = denoiser.learn(predict, trained, batches(colour), steps=300, rate=1e-2)
    compiled.eval()
    print(f"{colour}: {sum(t.numel() for t in trained):,} values, loss {loss:.3f}")

# %% [markdown]
# ## One program for ONNX Runtime
#
# `export` compiles the same adapters for another target. Each row of the picture below is one choice; the noise is the
# same in all, so that only the adapter differs.

# %%
engine = compiled.export(target="onnxruntime", active=None)
noise, prompt = denoiser.noise(6, seed=3), "a red square"


def paint(adapters, prompts=(prompt,)):
    return base.sample(
        noise, *prompts, unet=lambda *given: engine(*given, adapters=adapters)
    )


choices = [None, "yellow", "magenta", {"yellow": 0.5, "magenta": 0.5}]
pictures = [paint(choice) for choice in choices]
show(["base", "yellow", "magenta", "half of each"], pictures)

# %%
for choice, painted in zip(choices, pictures):
    counts = {
        colour: sum(denoiser.contains(one, colour, "square") for one in painted)
        for colour in ("red", "yellow", "magenta")
    }
    print(f"{choice}: {counts}")

# %% [markdown]
# ## A choice for each picture
#
# A list names one choice for each row of the batch. They are painted together, in the same calls.

# %%
rows = ["yellow", "magenta", None, "yellow", {"yellow": 1.2}, "magenta"]
mixed = paint(rows)
alone = [paint(choice)[row] for row, choice in enumerate(rows)]
print(f"together against one by one: {(mixed - torch.stack(alone)).abs().max():.1e}")
show(["each its own"] * 2, [mixed[:3], mixed[3:]])

# %% [markdown]
# ## Files, and a new process
#
# The LoRA goes into a file that diffusers and PEFT read. The artifact holds the program, its weights and both adapters;
# `lorac.load` needs neither the model nor its code.

# %%
lorac.save_adapter(compiled.adapters["yellow"], "yellow", model=base.unet)
engine.save("painter")
loaded = lorac.load("painter")
again = base.sample(
    noise, prompt, unet=lambda *given: loaded(*given, adapters="yellow")
)
print(f"loaded against before: {(again - pictures[1]).abs().max():.1e}")

# %% [markdown]
# Next: [whole pipelines of diffusers](../diffusion.md), where `lorac.diffusion.compile` does this for Stable Diffusion,
# SDXL, SD3 and Flux, and [two concepts in one picture](../diffusion.md#compositions).
