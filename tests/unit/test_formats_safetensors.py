from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crafted import TINY, safetensors_bytes, tiny_tensors, with_header, write_checkpoint, write_index
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import open_checkpoint
from glmlocal.formats.safetensors import read_file

F32_PAIR = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes: Any) -> dict[str, Any]:
    return {**F32_PAIR, **changes}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "release", TINY, tiny_tensors(TINY), shards=3)


def test_a_file_of_the_safetensors_library_reads_back(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal((4,)).astype(np.float16),
        "c": rng.integers(0, 9, (2, 2, 2)),
        "scalar": np.array(2.5, np.float32),
    }
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    refs = read_file(tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert {name: (ref.dtype, ref.shape) for name, ref in refs.items()} == {
        "a": ("F32", (3, 5)),
        "b": ("F16", (4,)),
        "c": ("I64", (2, 2, 2)),
        "scalar": ("F32", ()),
    }
    for name, ref in refs.items():
        assert raw[ref.offset : ref.offset + ref.nbytes] == arrays[name].tobytes()


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_of_a_release_is_found_and_reads_as_written(shards: int, tmp_path: Path) -> None:
    written = tiny_tensors(TINY)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "release", TINY, written, shards))
    assert checkpoint.config == TINY
    assert checkpoint.gguf_metadata is None
    assert checkpoint.directory == checkpoint.path == tmp_path / "release"
    tensors = checkpoint.tensors
    assert tensors.kind == "safetensors"
    assert len(tensors.files) == shards
    assert set(tensors) == set(written)
    assert tensors.nbytes == sum(array.nbytes for array in written.values())
    for name, array in written.items():
        assert tensors[name].shape == array.shape
        assert tensors.read(name).tobytes() == array.tobytes()


def test_nothing_is_mapped_before_it_is_read(release: Path) -> None:
    tensors = open_checkpoint(release).tensors
    for file in tensors.files:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"model-0000\d-of-00003"):
        tensors.read("model.norm.weight")


def test_views_are_read_only_share_a_map_and_outlive_close(release: Path) -> None:
    tensors = open_checkpoint(release).tensors
    view = tensors.read("model.norm.weight")
    assert not view.flags.writeable
    assert np.shares_memory(view, tensors.read("model.norm.weight"))
    before = view.copy()
    tensors.close()
    np.testing.assert_array_equal(view, before)
    with pytest.raises(ValueError, match="closed"):
        tensors.read("model.norm.weight")


def test_a_file_that_shrank_since_it_was_opened_is_noticed(release: Path) -> None:
    tensors = open_checkpoint(release).tensors
    last = max((ref for ref in tensors.values() if ref.file == tensors.files[0]), key=lambda ref: ref.offset)
    os.truncate(last.file, last.offset + last.nbytes - 1)
    with pytest.raises(CheckpointError, match="shorter"):
        tensors.read(last.name)


def test_an_unknown_name_is_named(release: Path) -> None:
    with pytest.raises(CheckpointError, match="nonsense"):
        open_checkpoint(release).tensors.read("nonsense")


