"""DyLoRA in NumPy: Valipour et al. 2022, equation 4; at rank b the first b components, scaled by alpha/b."""


def at_rank(W, p, variant, b):
    return W + variant.alpha / b * p.lora_B[:, :b] @ p.lora_A[:b]


def weight(W, p, variant):
    return at_rank(W, p, variant, variant.r)


def count(out, columns, variant):
    return variant.r * (columns + out)
