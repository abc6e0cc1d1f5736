"""TinyLoRA in NumPy: Morris et al. 2026, equation 3, core by core."""


def weight(W, p, variant):
    core = sum(value * matrix for value, matrix in zip(p.tinylora_v, p.tinylora_P, strict=True))
    return W + p.tinylora_B @ core @ p.tinylora_A


def count(out, columns, variant):
    return variant.u
