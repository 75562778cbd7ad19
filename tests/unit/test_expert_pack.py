"""The file of records: what is read is what was written, and nothing that is damaged or hostile is believed."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from glmlocal.errors import CheckpointError
from glmlocal.formats import expert_pack
from glmlocal.formats.expert_pack import (
    PACK_FILE,
    ExpertPack,
    PackHeader,
    check_beside,
    checksum,
    expert_name,
    header_bytes,
    read_pack,
)
from glmlocal.formats.expert_pack_layout import MATRICES, PAGE, expert_layout, layout_from_json, layout_to_json
from glmlocal.formats.forms import FORMS
from glmlocal.formats.index import TensorRef
from glmlocal.formats.packed_size import packed_bytes
from glmlocal.formats.schemes import FP8_CHANNEL, INT4, INT8

SMALL, LARGE = expert_layout(64, 48, (INT4, INT4, INT8)), expert_layout(64, 48, ("bf16", "bf16", "f32"))
HEADER = PackHeader("tiny", "int4", "org/tiny", 3, 2, {1: SMALL, 2: LARGE, 7: SMALL})
PREAMBLE = struct.Struct("<8sIIQQQ16xQ")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    sizes = [layout.record_bytes for layout in HEADER.layouts.values() for _ in range(HEADER.num_experts)]
    records = [rng.integers(0, 256, size, np.uint8) for size in sizes]
    path = tmp_path / PACK_FILE
    path.write_bytes(header_bytes(HEADER, [*map(checksum, records), 5, 6]) + b"".join(map(bytes, records)))
    return path


def rewritten(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The file with the JSON of its header changed and every length and checksum made right again."""
    data = file.read_bytes()
    magic, version, zero, json_bytes, entries, start, _ = PREAMBLE.unpack_from(data)
    value = json.loads(data[64 : 64 + json_bytes])
    change(value)
    body, table = (
        json.dumps(value, separators=(",", ":")).encode(),
        data[64 + json_bytes : 64 + json_bytes + 8 * entries],
    )
    fields = (magic, version, zero, len(body), entries, start)
    digest = xxhash.xxh3_64_intdigest(PREAMBLE.pack(*fields, 0) + body + table)
    file.write_bytes((PREAMBLE.pack(*fields, digest) + body + table).ljust(start, b"\0") + data[start:])


def test_records_are_where_the_pack_says_and_start_at_pages(file: Path) -> None:
    pack = read_pack(file)
    assert (pack.header, pack.layers(), pack.num_experts) == (HEADER, (1, 2, 7), 3)
    assert pack.dense_checksums == (5, 6)
    data, end = np.frombuffer(file.read_bytes(), np.uint8), None
    for record in pack.records():
        assert record.offset % PAGE == record.nbytes % PAGE == 0
        assert end in (None, record.offset)  # one after another
        end = record.offset + record.nbytes
        assert record.nbytes == pack.layout(record.layer).record_bytes
        pack.check(record, data[record.offset : end])
        assert record == pack.record(record.layer, record.expert)
    assert end == data.size
    for layer, expert in ((0, 0), (1, 3), (1, -1), (3, 0)):
        with pytest.raises(KeyError):
            pack.record(layer, expert)


def test_the_usual_type_of_scales_is_not_written_and_another_is() -> None:
    """Packs from before scales could be bf16 have no such field, and their headers are compared to the letter."""
    bf16 = replace(INT4, scale_type="bf16")
    written = layout_to_json(expert_layout(256, 80, (INT4, bf16, FP8_CHANNEL)))
    kinds = [written[name]["kind"] for name in ("gate", "up", "down")]
    assert [kind.get("scale_type") for kind in kinds] == [None, "bf16", None]
    assert kinds[0].keys() == set(asdict(INT4)) - {"scale_type"}


