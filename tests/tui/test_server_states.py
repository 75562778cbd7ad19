"""What the screen says about the server: loading, failed, gone, back, foreign; and the dashboard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from glmlocal_tui import connection
from tui.driving import running
from tui.scripted_server import Page, ScriptedServer, scripted, stats

pytestmark = pytest.mark.anyio


async def test_loading_then_an_error_in_place_then_ready(tmp_path: Path, server: ScriptedServer) -> None:
    loading = {"done_bytes": 5 << 30, "total_bytes": 20 << 30, "eta_s": 33.0, "tier": "gpu"}
    server.stats = stats("loading", loading=loading)
    async with running(tmp_path, server.url) as app:
        await app.wait("loading into GPU memory: 5.0 GiB of 20.0 GiB · 33 s left")
        assert "25%" in app.text
        assert "NVIDIA RTX 4090 ███" in app.text
        assert "21.0 GiB of 24.0 GiB" in app.text
        assert "hot experts" in app.text
        assert "int4 · KV fp8 · 1 MTP draft" in app.text
        server.stats = stats("error", error="needs 48.0 GiB of RAM, found 24.0 GiB; --quant int4 would fit", plan=None)
        await app.wait("The model could not be loaded.")
        assert "--quant int4 would fit" in app.text
        assert "NVIDIA" not in app.text
        server.stats = stats()
        await app.wait("ready: ask something")


async def test_the_server_goes_and_comes_back(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ASK_READY_S", 0.05)
    monkeypatch.setattr(connection, "_MOST_BACKOFF_S", 0.2)
    async with running(tmp_path, server.url) as app:
        await app.wait("ready: ask")
        await app.say("hello")
        await app.wait("Hello.")
        server.go_away()
        await app.wait("no answer from http://127.0.0.1")
        await app.say("anyone?")
        await app.wait(lambda: app.app.answering is None)
        assert app.text.count("no answer from") >= 1
        server.come_back()
        await app.wait(lambda: app.app.state.phase == "ready")
        await app.press("ctrl+r")
        await app.wait(lambda: len(server.requests) == 2)
        await app.wait("12 + 34 tokens")


async def test_a_refused_key_is_told(tmp_path: Path) -> None:
    with scripted(stats=stats(), key="right") as server:
        async with running(tmp_path, server.url, key="wrong") as app:
            await app.wait("The server wants another key.")
            assert "--api-key-file" in app.text
        async with running(tmp_path, server.url, key="right") as app:
            await app.wait("ready: ask")
            await app.say("hello")
            await app.wait("Hello.")


async def test_a_foreign_server_gets_no_field_it_may_not_know(tmp_path: Path) -> None:
    with scripted(stats=None, models=("llama-9", "other")) as server:
        async with running(tmp_path, server.url + "/v1", size=(140, 40)) as app:
            await app.wait("llama-9 · ready")
            await app.press("f4")
            await app.wait("This server has no /v1/stats")
            await app.say("/model other")
            await app.wait("other · ready")
            await app.say("/model nope")
            await app.wait("the server has no model 'nope'; it has llama-9, other")
            await app.say("hello")
            await app.wait("12 + 34 tokens")
            assert "20.0 tok/s" in app.text
            for word in ("KV cache", "memory", "experts", "disk"):
                assert f"{word} ─" not in app.text
    assert set(server.requests[0]) == {"model", "messages", "stream", "stream_options"}
    assert server.requests[0]["stream_options"] == {"include_usage": True}
    assert server.requests[0]["model"] == "other"


@pytest.mark.parametrize("status", [404, 500])
async def test_a_server_that_lists_no_models_can_be_asked(tmp_path: Path, status: int) -> None:
    with scripted(stats=None) as server:
        server.pages["/v1/models"] = Page(b"no", "text/plain", status)
        async with running(tmp_path, server.url) as app:
            await app.wait("ready: ask something")
            assert "no answer" not in app.text
            await app.say("hello")
            await app.wait("Hello.")
    assert "model" not in server.requests[0]  # not an empty name


@pytest.mark.parametrize("page", [Page(b"{}", status=500), Page(b"<html>", "text/html"), Page(b"[1]")])
async def test_anything_at_the_path_of_our_stats_is_another_kind_of_server(tmp_path: Path, page: Page) -> None:
    with scripted(stats=None, models=["qwen"]) as server:
        server.pages["/v1/stats"] = page
        async with running(tmp_path, server.url) as app:
            await app.wait("qwen · ready")


async def test_a_server_of_ours_that_fails_is_no_foreign_one(
    tmp_path: Path, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ASK_READY_S", 0.05)
    async with running(tmp_path, server.url) as app:
        await app.wait("GLM-4.5-Air · ready")
        server.pages["/v1/stats"] = Page(b'{"error": {"message": "broken"}}', status=500)
        await app.wait("the server said no (500): broken")


async def test_a_server_without_our_stats_is_asked_for_them_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_ASK_FOREIGN_S", 0.02)
    monkeypatch.setattr(connection, "_MOST_BACKOFF_S", 0.05)
    with scripted(stats=None, models=["qwen"]) as server:
        async with running(tmp_path, server.url) as app:
            await app.wait("qwen · ready")
            await app.wait(lambda: server.paths.count("/v1/models") > 3)
            assert server.paths.count("/v1/stats") == 1
            server.go_away()
            await app.wait("no answer from")
            server.stats = stats()  # another one has taken its place
            server.come_back()
            await app.wait("experts")


async def test_a_field_that_a_server_refuses_is_left_out(tmp_path: Path) -> None:
    with scripted(stats=None, models=["old"]) as server:
        server.refused = {"stream_options"}
        async with running(tmp_path, server.url) as app:
            await app.wait("old · ready")
            await app.say("hello")
            await app.wait("Hello.")
            await app.say("again")
            await app.wait(lambda: len(server.requests) == 3)
            assert "stream_options" not in server.requests[2]  # it is not asked for again
        server.refused = {"messages"}
        async with running(tmp_path, server.url) as app:
            await app.wait("old · ready")
            await app.say("hello")
            await app.wait("the server said no (400): unknown field messages")


async def test_what_came_instead_of_a_stream_is_told_or_shown(tmp_path: Path) -> None:
    whole = {
        "choices": [{"message": {"role": "assistant", "content": "A **whole** answer.", "reasoning_content": "hm"},
                     "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 6},
    }  # fmt: skip
    with scripted(stats=None, models=["odd"]) as server:
        server.script(
            Page(json.dumps(whole, indent=1).encode()),
            Page(b"<!DOCTYPE html>\n<title>Log in\x1b[2J</title>", "text/html"),
            Page(b'{"detail": "nope"}'),
            Page(b'{"error": {"message": "out of memory"}}'),
            Page(b"", "text/plain"),
        )
        async with running(tmp_path, server.url, size=(100, 50)) as app:
            await app.wait("odd · ready")
            await app.say("1")
            await app.wait("A whole answer.")
            await app.wait("5 + 6 tokens")
            assert "Thought" in app.text
            for said in (
                "no chat completion but a web page: '<!DOCTYPE html> <title>Log in␛[2J</title>'; is --url the root",
                """no chat completion but '{"detail": "nope"}'""",
                "out of memory",
                "closed the connection before the answer began",
            ):
                await app.wait(lambda: app.app.answering is None)
                await app.say("2")
                await app.wait(lambda said=said: said in app.flat.replace("▌ ", ""), 5)


async def test_the_names_we_were_given_reach_the_terminal_clean(tmp_path: Path) -> None:
    hostile = "http://127.0.0.1:1/\x1b[2J"
    async with running(tmp_path, hostile, target=hostile, model="m\x1b[1m", size=(100, 30)) as app:
        await app.wait("no answer from")
        assert "127.0.0.1:1/␛[2J" in app.text
        assert "m␛[1m" in app.text
        for line in app.lines:
            assert "\x1b" not in line


@pytest.mark.parametrize("size", [(40, 10), (20, 5), (6, 3), (1, 1)])
async def test_a_tiny_screen_shows_what_fits(tmp_path: Path, server: ScriptedServer, size: tuple[int, int]) -> None:
    async with running(tmp_path, server.url, size=size) as app:
        await app.wait(lambda: app.app.state.phase == "ready")
        await app.say("hello")
        await app.wait(lambda: app.app.answering is None and bool(app.app.conversation.messages))
        for key in ("f1", "escape", "f2", "f2", "f3", "escape", "f4", "f4", "f5", "escape", "pageup", "/", "ctrl+u"):
            await app.press(key)
            await app.pilot.pause(0.05)
            assert len(app.lines) == size[1]  # each of them as wide as the screen, or this fails
        await app.press("ctrl+end")
        if size == (40, 10):
            await app.wait("Hello.")
            await app.wait("GLM-4.5-Air · ready")
            await app.press("f4")
            await app.wait("tok/s")
            assert all("│" not in line[1:-1] for line in app.lines), app.text  # it has the whole width


async def test_the_models_name_is_whole_beside_a_panel(tmp_path: Path) -> None:
    with scripted(stats=None, models=["Qwen3-Next-80B-A3B-Instruct-4bit"]) as server:
        async with running(tmp_path, server.url) as app:
            await app.wait("Qwen3-Next-80B-A3B-Instruct-4bit · ready")
            await app.say("hello")
            await app.wait("12 + 34 tokens")
            await app.press("f4")
            await app.wait("no /v1/stats")
            assert "Qwen3-Next-80B-A3B-Instruct-4bit" in app.lines[-1]


async def test_the_dashboard_shows_every_tier(tmp_path: Path, server: ScriptedServer) -> None:
    server.stats = stats(speed={"decode_tokens_per_s": 12.5, "prefill_tokens_per_s": 340.0})
    async with running(tmp_path, server.url, size=(140, 40)) as app:
        await app.wait("ready: ask")
        await app.press("f4")
        await app.wait("12.5 tok/s")
        for words in (
            "340 tok/s", "0 / 32,768", "4,096 / 65,536", "75% of prompts", "VRAM", "71%", "93%", "1,200",
            "21.0 GiB / 24.0 GiB", "48.0 GiB / 64.0 GiB", "60.0 GiB / 1.0 TiB", "512 MB/s", "3.0 MiB", "1.5 s",
        ):  # fmt: skip
            assert words in app.text, words
        accepted = next(line for line in app.lines if "MTP accepted" in line)
        assert "75%" in accepted
        await app.press("f4")
        await app.gone("MTP accepted")
    server.stats = stats(tiers=None, nvme=None, mtp=None, plan=None)
    async with running(tmp_path, server.url) as app:  # 80 × 24, and everything resident
        await app.wait("ready: ask")
        await app.press("f4")
        await app.wait("KV cache")
        for word in ("MTP accepted", "VRAM", "disk ─", "memory ─"):
            assert word not in app.text


CHILD = """
import json, sys, threading, time
url, mode = sys.argv[1:]
if mode.startswith("fails:"):
    print("started", file=open(mode[6:], "a"))
    sys.exit("glmlocal: error: no such model: nowhere; `glmlocal ls` lists them")
print(json.dumps({"url": url, "pid": 1}), flush=True)
print("some log line", file=sys.stderr, flush=True)
sys.stdin.read()
print("bye", file=open(mode, "w"))
"""


async def test_a_server_of_our_own_is_started_found_and_ended(tmp_path: Path, server: ScriptedServer) -> None:
    command = (sys.executable, "-c", CHILD, server.url, str(tmp_path / "ended"))
    async with running(tmp_path, command=command) as app:
        await app.wait("ready: ask")
        await app.say("hello")
        await app.wait("Hello.")
        await app.press("ctrl+q")
    assert (tmp_path / "ended").read_text() == "bye\n"  # it read the end of its stdin


async def test_a_server_that_does_not_start_is_told_and_can_be_started_again(tmp_path: Path) -> None:
    command = (sys.executable, "-c", CHILD, "http://127.0.0.1:1", f"fails:{tmp_path / 'starts'}")
    async with running(tmp_path, command=command) as app:
        await app.wait("no such model: nowhere")
        assert "The model could not be loaded." in app.text
        assert "/restart tries again" in app.flat
        await app.say("/restart")
        await app.wait(lambda: (tmp_path / "starts").read_text().count("started") == 2)
        await app.wait("no such model: nowhere")
