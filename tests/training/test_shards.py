"""Sharded tensors are what the safetensors library reads, and damage is traced to the tensor."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from routing.errors import UserError
from training import shards
from training.shards import (
    ShardedTensors,
    Share,
    TensorSpec,
    broken_tensors,
    index,
    missing_tensors,
    sha256,
    write_shard,
)

TENSORS = {
    "odd": torch.arange(3, dtype=torch.float32) + 0.5,
    "counter": torch.tensor([2**40, 7]),
    "matrix": torch.randn(5, 4).t(),  # not contiguous
    "half": torch.tensor([1.5, -2.0, 3.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def specs(tensors: dict[str, Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_shard(tmp_path / "a.safetensors", specs(TENSORS), TENSORS.values())
    return tmp_path / "a.safetensors"


def test_the_library_reads_what_was_written(shard: Path) -> None:
    read = load_file(shard)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor), name


def test_every_tensor_is_aligned(shard: Path) -> None:
    content = shard.read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for spec in specs(TENSORS):
        assert header[spec.name]["data_offsets"][0] % spec.dtype.itemsize == 0, spec.name


@pytest.mark.parametrize("chunk", [3, 2**20])
def test_sums_are_of_the_file_and_of_each_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(shards, "CHUNK", chunk)
    path = tmp_path / "a.safetensors"
    check = torch.tensor(list(b"123456789"), dtype=torch.uint8)
    written = write_shard(path, [TensorSpec("check", torch.uint8, (9,))], [check])
    assert written.crc32 == {"check": "cbf43926"}  # CRC-32's published check value
    assert written.bytes == path.stat().st_size == len(path.read_bytes())
    assert written.tensor_bytes == 9
    assert written.sha256 == sha256(path)


def test_a_tensor_is_written_before_the_next_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def assembled() -> Iterator[Tensor]:
        for name in ("one", "two"):
            events.append(f"assemble {name}")
            yield torch.ones(2)

    write = shards._write_bytes
    monkeypatch.setattr(shards, "_write_bytes", lambda file, tensor: events.append("write") or write(file, tensor))
    write_shard(tmp_path / "a", [TensorSpec(name, torch.float32, (2,)) for name in ("one", "two")], assembled())
    assert events == ["assemble one", "write", "assemble two", "write"]


def test_bytes_are_shared_out_evenly() -> None:
    def spec(name: str, floats: int) -> TensorSpec:
        return TensorSpec(name, torch.float32, (floats,))

    model = [spec("a", 4), spec("b", 1), spec("c", 3)]
    optimizer = [spec("d", 6), spec("e", 2)]
    assert shards.shares({"model": model, "optimizer": optimizer}, 2) == [
        {  # 6 + 2
            "optimizer": Share("optimizer-00001-of-00001.safetensors", [spec("d", 6), spec("e", 2)]),
        },
        {  # 4 + 3 + 1
            "model": Share("model-00001-of-00001.safetensors", model),
        },
    ]
    alone = shards.shares({"model": model, "optimizer": optimizer}, 1)
    assert [share.specs for share in alone[0].values()] == [model, optimizer]
    many = shards.shares({"model": model}, 5)
    assert [[share.file for share in files.values()] for files in many] == [
        ["model-00001-of-00003.safetensors"],
        ["model-00002-of-00003.safetensors"],
        ["model-00003-of-00003.safetensors"],
        [],
        [],
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_tensor_has_one_writer_and_no_rank_has_much_more(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    sizes = torch.randint(0, 1000, (97,), generator=generator).tolist()
    model = [TensorSpec(f"t{n}", torch.float32, (size,)) for n, size in enumerate(sizes)]
    divided = shards.shares({"model": model}, ranks)
    written = [spec for files in divided for spec in files["model"].specs]
    assert sorted(written) == sorted(model, key=lambda spec: spec.name)
    loads = [sum(math.prod(spec.shape) for spec in files["model"].specs) for files in divided]
    assert max(loads) - min(loads) <= max(sizes)
    assert divided == shards.shares({"model": model}, ranks)


def test_reading_by_the_index(tmp_path: Path) -> None:
    tensors = {name: torch.full((2,), float(n)) for n, name in enumerate("abc")}
    crc32: dict[str, str] = {}
    for file, held in (("one", "ac"), ("two", "b")):
        own = {name: tensors[name] for name in held}
        crc32 |= write_shard(tmp_path / file, specs(own), own.values()).crc32
    (tmp_path / "index.json").write_text(index({"a": "one", "b": "two", "c": "one"}, crc32, 24))
    read = ShardedTensors(tmp_path, "index.json")
    assert len(read) == 3
    assert list(read) == ["a", "b", "c"]
    assert "b" in read
    assert "d" not in read
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor)
    with pytest.raises(KeyError):
        read["d"]
    recorded = json.loads((tmp_path / "index.json").read_text())
    assert recorded["metadata"] == {"total_size": 24, "crc32": crc32}
    (tmp_path / "two").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r".*/two is not a whole safetensors file: "):
        ShardedTensors(tmp_path, "index.json")["b"]


def test_a_file_is_opened_when_a_tensor_of_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text(index({"a": "one", "b": "not there"}, {}, 4))
    write_shard(tmp_path / "one", [TensorSpec("a", torch.float32, (1,))], [torch.ones(1)])
    read = ShardedTensors(tmp_path, "index.json")
    assert read["a"] == 1
    with pytest.raises(UserError, match="not there is not a whole safetensors file"):
        read["b"]


def test_damage_is_traced_to_the_tensor(shard: Path) -> None:
    crc32 = write_shard(shard, specs(TENSORS), TENSORS.values()).crc32
    whole = shard.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    assert broken_tensors(shard, crc32) == []
    places = {8: "counter", 20: "scalar", 60: "matrix", len(whole) - header - 1: "bytes"}
    for place, name in places.items():
        damaged = bytearray(whole)
        damaged[header + place] ^= 0x10
        shard.write_bytes(damaged)
        assert broken_tensors(shard, crc32) == [name]
    shard.write_bytes(whole[:-6])
    assert broken_tensors(shard, crc32) == ["flags", "bytes"]
    for content in (whole[:100], whole[:4], b"", b"\xff" * 200, whole[:8] + b"[" + whole[9:]):
        shard.write_bytes(content)
        assert broken_tensors(shard, crc32) == list(TENSORS)
    shard.unlink()
    assert broken_tensors(shard, crc32) == list(TENSORS)


def test_any_byte_of_the_header_may_be_damaged(shard: Path) -> None:
    crc32 = write_shard(shard, specs(TENSORS), TENSORS.values()).crc32
    whole = shard.read_bytes()
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        shard.write_bytes(damaged)
        assert set(broken_tensors(shard, crc32)) <= set(TENSORS)


def test_tensors_that_are_not_there_are_missing(shard: Path) -> None:
    assert missing_tensors(shard, TENSORS) == []
    assert missing_tensors(shard, ["odd", "even"]) == ["even"]
    shard.write_bytes(b"nothing")
    assert missing_tensors(shard, ["odd"]) == ["odd"]
