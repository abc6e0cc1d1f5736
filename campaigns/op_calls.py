"""Calls every op that a stranger's stored program may name, with hostile operands.

An operand is drawn by its type in the op's schema: negative and huge sizes, tensors without values, of other types and
shapes than their neighbours, not contiguous, None. Half of the calls change a sound one, ``SOUND``. Each is called as a
program of one node, whose sizes are checked first, or by itself, as a stored reduction calls it. Errors are right;
found is what ends the process or takes long.
"""

from __future__ import annotations

import functools
import math
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

import lorac
from lorac.storage.bounded_run import BoundedRun
from lorac.storage.op_guards import guard_op
from lorac.storage.op_names import is_checked

CALLS = 250
"""Calls of a case."""
PROGRAMS = 0.25
"""How often a call is a program's, which takes longer."""
OPERATIONS, BYTES = 1e9, 1 << 26
"""Limits of a program: about a second."""
LONGEST = 5.0
"""Seconds of a call's processor time; one by itself may fill memory first."""
LATEST = "call.txt"
"""The file that names the call in progress."""
NUMBERS = (
    -(1 << 63),
    -(1 << 31),
    -5,
    -2,
    -1,
    0,
    1,
    2,
    3,
    4,
    7,
    (1 << 31) - 1,
    1 << 31,
    1 << 33,
    1 << 62,
    (1 << 63) - 1,
)
SMALL = (-1, 0, 1, 2, 3)
FLOATS = (0.0, 1.0, -1.0, 0.5, 2.0, math.nan, math.inf, -math.inf, 1e308, -0.0)
SHAPES = (
    (), (0,), (1,), (3,), (4,), (2, 3), (3, 4), (4, 4), (0, 3), (3, 0), (2, 3, 4), (1, 2, 4, 4), (2, 4, 3, 3),
    (1, 2, 3, 4, 4), (6, 1), (1, 1, 64), (128,),
)  # fmt: skip
DTYPES = (
    *[torch.float32] * 5, *[torch.int64] * 4, torch.float64, *[torch.int32] * 2, torch.bool, torch.uint8, torch.int16,
    torch.int8, torch.float16, torch.bfloat16, torch.complex64,
)  # fmt: skip
TEXTS = (
    "", "none", "tanh", "mean", "sum", "prod", "amax", "amin", "constant", "reflect", "replicate", "circular", "ij",
    "xy", "trunc", "floor", "max", "linear", "bij,bjk->bik", "i...->...", "ii", "left", "right", "fro", "nuc", "\0",
)  # fmt: skip


@functools.cache
def checked_ops() -> tuple[torch._ops.OpOverload, ...]:
    """Return the ops that a program may name, sorted."""
    found = set()
    for full in torch._C._dispatch_get_all_op_names():
        namespace, _, rest = full.partition("::")
        packet, _, overload = rest.partition(".")
        op = getattr(getattr(getattr(torch.ops, namespace), packet, None), overload or "default", None)
        if namespace in {"aten", "lorac"} and isinstance(op, torch._ops.OpOverload) and is_checked(op):
            found.add(op)
    return tuple(sorted(found, key=str))


def run(chance: random.Random, folder: Path) -> None:
    """Make the calls of one case; the file ``call.txt`` of the folder names the latest one."""
    torch.manual_seed(chance.randrange(1 << 31))
    latest = os.open(folder / LATEST, os.O_WRONLY | os.O_CREAT)
    try:
        for number in range(CALLS):
            op, args, kwargs = _draw_call(chance)
            is_program = chance.random() < PROGRAMS
            text = f"{number} {'program' if is_program else 'alone'} {op} {_describe(args)} {_describe(kwargs)}"
            os.pwrite(latest, text[:2000].ljust(2000).encode("utf-8", "replace"), 0)
            begun = time.process_time()
            _call(op, args, kwargs, is_program)
            if (seconds := time.process_time() - begun) > LONGEST:
                raise RuntimeError(f"{seconds:.0f} s: {text}")
    finally:
        os.close(latest)


def import_lazily() -> None:
    """Import the parts of torch that calls need, before processes are forked."""
    for op, make in _sound_calls()[::8]:
        _call(op, make(), {}, is_program=True)