@pytest.mark.parametrize("kind", sorted(FORMS))
def test_layouts_survive_their_json_and_take_what_the_kernels_take(kind: str) -> None:
    form = FORMS[kind]
    layout = expert_layout(256, 80, (form.scheme or kind, "bf16", form.scheme or kind))
    assert layout_from_json(json.loads(json.dumps(layout_to_json(layout))), "x") == layout
    assert layout.gate.shape == (80, 256)
    assert layout.down.shape == (256, 80)
    assert layout.gate.nbytes == packed_bytes(80, 256, form.scheme or kind)
    assert layout.up.offset == layout.gate.nbytes
    assert layout.down.offset == layout.gate.nbytes + layout.up.nbytes
    assert 0 <= layout.record_bytes - layout.nbytes < PAGE


def test_read_records_brings_them_and_names_the_damaged_one(file: Path) -> None:
    pack = read_pack(file)
    start, nbytes = pack.record(2, 1).offset, LARGE.record_bytes
    out = np.empty(2 * nbytes, np.uint8)
    pack.read_records(2, 1, out)
    assert out.tobytes() == file.read_bytes()[start : start + 2 * nbytes]
    with open(file, "r+b") as raw:
        raw.seek(pack.record(2, 2).offset + nbytes - 1)  # of the padding even
        byte = raw.read(1)[0]
        raw.seek(-1, 1)
        raw.write(bytes([byte ^ 4]))
    with pytest.raises(CheckpointError, match="layer 2, expert 2 is damaged"):
        pack.read_records(2, 1, out)
    with open(file, "r+b") as raw:
        raw.truncate(start + 100)
    with pytest.raises(CheckpointError, match="shorter"):
        pack.read_records(2, 1, out)


