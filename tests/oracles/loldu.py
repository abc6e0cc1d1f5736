"""LoLDU in NumPy: Shi et al. 2024, the residual form: W_res + σ·P·L_r·diag(z)·U_r."""

import numpy as np


def weight(W, p, variant):
    sigma_0 = 1.0 if variant.alpha is None else variant.alpha / variant.r
    sigma = p.scaling_factor if variant.train_sigma else sigma_0
    residual = W - sigma_0 * p.lora_B @ np.diag(p.diagonal) @ p.lora_A
    return residual + sigma * p.lora_B @ np.diag(p.vector_z) @ p.lora_A


def count(out, columns, variant):
    return variant.r + (1 if variant.train_sigma else 0)
