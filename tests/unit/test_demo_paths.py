"""GLMLOCAL_HOME."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import platformdirs
import pytest

from glmlocal import paths
from glmlocal.errors import ConfigError
from glmlocal.paths import cache_home, demo_dir


@pytest.mark.parametrize("name", ["plain", "with spaces", "Größe 模型", "new\nline", "deep/er/still"])
def test_home_is_taken_as_it_is_and_not_created(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLMLOCAL_HOME", str(tmp_path / name))
    assert cache_home() == tmp_path / name
    assert demo_dir() == tmp_path / name / "demo"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("environ", [{}, {"GLMLOCAL_HOME": ""}])
def test_unset_or_empty_means_the_platforms_cache(environ: dict[str, str]) -> None:
    assert cache_home(environ) == Path(platformdirs.user_cache_dir("glmlocal"))


def test_tilde_is_the_users_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_home({"GLMLOCAL_HOME": "~/models"}) == tmp_path / "models"


@pytest.mark.parametrize("value", ["cache", "./cache", "~nobody-of-this-name/x", " "])
def test_relative_value_is_refused_and_quoted(value: str) -> None:
    with pytest.raises(ConfigError, match=f"GLMLOCAL_HOME is '{value}', a relative path"):
        cache_home({"GLMLOCAL_HOME": value})


@pytest.mark.parametrize("below", ["", "sub", "sub/deeper"])
def test_file_in_the_way_is_refused_and_quoted(below: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"GLMLOCAL_HOME is '.*file.*', but '.*/file' is not a directory"):
        cache_home({"GLMLOCAL_HOME": str(file / below)})


def test_dangling_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match="is not a directory"):
        cache_home({"GLMLOCAL_HOME": str(tmp_path / "link")})


def test_account_without_a_home_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths.platformdirs, "user_cache_dir", lambda name: "~/.cache/glmlocal")
    with pytest.raises(ConfigError, match="no home directory to cache in; set GLMLOCAL_HOME"):
        cache_home({})


def test_names_and_paths_need_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, glmlocal.resolve, glmlocal.paths, glmlocal.demo.cache\n"
        "print(sorted({'torch', 'numpy', 'gguf', 'httpx', 'rich'} & set(sys.modules)))"
    )
    root = Path(paths.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
