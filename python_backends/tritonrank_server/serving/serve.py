"""The embedded server: Triton's own ``tritonserver`` as a child process of this one."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from ..stages.numpy2 import SWITCH
from ..wheels import WheelError
from . import assets
from .supervise import OPTIONS, BackendDied, KeyFileError, end, restrictions, shared_memory, wait

#: How long the models may take to load before the start counts as failed, in seconds. A stub of
#: the wrong Python does not fail, it hangs.
START_TIMEOUT = 120.0
#: A server that ends sooner, in seconds, is started again after a pause, of so many at most.
STAYS_UP, LONGEST_PAUSE = 60.0, 60.0
#: Starts a command that Linux stops when this process dies, even by SIGKILL; see prctl(2). Not by
#: a function between fork and exec: where gRPC is at work, its own such functions may abort.
DYING_WITH_PARENT = ("setpriv", "--pdeathsig", "TERM", "--")
#: Of tritonserver's arguments, those that this sets, and by which it sees that the server is ready.
OWN = (
    *("--model-repository", "--model-store", "--allow-grpc", "--allow-http", "--allow-metrics"),
    *("--grpc-address", "--grpc-port", "--http-address", "--http-port"),
    *("--metrics-address", "--metrics-port"),
)
#: What Triton reports of a machine without a GPU, of the folders of exports, and of being stopped.
HARMLESS = (
    b"CUDA driver",
    b"CudaDriverHelper",
    b"pinned system memory",
    b"ignore version directory",
)


class ServerError(RuntimeError):
    """The server cannot start, or did not stay up; the message says why and what to do."""


class _EndedBySignal(ServerError):
    """The server crashed while it started."""


@dataclass(frozen=True)
class Settings:
    """What to serve, and where. Port 0 takes any free port.

    Attributes:
        model_repository: the folder with ``reranker`` and the models of its stages.
        arguments: more of ``tritonserver``'s own, such as ``--grpc-use-ssl=true``.
        log: where Triton's log goes; default, this process's standard error.
    """

    model_repository: Path = Path("model_repository")
    host: str = "127.0.0.1"
    grpc_port: int = 8001
    http_port: int = 8000
    metrics_port: int = 8002
    arguments: Sequence[str] = ()
    log: Path | None = None


class EmbeddedServer:
    """A context manager: inside it the server is ready, after it the server is gone.

    The server also stops when this process dies, however it dies; or the thread that entered it.

    Attributes:
        settings: with the host's address, and the ports that it took.
        grpc_url, http_url, metrics_url: ``HOST:PORT`` of each service.
    """

    def __init__(self, settings: Settings) -> None:
        settings = replace(settings, host=_address(settings.host))
        wanted = (settings.grpc_port, settings.http_port, settings.metrics_port)
        ports = grpc, http, metrics = _free_ports(settings.host, *wanted)
        self.settings = replace(settings, grpc_port=grpc, http_port=http, metrics_port=metrics)
        self.grpc_url, self.http_url, self.metrics_url = (f"{settings.host}:{p}" for p in ports)
        # Its own prefix, so that servers side by side never meet in /dev/shm.
        self._shm_prefix = f"tritonrank-{os.getpid()}-{ports[0]}-"
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> EmbeddedServer:
        """Starts the server and waits until its models are ready.

        Raises:
            ModuleNotFoundError: the extra ``serving`` is not installed.
            ServerError: no model, a port in use, a Python that Triton cannot embed, or a server
                that died or was not ready in time.
        """
        for package in ("onnxruntime", "tokenizers"):  # Else it is the stubs that miss them.
            if importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(f"no package {package}", name=package)
        for argument in self.settings.arguments:
            if argument.startswith(OWN):
                raise ServerError(f"{argument} is not for passing on: serve has its own option")
        repository = self.settings.model_repository
        home = assets.tritonserver()
        _check_repository(repository, home)
        try:
            self._start(home)
        except _EndedBySignal:  # Seen twice in some 1,500 starts, and never again at once.
            self._start(home)
        return self

    def _start(self, home: Path) -> None:
        self._process = subprocess.Popen(
            [*DYING_WITH_PARENT, home / "bin" / "tritonserver", *self._arguments(home)],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # A Ctrl-C in the terminal is for this process, which then stops the server.
            start_new_session=True,
            # Where this process dies, the log's pipe breaks, and that must not kill the server
            # before it has cleaned up: it keeps ignoring SIGPIPE, as Python does.
            restore_signals=False,
        )
        self._log = threading.Thread(target=self._relay_log, daemon=True)
        self._log.start()
        try:
            self._await_readiness()
        except BaseException:
            self._stop()
            raise

    def __exit__(self, *error: object) -> None:
        self._stop()

    def wait(self) -> int | None:
        """Blocks until the server ends by itself; gives its exit status.

        Raises:
            BackendDied: a process of its Python backend ended before it.
        """
        return wait(self._process, threading.Event())

    @property
    def pid(self) -> int:
        """Process id of ``tritonserver``."""
        return self._process.pid

    def _arguments(self, home: Path) -> list[str]:
        settings = self.settings
        return [
            f"--model-repository={settings.model_repository}",
            "--model-config-name=cpu",
            f"--backend-directory={backends(home)}",
            shared_memory(self._shm_prefix),
            *OPTIONS,
            f"--grpc-address={settings.host}",
            f"--grpc-port={settings.grpc_port}",
            f"--http-address={settings.host}",
            f"--http-port={settings.http_port}",
            f"--metrics-address={settings.host}",
            f"--metrics-port={settings.metrics_port}",
            "--allow-gpu-metrics=false",
            "--log-info=false",
            *restrictions(settings.arguments),
            *settings.arguments,
        ]

    def _await_readiness(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        # The metrics' service starts last.
        while not (
            _answers(f"http://{self.http_url}/v2/health/ready")
            and _answers(f"http://{self.metrics_url}/metrics")
        ):
            status = self._process.poll()
            if status is not None:
                kind = _EndedBySignal if status < 0 else ServerError
                raise kind(f"tritonserver stopped at start (exit {status}): see its log")
            if time.monotonic() > deadline:
                raise ServerError(f"tritonserver was not ready after {START_TIMEOUT:.0f} s")
            time.sleep(0.05)

    def _relay_log(self) -> None:
        """Passes Triton's log on, without what is harmless."""
        assert self._process.stdout
        path = self.settings.log
        with open(path, "wb") if path else nullcontext(sys.stderr.buffer) as sink:
            for line in self._process.stdout:
                # Read on also where nobody reads the log, or Triton would wait for ever.
                with suppress(OSError):
                    if not any(words in line for words in HARMLESS):
                        sink.write(line)
                        sink.flush()

    def _stop(self) -> None:
        """Kills it. By SIGTERM, Triton 2.51 keeps its gRPC connections open while its models stop.

        It then answers what comes with NOT_FOUND, at once, so that it draws the requests of all who
        balance by load, and refuses the next step of those under way. A connection that breaks is
        UNAVAILABLE, on which clients try another server.
        """
        end(self._process, self._shm_prefix)
        self._log.join()


