"""What a checkpoint says in JSON: a state's plain values, and which file has which block of which tensor.

A data file is in the safetensors format, https://huggingface.co/docs/safetensors (a JSON header, then raw numbers).
Nothing that is read is believed before it was checked, and none of it is a pickle.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SUFFIX = ".safetensors"
"""Of data files."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""What safetensors calls them."""


@dataclasses.dataclass(frozen=True)
class Part:
    """This rank's block of a tensor that the ranks hold together; their blocks fill it without overlap."""

    tensor: torch.Tensor
    """The block."""
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor, a number a dimension."""
    size: tuple[int, ...]
    """Shape of the whole tensor."""


_MOST_NUMBERS = 2**48  # torch counts in 64 bits


class Sink(Protocol):
    """What a file's content is written into."""

    def write(self, data: bytes | memoryview) -> int:
        """Takes the next bytes."""
        ...


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A block of a tensor and the file that holds it, there under the tensor's name."""

    file: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A whole tensor as the checkpoint has it."""

    dtype: torch.dtype
    size: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; ``parse_entries`` reads it back."""
        return {
            "dtype": NAMES[self.dtype],
            "size": list(self.size),
            "chunks": [
                {"file": chunk.file, "offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                for chunk in self.chunks
            ],
        }


# Plain values and the places of tensors among them, as JSON

_TENSOR, _TUPLE, _PAIRS = "!tensor", "!tuple", "!pairs"


def encode(state: Any) -> tuple[Any, dict[str, Tensor | Part]]:
    """Splits a state into what JSON can say, exactly, and its tensors by name.

    Args:
        state: anything made of tensors, ``Part``, numbers, strings, None, lists, tuples and dicts.

    Returns:
        JSON-able values in which ``{"!tensor": name}`` stands for a tensor, ``{"!tuple": […]}`` for a tuple and
        ``{"!pairs": [[key, value], …]}`` for a dict whose keys are not all plain strings; and name → tensor.

    Raises:
        ValueError: something else is in it, or two tensors would get the same name.
    """
    tensors: dict[str, Tensor | Part] = {}

    def walk(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, (Tensor, Part)):
            name = "/".join(path)
            if name in tensors or name == "__metadata__":
                raise ValueError(f"state: got two tensors of the name {name!r}, or a reserved one")
            dtype = (value.tensor if isinstance(value, Part) else value).dtype
            if dtype not in NAMES:
                raise ValueError(f"state: got a tensor of {dtype} ({name}), expected one of {', '.join(DTYPES)}")
            tensors[name] = value
            return {_TENSOR: name}
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, Mapping):
            if all(isinstance(key, str) and not key.startswith("!") for key in value):
                return {key: walk(item, (*path, key)) for key, item in value.items()}
            return {_PAIRS: [[walk(key, path), walk(item, (*path, str(key)))] for key, item in value.items()]}
        if isinstance(value, (list, tuple)):
            items = [walk(item, (*path, str(number))) for number, item in enumerate(value)]
            return items if isinstance(value, list) else {_TUPLE: items}
        raise ValueError(f"state: got a {type(value).__name__} ({'/'.join(path)}), expected tensors and plain values")

    return walk(state, ()), tensors