def test_fused_experts_become_the_released_names(tmp_path: Path) -> None:
    released = tiny_tensors(TINY, mtp=False)
    fused = {name: array for name, array in released.items() if ".experts." not in name}
    for layer in (1, 2):
        prefix = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            np.stack([released[f"{prefix}.{e}.{part}_proj.weight"] for e in range(TINY["n_routed_experts"])])
            for part in ("gate", "up", "down")
        )
        fused[f"{prefix}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        fused[f"{prefix}.down_proj"] = down
    tensors = open_checkpoint(write_checkpoint(tmp_path / "fused", TINY, fused, shards=2)).tensors
    assert set(tensors) == set(released)
    for name, array in released.items():
        assert tensors[name].shape == array.shape
        assert tensors.read(name).tobytes() == array.tobytes(), name


def test_the_expert_stacks_of_mlx_become_the_released_names(tmp_path: Path) -> None:
    released = tiny_tensors(TINY, mtp=False)
    stacked = {name: array for name, array in released.items() if ".experts." not in name}
    for layer in (1, 2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            stacked[f"model.layers.{layer}.mlp.switch_mlp.{part}.weight"] = np.stack(
                [released[f"model.layers.{layer}.mlp.experts.{e}.{part}.weight"] for e in range(4)]
            )
    tensors = open_checkpoint(write_checkpoint(tmp_path / "mlx", TINY, stacked)).tensors
    assert set(tensors) == set(released)
    for name, array in released.items():
        assert tensors[name].shape == array.shape
        assert tensors.read(name).tobytes() == array.tobytes(), name


def test_fused_and_separate_experts_of_one_name_are_refused(tmp_path: Path) -> None:
    tensors = tiny_tensors(TINY)
    tensors["model.layers.1.mlp.experts.down_proj"] = np.zeros((4, 64, 32), np.float32)
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(write_checkpoint(tmp_path / "both", TINY, tensors))


@pytest.mark.parametrize("shape", [[5000, 2, 1], [2, 3, 1]])
def test_fused_experts_of_an_absurd_shape_are_refused(shape: list[int], tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_bytes({"model.layers.1.mlp.experts.gate_up_proj": np.zeros(shape, np.float32)}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="gate_up_proj"):
        open_checkpoint(tmp_path)


TWO = {"a": F32_PAIR, "b": entry(data_offsets=[8, 16])}
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no header"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "no header"),
    "header length 0": (with_header(b"", bytes(8), length=0), "no header"),
    "header longer than the file": (with_header({"a": F32_PAIR}, bytes(8), length=5000), "missing"),
    "header over 100 MB": (with_header({"a": F32_PAIR}, bytes(8), length=100_000_001), "100,000,001"),
    "header length 2^63": (with_header({"a": F32_PAIR}, bytes(8), length=1 << 63), "limit"),
    "header length 2^64 - 1": (with_header({"a": F32_PAIR}, bytes(8), length=(1 << 64) - 1), "limit"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "not valid JSON"),
    "not JSON": (with_header(b"{"), "not valid JSON"),
    "deep JSON": (with_header(b'{"a":' + b"[" * 200_000), "not valid JSON"),
    "a number of 5000 digits": (with_header(b'{"a":' + b"9" * 5000 + b"}"), "not valid JSON"),
    "a list": (with_header([]), "not an object"),
    "duplicate names": (with_header(b'{"a":{},"a":{}}'), "'a' twice"),
    "duplicate field": (
        with_header(b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "'dtype' twice",
    ),
    "metadata no object": (with_header({"__metadata__": 3}), "__metadata__"),
    "entry no object": (with_header({"a": 3}), "'a'"),
    "unknown dtype": (with_header({"a": entry(dtype="Q9")}, bytes(8)), "'Q9'"),
    "dtype no text": (with_header({"a": entry(dtype=["F32"])}, bytes(8)), "dtype"),
    "no shape": (with_header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, bytes(8)), "shape"),
    "shape of floats": (with_header({"a": entry(shape=[2.0])}, bytes(8)), "shape"),
    "shape of bools": (with_header({"a": entry(shape=[True, 2])}, bytes(8)), "shape"),
    "negative dimension": (with_header({"a": entry(shape=[-2])}, bytes(8)), "shape"),
    "zero dimension": (with_header({"a": entry(shape=[0], data_offsets=[0, 0])}), "shape"),
    "overflowing shape": (with_header({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "more bytes"),
    "overflow to the right size": (with_header({"a": entry(shape=[1 << 61, 8, 2])}, bytes(8)), "more bytes"),
    "shape beyond the bytes": (with_header({"a": entry(shape=[3])}, bytes(8)), "12 bytes"),
    "shape below the bytes": (with_header({"a": entry(shape=[1])}, bytes(8)), "4 bytes"),
    "offsets no list": (with_header({"a": entry(data_offsets=8)}, bytes(8)), "data_offsets"),
    "three offsets": (with_header({"a": entry(data_offsets=[0, 4, 8])}, bytes(8)), "data_offsets"),
    "offsets as text": (with_header({"a": entry(data_offsets=["0", "8"])}, bytes(8)), "data_offsets"),
    "reversed offsets": (with_header({"a": entry(data_offsets=[8, 0])}, bytes(8)), "data_offsets"),
    "negative offset": (with_header({"a": entry(data_offsets=[-8, 0])}, bytes(8)), "data_offsets"),
    "offsets beyond the file": (with_header({"a": entry(data_offsets=[1000, 1008])}, bytes(8)), "hole"),
    "truncated": (with_header(TWO, bytes(13)), "3 of"),
    "bytes that nobody owns": (with_header(TWO, bytes(17)), "1 bytes"),
    "overlap": (with_header({"a": F32_PAIR, "b": entry(data_offsets=[4, 12])}, bytes(12)), "overlaps"),
    "the same bytes twice": (with_header({"a": F32_PAIR, "b": F32_PAIR}, bytes(8)), "overlaps"),
    "hole": (with_header({"a": F32_PAIR, "b": entry(data_offsets=[12, 20])}, bytes(20)), "hole"),
    "hole at the start": (with_header({"a": entry(data_offsets=[4, 12])}, bytes(12)), "hole"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, words = BAD_FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_a_good_file_with_padding_after_the_header_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(json.dumps(TWO).encode() + b"     ", bytes(16)))
    assert [ref.offset for ref in read_file(path).values()] == [len(path.read_bytes()) - 16, len(path.read_bytes()) - 8]


def test_a_hundred_thousand_entries_are_read_in_good_time(tmp_path: Path) -> None:
    header = {f"t{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(100_000)}
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header(header, bytes(100_000)))
    assert len(read_file(path)) == 100_000


def test_control_characters_of_names_are_escaped_in_messages(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(with_header({"\x1b]0;evil\x07" + "x" * 10_000: 3}))
    with pytest.raises(CheckpointError) as caught:
        read_file(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 700


BAD_SHARD_NAMES: dict[str, Any] = {
    "parent": "../release/model-00001-of-00003.safetensors",
    "absolute": "/etc/passwd.safetensors",
    "subfolder": "sub/model.safetensors",
    "backslash": "..\\model.safetensors",
    "dots": "..",
    "hidden": ".model.safetensors",
    "NUL": "model\0.safetensors",
    "empty": "",
    "number": 7,
    "list": ["model-00001-of-00003.safetensors"],
    "null": None,
    "pickle": "pytorch_model.bin",
}


@pytest.mark.parametrize("case", BAD_SHARD_NAMES)
def test_an_index_cannot_point_outside_its_directory(case: str, release: Path) -> None:
    index = json.loads((release / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(release, {**index, "model.norm.weight": BAD_SHARD_NAMES[case]})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        open_checkpoint(release)


@pytest.mark.parametrize("weight_map", [None, [], "x", {}])
def test_an_index_without_a_map_is_refused(weight_map: Any, release: Path) -> None:
    write_index(release, weight_map)
    with pytest.raises(CheckpointError, match="weight_map"):
        open_checkpoint(release)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[]"])
def test_a_broken_index_is_named(content: bytes, release: Path) -> None:
    (release / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(release)


def test_missing_shards_are_counted_and_named(release: Path) -> None:
    (release / "model-00002-of-00003.safetensors").unlink()
    (release / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 of the 3 files .*model-00002-of-00003\.safetensors"):
        open_checkpoint(release)


def test_a_tensor_that_its_shard_does_not_have_is_named(release: Path) -> None:
    index = json.loads((release / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(release, {**index, "model.extra.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight"):
        open_checkpoint(release)


def test_the_index_says_which_of_two_shards_a_tensor_comes_from(release: Path) -> None:
    index = json.loads((release / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted(set(index.values()))
    extra = {"model.norm.weight": np.zeros(3, np.float32), "only.here": np.ones(1, np.float32)}
    (release / "model-extra.safetensors").write_bytes(safetensors_bytes(extra))
    write_index(release, {**index, "only.here": "model-extra.safetensors"})
    tensors = open_checkpoint(release).tensors
    assert tensors["model.norm.weight"].file.name in shards
    assert tensors["only.here"].file.name == "model-extra.safetensors"
    write_index(release, {name: shard for name, shard in index.items() if name != "lm_head.weight"})
    assert "lm_head.weight" not in open_checkpoint(release).tensors


def test_a_file_that_the_index_does_not_name_is_left_alone(release: Path) -> None:
    (release / "model-00009-of-00009.safetensors").write_bytes(b"rubbish")
    assert len(open_checkpoint(release).tensors.files) == 3


def test_links_of_the_hubs_cache_work(release: Path, tmp_path: Path) -> None:
    """The cache keeps files in blobs/ and relative links to them in snapshots/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(release.iterdir())):
        file.rename(blobs / f"blob{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/blob{i}")
    tensors = open_checkpoint(snapshot).tensors
    np.testing.assert_array_equal(
        tensors.read("model.norm.weight").view(np.float32), tiny_tensors(TINY)["model.norm.weight"]
    )


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_link_to_nothing_is_named(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).symlink_to("../../blobs/gone")
    with pytest.raises(CheckpointError, match="broken link"):
        open_checkpoint(tmp_path)


def test_a_pipe_in_place_of_a_shard_is_refused_and_not_waited_for(release: Path) -> None:
    shard = release / "model-00002-of-00003.safetensors"
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(CheckpointError, match="model-00002-of-00003"):
        open_checkpoint(release)


def test_shards_without_an_index_are_refused(release: Path) -> None:
    (release / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_checkpoint(release)
