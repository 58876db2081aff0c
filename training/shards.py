"""Tensors in several safetensors files and an index, as Hugging Face lays them out.

Each file is written by one rank, a tensor at a time; reading depends on the index alone, and reads what is asked for.
"""

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heapreplace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from routing.errors import UserError

CHUNK = 16 * 2**20  # bytes that are written or read at once
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class TensorSpec(NamedTuple):
    """What is known of a tensor before it is there."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Share(NamedTuple):
    """One file of a collection of tensors, and what it holds, in the order in which it comes."""

    file: str
    specs: list[TensorSpec]


class Written(NamedTuple):
    """A file as it was written."""

    bytes: int
    tensor_bytes: int  # of those, the tensors'
    sha256: str
    crc32: dict[str, str]  # of each tensor's bytes


def shares(collections: Mapping[str, Sequence[TensorSpec]], ranks: int) -> list[dict[str, Share]]:
    """Divide collections of tensors among ranks, whole and about equally many bytes to each.

    Returns:
        For each rank its files, by collection; a rank without a tensor of a collection has no file of it.
    """
    specs = [(stem, spec) for stem, specs in collections.items() for spec in specs]
    owned: list[dict[str, list[TensorSpec]]] = [{} for _ in range(ranks)]
    for (stem, spec), owner in zip(specs, _owners([spec.nbytes for _, spec in specs], ranks), strict=True):
        owned[owner].setdefault(stem, []).append(spec)
    files: list[dict[str, Share]] = [{} for _ in range(ranks)]
    for stem in collections:
        writers = [rank for rank in range(ranks) if stem in owned[rank]]
        for number, rank in enumerate(writers, 1):
            name = f"{stem}-{number:05d}-of-{len(writers):05d}.safetensors"
            files[rank][stem] = Share(name, owned[rank][stem])
    return files


def write_shard(path: Path, specs: Sequence[TensorSpec], tensors: Iterable[Tensor]) -> Written:
    """Write one safetensors file and bring it to the disk, holding one tensor at a time.

    Args:
        specs: of `tensors`, in their order.

    Raises:
        OSError: if it can't be written.
    """
    header, offsets = _header(specs)
    crc32 = {}
    with path.open("wb") as file:
        file.write(header)
        for spec, tensor in zip(specs, tensors, strict=True):
            assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), spec.name
            file.seek(len(header) + offsets[spec.name])
            crc32[spec.name] = _write_bytes(file, tensor)
        file.flush()
        os.fsync(file.fileno())
    size = path.stat().st_size
    return Written(size, size - len(header), sha256(path), crc32)


def index(weight_map: Mapping[str, str], crc32: Mapping[str, str], total_size: int) -> str:
    """The text of a `*.safetensors.index.json`.

    Args:
        weight_map: each tensor's file.
        crc32: each tensor's checksum; other readers ignore it.
        total_size: bytes of all tensors.
    """
    metadata = {"total_size": total_size, "crc32": dict(sorted(crc32.items()))}
    return json.dumps({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"


class ShardedTensors(Mapping[str, Tensor]):
    """The tensors that an index names, each read from its file when it is asked for."""

    def __init__(self, folder: Path, index: str) -> None:
        self._folder = folder
        self._files: dict[str, str] = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        self._open: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            KeyError: if the index doesn't name it.
            UserError: if its file is broken.
        """
        path = self._folder / self._files[name]
        try:
            if path.name not in self._open:
                self._open[path.name] = safe_open(path, framework="pt")
            tensor: Tensor = self._open[path.name].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a whole safetensors file: {error}") from error
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def missing_tensors(path: Path, names: Iterable[str]) -> list[str]:
    """Those that a safetensors file doesn't hold; all, if its header can't be read."""
    wanted = list(names)
    try:
        with path.open("rb") as file:
            held = _read_header(file) if wanted else {}
        return [name for name in wanted if name not in held]
    except (OSError, ValueError):
        return wanted


def broken_tensors(path: Path, crc32: Mapping[str, str]) -> list[str]:
    """Of a damaged file, the tensors whose bytes aren't those that were written; all, if its header can't be read."""
    try:
        with path.open("rb") as file:
            header = _read_header(file)
            start = file.tell()
            return [name for name, crc in crc32.items() if _crc_of(file, start, header.get(name)) != crc]
    except (OSError, ValueError):
        return list(crc32)


def sha256(path: Path) -> str:
    """A file's SHA-256 sum, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Who takes what: the largest first, each by whoever has least so far."""
    loads = [(0, rank) for rank in range(ranks)]
    heapify(loads)
    owners = [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        load, owners[i] = loads[0]
        heapreplace(loads, (load + sizes[i], owners[i]))
    return owners


def _header(specs: Sequence[TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the tensors', and where among the latter each begins."""
    offsets, end = {}, 0
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):  # so that each is aligned
        offsets[spec.name], end = end, end + spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPES[spec.dtype],
            "shape": spec.shape,
            "data_offsets": [offsets[spec.name], end],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, offsets


def _read_header(file: BinaryIO) -> dict[str, Any]:
    """A safetensors file's header; leaves the file where the tensors' bytes start.

    Raises:
        ValueError: if it isn't one.
    """
    head = file.read(8)
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
    if not 0 < length <= os.fstat(file.fileno()).st_size - 8:
        raise ValueError("no header")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("no header")
    return header


def _write_bytes(file: BinaryIO, tensor: Tensor) -> str:
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
    crc = 0
    for begin in range(0, len(content), CHUNK):
        chunk = content[begin : begin + CHUNK]
        file.write(chunk)
        crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def _crc_of(file: BinaryIO, start: int, entry: Any) -> str | None:
    """The checksum of a tensor's bytes, as the header's entry says where they are; None if they aren't all there."""
    try:
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError):
        return None
    file.seek(start + begin)
    crc, left = 0, end - begin
    while left > 0:
        chunk = file.read(min(CHUNK, left))
        if not chunk:
            return None
        crc, left = zlib.crc32(chunk, crc), left - len(chunk)
    return f"{crc:08x}"