def _address(host: str) -> str:
    """The IPv4 address of a name: Triton's HTTP service takes no names."""
    try:
        return socket.gethostbyname(host)
    except OSError as error:
        raise ServerError(
            f"cannot listen on {host or 'an empty host'}: pass an IPv4 address, or a name of one"
        ) from error


def _free_ports(host: str, *ports: int) -> list[int]:
    """The ports, each seen to be free."""
    sockets = []
    try:
        for port in ports:
            sockets.append(socket.create_server((host, port)))
        return [each.getsockname()[1] for each in sockets]
    except (OSError, OverflowError) as error:
        raise ServerError(
            f"cannot listen on {host}:{port} ({error}): choose another port"
        ) from error
    finally:
        for each in sockets:
            each.close()


def _check_repository(repository: Path, home: Path) -> None:
    if not os.access(repository, os.R_OK | os.X_OK) and repository.exists():
        raise ServerError(f"{repository} cannot be read: run this as a user who may")
    if not (repository / "reranker" / "config.pbtxt").is_file():
        raise ServerError(
            f"no model repository at {repository}: run this in a checkout of tritonrank, or name "
            "the folder with --model-repository"
        )
    for path in (str(repository), sys.executable, str(home)):
        if not re.fullmatch(r"[\w./+=:,@%-]+", path, re.ASCII):
            raise ServerError(
                f"Triton hands {path!r} to a shell unquoted: use a path of letters, digits, . _ -"
            )
    current = repository / "cross_encoder" / "current"
    if current.is_symlink() and not current.exists():
        raise ServerError(f"{current} points to {current.readlink()}, which is not there: mend it")
    if not (repository / "cross_encoder" / "1" / "model.onnx").exists():
        raise ServerError(f"no model in {repository}: run `tritonrank export` first")


#: Past any proxy that the environment names.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _answers(url: str) -> bool:
    try:
        with DIRECT.open(url, timeout=1) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def backends(home: Path) -> Path:
    """The backend directory of this interpreter's version, made when the wheel was unpacked."""
    if platform.machine() != "x86_64":
        raise ServerError("Triton's wheel is for x86-64 only: use the container image")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not (home / "python_backend_stubs" / version).exists():
        raise ServerError(f"Triton's wheel has no stub for Python {version}: use 3.10 to 3.13")
    return home / f"backends-{version}"


