"""What is published: one folder, which all of the repository's models link into.

It has the graph, its weights, the tokenizer and ``export.json``. The version folders of the models
link into ``cross_encoder/current``, itself a link to that folder, so one rename changes all of it
at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ExportRefused
from .progress import bar


@contextmanager
def staging(models: Path) -> Iterator[Path]:
    """A folder beside the published ones, gone after an export that was not published.

    One export at a time: another waits here for the lock, which goes with its process.
    """
    if not os.access(models, os.W_OK | os.X_OK):
        raise ExportRefused(
            f"{models} cannot be written: export as its owner, or name another repository with "
            "--model-repository"
        )
    lock = os.open(models, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    for left_by_a_killed_export in models.glob(".staging-*"):
        shutil.rmtree(left_by_a_killed_export)
    folder = staging_folder(models)
    try:  # From before it is made: a signal may come right after.
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def staging_folder(models: Path) -> Path:
    return models / f".staging-{os.getpid()}"


def use(folder: Path) -> None:
    """Makes a published folder the current one, at once: what starts from now on serves it."""
    link = folder.with_name(f".current-{os.getpid()}")
    link.symlink_to(folder.name)
    link.replace(folder.with_name("current"))


def publish(staged: Path) -> Path:
    """Puts the staged folder in the place of the published one, which is kept for going back."""
    models = staged.parent
    for path in staged.iterdir():
        with path.open("rb") as file:
            os.fsync(file)
    digest = sha256(staged / "export.json")[:12]
    folder, current = models / f"export-{digest}", models / "current"
    previous = current.resolve().name
    # Again the same: the one before it is still to be kept.
    if folder.exists() and previous == folder.name:
        return folder
    staged.chmod(0o755)
    if not folder.exists():
        staged.rename(folder)
    use(folder)
    if (models / previous).exists():  # Else it is a slip of who went back by hand.
        for older in models.glob("export-*"):
            if older.name not in (folder.name, previous):
                shutil.rmtree(older)
    return folder


def sha256(path: Path) -> str:
    """Of a file's content, of which it holds a little at a time."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    options = {"total": size, "unit": "B", "unit_scale": True}
    with path.open("rb") as file, bar(f"Hashing {path.name}", **options) as progress:
        while chunk := file.read(2**20):
            digest.update(chunk)
            progress.update(len(chunk))
    return digest.hexdigest()
