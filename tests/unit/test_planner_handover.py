"""Launch commands of other engines against the official recipes, word for word."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from glmlocal.errors import ConfigError
from glmlocal.planner.handover import Served, launch_command, tensor_parallel_sizes
from glmlocal.planner.hardware import parse_gpus
from glmlocal.planner.machine import Cpu, Machine, Ram
from glmlocal.planner.plan import Wants
from glmlocal.units import GIB

# Sizes of glm-reference.md §1.3 and §4.
AIR = Served("zai-org/GLM-4.5-Air", "GLM-4.5-Air", "bf16", 220_937_649_664, 188_416, 8, 96, 131072)
AIR_FP8 = replace(AIR, repository="zai-org/GLM-4.5-Air-FP8", format="fp8_channel", weights_bytes=112_500_000_000)
BIG = Served("zai-org/GLM-4.5", "GLM-4.5", "bf16", 716_700_000_000, 376_832, 8, 96, 131072)
BIG_FP8 = replace(BIG, repository="zai-org/GLM-4.5-FP8", format="fp8_channel", weights_bytes=361_000_000_000)
GLM_47_FP8 = replace(BIG_FP8, repository="zai-org/GLM-4.7-FP8", family="GLM-4.7", max_position_embeddings=202752)
GLM_5_FP8 = Served("zai-org/GLM-5-FP8", "GLM-5", "fp8_block128", 756_000_000_000, 109_824, 1, 64, 202752)
GLM_52_FP8 = replace(GLM_5_FP8, repository="zai-org/GLM-5.2-FP8", family="GLM-5.2", max_position_embeddings=1_048_576)


def _machine(gpus: str, own: bool = False) -> Machine:
    return Machine(parse_gpus(gpus), Cpu("CPU", 8, 1, 1), Ram(2 << 40, 2 << 40, 300), None, is_this_machine=own)


def _command(engine: str, served: Served, gpus: str, **wants: object) -> str:
    """The command on one line, comments left out; a shell reads it as we do."""
    text = launch_command(engine, served, _machine(gpus), Wants(**wants))  # type: ignore[arg-type]
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    return shlex.join(shlex.split("\n".join(lines).replace("\\\n", " ")))


def test_the_text_is_comments_and_one_command() -> None:
    assert launch_command("vllm", AIR_FP8, _machine("2xH100"), Wants()) == (
        "# GLM-4.5-Air-FP8 on 2× H100: 52.39 GiB of weights on each of 79.65 GiB (modelled, not tried)\n"
        "vllm serve zai-org/GLM-4.5-Air-FP8 \\\n"
        "  --tensor-parallel-size 2 \\\n"
        "  --speculative-config.method mtp \\\n"
        "  --speculative-config.num_speculative_tokens 1 \\\n"
        "  --tool-call-parser glm45 \\\n"
        "  --reasoning-parser glm45 \\\n"
        "  --enable-auto-tool-choice \\\n"
        "  --served-model-name glm-4.5-air-fp8"
    )


_MTP_1 = "--speculative-config.method mtp --speculative-config.num_speculative_tokens 1"
_GLM45 = "--tool-call-parser glm45 --reasoning-parser glm45 --enable-auto-tool-choice"
_GLM47 = "--tool-call-parser glm47 --reasoning-parser glm45 --enable-auto-tool-choice"
_EAGLE = (
    "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
    "--speculative-num-draft-tokens 4"
)


@pytest.mark.parametrize(
    ("served", "gpus", "command"),
    [
        (
            BIG,
            "16xH100",
            f"vllm serve zai-org/GLM-4.5 --tensor-parallel-size 16 {_MTP_1} {_GLM45} --served-model-name glm-4.5 "
            "--nnodes 2 --node-rank 0 --master-addr HEAD_ADDRESS",
        ),
        (
            BIG,
            "8xH100",
            f"vllm serve zai-org/GLM-4.5 --tensor-parallel-size 8 {_MTP_1} {_GLM45} --cpu-offload-gb 16 "
            "--max-model-len 27648 --served-model-name glm-4.5",
        ),
        (
            BIG,
            "8xH200",
            f"vllm serve zai-org/GLM-4.5 --tensor-parallel-size 8 {_MTP_1} {_GLM45} --served-model-name glm-4.5",
        ),
        (
            AIR_FP8,
            "1xH200",
            f"vllm serve zai-org/GLM-4.5-Air-FP8 --tensor-parallel-size 1 {_MTP_1} {_GLM45} --max-model-len 105472 "
            "--served-model-name glm-4.5-air-fp8",
        ),
        (
            GLM_47_FP8,
            "4xH200",
            f"vllm serve zai-org/GLM-4.7-FP8 --tensor-parallel-size 4 {_MTP_1} {_GLM47} "
            "--served-model-name glm-4.7-fp8",
        ),
        (
            GLM_5_FP8,
            "8xH200",
            "vllm serve zai-org/GLM-5-FP8 --tensor-parallel-size 8 --speculative-config.method mtp "
            f"--speculative-config.num_speculative_tokens 3 {_GLM47} --served-model-name glm-5-fp8",
        ),
        (
            GLM_52_FP8,
            "8xB200",
            "vllm serve zai-org/GLM-5.2-FP8 --tensor-parallel-size 8 --kv-cache-dtype fp8_e4m3 "
            "--speculative-config.method mtp --speculative-config.num_speculative_tokens 5 "
            f"{_GLM47} --served-model-name glm-5.2-fp8",
        ),
    ],
)
def test_vllm(served: Served, gpus: str, command: str) -> None:
    assert _command("vllm", served, gpus) == command


_SGLANG = "python3 -m sglang.launch_server --model-path zai-org"


@pytest.mark.parametrize(
    ("served", "gpus", "command"),
    [
        (
            AIR,
            "8xH100",
            f"{_SGLANG}/GLM-4.5-Air --tp-size 8 --tool-call-parser glm45 --reasoning-parser glm45 {_EAGLE} "
            "--mem-fraction-static 0.7 --served-model-name glm-4.5-air --host 0.0.0.0 --port 8000",
        ),
        (
            AIR_FP8,
            "4xH100",
            f"{_SGLANG}/GLM-4.5-Air-FP8 --tp-size 4 --tool-call-parser glm45 --reasoning-parser glm45 {_EAGLE} "
            "--mem-fraction-static 0.7 --disable-shared-experts-fusion --served-model-name glm-4.5-air-fp8 "
            "--host 0.0.0.0 --port 8000",
        ),
        (
            AIR_FP8,  # the official minimum; 0.7 of it is less than the weights
            "1xH200",
            f"{_SGLANG}/GLM-4.5-Air-FP8 --tp-size 1 --tool-call-parser glm45 --reasoning-parser glm45 {_EAGLE} "
            "--mem-fraction-static 0.9 --disable-shared-experts-fusion --served-model-name glm-4.5-air-fp8 "
            "--host 0.0.0.0 --port 8000",
        ),
        (
            BIG,
            "16xH100",
            f"{_SGLANG}/GLM-4.5 --tp-size 16 --tool-call-parser glm45 --reasoning-parser glm45 {_EAGLE} "
            "--mem-fraction-static 0.7 --served-model-name glm-4.5 --host 0.0.0.0 --port 8000 "
            "--nnodes 2 --node-rank 0 --dist-init-addr HEAD_ADDRESS:20000",
        ),
        (
            GLM_47_FP8,
            "8xH200",
            f"{_SGLANG}/GLM-4.7-FP8 --tp-size 8 --tool-call-parser glm47 --reasoning-parser glm45 {_EAGLE} "
            "--mem-fraction-static 0.8 --served-model-name glm-4.7-fp8 --host 0.0.0.0 --port 8000",
        ),
        (
            GLM_5_FP8,
            "8xH200",
            f"{_SGLANG}/GLM-5-FP8 --tp-size 8 --tool-call-parser glm47 --reasoning-parser glm45 {_EAGLE} "
            "--mem-fraction-static 0.85 --served-model-name glm-5-fp8 --host 0.0.0.0 --port 8000",
        ),
    ],
)
def test_sglang(served: Served, gpus: str, command: str) -> None:
    assert _command("sglang", served, gpus) == command


@pytest.mark.parametrize(
    ("served", "gpus"),
    [
        (BIG, "16xH100"), (BIG, "8xH200"), (BIG_FP8, "8xH100"), (BIG_FP8, "4xH200"),
        (AIR, "4xH100"), (AIR, "2xH200"), (AIR_FP8, "2xH100"), (AIR_FP8, "1xH200"),
    ],
)  # fmt: skip
def test_the_official_minimum_is_launched_by_both_engines_without_offload(served: Served, gpus: str) -> None:
    for engine in ("vllm", "sglang"):
        command = _command(engine, served, gpus)
        assert "offload" not in command
        size = gpus.partition("x")[0]
        assert f"--tensor-parallel-size {size} " in command or f"--tp-size {size} " in command


def test_what_the_user_asked_for_arrives() -> None:
    wants = {"context": 65536, "batch": 2, "kv_dtype": "fp8", "draft": 2, "vram_bytes": 70 * GIB}
    vllm = _command("vllm", AIR_FP8, "2xH100", **wants)
    for words in (
        "--max-model-len 65536", "--max-num-seqs 2", "--kv-cache-dtype fp8_e4m3", "num_speculative_tokens 2",
        "--gpu-memory-utilization 0.79",
    ):  # fmt: skip
        assert words in vllm
    sglang = _command("sglang", AIR_FP8, "2xH100", **{**wants, "vram_bytes": None})
    for words in (
        "--context-length 65536", "--max-running-requests 2", "--kv-cache-dtype fp8_e4m3",
        "--speculative-num-steps 2", "--speculative-num-draft-tokens 3",
    ):  # fmt: skip
        assert words in sglang
    for engine in ("vllm", "sglang"):
        assert "speculative" not in _command(engine, AIR_FP8, "2xH100", draft=0)
        assert "speculative" not in _command(engine, replace(AIR_FP8, has_mtp=False), "2xH100")


def test_offload_as_asked_or_as_needed() -> None:
    assert "--cpu-offload-gb 16 " in _command("vllm", BIG, "8xH100", cpu_offload_bytes=16 * GIB)
    assert "--cpu-offload-gb 24 " in _command("vllm", BIG, "8xH100", cpu_offload_bytes=24 * GIB)
    assert "--cpu-offload-gb 8 " in _command("vllm", BIG, "8xH200", cpu_offload_bytes=8 * GIB)
    text = launch_command("vllm", BIG, _machine("8xH100"), Wants())
    assert "128 GiB in all" in text  # 8 × 16: what the host must have
    with pytest.raises(ConfigError, match=r"--cpu-offload-gb 16 \(with 128 GiB of free host memory\), or 16× H100"):
        _command("vllm", BIG, "8xH100", cpu_offload_bytes=8 * GIB)
    with pytest.raises(ConfigError, match="--cpu-offload-gb 16"):
        _command("vllm", BIG, "8xH100", offload=False)
    with pytest.raises(ConfigError, match="16× H100 would hold it") as error:
        _command("sglang", BIG, "8xH100")
    assert "--cpu-offload-gb" not in str(error.value)  # SGLang's recipe has none
    with pytest.raises(ConfigError, match="vLLM's alone"):
        _command("sglang", BIG, "16xH100", cpu_offload_bytes=8 * GIB)


@pytest.mark.parametrize(
    ("served", "gpus", "wants", "message"),
    [
        (AIR, "none", {}, "--gpus 8xH100"),
        (AIR, "1xRTX4090", {}, "16× RTX 4090 would hold it"),
        (AIR, "1xH100", {}, "4× H100 would hold it"),
        (replace(AIR, format="gguf"), "8xH100", {}, "take the FP8 release of GLM-4.5-Air"),
        (replace(AIR, format="mlx"), "8xH100", {}, "which is mlx"),
        (AIR, "8xH100", {"kv_dtype": "int8"}, "give auto, bf16 or fp8"),
        (AIR, "8xH100", {"context": 200_000}, "more than the 131072"),
        (BIG, "8xH100", {"context": 131_072}, "leave room for"),
    ],
)
def test_what_cannot_run_is_refused_with_what_would(
    served: Served, gpus: str, wants: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        _command("vllm", served, gpus, **wants)
    assert "\n" not in str(error.value)


def test_what_is_said_to_hold_it_does() -> None:
    for served, gpus, enough in (
        (AIR, "1xH100", "4xH100"),
        (AIR, "1xRTX4090", "16xRTX4090"),
        (BIG, "1xH200", "8xH200"),
    ):
        with pytest.raises(ConfigError, match=enough.replace("x", "× ").replace("RTX4", "RTX 4")):
            _command("vllm", served, gpus, offload=False)
        _command("vllm", served, enough, offload=False)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(ConfigError, match="vllm or sglang"):
        _command("tgi", AIR, "8xH100")


def test_gpus_of_another_kind_or_beyond_a_power_of_two_take_no_part() -> None:
    text = launch_command("vllm", AIR_FP8, _machine("1xRTX4090,3xH100"), Wants())
    assert "--tensor-parallel-size 2" in text
    assert "# 2 further GPUs take no part" in text
    assert "further" not in launch_command("vllm", AIR_FP8, _machine("2xH100"), Wants())


def test_the_kind_of_gpu_with_the_most_memory_together_is_used() -> None:
    assert "on 8× H100" in launch_command("vllm", AIR_FP8, _machine("2xH200,8xH100"), Wants())


def test_the_context_that_is_left_counts_heads_and_latents_as_each_gpu_holds_them() -> None:
    """Each GPU has the whole latent cache of GLM-5; 16 GPUs hold the 8 kv heads of GLM-4.5 twice."""
    room = 0.9 * 81559 * 2**20 - 3 * GIB
    tokens = (room - 756e9 / 16) / 109_824
    short = replace(GLM_52_FP8, kv_bytes_per_token=109_824)
    assert f"--max-model-len {int(tokens * 2) // 1024 * 1024} " in _command("vllm", short, "16xH100")  # fp8
    large = replace(BIG, kv_bytes_per_token=3_768_320)
    tokens = (room - 716.7e9 / 16) / (3_768_320 / 8)
    assert f"--max-model-len {int(tokens) // 1024 * 1024} " in _command("vllm", large, "16xH100")


def test_a_limit_per_gpu_can_be_too_little() -> None:
    with pytest.raises(ConfigError, match="does not fit 2× H100 under sglang"):
        _command("sglang", AIR_FP8, "2xH100", vram_bytes=40 * GIB)
    assert "--cpu-offload-gb 12 " in _command("vllm", AIR_FP8, "2xH100", vram_bytes=52 * GIB)


def test_sizes_divide_the_heads_and_no_block_of_weights() -> None:
    assert tensor_parallel_sizes(AIR, 64) == (32, 16, 8, 4, 2, 1)  # 96 heads
    assert tensor_parallel_sizes(AIR, 7) == (4, 2, 1)
    assert tensor_parallel_sizes(GLM_5_FP8, 64) == (16, 8, 4, 2, 1)  # 64 heads, but 2048 / 32 is half a block
    assert tensor_parallel_sizes(replace(GLM_5_FP8, format="bf16"), 64) == (64, 32, 16, 8, 4, 2, 1)


def test_nodes_are_eight_gpus_each_unless_the_machine_is_this_one() -> None:
    text = launch_command("vllm", BIG, _machine("32xH100"), Wants())
    assert "# 4 nodes of 8 GPUs" in text
    assert "on the 3 others the same with --node-rank 1 --headless, 2, …" in text
    assert "--nnodes 4" in text
    assert "headless" not in launch_command("sglang", BIG, _machine("16xH100"), Wants())
    assert "--nnodes" not in launch_command("vllm", BIG, _machine("16xH100", own=True), Wants())


def test_weights_in_groups_are_shared_out_as_whole_experts() -> None:
    awq = replace(AIR, repository="QuantTrio/GLM-4.5-Air-AWQ-FP16Mix", format="awq", weights_bytes=66_000_000_000)
    assert "--tensor-parallel-size 4 --enable-expert-parallel " in _command("vllm", awq, "4x4090")
    assert "--tp-size 4 --ep-size 4 " in _command("sglang", awq, "4x4090")
    assert "expert-parallel" not in _command("vllm", AIR, "4xH100")


def test_fp8_weights_on_a_gpu_without_fp8_are_noted() -> None:
    assert "no FP8 units" in launch_command("vllm", AIR_FP8, _machine("4xA100"), Wants())
    assert "no FP8 units" not in launch_command("vllm", AIR_FP8, _machine("4xH100"), Wants())


def test_a_name_for_the_shell_is_quoted() -> None:
    odd = replace(AIR, repository="me/GLM 4.5;rm -rf")
    assert "vllm serve 'me/GLM 4.5;rm -rf'" in launch_command("vllm", odd, _machine("8xH100"), Wants())
