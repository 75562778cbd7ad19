"""Making packs: what is in them, going on after a kill at any point, and what goes wrong on the way."""

from __future__ import annotations

import errno
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
import tiny_gguf
from glmlocal import kernels
from glmlocal.errors import CheckpointError, ConfigError, DownloadError
from glmlocal.formats.index import open_checkpoint
from glmlocal.kernels import cpu
from glmlocal.models.config import ModelConfig, check_tensors
from glmlocal.models.footprints import of_checkpoint
from glmlocal.models.weights import Quant, WeightReader, quantized_already
from glmlocal.packing import make, partial
from glmlocal.packing.job import plan_job
from glmlocal.packing.verify import Damage, verify_pack
from packs import CountedWrites, files_of, killed_at, pack

pytestmark = pytest.mark.skipif(not cpu.available, reason="no native kernels, whose layout a pack has")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BF16 with an MTP layer: 3 layers of 8 experts, of sizes that are multiples of nothing."""
    sizes = {"hidden_size": 80, "moe_intermediate_size": 48, "num_key_value_heads": 4, "head_dim": 24}
    model = tiny.build_model(**sizes).bfloat16()
    return tiny.save(model, tmp_path_factory.mktemp("source"), mtp=True)


@pytest.mark.parametrize("quant", ["keep", "int8", "int4"])
def test_records_hold_what_the_loader_would_have_packed(source: Path, tmp_path: Path, quant: Quant) -> None:
    packed = open_checkpoint(pack(source, tmp_path / "pack", quant))
    plain = open_checkpoint(source)
    assert set(packed.tensors) == set(plain.tensors)
    assert check_tensors(ModelConfig.from_hf(packed.config), packed.tensors)
    loader, reader = WeightReader(plain.tensors, lambda n: None, quant), WeightReader(packed.tensors, lambda n: None)
    assert packed.tensors.experts is not None
    assert packed.tensors.experts.layers() == (1, 2, 3)
    for layer in packed.tensors.experts.layers():
        finer = loader.at_least_8_bits() if layer == 3 else loader  # MTP
        experts = reader.packed_experts(layer)
        assert experts is not None
        for name in ("gate", "up", "down"):
            for e, weight in enumerate(getattr(experts, name)):
                want = finer.weight(f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.weight")
                assert weight.kind == want.kind
                assert torch.equal(weight.dequantize(), want.dequantize())
    for name, ref in packed.tensors.items():
        if ".mlp.experts." not in name:
            assert packed.tensors.read(name).tobytes() == plain.tensors.read(name).tobytes()
            assert ref.dtype == plain.tensors[name].dtype
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "pack" / name).read_bytes() == (source / name).read_bytes()


def test_a_pack_is_the_same_whatever_made_it(source: Path, tmp_path: Path) -> None:
    one, other = pack(source, tmp_path / "one", "int4", threads=1), pack(source, tmp_path / "other", "int4", threads=3)
    assert files_of(one) == files_of(other)
    assert sorted(tmp_path.iterdir()) == [one, other]  # nothing is left beside them


def test_gguf_keeps_its_blocks_and_all_of_its_metadata(source: Path, tmp_path: Path) -> None:
    wide = tiny.save(tiny.build_model(**{**tiny.CONFIGS["air"], "moe_intermediate_size": 64}), tmp_path / "w", mtp=True)
    tiny_gguf.convert(wide, tmp_path / "model.gguf", "Q4_1", split_bytes=100_000)
    first = next(tmp_path.glob("model*-00001-of-*.gguf"))
    plain = open_checkpoint(first)
    packed = open_checkpoint(pack(first, tmp_path / "pack", "int8"))
    assert plain.gguf_metadata is not None
    metadata = {key: value for key, value in plain.gguf_metadata.items() if not key.startswith("split.")}
    assert packed.gguf_metadata == metadata
    assert packed.config == plain.config
    assert {ref.dtype for name, ref in packed.tensors.items() if ".experts." in name} == {"pack.Q4_1"}
    for name in packed.tensors:
        if ".mlp.experts." not in name:
            assert packed.tensors.read(name).tobytes() == plain.tensors.read(name).tobytes()
    assert verify_pack(tmp_path / "pack", 2, lambda n: None)[1] == []


def test_experts_of_a_pack_are_counted_as_they_are_held(source: Path, tmp_path: Path) -> None:
    packed = open_checkpoint(pack(source, tmp_path / "pack", "int8"))
    want, got = of_checkpoint(open_checkpoint(source), "int8"), of_checkpoint(packed, "int8")
    assert [layer.expert and layer.expert.nbytes for layer in got.layers] == [
        layer.expert and layer.expert.nbytes for layer in want.layers
    ]
    assert of_checkpoint(packed, "int4").layers[1].expert == got.layers[1].expert  # they stay what they are
    assert "int8" in (quantized_already(packed.tensors) or "")


def test_experts_of_a_layer_that_differ_are_refused(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name] = tensors[name].float()
    (tmp_path / "mixed").mkdir()
    save_file(tensors, tmp_path / "mixed" / "model.safetensors")
    (tmp_path / "mixed" / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.experts\.0.*experts\.5.*different types"):
        pack(tmp_path / "mixed", tmp_path / "pack")
    pack(tmp_path / "mixed", tmp_path / "pack", "int8")


def test_what_is_there_is_not_overwritten_and_a_pack_is_not_packed(source: Path, tmp_path: Path) -> None:
    packed = pack(source, tmp_path / "pack")
    with pytest.raises(ConfigError, match="is a packed model already"):
        pack(source, packed)
    with pytest.raises(ConfigError, match="is packed already"):
        pack(packed, tmp_path / "again")
    (tmp_path / "other").mkdir()
    with pytest.raises(ConfigError, match="no packed model"):
        pack(source, tmp_path / "other")


def test_mtp_that_cannot_be_used_is_left_out_and_said(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.3.mlp.experts.5.up_proj.weight"]
    (tmp_path / "cut").mkdir()
    save_file(tensors, tmp_path / "cut" / "model.safetensors")
    (tmp_path / "cut" / "config.json").write_text((source / "config.json").read_text())
    job = plan_job(open_checkpoint(tmp_path / "cut"), "keep", model="m", source="s")
    assert job.left_out is not None
    assert "1 of its" in job.left_out
    packed = open_checkpoint(pack(tmp_path / "cut", tmp_path / "pack"))
    assert not any(name.startswith("model.layers.3.") for name in packed.tensors)
    assert not check_tensors(ModelConfig.from_hf(packed.config), packed.tensors)


def test_dense_tensors_are_made_among_records(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or cores would quantize first and wait for the disk afterwards."""
    made: list[int] = []
    original = make.Maker._make

    def note(self: make.Maker, piece: int, *rest: object) -> None:
        made.append(piece)
        original(self, piece, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(make.Maker, "_make", note)
    pack(source, tmp_path / "pack", threads=1)
    num_records = 24
    assert sorted(made) == list(range(len(made)))
    assert len(made) > 2 * num_records
    for half in made[: len(made) // 2], made[len(made) // 2 :]:
        assert num_records // 3 <= sum(piece < num_records for piece in half) <= num_records * 2 // 3
    assert [piece for piece in made if piece < num_records] == list(range(num_records)), "in the order of the file"


# Stopped on the way


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")
def test_killed_anywhere_and_resumed_the_pack_is_byte_identical(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a killed process wrote is there without the disk's help: nothing waits for it, though the calls count."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda descriptor: None)
    want = files_of(pack(source, tmp_path / "whole", "int4"))
    with pytest.MonkeyPatch.context() as patch:
        counted = CountedWrites(patch)
        pack(source, tmp_path / "counted", "int4")
    made: list[int] = []
    original = make.Maker._pack

    def count(self: make.Maker, piece: int, *rest: object) -> None:
        made.append(piece)
        original(self, piece, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(make.Maker, "_pack", count)
    rename = counted.count - 2  # then the directory is synced and the journal removed
    for call in sorted({1, 6, rename - 2, rename, *random.Random(20).sample(range(2, rename), 20)}):
        target = tmp_path / f"killed-{call}"
        killed_at(call, lambda target=target: pack(source, target, "int4"))
        assert not target.exists()
        journal = target.with_name(target.name + ".partial.journal").read_bytes().splitlines()[1:]
        records = {int(line.split()[0]) for line in journal} & set(range(24))
        made.clear()
        assert files_of(pack(source, target, "int4")) == want
        assert len(made) == 24 - len(records)  # nothing that the journal had was made again
        assert not records & set(made)


def test_what_the_journal_claims_is_compared_with_the_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = files_of(pack(source, tmp_path / "whole"))
    monkeypatch.setattr(partial.PartialPack, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "pack")
    monkeypatch.undo()
    broken = tmp_path / "pack.partial" / "experts.pack"
    with open(broken, "r+b") as file:
        file.seek(broken.stat().st_size - 5000)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with open(tmp_path / "pack.partial.journal", "ab") as file:
        file.write(b"3 0123")  # not a whole line
    assert files_of(pack(source, tmp_path / "pack")) == want


def test_another_source_or_quant_starts_over(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial.PartialPack, "publish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "pack", "int8")
    monkeypatch.undo()
    assert files_of(pack(source, tmp_path / "pack", "int4")) == files_of(pack(source, tmp_path / "other", "int4"))


def test_a_full_disk_is_one_line_and_loses_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = files_of(pack(source, tmp_path / "whole"))
    original, calls = os.pwrite, []

    def pwrite(file: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        patch.setattr(make, "COMMIT_EVERY_S", 0.0)
        with pytest.raises(DownloadError, match=r"is full; free some space and run the same command again"):
            pack(source, tmp_path / "pack", threads=1)
    assert not (tmp_path / "pack").exists()
    assert files_of(pack(source, tmp_path / "pack")) == want


def test_too_small_a_disk_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(os, "statvfs", lambda path: Full)
    with pytest.raises(DownloadError, match="too small"):
        pack(source, tmp_path / "pack")


def test_two_processes_do_not_make_the_same_pack(source: Path, tmp_path: Path) -> None:
    def second(*args: object) -> None:
        pack(source, tmp_path / "pack")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make.Maker, "make", second)
        with pytest.raises(ConfigError, match="another process is making"):
            pack(source, tmp_path / "pack")


# Checked afterwards


def test_verify_names_the_record_and_the_tensor_that_are_damaged(source: Path, tmp_path: Path) -> None:
    directory = pack(source, tmp_path / "pack", "int4")
    tensors = open_checkpoint(directory).tensors
    assert tensors.experts is not None
    num_bytes, damaged = verify_pack(directory, 2, lambda n: None)
    assert damaged == []
    assert num_bytes == sum(r.nbytes for r in tensors.experts.records()) + sum(
        ref.nbytes for name, ref in tensors.items() if ".mlp.experts." not in name
    )
    record, ref = tensors.experts.record(2, 6), tensors["model.layers.1.self_attn.k_proj.weight"]
    for file, offset in ((directory / "experts.pack", record.offset + 77), (ref.file, ref.offset + ref.nbytes - 1)):
        data = bytearray(file.read_bytes())
        data[offset] ^= 16
        file.write_bytes(data)
    _, damaged = verify_pack(directory, 2, lambda n: None)
    assert damaged == [
        Damage("experts.pack", 2, 6, None),
        Damage("dense.safetensors", None, None, "model.layers.1.self_attn.k_proj.weight"),
    ]
    with pytest.raises(CheckpointError, match="layer 2, expert 6 is damaged"):
        WeightReader(tensors, lambda n: None).packed_experts(2)
    with pytest.raises(ConfigError, match="no packed model"):
        verify_pack(source, 2, lambda n: None)


def test_a_pack_without_its_dense_file_or_with_anothers_is_refused(source: Path, tmp_path: Path) -> None:
    directory = pack(source, tmp_path / "pack")
    dense = directory / "dense.safetensors"
    dense.rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"no dense\.safetensors"):
        open_checkpoint(directory)
    save_file(load_file(source / "model.safetensors"), dense)
    with pytest.raises(CheckpointError, match="so has the file beside it"):
        open_checkpoint(directory)
    config = json.loads((directory / "config.json").read_text())
    dense.unlink()
    (tmp_path / "kept").rename(dense)
    (directory / "config.json").write_text(json.dumps(config | {"n_routed_experts": 9}))
    with pytest.raises(CheckpointError, match=r"mlp\.gate\.weight has shape|lacks the tensor"):
        check_tensors(ModelConfig.from_hf(open_checkpoint(directory).config), open_checkpoint(directory).tensors)


def test_a_record_of_another_layout_is_not_bound(source: Path, tmp_path: Path) -> None:
    experts = open_checkpoint(pack(source, tmp_path / "pack")).tensors.experts
    assert experts is not None
    layout = experts.layout(1)
    with pytest.raises(ValueError, match="record wanted"):
        kernels.bind_record(layout, np.zeros(layout.record_bytes - 4096, np.uint8))
