"""LoRA-XS in NumPy: Bałazy, Banaei et al. 2024, equation 1."""


def weight(W, p, variant):
    return W + variant.alpha / variant.r * p.lora_B @ p.lora_latent @ p.lora_A


def count(out, columns, variant):
    return variant.r**2
