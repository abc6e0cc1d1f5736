"""Ways to damage a file: values of JSON, fields of headers, pickles, and bytes; seals and hashes are made to agree."""

from __future__ import annotations

import io
import json
import math
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from campaigns import special_files
from lorac.formats._config_fields import EXPERTS, SEAL
from lorac.storage import artifact
from lorac.storage.tensor_file import DTYPES
from lorac.storage.tensor_hash import hash_contents
from lorac.trainer import checkpoints

SEALS = (SEAL, EXPERTS)
"""Entries of metadata that no other tool writes."""
RAW = "\0raw\0"
"""A text that begins so is written into JSON as it is, without quotes."""
TEXTS = (
    "", "x", "\0", "ü" * 50, "../x", "/etc/passwd", "os.system", "None", "all-linear", "all-blocks", ".*", "(", "[",
    "site", "((?:up){65000}){65000}", "(?:(?:(?:(?:a{90}){90}){90}){90})", "((.|..)+)+(?<![a-z])", "(a*)*b",
    "a" * 5000, "|".join(f"layer{i}" for i in range(20_000)), "(?:" * 2000 + "a" + ")" * 2000, "\\1", "(?P<idx>x)",
    "(?R)", "float32", "torch.float64", "complex64", "I64", "cuda:0", "meta", "cpu", "eager", "onnxruntime", "fused",
    "baked",
)  # fmt: skip
NUMBERS = (
    -1, 0, 1, 2, 3, 7, 255, 65_536, 10**6, 10**7, 2**31 - 1, 2**31, 2**53, 2**62, 2**63, 2**64, -(2**63),
    0.0, -0.5, 0.5, 1e-308, 1e308, 3.0, f"{RAW}1{'0' * 400}", f"{RAW}1e400", f"{RAW}NaN", f"{RAW}-Infinity",
)  # fmt: skip


def value(random: random.Random) -> Any:
    """Something that a field may not expect."""
    return random.choice(
        (
            lambda: random.choice(NUMBERS),
            lambda: random.choice(NUMBERS),
            lambda: random.choice(TEXTS),
            lambda: random.choice((None, True, False, [], {}, [[]], [None], {"": None}, [0, 1], ["site"])),
            lambda: [random.choice(NUMBERS)] * random.choice((1, 2, 3, 4, 1000)),
            lambda: [random.choice(TEXTS), random.choice(NUMBERS)],
            lambda: {random.choice(TEXTS): random.choice(NUMBERS)},
            lambda: {f"(x{i}|a*)*z": 2 for i in range(2000)},
            lambda: [f"name{i}" for i in range(random.choice((10, 100_000)))],
            lambda: RAW + "[" * random.choice((90, 150, 100_000)),
            lambda: RAW + "[" * 99 + "1" + "]" * 99,
            lambda: {"variant": random.choice(("lora", "chain", "boft", "x")), "config": {"r": random.choice(NUMBERS)}},
        )
    )()