def environment() -> dict[str, str]:
    """This process's environment, in which the stub finds this interpreter and its packages."""
    libraries = Path(sysconfig.get_config_var("LIBDIR"))
    library = sysconfig.get_config_var("INSTSONAME")
    # The stub of 3.13 brings its own libpython.
    if sys.version_info < (3, 13) and not (libraries / library).exists():
        raise ServerError(
            f"this Python has no shared library in {libraries}, and Triton embeds one: install "
            f"it (Debian, Ubuntu: apt install libpython{sysconfig.get_python_version()}), or use "
            "a Python built with --enable-shared"
        )
    inherited = os.environ.get("LD_LIBRARY_PATH")
    numpy_2 = int(version("numpy").partition(".")[0]) >= 2
    return (os.environ | {SWITCH: "1"} if numpy_2 else os.environ) | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(libraries), inherited])),
        # The tokenizer's batch calls use all cores; the stub is forked before any of them.
        "TOKENIZERS_PARALLELISM": "true",
    }


def main(argv: list[str] | None = None) -> int:
    """``tritonrank serve``: the embedded server in the foreground until Ctrl-C or SIGTERM.

    A server that ends by itself is started again, at the same ports. A gateway stands before it.
    """
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="tritonrank serve",
        description="Serve the model repository with the embedded Triton until Ctrl-C.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model-repository", type=Path, default=defaults.model_repository)
    parser.add_argument("--host", default=defaults.host, help="address to listen on")
    for service in ("grpc", "http", "metrics"):
        default = getattr(defaults, f"{service}_port")
        parser.add_argument(
            f"--{service}-port", type=int, default=default, help="0 takes any free port"
        )
    parser.add_argument(
        "--rerank-port", type=int, default=8080, help="of the HTTP gateway; 0 takes any free port"
    )
    parser.add_argument(
        "--no-rerank", dest="rerank_port", action="store_const", const=None, help="no HTTP gateway"
    )
    parser.add_argument(
        "arguments", nargs="*", metavar="-- ARGUMENT", help="more of tritonserver's own arguments"
    )
    options = vars(parser.parse_args(argv))
    rerank_port = options.pop("rerank_port")
    settings = Settings(**options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        _serve(settings, rerank_port)
    except (ServerError, KeyFileError, WheelError) as error:
        print(f"tritonrank: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


class _Gateway(threading.Thread):
    """The HTTP gateway of a server, as a process of its own; started again where it ends."""

    def __init__(self, host: str, port: int, url: str) -> None:
        super().__init__(daemon=True)
        self._command = [sys.executable, "-m", "tritonrank", "gateway", "--url", url]
        self._command += ["--host", host, "--port", str(port)]

    def run(self) -> None:
        while True:
            # Not for a Ctrl-C in the terminal, which is for this process, after which it ends.
            command = [*DYING_WITH_PARENT, *self._command]
            # Nor does it import what lies in the working directory.
            environment = os.environ | {"PYTHONSAFEPATH": "1"}
            done = subprocess.run(command, start_new_session=True, env=environment, check=False)
            status = done.returncode
            _say(f"tritonrank: the gateway ended (exit {status}): it is started again in 1 s")
            time.sleep(1)


def _serve(settings: Settings, rerank_port: int | None) -> NoReturn:
    """Serves until it is interrupted; a server that ends by itself is started again.

    At once, or after ever longer pauses where it did not stay up for a minute.
    """
    pause, served = 0.0, False
    host = _address(settings.host)
    if {"--grpc-use-ssl=true", "--grpc-use-ssl=1"} & {*settings.arguments}:
        _say("No HTTP gateway, since it needs to know of TLS: see tritonrank gateway --help")
        rerank_port = None
    if rerank_port is not None:
        try:
            others = (settings.grpc_port, settings.http_port, settings.metrics_port)
            rerank_port, *_ = _free_ports(host, rerank_port, *others)
        except ServerError as error:
            raise ServerError(f"{error} by --rerank-port, or --no-rerank") from error
    while True:
        _say("Starting Triton …")
        started = time.monotonic()
        try:
            with EmbeddedServer(settings) as server:
                settings, first, served = server.settings, not served, True  # The same ports again.
                _say(
                    f"Ready in {time.monotonic() - started:.1f} s: gRPC {server.grpc_url}, "
                    f"HTTP {server.http_url}, metrics {server.metrics_url}. Ctrl-C stops it."
                )
                if first and rerank_port is not None:
                    _Gateway(host, rerank_port, server.grpc_url).start()
                reason = f"tritonserver ended (exit {server.wait()})"
        except (BackendDied, ServerError) as error:
            if not served:
                raise
            reason = str(error)
        stayed_up = time.monotonic() - started > STAYS_UP
        pause = 0.0 if stayed_up else min(2 * pause or 1.0, LONGEST_PAUSE)
        _say(f"tritonrank: {reason}: it is started again in {pause:.0f} s; its log says why")
        time.sleep(pause)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