def decode(values: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that ``encode`` took apart.

    Raises:
        ValueError: ``values`` is not made by ``encode`` for these tensors.
    """
    if isinstance(values, list):
        return [decode(item, tensors) for item in values]
    if not isinstance(values, dict):
        return values
    tags = [key for key in values if key.startswith("!")]
    if not tags:
        return {key: decode(item, tensors) for key, item in values.items()}
    ((tag, content),) = values.items() if len(values) == 1 else ((None, None),)
    if tag == _TENSOR and isinstance(content, str) and content in tensors:
        return tensors[content]
    if tag == _TUPLE and isinstance(content, list):
        return tuple(decode(item, tensors) for item in content)
    if tag == _PAIRS and isinstance(content, list) and all(isinstance(p, list) and len(p) == 2 for p in content):
        pairs = [(decode(key, tensors), decode(item, tensors)) for key, item in content]
        if all(_is_key(key) for key, _ in pairs):
            return dict(pairs)
    raise ValueError(f"got {str(values)[:80]}, expected a tensor's name, a tuple or pairs")


def _is_key(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_key, value))
    return value is None or isinstance(value, (bool, int, float, str))


def parse_entries(content: Any, files: Iterable[str]) -> dict[str, Entry]:
    """Checks and takes over where the tensors lie.

    Args:
        content: name → what ``Entry.to_json`` made, read from a file that nobody vouches for.
        files: the checkpoint's files.

    Raises:
        ValueError: it is of another form, names another file, or its blocks do not fill each tensor exactly.
    """
    known = set(files)
    if not isinstance(content, dict):
        raise ValueError("got no list of tensors")
    return {name: _parse_entry(name, entry, known) for name, entry in content.items()}


def _parse_entry(name: str, entry: Any, files: set[str]) -> Entry:
    try:
        dtype, size = DTYPES[entry["dtype"]], _sizes(entry["size"])
        chunks = tuple(
            Chunk(chunk["file"], _sizes(chunk["offsets"]), _sizes(chunk["sizes"])) for chunk in entry["chunks"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: not a tensor's entry ({error!r})") from None
    if math.prod(max(1, extent) for extent in size) > _MOST_NUMBERS:
        raise ValueError(f"{name}: {size} is no size of a tensor")
    for chunk in chunks:
        if not isinstance(chunk.file, str) or chunk.file not in files or not chunk.file.endswith(SUFFIX):
            raise ValueError(f"{name}: {chunk.file!r} is no data file of this checkpoint")
        inside = len(chunk.offsets) == len(chunk.sizes) == len(size) and all(
            offset + extent <= whole for offset, extent, whole in zip(chunk.offsets, chunk.sizes, size)
        )
        if not inside:
            raise ValueError(f"{name}: a block at {chunk.offsets} of {chunk.sizes} is not within {size}")
    if not chunks or sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(size) or _overlap(chunks):
        raise ValueError(f"{name}: its blocks do not fill {size}")
    return Entry(dtype, size, chunks)


def _sizes(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(value) is int and value >= 0 for value in values):
        raise ValueError(f"{str(values)[:40]}")
    return tuple(values)


def _overlap(chunks: tuple[Chunk, ...]) -> bool:
    """Whether two blocks have an element in common; compares only those that meet in one dimension."""
    dimensions = range(len(chunks[0].offsets))
    along = max(dimensions, key=lambda dimension: len({chunk.offsets[dimension] for chunk in chunks}), default=None)
    if along is None:
        return len(chunks) > 1
    ordered = sorted(chunks, key=lambda chunk: chunk.offsets[along])
    for number, one in enumerate(ordered):
        for other in ordered[number + 1 :]:
            if other.offsets[along] >= one.offsets[along] + one.sizes[along]:
                break
            meeting = zip(one.offsets, one.sizes, other.offsets, other.sizes)
            if all(a < b + n and b < a + m for a, m, b, n in meeting):
                return True
    return False


def check_files(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Opens every data file and compares its header with the entries; no tensor is read.

    Raises:
        ValueError: a file is not in the safetensors format, or holds something else; the message begins with its name.
    """
    for file, wanted in _by_file(entries).items():
        try:
            with safe_open(str(folder / file), framework="pt") as opened:
                for name, chunk in wanted:
                    found = opened.get_slice(name)
                    shape, dtype = tuple(found.get_shape()), DTYPES.get(str(found.get_dtype()))
                    if (shape, dtype) != (chunk.sizes, entries[name].dtype):
                        raise ValueError(f"{file}: {name} is {dtype} {shape}, expected {chunk.sizes}")
        except SafetensorError as error:
            raise ValueError(f"{file}: refused as safetensors ({error})") from None


def _by_file(entries: Mapping[str, Entry]) -> dict[str, list[tuple[str, Chunk]]]:
    files: dict[str, list[tuple[str, Chunk]]] = {}
    for name, entry in entries.items():
        for chunk in entry.chunks:
            files.setdefault(chunk.file, []).append((name, chunk))
    return files
