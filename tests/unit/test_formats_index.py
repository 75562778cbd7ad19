from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

import tiny
from crafted import TINY, safetensors_bytes, tiny_gguf, tiny_tensors, write_checkpoint
from glmlocal.errors import CheckpointError
from glmlocal.formats.index import Checkpoint, open_checkpoint, quoted
from glmlocal.models.config import ModelConfig, check_tensors


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "release", TINY, tiny_tensors(TINY))


def gguf_file(path: Path) -> Path:
    return tiny_gguf(TINY, tiny_tensors(TINY)).write(path)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_missing_path_suggests_the_near_miss(release: Path) -> None:
    message = refusal(release.with_name("relaese"))
    assert "does not exist" in message
    assert f"did you mean {release}?" in message
    assert "did you mean" not in refusal(release.with_name("zzz"))
    assert "no directory" in refusal(release / "a" / "b")


def test_paths_that_the_system_refuses_are_one_line(tmp_path: Path) -> None:
    assert "too long" in refusal(tmp_path / ("x" * 5000))
    assert "does not exist" in refusal(Path("a\0b"))


def test_an_empty_directory_says_what_was_wanted(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert ".gguf" in message
    (tmp_path / "notes.txt").touch()
    assert "notes.txt" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt", "x.ckpt"])
def test_pickles_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        assert "pickle" in refusal(path)
        assert name in refusal(path)


def test_a_pickle_beside_safetensors_is_not_looked_at(release: Path) -> None:
    (release / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert open_checkpoint(release).tensors.kind == "safetensors"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_file_of_a_release_points_to_its_directory(name: str, release: Path) -> None:
    assert f"give the directory that holds it: {release}" in refusal(release / name)


def test_a_file_of_another_kind_shows_how_it_starts(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"<html>\x1b[31m not found")
    assert "b'<htm'" in refusal(tmp_path / "model.gguf")
    assert "web page" in refusal(tmp_path / "model.gguf")
    (tmp_path / "empty.gguf").touch()
    assert "b''" in refusal(tmp_path / "empty.gguf")


def test_a_git_lfs_pointer_is_known_for_what_it_is(release: Path, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 4997484712\n"
    (tmp_path / "model.gguf").write_bytes(pointer)
    (tmp_path / "part-00001-of-00001.gguf").write_bytes(pointer)
    (release / "model.safetensors").write_bytes(pointer)
    for path in (tmp_path / "model.gguf", tmp_path / "part-00001-of-00001.gguf", release):
        assert "git lfs pull" in refusal(path)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "neither a file nor a directory" in refusal(tmp_path / "pipe.gguf")


def test_safetensors_without_a_config_are_refused(release: Path) -> None:
    (release / "config.json").unlink()
    assert "config.json" in refusal(release)


@pytest.mark.parametrize("content", ["", "{", "[]", '"x"', "\ud800"])
def test_a_broken_config_is_named(content: str, release: Path) -> None:
    (release / "config.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    assert "config.json" in refusal(release)


def test_a_config_of_absurd_size_is_not_read(release: Path) -> None:
    os.truncate(release / "config.json", 200_000_000)  # sparse
    assert "200,000,000" in refusal(release)


@pytest.mark.parametrize("name", ["model.gguf", "sha256-0a1b2c", "Model.GGUF"])
def test_a_gguf_file_is_known_by_its_content(name: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf_file(tmp_path / name))
    assert checkpoint.tensors.kind == "gguf"
    assert checkpoint.directory == tmp_path
    assert checkpoint.gguf_metadata is not None


def test_a_directory_with_one_gguf_is_that_model(tmp_path: Path) -> None:
    gguf_file(tmp_path / "model-Q4_K_M.gguf")
    for companion in ("mmproj-F16.gguf", "mtp-model-Q8_0.gguf", "imatrix.gguf", "README.md", "config.json"):
        (tmp_path / companion).write_bytes(b"not looked at")
    assert open_checkpoint(tmp_path).path == tmp_path / "model-Q4_K_M.gguf"


def test_a_directory_with_several_gguf_models_lists_them(tmp_path: Path) -> None:
    for name in ("a-Q4_0.gguf", "b-00001-of-00002.gguf", "b-00002-of-00002.gguf", "b-00001-of-00003.gguf"):
        (tmp_path / name).touch()
    message = refusal(tmp_path)
    assert "3 GGUF models" in message
    assert "'a-Q4_0.gguf'" in message


def test_safetensors_win_over_a_gguf_in_the_same_directory(release: Path) -> None:
    gguf_file(release / "model.gguf")
    assert open_checkpoint(release).tensors.kind == "safetensors"


def test_both_formats_of_one_model_give_the_same_names_shapes_and_bytes(release: Path, tmp_path: Path) -> None:
    one, other = open_checkpoint(release), open_checkpoint(gguf_file(tmp_path / "model.gguf"))
    assert set(one.tensors) == set(other.tensors)
    for name in one.tensors:
        assert one.tensors[name].shape == other.tensors[name].shape, name
        np.testing.assert_array_equal(one.tensors.read(name), other.tensors.read(name), err_msg=name)
    assert ModelConfig.from_hf(one.config) == ModelConfig.from_hf(other.config)
    assert check_tensors(ModelConfig.from_hf(one.config), one.tensors)
    assert check_tensors(ModelConfig.from_hf(other.config), other.tensors)


@pytest.mark.parametrize("config", list(tiny.CONFIGS))
def test_what_transformers_saves_is_what_is_expected_and_found(config: str, tmp_path: Path) -> None:
    model = tiny.build_model(**tiny.CONFIGS[config])
    checkpoint = open_checkpoint(tiny.save(model, tmp_path / "saved", max_shard_size="100KB"))
    assert len(checkpoint.tensors.files) > 1
    parsed = ModelConfig.from_hf(checkpoint.config)
    assert check_tensors(parsed, checkpoint.tensors) is False
    assert_equal_to_transformers(checkpoint, model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_releases_read_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny.build_model().to(dtype)
    assert_equal_to_transformers(open_checkpoint(tiny.save(model, tmp_path / "saved")), model)


def assert_equal_to_transformers(checkpoint: Checkpoint, model: torch.nn.Module) -> None:
    """Every parameter of transformers' model, its fused experts taken apart, is in the index with the same bits."""
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    wanted: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("experts.gate_up_proj"):
            for e, expert in enumerate(tensor):
                gate, up = expert.chunk(2)
                wanted[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                wanted[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            wanted |= {name.replace("down_proj", f"{e}.down_proj.weight"): expert for e, expert in enumerate(tensor)}
        else:
            wanted[name] = tensor
    if checkpoint.config["tie_word_embeddings"]:
        del wanted["lm_head.weight"]
    assert set(checkpoint.tensors) == set(wanted)
    for name, tensor in wanted.items():
        ref = checkpoint.tensors[name]
        assert (ref.shape, ref.dtype) == (tuple(tensor.shape), dtypes[tensor.dtype]), name
        stored = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
        np.testing.assert_array_equal(checkpoint.tensors.read(name), stored, err_msg=name)


def test_a_tensor_of_an_unsupported_dtype_is_listed_but_not_accepted(tmp_path: Path) -> None:
    tensors = tiny_tensors(TINY)
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"):
        tensors[name] = tensors[name].astype(np.uint8)
    checkpoint = open_checkpoint(write_checkpoint(tmp_path / "fp8", TINY, tensors))
    assert checkpoint.tensors["model.layers.0.mlp.up_proj.weight"].dtype == "F8_E4M3"
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight is F8_E4M3 with no scales"):
        check_tensors(ModelConfig.from_hf(checkpoint.config), checkpoint.tensors)


def test_quoting_keeps_a_message_on_its_line() -> None:
    assert quoted("a\x1b\n") == r"'a\x1b\n'"
    assert len(quoted("x" * 10**6)) < 250
    assert len(quoted(list(range(10**5)))) < 250
    assert quoted("\ud800") == r"'\ud800'"


def test_the_single_file_wins_over_an_index(release: Path) -> None:
    """As in transformers; a stale index does not matter."""
    (release / "model.safetensors.index.json").write_text("not JSON")
    assert open_checkpoint(release).tensors.files == (release / "model.safetensors",)
    (release / "model.safetensors").write_bytes(safetensors_bytes({}))
    assert len(open_checkpoint(release).tensors) == 0


def test_a_copy_is_the_bytes_of_the_file_and_maps_nothing(tmp_path: Path) -> None:
    data = np.random.default_rng(0).random((2048, 1024), np.float32)  # 8 MiB
    file = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": data, "b": data[:1]}, file)
    (tmp_path / "config.json").write_text("{}")
    with open_checkpoint(tmp_path).tensors as tensors:
        np.testing.assert_array_equal(tensors.copy("a"), tensors.read("a"))
        np.testing.assert_array_equal(tensors.copy("a", 4097, 12345), tensors.read("a")[4097:12345])
        assert tensors.copy("a", 5, 5).size == 0
        copy = tensors.copy("b")
        copy[:] = 0  # the caller's own
        assert tensors.read("b").any()
    with open_checkpoint(tmp_path).tensors as tensors:
        tensors.copy("a")
        assert str(file) not in Path("/proc/self/maps").read_text()
    with pytest.raises(ValueError, match="closed"):
        tensors.copy("a")


def test_a_file_that_became_shorter_is_one_line(release: Path) -> None:
    with open_checkpoint(release).tensors as tensors, (release / "model.safetensors").open("r+b") as file:
        file.truncate(9000)
        with pytest.raises(CheckpointError, match="has become shorter since it was opened"):
            tensors.copy("model.embed_tokens.weight")


def test_a_file_that_went_away_is_one_line(release: Path) -> None:
    with open_checkpoint(release).tensors as tensors:
        (release / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
            tensors.copy("model.embed_tokens.weight")