def _call(op: torch._ops.OpOverload, args: list[Any], kwargs: dict[str, Any], is_program: bool) -> None:
    guarded = guard_op(op)
    try:
        if not is_program:
            guarded(*args, **kwargs)
            return
        tensors: list[Tensor] = []
        graph = fx.Graph()

        def to_node(value: Any) -> Any:
            if isinstance(value, Tensor):
                tensors.append(value)
                return graph.placeholder(f"x{len(tensors)}")
            return [*map(to_node, value)] if isinstance(value, list) else value

        operands = to_node(args), {name: to_node(value) for name, value in kwargs.items()}
        graph.output((graph.create_node("call_function", guarded, *map(_frozen, operands)),))
        bounded = BoundedRun(fx.GraphModule(nn.Module(), graph), [True] * len(tensors), is_trusted=False)
        with lorac.budget(bytes=BYTES, operations=OPERATIONS):
            bounded(tensors)
    except (Exception, Warning):  # whatever torch refuses, it refuses by an exception
        return


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# ── Operands ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _draw_call(chance: random.Random) -> tuple[torch._ops.OpOverload, list[Any], dict[str, Any]]:
    if chance.random() < 0.5:
        return _change_sound(chance)
    op = chance.choice(checked_ops())
    args, kwargs = [], {}
    for argument in op._schema.arguments:
        if argument.kwarg_only:
            if chance.random() < 0.3 and argument.name not in {"layout", "device", "pin_memory", "generator"}:
                kwargs[argument.name] = _draw(argument.type, argument.name, chance)
        elif argument.has_default_value() and chance.random() < 0.35:
            break
        else:
            args.append(_draw(argument.type, argument.name, chance))
    return op, args, kwargs


def _change_sound(chance: random.Random) -> tuple[torch._ops.OpOverload, list[Any], dict[str, Any]]:
    """Return a sound call, of which one to three operands are others."""
    op, make = chance.choice(_sound_calls())
    args = make()
    types = [(argument.type, argument.name) for argument in op._schema.arguments]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        at = chance.randrange(len(types))
        if at >= len(args):
            continue
        here = args[at]
        if isinstance(here, Tensor) and chance.random() < 0.7:
            args[at] = _change_tensor(here, chance)
        elif isinstance(here, list) and here and chance.random() < 0.7:
            inner = chance.randrange(len(here))
            here[inner] = (
                _change_tensor(here[inner], chance) if isinstance(here[inner], Tensor) else chance.choice(NUMBERS)
            )
            args[at] = here if chance.random() < 0.8 else here[:-1]
        else:
            args[at] = _draw(*types[at], chance)
    return op, args, {}


def _change_tensor(tensor: Tensor, chance: random.Random) -> Tensor | None:
    """Return a tensor of another shape, type or layout, or with other values."""
    ways: tuple[Callable[[], Tensor | None], ...] = (
        lambda: tensor.new_zeros([chance.choice((0, 1, size, size + 1, 2 * size)) for size in tensor.shape]),
        lambda: tensor[..., :-1] if tensor.dim() else tensor.reshape(1),
        lambda: tensor.transpose(0, -1) if tensor.dim() else tensor,
        lambda: tensor.reshape(-1),
        lambda: tensor[None],
        lambda: tensor.to(chance.choice(DTYPES)),
        lambda: tensor[:1].expand(5, *tensor.shape[1:]) if tensor.dim() else tensor.expand(5),
        lambda: torch.full_like(tensor, chance.choice(NUMBERS if tensor.dtype == torch.int64 else SMALL)),
        lambda: _draw_tensor(chance),
        lambda: None,
    )
    try:
        return chance.choice(ways)()
    except (RuntimeError, IndexError, ValueError):
        return tensor


def _draw_tensor(chance: random.Random) -> Tensor:
    shape, dtype = chance.choice(SHAPES), chance.choice(DTYPES)
    if dtype.is_floating_point or dtype.is_complex:
        filled = torch.full(shape, chance.choice((math.nan, math.inf, 1e30, -1e30)))
        tensor = (torch.randn(shape) if chance.random() < 0.8 else filled).to(dtype)
    else:
        values = NUMBERS if chance.random() < 0.5 else SMALL
        drawn = torch.tensor([chance.choice(values) for _ in range(math.prod(shape))], dtype=torch.int64).reshape(shape)
        least, most = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        tensor = drawn.clamp(least, most).to(dtype)
    if chance.random() < 0.15 and tensor.ndim > 1:
        tensor = tensor.transpose(0, 1)
    if chance.random() < 0.1 and tensor.ndim and len(tensor):
        tensor = tensor[:1].expand(3, *tensor.shape[1:])
    return tensor