@pytest.mark.parametrize("position", [0, 9, 13, 17, 25, 33, 57, 70, 200, -9, -1])
def test_a_flipped_bit_in_the_header_is_seen(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    used = 64 + PREAMBLE.unpack_from(data)[3] + 8 * HEADER.num_checksums
    data[position % used] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_pack(file)


@pytest.mark.parametrize("size", [0, 1, 8, 40, 63, 64, 500, 4095, 4096, 5000, -1])
def test_a_cut_file_is_refused(file: Path, size: int) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(CheckpointError, match="pack the model again"):
        read_pack(file)


def test_a_longer_file_and_one_of_another_kind_are_refused(file: Path) -> None:
    data = file.read_bytes()
    for wrong, message in (
        (data + b"\0", "its header wants"),
        (b"GGUF" + data[4:], "is not an expert pack"),
        (b"\0" * len(data), "never finished"),
        (data[:8] + struct.pack("<I", 2) + data[12:], "version 2, this is 1"),
    ):
        file.write_bytes(wrong)
        with pytest.raises(CheckpointError, match=message):
            read_pack(file)


def test_claims_are_checked_before_memory_is_taken_for_them(file: Path) -> None:
    data = bytearray(file.read_bytes())
    for where in (16, 24, 32):
        wrong = bytearray(data)
        wrong[where : where + 8] = struct.pack("<Q", 1 << 60)
        file.write_bytes(wrong)
        with pytest.raises(CheckpointError, match="cannot be"):
            read_pack(file)


@pytest.mark.parametrize("num_experts", [1, 40, 300, 700])
def test_records_begin_after_the_whole_header(num_experts: int, tmp_path: Path) -> None:
    """Also where its table of checksums is longer than a page."""
    header = replace(HEADER, num_experts=num_experts)
    sums = list(range(1, header.num_checksums + 1))
    raw = header_bytes(header, sums)
    used = 64 + len(header.to_json()) + 8 * len(sums)
    assert used <= len(raw) < used + PAGE
    assert len(raw) % PAGE == 0
    path = tmp_path / PACK_FILE
    with open(path, "wb") as file:
        file.write(raw)
        file.truncate(expert_pack.file_bytes(header))
    pack = read_pack(path)
    assert pack.record(1, 0).offset == len(raw)
    assert [record.checksum for record in pack.records()] == sums[:-2]
    assert pack.dense_checksums == tuple(sums[-2:])


@pytest.mark.parametrize("entries", [-1, 1])
def test_a_table_of_another_length_than_the_header_says_is_refused(file: Path, entries: int) -> None:
    data = file.read_bytes()
    magic, version, zero, json_bytes, count, start, _ = PREAMBLE.unpack_from(data)
    rest = data[64 : 64 + json_bytes + 8 * (count + entries)]
    fields = (magic, version, zero, json_bytes, count + entries, start)
    digest = xxhash.xxh3_64_intdigest(PREAMBLE.pack(*fields, 0) + rest)
    file.write_bytes((PREAMBLE.pack(*fields, digest) + rest).ljust(start, b"\0") + data[start:])
    with pytest.raises(CheckpointError, match="contradicts itself"):
        read_pack(file)


def test_tensors_beside_a_pack_are_known_by_their_number_and_the_small_ones(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [rng.integers(0, 256, size, np.uint8) for size in (100, 1 << 17, 1 << 16)]
    (tmp_path / "dense").write_bytes(b"".join(map(bytes, parts)))
    starts = (0, 100, 100 + (1 << 17))
    refs = [
        TensorRef(name, tmp_path / "dense", start, part.nbytes, (part.size,), "U8")
        for name, start, part in zip("cba", starts, parts, strict=True)
    ]
    sums = [checksum(part) for part in parts]

    def check(*dense: int) -> None:
        header = replace(HEADER, num_dense=len(dense))
        pack = ExpertPack(tmp_path / PACK_FILE, 1, header, (*range(header.num_records), *dense))
        check_beside(pack, sorted(refs, key=lambda ref: ref.name))

    check(*sums)
    check(sums[0], sums[1] + 1, sums[2])  # too large to be read at every start
    for wrong in (
        (sums[0] + 1, *sums[1:]),
        (*sums[:2], sums[2] + 1),
        sums[:2],
        (*sums, 7),
        (sums[2], sums[1], sums[0]),
    ):
        with pytest.raises(CheckpointError, match=r"was made with other tensors than .*dense has"):
            check(*wrong)


def set_in(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = to

    return change


def sizes_of(group: int, super_group: int, codec: str = "plain") -> Callable[[dict[str, Any]], None]:
    def change(value: Any) -> None:
        value["layouts"][0]["gate"]["kind"] |= {
            "group_size": group,
            "super_size": super_group,
            "scale_codec": codec,
        }

    return change


def reshape(layout: dict[str, Any], width: int, hidden: int) -> None:
    for name in MATRICES:
        layout[name]["shape"] = [hidden, width] if name == "down" else [width, hidden]


EXPERTS, LAYER, SHAPES = r"experts per layer", r"has the layer", r"have shapes .*, which no expert has"
UNKNOWN, SCHEME = r"which this version does not know", r"which no kernel can have"
KIND = ("layouts", 0, "gate", "kind")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_in("num_experts", to=10**9), EXPERTS),
        (set_in("num_experts", to=4097), EXPERTS),
        (set_in("num_experts", to=0), EXPERTS),
        (set_in("num_experts", to=3.0), EXPERTS),
        (set_in("num_experts", to=True), EXPERTS),
        (set_in("num_experts", to=4), "contradicts itself"),
        (set_in("num_dense", to=-1), "claims -1 other tensors"),
        (set_in("num_dense", to=(1 << 20) + 1), "claims 1048577 other tensors"),
        (set_in("model", to=None), "no model, quant and source"),
        (set_in("quant", to=4), "no model, quant and source"),
        (set_in("source", to=[]), "no model, quant and source"),
        (set_in("kernel_layout", to="panels of the next version"), "laid out for the kernels of another version"),
        (set_in("layers", to=[]), "lists no layers"),
        (lambda value: value["layouts"].extend(value["layouts"]), "lists no layers"),
        (set_in("layers", to=[[1, 0], [1, 1], [7, 0]]), "out of order"),
        (set_in("layers", to=[[2, 0], [1, 1], [7, 0]]), "out of order"),
        (set_in("layers", 0, to=[1, 2]), LAYER),
        (set_in("layers", 0, to=[-1, 0]), LAYER),
        (set_in("layers", 2, to=[10_000, 0]), LAYER),
        (set_in("layers", 0, to=[1, 0.0]), LAYER),
        (set_in("layers", 0, to="12"), LAYER),
        (set_in("layouts", 0, to={}), "gate, up and down were expected"),
        (set_in("layouts", 0, "other", to={}), "gate, up and down were expected"),
        (set_in("layouts", 0, "gate", "other", to=1), "a shape and a kind were expected"),
        (set_in("layouts", 0, "gate", "shape", to=[48, 64, 1]), SHAPES),
        (set_in("layouts", 0, "gate", "shape", to=[48, 32]), SHAPES),
        (set_in("layouts", 0, "up", "shape", to=[48, 32]), SHAPES),
        (set_in("layouts", 0, "down", "shape", to=[48, 64]), SHAPES),
        (lambda value: reshape(value["layouts"][0], 48, (1 << 24) + 1), SHAPES),
        (lambda value: reshape(value["layouts"][0], 0, 64), SHAPES),
        (set_in(*KIND, to="f64"), UNKNOWN),
        (set_in(*KIND, "other", to=1), UNKNOWN),
        (set_in(*KIND, "bits", to=7), SCHEME),
        (set_in(*KIND, "name", to=""), SCHEME),
        (set_in(*KIND, "name", to="n" * 65), SCHEME),
        (sizes_of(0, 0), SCHEME),
        (sizes_of(8, 8), SCHEME),
        (sizes_of(48, 48), SCHEME),
        (sizes_of(32, 64), SCHEME),
        (sizes_of(64, 32, "two_level"), SCHEME),
        (sizes_of(1 << 25, 1 << 25), SCHEME),
        (set_in(*KIND, "codebook", to=[1, 2]), SCHEME),
        (set_in(*KIND, "codebook", to=[1000] * 16), SCHEME),
        (set_in(*KIND, "codebook", to=[-129] * 16), SCHEME),
        (set_in(*KIND, "scale_codec", to="x"), SCHEME),
        (set_in(*KIND, "offset_codec", to="x"), SCHEME),
        (set_in(*KIND, "code_type", to="e4m3"), SCHEME),
        (set_in(*KIND, "zero_point", to="8"), SCHEME),
        (set_in(*KIND, "zero_point", to=256), SCHEME),
        (set_in(*KIND, "zero_point", to=-1), SCHEME),
        (set_in("extra", to=1), "contradicts itself"),
    ],
)
def test_a_hostile_header_is_refused_although_its_checksum_is_right(
    file: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    rewritten(file, lambda value: None)
    read_pack(file)
    rewritten(file, change)
    with pytest.raises(CheckpointError, match=message):
        read_pack(file)


def test_refs_are_where_the_matrices_lie_in_their_records(file: Path) -> None:
    pack = read_pack(file)
    refs = pack.refs()
    for record in pack.records():
        layout = pack.layout(record.layer)
        for name, matrix in zip(MATRICES, layout.matrices, strict=True):
            ref = refs[expert_name(record.layer, record.expert, name)]
            assert (ref.file, ref.offset, ref.nbytes) == (file, record.offset + matrix.offset, matrix.nbytes)
    assert len(refs) == 3 * pack.header.num_records


def test_checksums_are_xxh3_of_all_bytes() -> None:
    data = np.arange(10_000, dtype=np.uint32).view(np.uint8)
    assert checksum(data) == xxhash.xxh3_64_intdigest(data.tobytes()) == checksum(data.tobytes())


def test_reading_packs_imports_no_torch() -> None:
    code = "import sys, glmlocal.formats.expert_pack; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert expert_pack.VERSION == 1