def json_text(data: bytes, random: random.Random) -> bytes:
    """Return a JSON text of which one to three values, names or entries are others; some names are given twice."""
    try:
        root = json.loads(data)
    except ValueError:
        return octets(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        root = _edited(root, random)
    text = json.dumps(root)
    while (at := text.find('"\\u0000raw\\u0000')) >= 0:
        end = text.index('"', at + 1)
        text = text[:at] + text[at + 16 : end] + text[end + 1 :]
    if random.random() < 0.03:
        text = text.replace('{"', '{"r": 1, "r": 2, "', 1)
    return text.encode("utf-8", "surrogatepass")


def _edited(root: Any, random: random.Random) -> Any:
    """One change at a random depth."""
    owner, key, here = None, None, root
    while isinstance(here, dict | list) and here and random.random() < 0.85:
        keys = list(here) if isinstance(here, dict) else range(len(here))
        owner, key = here, random.choice(keys)
        here = owner[key]
    if owner is None:
        return value(random) if random.random() < 0.1 else _edited(root, random) if root else value(random)
    how = random.random()
    if how < 0.12:
        del owner[key]
    elif how < 0.22 and isinstance(owner, dict):
        owner[random.choice(TEXTS[:14])] = owner.pop(key) if random.random() < 0.5 else value(random)
    elif how < 0.3:
        other = random.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        owner[key], owner[other] = owner[other], owner[key]
    else:
        owner[key] = _alike(here, random) if how < 0.8 else value(random)
    return root


def _alike(here: Any, random: random.Random) -> Any:
    """Another value of the same type, which checks of types let pass."""
    if isinstance(here, bool):
        return not here
    if isinstance(here, int | float):
        return random.choice(
            [n for n in NUMBERS if isinstance(n, type(here) if random.random() < 0.7 else int | float)]
        )
    if isinstance(here, str):
        return random.choice(TEXTS)
    if isinstance(here, list) and here:
        return random.choice((here[:-1], here * 2, here[::-1], [_alike(item, random) for item in here]))
    if isinstance(here, dict) and here:
        return {key: _alike(item, random) for key, item in here.items()}
    return value(random)


def octets(data: bytes, random: random.Random) -> bytes:
    """Bytes of which some are flipped, gone, doubled or others."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 8))):
        at, length = random.randrange(len(changed) + 1), random.choice((1, 1, 4, 8, 64))
        how = random.randrange(5)
        if how == 0:
            changed[at : at + length] = bytes(random.randrange(256) for _ in range(length))
        elif how == 1:
            del changed[at : at + length]
        elif how == 2:
            changed[at:at] = changed[at : at + length]
        elif how == 3:
            changed[at : at + length] = random.choice((b"\0", b"\xff")) * length
        elif at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
    return bytes(changed if random.random() < 0.9 else changed[: random.randrange(len(changed) + 1)])


# ── safetensors ──────────────────────────────────────────────────────────────────────────────────────────────────────
def safetensors(data: bytes, random: random.Random) -> bytes:
    """Return a file whose header says something else, or whose tensors are others under a header that fits."""
    how = random.random()
    if how < 0.2:
        return octets(data, random)
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    if how < 0.35:
        text = json_text(text, random)
        length = random.choice((len(text), len(text), len(text) + 1, 2**63, 10**9))
        return length.to_bytes(8, "little") + text + rest
    header = json.loads(text)
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor(entry, rest) for name, entry in header.items()}
    told = [entry for entry in metadata if entry != "lorac_seal"]
    if how < 0.7 and told:
        entry = random.choice(told)
        metadata[entry] = json_text(metadata[entry].encode(), random).decode("utf-8", "replace")
    else:
        _change_tensors(tensors, random)
    return _file(tensors, metadata, random)


def _tensor(entry: dict[str, Any], rest: bytes) -> tuple[str, list[int], bytes]:
    begin, end = entry["data_offsets"]
    return entry["dtype"], entry["shape"], rest[begin:end]


def _change_tensors(tensors: dict[str, tuple[str, list[int], bytes]], random: random.Random) -> None:
    """Another dtype, shape or value, one tensor more or less, or under another name: the header will fit."""
    name = random.choice(list(tensors)) if tensors else ""
    dtype, shape, content = tensors.get(name, ("F32", [2], bytes(8)))
    how = random.randrange(7)
    if how == 0:
        dtype = random.choice(list(DTYPES))
    elif how == 1:
        shape = random.choice(([], [0], [1], shape[::-1], [*shape, 1], [1, *shape], [n + 1 for n in shape], [0, 2**40]))
    elif how == 2:
        content = random.choice((b"\xff", b"\0", b"\x7f", random.randbytes(8))) * (len(content) + 1)
    elif how == 3:
        tensors.pop(name, None)
        return
    elif how == 4:
        name = random.choice((name + "x", random.choice(TEXTS), name.replace("lora_A", "lora_B"), "a" * 2000))
    elif how == 5:
        tensors.pop(name, None)
        name = name.replace("site", random.choice(("sites", "site.0", "", "nowhere")))
    else:
        shape, dtype = [random.choice((1, 2, 3, 7, 12, 300)) for _ in range(random.randrange(6))], "F32"
    size = DTYPES[dtype].itemsize
    for length in shape:
        size *= length
    if size > 1 << 20:
        return
    tensors[name] = dtype, shape, (content * (size // max(len(content), 1) + 1) + bytes(size))[:size]


def _file(tensors: dict[str, tuple[str, list[int], bytes]], metadata: dict[str, str], random: random.Random) -> bytes:
    header: dict[str, Any] = {}
    data = b""
    for name, (dtype, shape, content) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        data += content
    if "lorac" not in metadata:
        metadata.pop("lorac_seal", None)
    if "lorac_seal" in metadata and random.random() < 0.95:
        values = {n: _value(dtype, shape, content) for n, (dtype, shape, content) in tensors.items()}
        metadata["lorac_seal"] = hash_contents(metadata.get("lorac", ""), values)
    text = json.dumps({"__metadata__": metadata, **header} if metadata else header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _value(dtype: str, shape: list[int], content: bytes) -> torch.Tensor:
    if not content:
        return torch.empty(shape, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(DTYPES[dtype]).reshape(shape)


# ── Pickles ──────────────────────────────────────────────────────────────────────────────────────────────────────────
STRANGE: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda t: t.flatten()[:1].expand(10**9),
    lambda t: torch.ones(1).expand(50_000, 50_000),
    lambda t: t.to("meta"),
    lambda t: t.to_sparse(),
    lambda t: t.to(torch.complex64),
    lambda t: t.long(),
    lambda t: t.half(),
    lambda t: t.t() if t.ndim == 2 else t[None],
    lambda t: t.flatten(),
    lambda t: [t],
    lambda t: t.bool(),
    lambda t: t * torch.nan,
    lambda t: torch.zeros(1 << 20)[: t.numel()].reshape(t.shape),
    torch.nn.Parameter,
    lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    lambda t: torch.nested.nested_tensor([t, t]),
    lambda t: {"x": t},
    lambda t: 3,
    lambda t: None,
    lambda t: torch.empty(0),
)


def pickled(data: bytes, random: random.Random) -> bytes:
    """Return a .bin file of which bytes, or tensors, are others; or a bomb."""
    how = random.random()
    if how < 0.3:
        return octets(data, random)
    if how < 0.34:
        return _bomb(random)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    holder = {"": loaded} if isinstance(loaded, torch.Tensor) else loaded  # a file may hold one tensor alone
    tensors = holder.get("model", holder)
    name = random.choice(list(tensors))
    if how < 0.8:
        tensors[name] = random.choice(STRANGE if tensors[name].is_floating_point() else STRANGE[:10])(tensors[name])
    elif how < 0.9:
        tensors[random.choice((*TEXTS, 3, None))] = tensors.pop(name)
    else:
        return pickle.dumps(loaded)
    written = io.BytesIO()
    torch.save(holder.get("", holder), written, _use_new_zipfile_serialization=random.random() < 0.95)
    return written.getvalue()


def _bomb(random: random.Random) -> bytes:
    """Return a zip file that unpacks to 300 MB, or holds very many files, or a pickle without an end."""
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        how = random.randrange(3)
        if how == 0:
            with archive.open("archive/data.pkl", "w") as member:
                for _ in range(300):
                    member.write(b"\x80\x02" + b"]" * (1 << 20))
        elif how == 1:
            for index in range(20_000):
                archive.writestr(f"archive/data/{index}", b"")
        else:
            archive.writestr("archive/data.pkl", b"\x80\x02}" + b"]0" * 2_000_000 + b".")
    return written.getvalue()


# ── Artifacts ────────────────────────────────────────────────────────────────────────────────────────────────────────
MANIFESTS = {"artifact": artifact.MANIFEST, "training": checkpoints.MANIFEST}
"""Kind of a folder -> its manifest, which has hashes of its files."""


def damage_sealed(manifest: Path, random: random.Random) -> None:
    """Damage a file of a folder with a manifest, and make the manifest's hashes agree with it, mostly."""
    folder = manifest.parent
    if random.random() < 0.5:
        manifest.write_bytes(json_text(manifest.read_bytes(), random))
    else:
        target = random.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path != manifest])
        by_suffix = {".json": json_text, ".safetensors": safetensors, ".onnx": nodes}
        target.write_bytes(by_suffix.get(target.suffix, octets)(target.read_bytes(), random))
        told = json.loads(manifest.read_bytes())
        told["files"] = {
            name: entry for name, entry in artifact.describe_files(folder).items() if name != manifest.name
        }
        manifest.write_text(json.dumps(told))
    try:
        agreed = json.dumps(artifact.seal_manifest(json.loads(manifest.read_bytes())))
    except (ValueError, RecursionError, AttributeError):  # it is no object any more
        return
    if random.random() < 0.97:
        manifest.write_text(agreed)


