"""The ops that a stored program may name: functional ones, whose kernels check their operands.

The file, which anybody may have written, decides which ops are called, so only listed ones may be. The list follows
from torch's own statements about its ops: those of core ATen and pointwise ones, as their tags say, and by name those
that torch composes of others or that PyTorch models commonly use. Whatever writes into an argument, leaves memory
uninitialised, takes packed or unchecked layouts or reads a file is not among them. Ops that models need, and whose
kernels do not check their operands, are checked when they are called (``lorac.storage.op_guards``).
"""

import functools
import math
import operator
from collections.abc import Callable, Mapping
from types import ModuleType

import torch

from lorac.errors import ArtifactError
from lorac.ir.graph import ops
from lorac.storage.op_guards import guard_op

_TAGS = frozenset({torch.Tag.core, torch.Tag.pointwise})
_EXCLUDED = ("_backward", "empty", "_embedding_bag")
"""Parts of names of core ops that do not check their indices or shapes, or give memory as it is."""
_UNSAFE_ARGUMENTS = frozenset({"filename", "unsafe", "batch_sizes"})
"""Arguments of overloads that read files or skip the checks of their operands."""
_FURTHER_NAMES = """
    __and__ __or__ __xor__ _assert_scalar _assert_tensor_metadata _fft_c2c _safe_softmax
    _scaled_dot_product_attention_math _trilinear _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm absolute
    adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d addbmm addmv
    addr adjoint affine_grid_generator alias_copy all alpha_dropout aminmax arange arccos arccosh arcsin arcsinh
    arctan arctan2 arctanh argsort argwhere atleast_1d atleast_2d atleast_3d baddbmm batch_norm bernoulli bilinear
    block_diag broadcast_tensors broadcast_to bucketize cartesian_prod cdist chain_matmul channel_shuffle chunk
    column_stack complex concat concatenate conj contiguous conv1d conv2d conv3d conv_tbc conv_transpose1d
    conv_transpose2d conv_transpose3d cosine_similarity count_nonzero cross cross_entropy_loss cummax cummin cumprod
    detach detach_copy diag diag_embed diagflat diff dist divide dot dropout dsplit dstack einsum embedding_bag
    expand_as expand_copy eye feature_dropout fft_fft fft_fft2 fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_ifft
    fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq
    fft_rfftn fix flatten fliplr flipud floor_divide frobenius_norm full_like ger glu greater greater_equal
    grid_sampler grid_sampler_3d group_norm gru hamming_window hann_window hardswish hsplit hstack huber_loss im2col
    imag index_add index_copy index_fill index_reduce inner instance_norm inverse is_complex is_floating_point
    isclose isin isreal istft kl_div kron kthvalue l1_loss layer_norm less less_equal lift_fresh lift_fresh_copy
    linalg_cholesky linalg_cross linalg_det linalg_diagonal linalg_inv linalg_matmul linalg_matrix_exp
    linalg_matrix_norm linalg_matrix_power linalg_norm linalg_qr linalg_solve linalg_solve_triangular linalg_svd
    linalg_vecdot linalg_vector_norm linear linspace log_sigmoid log_sigmoid_forward log_softmax logcumsumexp
    logspace logsumexp lstm masked_fill masked_select matmul matrix_exp matrix_power max_pool1d
    max_pool1d_with_indices max_pool2d max_pool3d median meshgrid mode moveaxis movedim mse_loss msort multiply mv
    nanmean nanmedian nansum narrow narrow_copy negative new_full new_ones new_zeros nll_loss nll_loss_forward
    nll_loss_nd norm normal not_equal numel numpy_T one_hot ones ones_like outer pad pairwise_distance permute_copy
    pixel_shuffle pixel_unshuffle polar prelu qr quantile rand_like randint randint_like randn_like ravel real
    repeat_interleave reshape reshape_as resolve_conj resolve_neg rms_norm roll rot90 row_stack
    scaled_dot_product_attention searchsorted select_copy size slice_copy smooth_l1_loss softmax special_digamma
    special_erf special_erfc special_erfinv special_exp2 special_expit special_expm1 special_log1p
    special_log_softmax special_logit special_logsumexp special_ndtr special_round special_sinc special_softmax
    special_xlogy split split_copy split_with_sizes_copy squeeze_copy stack std std_mean stft subtract sum_to_size
    svd swapaxes swapdims sym_constrain_range sym_constrain_range_for_size t t_copy take take_along_dim tensor_split
    tensordot tile to trace transpose transpose_copy tril tril_indices triu triu_indices true_divide type_as unbind
    unbind_copy unflatten unfold unfold_copy unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze_copy
    upsample_bicubic2d upsample_linear1d upsample_nearest1d upsample_nearest3d upsample_trilinear3d var_mean vdot
    view_as view_as_complex view_as_real view_copy vsplit vstack where zero zeros zeros_like
"""
_FURTHER = frozenset(_FURTHER_NAMES.split())
"""Ops of aten that are allowed by name."""
_MODULES: Mapping[str, ModuleType] = {"operator": operator, "math": math, "torch": torch}
_NUMBER_FUNCTIONS = frozenset(
    {"getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge"}
    | {"and_", "or_", "not_", "ceil", "floor", "trunc", "sym_float", "sym_int", "sym_max", "sym_min", "sym_not"}
    | {"sym_ite", "sym_sum"}
)
_BITS = 64
"""Longest whole number that a program computes sizes with."""


