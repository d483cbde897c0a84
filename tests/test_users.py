"""Export and server as users who have no home, or may read but not write."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import new_repository
from test_export import Sample, write_checkpoint
from tritonrank_server.export import default_model
from tritonrank_server.serving import assets
from tritonrank_server.wheels import cache_folder

#: Root without its powers, to whom permissions apply as to anybody.
POWERLESS = ["setpriv", "--inh-caps=-all", "--bounding-set=-all", "--"] * (os.geteuid() == 0)
COMMAND = [*POWERLESS, sys.executable, "-m", "tritonrank"]
#: Of a user whom this machine does not know; what is not imported before, he may not be able to.
NOBODY = """
import encodings.idna, os, sys
from tritonrank_server.{0} import main
os.setgroups([])
os.setgid(12345)
os.setuid(12345)
sys.exit(main(sys.argv[1:]))
"""


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    without_home = {name: os.environ[name] for name in os.environ.keys() - {"HOME"}}
    return subprocess.run(command, env=without_home | environment, capture_output=True, text=True)


def read_only(folder: Path) -> Path:
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o555)
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return new_repository(tmp_path / "repository")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["export", "demo"])
def test_a_cache_that_cannot_be_written(
    command: str, repository: Path, int8_repository: Path, tmp_path: Path
) -> None:
    (tmp_path / "cache").mkdir(mode=0o555)
    model_repository = {"export": repository, "demo": int8_repository}[command]
    arguments = [command, f"--model-repository={model_repository}"]
    for variable in ({"XDG_CACHE_HOME": f"{tmp_path}/cache"}, {"HOME": f"{tmp_path}/cache"}):
        line = last_line(run([*COMMAND, *arguments], **variable))
        assert f"in {tmp_path}/cache" in line
        assert "(Permission denied): set XDG_CACHE_HOME to a folder" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("module", ["export.command", "serving.demo"])
def test_no_home(module: str, repository: Path) -> None:
    repository.chmod(0o777)
    (repository / "cross_encoder").chmod(0o777)
    for folder in repository.parents:
        folder.chmod(folder.stat().st_mode | 0o111)
    script = NOBODY.format(module)
    line = last_line(run([sys.executable, "-c", script, f"--model-repository={repository}"]))
    assert "no home folder" in line
    assert "set XDG_CACHE_HOME" in line


def test_a_cache_that_another_filled_serves(
    repository: Path, int8_repository: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache" / "tritonrank"
    for wheel in (default_model.folder(), assets.tritonserver()):
        folder = wheel.relative_to(cache_folder()).parts[0]
        shutil.copytree(cache_folder() / folder, cache / folder, symlinks=True)
    environment = {"XDG_CACHE_HOME": str(read_only(cache).parent)}
    exported = run([*COMMAND, "export", f"--model-repository={repository}"], **environment)
    assert exported.returncode == 0, exported.stderr
    served = run([*COMMAND, "demo", f"--model-repository={int8_repository}"], **environment)
    assert served.returncode == 0, served.stderr
    assert "富士山" in served.stdout


def test_a_repository_that_cannot_be_written(repository: Path) -> None:
    read_only(repository)
    line = last_line(run([*COMMAND, "export", f"--model-repository={repository}"]))
    assert f"{repository}/cross_encoder cannot be written" in line
    assert "--model-repository" in line


def test_a_hub_cache_that_another_filled(repository: Path, tmp_path: Path, sample: Sample) -> None:
    cached = tmp_path / "hf/hub/models--org--name"
    write_checkpoint(cached / "snapshots/0", "bert", sample)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("0")
    command = [*COMMAND, "export", "org/name", "--precision=fp32"]
    environment = {"HF_HOME": str(read_only(tmp_path / "hf")), "HF_HUB_OFFLINE": "1"}
    done = run([*command, f"--model-repository={repository}"], **environment)
    assert done.returncode == 0, done.stderr
    card = (repository / "cross_encoder/current/export.json").read_text()
    assert '"checkpoint": "org/name"' in card


def test_nothing_is_written_into_the_home_but_the_cache(tmp_path: Path) -> None:
    done = run([*COMMAND, "export", "--help"], HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