def _draw(kind: Any, name: str, chance: random.Random) -> Any:
    text = str(kind)
    if text.startswith("Optional["):
        return None if chance.random() < 0.4 else _draw(kind.getElementType(), name, chance)
    if text in {"List[Tensor]", "List[Optional[Tensor]]"}:
        return [_draw_tensor(chance) for _ in range(chance.choice((0, 1, 2, 2, 3, 4, 8, 9)))]
    if text.startswith("List[") and not text.startswith(("List[int]", "List[bool]", "List[float]")):
        return [_draw(kind.getElementType(), name, chance) for _ in range(2)]
    drawn: Mapping[str, Callable[[], Any]] = {
        "Tensor": lambda: _draw_tensor(chance),
        "int": lambda: _draw_number(name, chance),
        "float": lambda: chance.choice(FLOATS),
        "number": lambda: chance.choice((*NUMBERS, *FLOATS)),
        "bool": lambda: chance.random() < 0.5,
        "str": lambda: chance.choice(TEXTS),
        "Device": lambda: torch.device(chance.choice(("cpu", "meta"))),
        "List[int]": lambda: [chance.choice(NUMBERS if chance.random() < 0.35 else SMALL) for _ in _some(chance)],
        "List[bool]": lambda: [chance.random() < 0.5 for _ in _some(chance)],
        "List[float]": lambda: [chance.choice(FLOATS) for _ in _some(chance)],
    }
    return drawn.get(text.partition(" ")[0], lambda: None)()


def _draw_number(name: str, chance: random.Random) -> Any:
    if name == "dtype":
        return chance.choice(DTYPES)
    return None if name in {"layout", "memory_format"} else chance.choice(NUMBERS if chance.random() < 0.6 else SMALL)


def _some(chance: random.Random) -> range:
    return range(chance.choice((0, 1, 1, 2, 2, 3, 3, 4, 5, 6)))


def _describe(value: Any) -> Any:
    if isinstance(value, Tensor):
        few = value.reshape(-1)[:6].tolist() if not value.dtype.is_floating_point and value.numel() else ""
        return f"Tensor({tuple(value.shape)}, {str(value.dtype)[6:]}, {value.stride()}, {few})"
    if isinstance(value, list):
        return [*map(_describe, value)]
    return {name: _describe(item) for name, item in value.items()} if isinstance(value, dict) else value


# ── Sound calls ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def _ids(*values: int) -> Tensor:
    return torch.tensor(values)


