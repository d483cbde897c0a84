"""``tritonrank serve`` and ``tritonrank rank`` as processes: start, stop, and what goes wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest
import tritonclient.grpc as triton
from conftest import new_repository, pipeline, start
from tritonclient.utils import InferenceServerException
from tritonrank import RerankClient, RerankError
from tritonrank_server.serving.serve import EmbeddedServer, ServerError, Settings

TRITONRANK = [sys.executable, "-m", "tritonrank"]


@contextmanager
def serving(
    repository: Path, python: str = sys.executable
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``tritonrank serve`` as a child process, and its gRPC address once it is ready."""
    ports = ["--grpc-port=0", "--http-port=0", "--metrics-port=0", "--rerank-port=0"]
    command = [python, "-m", "tritonrank", "serve", f"--model-repository={repository}", *ports]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr
            lines = iter(process.stderr.readline, "")
            ready = next(line for line in lines if line.startswith("Ready"))
            yield process, re.search(r"gRPC ([\d.:]+)", ready)[1]  # type: ignore[index]
        finally:
            process.kill()


def descendants(pid: int) -> set[int]:
    """Process ids of the children of a process, and of theirs."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    direct = {int(child) for path in children for child in path.read_text().split()}
    return direct.union(*map(descendants, direct))


def command_of(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")


def await_end(pids: set[int]) -> None:
    """Waits until none of the processes runs; a zombie does not run."""

    def runs(pid: int) -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    deadline = time.monotonic() + 60
    while running := {pid for pid in pids if runs(pid)}:
        assert time.monotonic() < deadline, f"still running: {running}"
        time.sleep(0.1)


def shared_memory(pid: int) -> list[str]:
    """What the server of this process has there; other tests' servers have theirs."""
    ours = re.compile(rf"tritonrank-(?:.*-)?{pid}-")
    return [name for name in os.listdir("/dev/shm") if ours.match(name)]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_it_ends_nothing_is_left(int8_repository: Path, how: signal.Signals) -> None:
    with serving(int8_repository) as (process, url):
        with RerankClient(url) as client:
            assert client.rank("tea", ["a car", "green tea"])[0].index == 1
        family = descendants(process.pid)
        assert len(family) >= 4  # tritonserver and three stubs
        assert shared_memory(process.pid)
        process.send_signal(how)
        await_end({process.pid, *family})
        assert process.wait() == (-how if how == signal.SIGKILL else 0)
    assert not shared_memory(process.pid)


def test_a_stop_does_not_wait_for_what_is_computed(int8_repository: Path) -> None:
    server = start(int8_repository)
    with server as running, RerankClient(running.grpc_url, timeout=600) as client:
        stubs = descendants(running.pid)
        work = threading.Thread(
            target=_ignoring_errors, args=(client.rank, "a", ["b " * 600] * 1000)
        )
        work.start()
        time.sleep(3)  # It takes minutes.
        stop = threading.Thread(target=server.__exit__, args=(None, None, None))
        stop.start()
        stop.join(60)
        assert not stop.is_alive()
        await_end(stubs)
        work.join()


def _ignoring_errors(function: Callable[..., object], *arguments: object) -> None:
    with suppress(RerankError):
        function(*arguments)


def test_log_is_readable(int8_repository: Path) -> None:
    with serving(int8_repository) as (process, _):
        process.terminate()
        assert process.stderr
        assert "CUDA" not in process.stderr.read()


def test_numpy_2(int8_repository: Path, tmp_path: Path) -> None:
    """Python 3.13 has no other; the stubs of Triton's wheel are compiled for NumPy 1."""
    # An environment of its own, since a stub does not read PYTHONPATH.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    [packages] = tmp_path.glob("venv/lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, packages, "numpy>=2"], check=True)
    others = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})"
    (packages / "others.pth").write_text(others)
    oracle = pipeline(int8_repository)
    with (
        serving(int8_repository, str(tmp_path / "venv" / "bin" / "python")) as (process, url),
        RerankClient(url, timeout=60) as client,
    ):
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in descendants(process.pid)]
        assert sum(f"{packages}/numpy" in each for each in maps) >= 3  # The stubs.
        for count in (1, 2, 50):
            documents = [f"{i} 일본 tea " * i for i in range(count)]
            expected = oracle.rank("green tea", documents, 20)
            ranking = client.rank("green tea", documents, 20)
            assert [each.index for each in ranking] == expected.indices.tolist()
            assert [each.logit for each in ranking] == expected.logits.tolist()
            assert [each.score for each in ranking] == expected.scores.tolist()


@pytest.mark.parametrize(
    ("who", "said"), [("server", r"tritonserver ended \(exit -11\)"), ("stub", "backend died")]
)
def test_what_dies_is_started_again(int8_repository: Path, who: str, said: str) -> None:
    with serving(int8_repository) as (process, url), RerankClient(url, timeout=60) as client:
        assert process.stderr
        log = iter(process.stderr.readline, "")
        for pause in (1, 2):
            [tritonserver] = {pid for pid in descendants(process.pid) if descendants(pid)}
            died = tritonserver if who == "server" else min(descendants(tritonserver))
            os.kill(died, signal.SIGSEGV)
            again = f"tritonrank: .*{said}: it is started again in {pause} s"
            assert any(re.match(again, line) for line in log)
            assert url in next(line for line in log if line.startswith("Ready"))
        assert client.rank("tea", ["a car", "green tea"])[0].index == 1