OPS = (
    "Add", "MatMul", "Gemm", "Reshape", "Transpose", "Concat", "Slice", "Gather", "Expand", "Tile", "Pad", "Range",
    "Softmax", "TopK", "Split", "Squeeze", "Where", "Cast", "ScatterND", "Conv", "LSTM", "Einsum", "Resize",
)  # fmt: skip
"""Ops of ONNX that a node may become."""


def nodes(data: bytes, random: random.Random) -> bytes:
    """Return an ONNX model some of whose nodes, constants and inputs do not go together; at times only its bytes."""
    import onnx

    if random.random() < 0.2:
        return octets(data, random)
    model = onnx.ModelProto.FromString(data)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        random.choice((_node, _node, _node, _attribute, _constant, _shape))(model.graph, random)
    return model.SerializeToString()


def _node(graph: Any, random: random.Random) -> None:
    node, values = random.choice(graph.node), [name for node in graph.node for name in (*node.input, *node.output)]
    place = random.randrange(max(1, len(node.input)))
    change = random.choice(("op", "input", "drop", "more", "output", "twice"))
    if change == "op":
        node.op_type, node.domain = random.choice(OPS), random.choice(("", "", node.domain, "com.microsoft"))
    elif change == "input" and node.input:
        node.input[place] = random.choice((*values, "", "nowhere"))
    elif change == "drop" and node.input:
        del node.input[place]
    elif change == "more":
        node.input.extend(random.choices(values, k=random.choice((1, 3, 40))))
    elif change == "output" and node.output:
        del node.output[random.randrange(len(node.output)) :]
    else:
        graph.node.append(node)