def op_name(target: object) -> str | None:
    """Return the name of a callable in stored programs, or None if they may not name it."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target) if _is_allowed(target) else None
    module = getattr(target, "__module__", "").removeprefix("_")
    name = getattr(target, "__name__", "")
    return f"{module}.{name}" if module in _MODULES and name in _NUMBER_FUNCTIONS else None


def find_op(name: str) -> Callable[..., object]:
    """Return the op registered as ``<namespace>.<name>.<overload>``, or a function on numbers.

    Raises:
        ArtifactError: it is not among those that a program may call.
    """
    namespace, _, rest = name.partition(".")
    if namespace in _MODULES and rest in _NUMBER_FUNCTIONS:
        return _bound_number(getattr(_MODULES[namespace], rest))
    packet, _, overload = rest.partition(".")
    is_op = namespace in {"aten", ops.LINEAR.namespace} and packet.isidentifier()
    found = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload, None) if is_op else None
    if not isinstance(found, torch._ops.OpOverload) or not _is_allowed(found):
        raise ArtifactError(f"the program calls '{name}', which is not an op that an artifact may name")
    return guard_op(found)


@functools.cache
def _is_allowed(op: torch._ops.OpOverload) -> bool:
    if op.namespace == ops.LINEAR.namespace:
        return True
    name = op._schema.name.removeprefix("aten::")
    arguments = {argument.name for argument in op._schema.arguments}
    is_known = name in _FURTHER or not _TAGS.isdisjoint(op.tags)
    is_safe = not any(part in name for part in _EXCLUDED) and not op._schema.is_mutable
    is_safe = is_safe and arguments.isdisjoint(_UNSAFE_ARGUMENTS)
    return op.namespace == "aten" and is_known and is_safe


def _bound_number(function: Callable[..., object]) -> Callable[..., object]:
    """Return a function on numbers that refuses other arguments, and results of more bits than a size has."""
    if function is operator.getitem:
        return function

    def bounded(*values: object) -> object:
        given = values[0] if function is torch.sym_sum and isinstance(values[0], list | tuple) else values
        whole = [value for value in given if type(value) is int]
        grows = function is operator.pow and len(whole) == 2 and whole[0].bit_length() * abs(whole[1]) > _BITS
        result = None if grows or any(isinstance(value, str | list | tuple) for value in given) else function(*values)
        if result is None or (type(result) is int and result.bit_length() > _BITS):
            raise ArtifactError(f"the program calls '{function.__name__}' with what gives no size")
        return result

    # Under the name of an operator, torch.fx would write the operator itself into the code that it generates.
    bounded.__name__ = f"bounded_{function.__name__}"
    return bounded
