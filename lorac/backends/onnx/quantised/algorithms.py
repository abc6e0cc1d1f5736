"""Algorithms that choose the codes of a matrix: the library's kernel, its k-quants, and GPTQ.

GPTQ ("GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", Frantar et al. 2023, arXiv
2210.17323) quantises a matrix column by column and moves each column's error to the remaining columns, according to the
second moments of the layer's inputs. The library's own GPTQ returns rounded values, but not their codes.
"""

import numpy as np
import torch
from torch import Tensor

from lorac.backends.onnx.quantised.codec import Array, Codec, EncodedMatrix

RTN, K_QUANT, GPTQ = "rtn", "k_quant", "gptq"
ALGORITHMS = (RTN, K_QUANT, GPTQ)
"""Names of the algorithms, the fastest first."""
_DAMPING = 0.01
"""Damping: the share of their mean that is added to the diagonal of second moments."""
_SHRINKING = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Shares of a block's range that its scale may cover: clipping a few values can serve the others."""
_MOST_VALUES = 1 << 22
"""The number of values that the library's k-quants take at once; each needs some hundred bytes of memory."""


def encode(codec: Codec, matrix: Array, algorithm: str, moments: Tensor | None) -> EncodedMatrix:
    """Quantise a float32 matrix (rows, columns).

    Args:
        algorithm: one of ``ALGORITHMS``.
        moments: (columns, columns), second moments of the inputs of products with the matrix, for GPTQ; without them
            GPTQ rounds to the nearest code.
    """
    if algorithm == GPTQ and moments is not None:
        return _encode_by_gptq(codec, matrix, moments)
    if algorithm != K_QUANT:
        return codec.encode(matrix)
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    rows, columns = matrix.shape
    blocks = -(-columns // codec.block)
    padded = np.pad(matrix, ((0, 0), (0, blocks * codec.block - columns)))
    parts = np.array_split(padded, max(1, padded.size // _MOST_VALUES))
    with np.errstate(divide="ignore", invalid="ignore"):  # blocks of equal values, which it leaves unchanged
        found = [quant_tensor_k_quant_cpu(part, codec.bits, codec.block) for part in parts]
    whole, scales, zeros = (np.concatenate([part[i] for part in found]) for i in range(3))
    return codec.pack(
        whole.reshape(rows, -1)[:, :columns].astype(np.uint8),
        scales.reshape(rows, blocks).astype(np.float32),
        zeros.reshape(rows, blocks),
    )


@torch.no_grad()
def _encode_by_gptq(codec: Codec, matrix: Array, moments: Tensor) -> EncodedMatrix:
    rows, columns = matrix.shape
    blocks = -(-columns // codec.block)
    size = blocks * codec.block
    left = torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(matrix)), (0, size - columns)).t().contiguous()
    padded, identity = torch.nn.functional.pad(moments, (0, size - columns, 0, size - columns)), torch.eye(size)
    damping, failed = _DAMPING * padded.diagonal().mean(), torch.tensor(1)
    while failed:  # damp the moments until they have an inverse
        lower, failed = torch.linalg.cholesky_ex(padded + damping * identity)
        damping = damping * 10
    spread = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    whole = torch.empty(size, rows, dtype=torch.uint8)
    scales, zeros = torch.empty(blocks, rows), torch.empty(blocks, rows)
    for block in range(blocks):
        begin, end = block * codec.block, (block + 1) * codec.block
        own, values = spread[begin:end, begin:end], left[begin:end]
        scale, zero = scales[block], zeros[block] = _choose_scales(codec, values, own.diagonal() ** -2)
        errors = torch.empty_like(values)
        for i, value in enumerate(values):
            code = (value / scale).round_().add_(zero).clamp_(0, 2**codec.bits - 1)
            whole[begin + i] = code
            errors[i] = (value - (code - zero) * scale) / own[i, i]
            values[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        left[end:].addmm_(spread[begin:end, end:].t(), errors, alpha=-1)
    parts = (whole[:columns], scales, zeros.to(torch.uint8))
    return codec.pack(*(np.ascontiguousarray(part.t().numpy()) for part in parts))


def _choose_scales(codec: Codec, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each column's scale and zero point in a block, with the least weighted squared error.

    Args:
        values: (block, rows).
        weights: (block,).
    """
    most, middle = 2**codec.bits - 1, 2.0 ** (codec.bits - 1)
    candidates: list[tuple[Tensor, Tensor]] = []
    if codec.symmetric:
        # The end of the range with one more code is assigned to the largest value, or to the other side.
        largest = values.gather(0, values.abs().argmax(0, keepdim=True))[0] / -middle
        for share in (*_SHRINKING, *(-share for share in _SHRINKING)):
            candidates.append((_nonzero(largest * share), torch.full_like(largest, middle)))
    else:
        low, high = values.amin(0).clamp(max=0), values.amax(0).clamp(min=0)
        for share in _SHRINKING:
            scale = _nonzero((high - low) * share / most)
            candidates.append((scale, (-low * share / scale).round().clamp(0, most)))
    best = None
    for scale, zero in candidates:
        rounded = ((values / scale).round_().add_(zero).clamp_(0, most) - zero) * scale
        error = weights @ (rounded - values).square_()
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = (torch.where(better, scale, best[0]), torch.where(better, zero, best[1]))
        least = torch.where(better, error, least)
    assert best is not None
    return best


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)