def test_a_log_that_nobody_reads_stops_nothing(int8_repository: Path) -> None:
    with serving(int8_repository) as (process, url), RerankClient(url, timeout=60) as client:
        assert process.stderr
        process.stderr.close()
        request = triton.InferInput("input_ids", [1, 4], "INT32")
        ones = triton.InferInput("lengths", [1, 1], "INT32")
        request.set_data_from_numpy(np.full((1, 4), 10**8, np.int32))
        ones.set_data_from_numpy(np.int32([[4]]))
        query = triton.InferInput("query_lengths", [1, 1], "INT32")
        query.set_data_from_numpy(np.int32([[1]]))
        with triton.InferenceServerClient(url) as direct:
            for _ in range(400):  # A pipe holds 64 KiB.
                with pytest.raises(InferenceServerException):
                    direct.infer("cross_encoder", [request, ones, query], client_timeout=60)
        assert client.rank("tea", ["a car", "green tea"])[0].index == 1


def test_a_name_for_a_host_and_a_proxy_around(
    int8_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
    with EmbeddedServer(Settings(int8_repository, host="localhost", **ports)) as server:
        assert server.http_url.startswith("127.0.0.1:")
    with pytest.raises(ServerError, match="pass an IPv4 address"):
        EmbeddedServer(Settings(int8_repository, host="::1", **ports))


def test_a_path_that_a_shell_would_read_is_refused(int8_repository: Path, tmp_path: Path) -> None:
    for name in ("with space", "$(touch injected)", "경로"):
        (tmp_path / name).symlink_to(int8_repository)
        with pytest.raises(ServerError, match="letters, digits"), start(tmp_path / name):
            pass


def test_the_gateway_comes_along_and_comes_back(int8_repository: Path) -> None:
    with serving(int8_repository) as (process, grpc_url):
        assert process.stderr
        for _ in range(2):
            told = next(line for line in process.stderr if "Rerank API" in line)
            url = re.search(r"http://\S+", told)[0]  # type: ignore[index]
            body = {"query": "tea", "documents": ["a car", "green tea"]}
            answer = httpx.post(f"{url}/rerank", json=body, timeout=30).json()
            with RerankClient(grpc_url) as client:
                expected = client.rank("tea", ["a car", "green tea"])
            scores = [(each["index"], each["relevance_score"]) for each in answer["results"]]
            assert scores == [(each.index, each.score) for each in expected]
            [gateway] = [pid for pid in descendants(process.pid) if "gateway" in command_of(pid)]
            os.kill(gateway, signal.SIGKILL)
            assert any("it is started again" in line for line in process.stderr)


def test_two_servers_side_by_side(int8_repository: Path) -> None:
    with start(int8_repository) as one, start(int8_repository) as other:
        assert one.grpc_url != other.grpc_url
        with RerankClient(one.grpc_url) as a, RerankClient(other.grpc_url) as b:
            assert a.rank("tea", ["green tea", "a car"]) == b.rank("tea", ["green tea", "a car"])
            alive = one.pid
        assert Path(f"/proc/{alive}").exists()


def test_port_in_use_is_one_clear_line(int8_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        command = [*TRITONRANK, "serve", "--model-repository", str(int8_repository)]
        done = subprocess.run(
            [*command, f"--http-port={port}", "--grpc-port=0", "--rerank-port=0"],
            capture_output=True,
            text=True,
        )
    assert done.returncode == 1
    assert re.search(rf"^tritonrank: cannot listen on 127.0.0.1:{port} .*$", done.stderr, re.M)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (["--grpc-port", "99999"], None, "cannot listen on 127.0.0.1:99999"),
        (["--", "--http-port=1"], None, "--http-port=1 is not for passing on"),
        ([], "", "must hold one key"),
        ([], "two words", "must hold one key"),
        ([], None, "cannot be read"),
    ],
)
def test_what_cannot_be_served_is_one_clear_line(
    arguments: list[str], key: str | None, message: str, int8_repository: Path, tmp_path: Path
) -> None:
    if key is not None:
        (tmp_path / "key").write_text(key)
    ports = ["--grpc-port=0", "--http-port=0", "--metrics-port=0", "--rerank-port=0"]
    command = [*TRITONRANK, "serve", f"--model-repository={int8_repository}", *ports, *arguments]
    environment = {} if arguments else {"TRITONRANK_ADMIN_KEY_FILE": str(tmp_path / "key")}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 1
    assert re.search(f"^tritonrank: .*{message}", done.stderr, re.M)
    assert "Traceback" not in done.stderr


def test_missing_model_is_one_clear_line(tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    for folder, message in [(repository, "run `tritonrank export`"), (tmp_path, "no model repos")]:
        with pytest.raises(ServerError, match=message):
            EmbeddedServer(Settings(folder, grpc_port=0, http_port=0, metrics_port=0)).__enter__()


def test_a_link_to_nowhere_is_one_clear_line(tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    (repository / "cross_encoder" / "current").symlink_to("export-mistyped")
    with pytest.raises(ServerError, match="points to export-mistyped"), start(repository):
        pass


def test_broken_model_is_noticed_at_start(int8_repository: Path, tmp_path: Path) -> None:
    repository = new_repository(tmp_path / "repository")
    current = repository / "cross_encoder" / "current"
    current.mkdir()
    (current / "model.onnx").write_bytes(b"not a graph")
    tokenizer = int8_repository / "tokenizer" / "1" / "tokenizer.json"
    (current / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    with pytest.raises(ServerError, match="stopped at start"), start(repository):
        pass
    assert "model.onnx" in repository.with_suffix(".log").read_text()


def test_rank_from_the_shell(int8_server: EmbeddedServer) -> None:
    command = [*TRITONRANK, "rank", "차", "-", "--json", "--top-k=2", "--url", int8_server.grpc_url]
    done = subprocess.run(
        command, input="a car\n차\n버스\n", capture_output=True, text=True, encoding="utf-8"
    )
    ranking = json.loads(done.stdout)
    assert done.returncode == 0
    assert ranking[0]["document"] == "차"
    assert len(ranking) == 2
