"""The server as a process: announcing, loading, failing, draining, keys. The engine is scripted, the rest is real."""

from __future__ import annotations

import shutil
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from glmlocal.cli.main import main
from glmlocal.server import process
from served import SCRIPTED, Process, served

CHAT = "/v1/chat/completions"


def body(text: str, **fields: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": text}], **fields}


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *SCRIPTED, "serve", *arguments]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=60)


def test_the_port_is_open_while_the_model_loads(tmp_path: Path) -> None:
    with served(tmp_path, "b", ready=False, SCRIPTED_LOAD_S="2") as server:
        health = server.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        assert 0 <= health.json()["progress"] <= 1
        stats = server.http.get("/v1/stats").json()
        assert (stats["state"], stats["loading"]["total_bytes"]) == ("loading", 10_000)
        refused = server.http.post(CHAT, json=body("x"))
        assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (503, True)
        server.wait_until_ready()
        stats = server.http.get("/v1/stats").json()
        assert (stats["state"], stats["loading"], stats["error"]) == ("ready", None, None)
        assert server.http.post(CHAT, json=body("x")).status_code == 200


def test_the_end_of_stdin_ends_an_announced_server(tmp_path: Path) -> None:
    with served(tmp_path, "b") as server:
        assert server.process.stdin is not None
        server.process.stdin.close()
        assert server.exit_code() == 0
        server.process.stdin = None


def test_a_load_error_is_shown_in_place_or_ends_the_server(tmp_path: Path) -> None:
    with served(tmp_path, "broken", ready=False) as server:
        while (health := server.http.get("/health").json())["status"] == "loading":
            pass
        assert health == {"status": "error", "error": "broken is damaged; fetch it again"}
        assert server.http.get("/v1/stats").json()["error"] == "broken is damaged; fetch it again"
        assert "damaged" in server.http.post(CHAT, json=body("x")).json()["error"]["message"]
    done = serve("broken", "--port", "0")
    assert (done.returncode, done.stdout) == (1, "")
    assert "broken is damaged; fetch it again" in done.stderr
    assert "Traceback" not in done.stderr


def _stream_in_background(server: Process, words: str) -> tuple[threading.Thread, list[str]]:
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with (
            httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http,
            http.stream("POST", CHAT, json=body(words, stream=True)) as answer,
        ):
            try:
                for line in answer.iter_lines():
                    begun.set()
                    lines.append(line)
            except httpx.RemoteProtocolError:
                lines.append("cut off")

    thread = threading.Thread(target=read)
    thread.start()
    assert begun.wait(20)
    return thread, lines


def test_sigterm_lets_answers_end_and_takes_no_new_ones(tmp_path: Path) -> None:
    with served(tmp_path, "b", SCRIPTED_DELAY_S="0.01") as server:
        thread, lines = _stream_in_background(server, "say «" + "word " * 20 + "»")
        server.signal(signal.SIGTERM)
        thread.join()
        assert server.exit_code() == 0
        assert "data: [DONE]" in lines
        assert any('"finish_reason":"stop"' in line for line in lines)


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    with served(tmp_path, "b", SCRIPTED_DELAY_S="0.2") as server:
        thread, lines = _stream_in_background(server, "say «" + "word " * 500 + "»")
        server.signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            server.exit_code(1.0)
        server.signal(signal.SIGTERM)
        assert server.exit_code(10.0) != 0
        thread.join()
        assert "data: [DONE]" not in lines


def test_keys_come_from_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# mine\nsecret-1\n", "utf-8")
    keys.chmod(0o644)
    done = serve("b", "--api-key-file", str(keys))
    assert (done.returncode, "chmod 600" in done.stderr, done.stderr.count("\n")) == (2, True, 1)
    keys.chmod(0o600)
    with served(tmp_path, "b", "--api-key-file", str(keys), ready=False) as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/v1/models", headers={"x-api-key": "secret-1"}).status_code == 200
    assert "secret-1" not in (tmp_path / "serve.log").read_text("utf-8")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("b", "--host", "0.0.0.0"), "--api-key-file"),
        (("b", "--host", "::"), "--api-key-file"),
        (("b", "--host", "example.com"), "address"),
        (("b", "--port", "70000"), "port"),
        (("b", "--kv-limit", "1GiB"), "--kv-dir"),
        (("b", "--ssl-certfile", "x"), "belong together"),
        (("b", "--ssl-certfile", "/nowhere", "--ssl-keyfile", "/nowhere"), "TLS"),
        (("b", "--allow-origin", "chat.example"), "origin"),
        (("b", "--api-key-file", "/nowhere"), "/nowhere"),
        (("b", "--engine", "vllm"), ""),
        (("GLM-4.5-Air", "--engine", "vllm", "--gpus", "4xH100"), "vllm serve zai-org/GLM-4.5-Air"),
        (("GLM-4.5-Air", "--engine", "sglang", "--gpus", "4xH100"), "sglang.launch_server"),
    ],
)
def test_mistakes_are_one_line(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_bind", lambda listen: pytest.fail("it must not come to that"))
    code, (out, err) = main(["serve", *arguments]), capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("glmlocal: error: ")
    assert word in err


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    with served(tmp_path, "b", ready=False) as server:
        done = serve("b", "--port", server.url.rpartition(":")[2])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--port" in done.stderr


def test_names_and_logs(tmp_path: Path) -> None:
    with served(tmp_path, "b", "--served-model-name", "one", "--served-model-name", "two") as server:
        listed = server.http.get("/v1/models").json()
        assert [entry["id"] for entry in listed["data"]] == ["one", "two"]
        assert server.http.get("/v1/models/two").json()["id"] == "two"
        server.http.get("/%1b%5b31m%0aevil")
    log = (tmp_path / "serve.log").read_text("utf-8")
    assert "\x1b" not in log
    assert "\\x1b[31m\\nevil" in log


def test_help_imports_no_web_framework() -> None:
    code = (
        "import sys; from glmlocal.cli.main import main; main(['serve', '--help']); "
        "print(sorted({'fastapi', 'uvicorn', 'torch', 'pydantic'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "--served-model-name" in done.stdout
    assert done.stderr.strip() == "[]"


def test_json_on_stdout_is_all_there_is(tmp_path: Path) -> None:
    with served(tmp_path, "b") as server:
        server.http.post(CHAT, json=body("x"))
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
        assert server.process.stdout is not None
        assert server.process.stdout.read() == ""


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl, which makes the certificate")
def test_https_with_a_certificate_of_ones_own(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-nodes",
        "-days",
        "2",
    ]
    make += ["-subj", "/CN=glmlocal", "-addext", names, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    files = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with served(tmp_path, "b", *files, ready=False) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = httpx.Client(verify=ssl.create_default_context(cafile=str(certificate)), trust_env=False)
        with trusting, openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", http_client=trusting) as client:
            messages: Any = [{"role": "user", "content": "say «safely»"}]  # 503 while it loads is tried again
            answer = client.with_options(max_retries=20).chat.completions.create(model="glm", messages=messages)
            assert answer.choices[0].message.content == "safely"
            chunks = client.chat.completions.create(model="glm", messages=messages, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "safely"
        with pytest.raises(httpx.ConnectError, match="certificate"):
            httpx.get(f"{server.url}/health", trust_env=False)
        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"http://{server.url.removeprefix('https://')}/health", trust_env=False)
        server.signal(signal.SIGTERM)
        assert server.exit_code() == 0
