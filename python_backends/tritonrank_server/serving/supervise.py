"""The image's entry point: runs ``tritonserver``, closes what is for administrators, watches it.

Triton does not start a dead process of its Python backend again, and goes on saying that it is
live. So this ends with it, and what runs the container starts it anew. It is free of dependencies,
since it is also the way to run NVIDIA's own image.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..stages.shm import stages_prefix

#: Triton's own names of its services; see "limited endpoint access" in its documentation.
ADMINISTRATION = "model-repository,shared-memory,trace,logging"
#: All others but health.
USE = "inference,metadata,model-config,statistics"
#: The header with the administrators' key; in gRPC Triton prefixes it: triton-grpc-protocol-….
HEADER = "tritonrank-admin-key"
#: Names the file with that key, in the environment. Without one nobody gets in.
KEY_FILE = "TRITONRANK_ADMIN_KEY_FILE"
#: What every server of this project has.
OPTIONS = (
    # The configurations are complete. Completing them starts processes that end, as the dead do.
    "--disable-auto-complete-config",
    # Clients ask every 5 s whether a server that owes them an answer is still there.
    "--grpc-http2-min-recv-ping-interval-without-data=4000",
    # Of what is shared with each process of the Python backend. From 1 MB, the default, it grows
    # under way with usual requests, while the scorer answers by a thread of its own; one was seen
    # to die as it wrote past the end, which is a likely cause.
    f"--backend-config=python,shm-default-byte-size={8 * 1024 * 1024}",
)
#: How often the processes are looked at, in seconds.
INTERVAL = 0.5
#: The name of the Python backend's processes, as far as Linux keeps it.
STUB = "triton_python_backend_stub"[:15]


class KeyFileError(RuntimeError):
    """The administrators' key cannot be used; the message says why."""


class BackendDied(RuntimeError):
    """A process of Triton's Python backend died."""


def wait(process: subprocess.Popen[bytes], stop: threading.Event) -> int | None:
    """Blocks until ``tritonserver`` ends by itself, or it is to stop.

    Returns:
        Its exit status, or None where it is to stop.

    Raises:
        BackendDied: a process of its Python backend ended before it, whose requests would all fail.
    """
    seen: set[int] = set()
    while process.poll() is None:
        if stop.wait(INTERVAL):
            return None
        seen |= {pid for pid in _children(process.pid) if _comm(pid) == STUB}
        if not all(map(_runs, seen)):
            raise BackendDied("a process of Triton's Python backend died")
    return process.returncode


def end(process: subprocess.Popen[bytes], prefix: str) -> None:
    """Kills ``tritonserver``, which leads a process group, and removes what it shares.

    With it go its backends' processes: one that was at work would wait for ever for a server that
    is gone.

    Args:
        process: the server.
        prefix: of the names of its regions of shared memory.
    """
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    free(prefix)
    free(stages_prefix(process.pid))


def free(prefix: str) -> None:
    """Removes the regions of shared memory whose names begin so."""
    for region in Path("/dev/shm").glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


def shared_memory(prefix: str) -> str:
    """The argument by which the regions' names begin so."""
    return f"--backend-config=python,shm-region-prefix-name={prefix}"


def _children(pid: int) -> set[int]:
    """Process ids of its children; see proc(5)."""
    found: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # A thread that just ended.
            found.update(map(int, path.read_text().split()))
    return found


def _comm(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _runs(pid: int) -> bool:
    """Whether there is such a process that has not ended, though nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def restrictions(arguments: Sequence[str]) -> list[str]:
    """Arguments that close both protocols' administration to whoever has not the key.

    Where gRPC asks for certificates, HTTP, which cannot, must be no way round them: there it
    answers whether the server is up, and needs the key for all else.

    Args:
        arguments: the others.

    Raises:
        KeyFileError: the key cannot be read, or is none that Triton can take.
    """
    key = _key()
    tls = any(
        each.startswith("--grpc-use-ssl") and not each.endswith(("=false", "=0"))
        for each in arguments
    )
    http = f"{ADMINISTRATION},{USE}" if tls else ADMINISTRATION
    return [
        f"--http-restricted-api={http}:{HEADER}={key}",
        f"--grpc-restricted-protocol={ADMINISTRATION}:{HEADER}={key}",
    ]


def _key() -> str:
    path = os.environ.get(KEY_FILE)
    if not path:
        return secrets.token_urlsafe()
    try:
        key = Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{KEY_FILE} names {path}, which cannot be read: {error}") from error
    if not re.fullmatch(r"[\w.~+/-]+", key, re.ASCII):
        raise KeyFileError(
            f"{path}, which {KEY_FILE} names, must hold one key of letters, digits and . ~ + / - _"
        )
    return key


def main(command: Sequence[str]) -> int:
    """Runs ``tritonserver`` with its arguments until SIGTERM or SIGINT.

    Then it answers what it has begun and takes no more, for 30 s at most, ``--exit-timeout-secs``.
    """
    # In a pod, what a killed container left is still there, and this is process 1 again.
    prefix = f"tritonrank-{socket.gethostname()}-{os.getpid()}-"
    free(prefix)
    stop = threading.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: stop.set())
    try:
        own = [shared_memory(prefix), *OPTIONS, *restrictions(command)]
        process = subprocess.Popen([*command, *own], start_new_session=True)
    except (KeyFileError, OSError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    try:
        status = wait(process, stop)
        if status is None:
            process.terminate()
            status = process.wait()
        return status
    except BackendDied as error:
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    finally:
        end(process, prefix)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