SOUND: Mapping[str, Callable[[], list[Any]]] = {
    "linear": lambda: [_noise(2, 3), _noise(4, 3), _noise(4)],
    "addmm": lambda: [_noise(4), _noise(2, 3), _noise(3, 4)],
    "bmm": lambda: [_noise(2, 3, 4), _noise(2, 4, 5)],
    "baddbmm": lambda: [_noise(2, 3, 5), _noise(2, 3, 4), _noise(2, 4, 5)],
    "matmul": lambda: [_noise(2, 1, 3, 4), _noise(4, 5)],
    "mv": lambda: [_noise(3, 4), _noise(4)],
    "einsum": lambda: ["bij,bjk->bik", [_noise(2, 3, 4), _noise(2, 4, 5)]],
    "convolution": lambda: [
        _noise(1, 4, 6, 6), _noise(6, 2, 3, 3), _noise(6), [1, 1], [1, 1], [1, 1], False, [0, 0], 2
    ],
    "conv1d": lambda: [_noise(1, 4, 9), _noise(6, 2, 3), _noise(6), [1], [1], [1], 2],
    "conv2d.default": lambda: [_noise(1, 4, 6, 6), _noise(6, 2, 3, 3), _noise(6), [2, 1], [1, 0], [1, 2], 2],
    "conv3d.default": lambda: [_noise(1, 2, 4, 4, 4), _noise(3, 2, 2, 2, 2), _noise(3), [1] * 3, [0] * 3, [1] * 3, 1],
    "conv_transpose1d": lambda: [_noise(1, 4, 9), _noise(4, 3, 3), _noise(6), [2], [1], [1], 2, [1]],
    "conv_transpose2d.input": lambda: [
        _noise(1, 4, 5, 5), _noise(4, 3, 3, 3), _noise(6), [2, 2], [1, 1], [1, 1], 2, [1, 1]
    ],
    "embedding": lambda: [_noise(5, 3), _ids(0, 4, 2), -1, False, False],
    "embedding_bag": lambda: [_noise(5, 8), _ids(0, 1, 2, 3), _ids(0, 2, 2, 4), False, 1, False, None, True, -1],
    "scaled_dot_product_attention": lambda: [
        _noise(1, 2, 3, 8), _noise(1, 2, 5, 8), _noise(1, 2, 5, 8), _noise(1, 1, 3, 5), 0.0, False
    ],
    "_native_batch_norm_legit.no_stats": lambda: [_noise(2, 3, 4), _noise(3), _noise(3), True, 0.1, 1e-5],
    "_native_batch_norm_legit_no_training": lambda: [
        _noise(2, 3, 4), _noise(3), _noise(3), _noise(3), _noise(3).abs(), 0.1, 1e-5
    ],
    "batch_norm": lambda: [_noise(2, 3, 4), _noise(3), _noise(3), _noise(3), _noise(3).abs(), False, 0.1, 1e-5, False],
    "layer_norm": lambda: [_noise(2, 3, 4), [3, 4], _noise(3, 4), _noise(3, 4), 1e-5, False],
    "native_layer_norm": lambda: [_noise(2, 3, 4), [4], _noise(4), _noise(4), 1e-5],
    "group_norm": lambda: [_noise(2, 6, 4), 3, _noise(6), _noise(6), 1e-5, False],
    "native_group_norm": lambda: [_noise(2, 6, 4), _noise(6), _noise(6), 2, 6, 4, 3, 1e-5],
    "rms_norm": lambda: [_noise(2, 3, 4), [4], _noise(4), 1e-5],
    "_weight_norm": lambda: [_noise(5, 4), _noise(5, 1), 0],
    "lstm.input": lambda: [
        _noise(2, 5, 8), [torch.zeros(1, 2, 16)] * 2, [_noise(64, 8), _noise(64, 16)], False, 1, 0.0, False, False, True
    ],
    "max_pool2d": lambda: [_noise(1, 2, 6, 6), [2, 2], [2, 2], [1, 1], [1, 1], True],
    "max_pool2d_with_indices": lambda: [_noise(1, 2, 6, 6), [3, 3], [2, 2], [1, 1], [1, 1], True],
    "max_pool3d_with_indices": lambda: [_noise(1, 2, 4, 4, 4), [2] * 3, [2] * 3, [0] * 3, [1] * 3, False],
    "avg_pool1d": lambda: [_noise(1, 2, 6), [2], [2], [1], False, True],
    "avg_pool2d": lambda: [_noise(1, 2, 6, 6), [2, 2], [2, 2], [1, 1], True, False, 3],
    "avg_pool3d": lambda: [_noise(1, 2, 4, 4, 4), [2] * 3, [2] * 3, [1] * 3, False, True, None],
    "_adaptive_avg_pool2d": lambda: [_noise(1, 2, 6, 6), [3, 2]],
    "_adaptive_avg_pool3d": lambda: [_noise(1, 2, 4, 4, 4), [3, 2, 1]],
    "adaptive_max_pool2d": lambda: [_noise(1, 2, 6, 6), [3, 2]],
    "grid_sampler_2d": lambda: [_noise(1, 2, 5, 6), _noise(1, 3, 4, 2), 0, 1, False],
    "grid_sampler_3d": lambda: [_noise(1, 2, 4, 5, 6), _noise(1, 2, 3, 4, 3), 0, 1, False],
    "upsample_nearest2d.vec": lambda: [_noise(1, 2, 3, 4), None, [2.0, 1.5]],
    "upsample_bilinear2d.vec": lambda: [_noise(1, 2, 3, 4), [6, 5], False, None],
    "upsample_bicubic2d.vec": lambda: [_noise(1, 2, 3, 4), [6, 5], False, None],
    "_upsample_bilinear2d_aa": lambda: [_noise(1, 2, 8, 8), [3, 2], False, None, None],
    "im2col": lambda: [_noise(1, 2, 6, 6), [2, 2], [1, 1], [1, 1], [2, 2]],
    "col2im": lambda: [_noise(1, 8, 16), [5, 5], [2, 2], [1, 1], [0, 0], [1, 1]],
    "index.Tensor": lambda: [_noise(3, 4, 5), [_ids(0, 2), None, _ids(1, 4)]],
    "index_put": lambda: [_noise(3, 4), [_ids(0, 2), _ids(1, 3)], _noise(2), True],
    "index_select": lambda: [_noise(3, 4), 1, _ids(0, 3)],
    "index_copy": lambda: [_noise(3, 4), 0, _ids(0, 2), _noise(2, 4)],
    "index_add": lambda: [_noise(3, 4), 0, _ids(0, 2), _noise(2, 4)],
    "gather": lambda: [_noise(3, 4), 1, torch.zeros(3, 2, dtype=torch.int64)],
    "scatter.src": lambda: [_noise(3, 4), 1, torch.zeros(3, 2, dtype=torch.int64), _noise(3, 2)],
    "scatter_add": lambda: [_noise(3, 4), 1, torch.zeros(3, 2, dtype=torch.int64), _noise(3, 2)],
    "scatter_reduce.two": lambda: [_noise(3, 4), 1, torch.zeros(3, 2, dtype=torch.int64), _noise(3, 2), "amax"],
    "masked_scatter": lambda: [_noise(3, 4), _noise(3, 4) > 0, _noise(12)],
    "select_scatter": lambda: [_noise(3, 4), _noise(4), 0, 1],
    "slice_scatter": lambda: [_noise(5, 4), _noise(2, 4), 0, 1, 5, 2],
    "as_strided": lambda: [_noise(4, 4), [2, 2], [4, 1], 3],
    "slice.Tensor": lambda: [_noise(5, 4), 0, 1, 4, 2],
    "cat": lambda: [[_noise(2, 3), _noise(4, 3)], 0],
    "split_with_sizes": lambda: [_noise(6, 2), [1, 2, 3], 0],
    "constant_pad_nd": lambda: [_noise(2, 3, 4), [1, -1, 0, 2], 0.5],
    "reflection_pad2d": lambda: [_noise(1, 2, 4, 4), [1, 2, 3, 0]],
    "replication_pad2d": lambda: [_noise(1, 2, 4, 4), [1, 2, 3, 0]],
    "_fft_c2c": lambda: [_noise(2, 3, 4).to(torch.complex64), [1, 2], 0, True],
    "_fft_r2c": lambda: [_noise(2, 3, 4), [1, 2], 0, True],
    "_fft_c2r": lambda: [_noise(2, 3, 4).to(torch.complex64), [1, 2], 0, 6],
    "topk": lambda: [_noise(3, 4), 2, 1, True, True],
    "sort": lambda: [_noise(3, 4), 1, True],
    "cumsum": lambda: [_noise(3, 4), 1],
    "_cdist_forward": lambda: [_noise(2, 3, 4), _noise(2, 5, 4), 2.0, None],
    "_pdist_forward": lambda: [_noise(3, 4), 2.0],
    "linalg_solve_triangular": lambda: [_noise(3, 3), _noise(3, 2)],
    "div.Tensor_mode": lambda: [_ids(1, 2, 3), _ids(2, -1, 1)],
    "floor_divide": lambda: [_ids(1, 2, 3), _ids(2, -1, 1)],
    "remainder.Tensor": lambda: [_ids(1, 2, 3), _ids(2, -1, 1)],
    "repeat_interleave.self_Tensor": lambda: [_noise(3, 2), _ids(1, 0, 2), 0],
    "repeat_interleave.Tensor": lambda: [_ids(1, 0, 2), 3],
    "one_hot": lambda: [_ids(1, 0, 2), 3],
    "bucketize.Tensor": lambda: [_noise(3), torch.tensor([0.0, 1.0, 2.0])],
    "searchsorted.Tensor": lambda: [torch.tensor([0.0, 1.0, 2.0]), _noise(3)],
    "unfold": lambda: [_noise(2, 6), 1, 2, 2],
    "diagonal": lambda: [_noise(3, 4), 1, 0, 1],
    "repeat": lambda: [_noise(2, 3), [2, 1, 3]],
    "expand": lambda: [_noise(1, 3), [4, 3]],
    "roll": lambda: [_noise(2, 3), [1, 2], [0, 1]],
    "pixel_shuffle": lambda: [_noise(1, 8, 2, 2), 2],
}  # fmt: skip
"""Op, or overload -> operands that fit, of kernels that have checks of their own; in the order of its schema."""


@functools.cache
def _sound_calls() -> list[tuple[torch._ops.OpOverload, Callable[[], list[Any]]]]:
    calls = []
    for op in checked_ops():
        make = SOUND.get(f"{op._opname}.{op._overloadname}", SOUND.get(op._opname))
        if make is not None:
            calls.append((op, make))
    return calls