def _attribute(graph: Any, random: random.Random) -> None:
    attributes = [attribute for node in graph.node for attribute in node.attribute]
    if not attributes:
        return
    chosen = random.choice(attributes)
    number = random.choice([one for one in NUMBERS if type(one) is int and -(1 << 63) <= one < 1 << 63])
    if chosen.ints:
        chosen.ints[random.randrange(len(chosen.ints))] = number
    elif chosen.HasField("i"):
        chosen.i = number
    else:
        chosen.f = random.choice((math.nan, math.inf, -1.0, 1e38))


def _constant(graph: Any, random: random.Random) -> None:
    if not graph.initializer:
        return
    chosen = random.choice(graph.initializer)
    if random.random() < 0.3:
        chosen.data_type = random.randrange(24)
    elif random.random() < 0.5 and chosen.dims:
        chosen.dims[random.randrange(len(chosen.dims))] = random.choice((-1, 0, 1, 3, 1 << 20, 1 << 40, (1 << 63) - 1))
    elif len(chosen.raw_data) >= 8:
        chosen.raw_data = random.choice((random.randbytes(len(chosen.raw_data)), chosen.raw_data[:-3], b"\xff" * 8))


def _shape(graph: Any, random: random.Random) -> None:
    tensor = random.choice([*graph.input, *graph.output]).type.tensor_type
    if random.random() < 0.5:
        tensor.elem_type = random.randrange(24)
    elif tensor.shape.dim:
        random.choice(tensor.shape.dim).dim_value = random.choice((-1, 0, 1, 7, 1 << 40))


def damage(kind: str, place: Path, random: random.Random) -> None:
    """Damage a sound file, or a file of a folder, of a kind."""
    if kind in MANIFESTS:
        damage_sealed(place / MANIFESTS[kind], random)
        return
    target = random.choice([place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file()))
    if place.is_dir() and random.random() < 0.05:
        special_files.put(target, random)
        return
    by_suffix = {".json": json_text, ".safetensors": safetensors, ".bin": pickled, ".pt": pickled}
    how = checkpoint if kind == "checkpoint" and random.random() < 0.6 else by_suffix.get(target.suffix, octets)
    target.write_bytes(how(target.read_bytes(), random))
    if place.is_dir() and random.random() < 0.95:
        unseal(place)


def checkpoint(data: bytes, random: random.Random) -> bytes:
    """Return a state dict whose record says something else, and has no seal."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    metadata = header.pop("__metadata__", {})
    tensors = {name: _tensor(entry, rest) for name, entry in header.items()}
    name = next(name for name in tensors if name.endswith("._extra_state"))
    record = {key: value for key, value in json.loads(tensors[name][2]).items() if key != "seal"}
    text = json_text(json.dumps(record).encode(), random)
    tensors[name] = "U8", [len(text)], text
    return _file(tensors, metadata, random)


def unseal(folder: Path) -> None:
    """Take lorac's seals off a folder, as a tool does that knows nothing of them."""
    for path in folder.rglob("*.safetensors"):
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        try:
            header = json.loads(data[8 : 8 + length])
            header["__metadata__"] = {k: v for k, v in header["__metadata__"].items() if k not in SEALS}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # it is damaged already
            continue
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
