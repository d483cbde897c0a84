"""What can be known of the image, the manifests and the monitoring without a container engine.

The image's tree is made as its Dockerfile says, and its entry point is run there for real, with the
embedded ``tritonserver`` in place of the base image's and its scorer in place of a GPU's.
"""

from __future__ import annotations

import http.server
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import kubernetes_validate
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http
import trustme
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from conftest import GatewayProcess, gateway_at
from dockerfile_parse import DockerfileParser
from test_serve import await_end, descendants, shared_memory
from tritonclient.utils import InferenceServerException
from tritonrank import TLS, InvalidRequestError, RerankClient, RerankError
from tritonrank.gateway.command import GRACE
from tritonrank_server.export.publish import use
from tritonrank_server.serving import assets, serve
from tritonrank_server.serving.serve import DYING_WITH_PARENT, EmbeddedServer, Settings

from loadtest.bench import new_repository
from loadtest.replicas import Fleet, Phase, nginx, scenario

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
MANIFESTS = DOCKER / "kubernetes"
BIN = Path(sys.executable).parent
#: Options of the image's Triton that the embedded one, which is older, does not have.
NEWER = ("--http-max-input-size",)
#: Metrics of Triton that need an NVIDIA GPU; see "GPU metrics" in its documentation.
OF_A_GPU = {
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_power_usage",
}
#: What the names of the gateway's metrics begin with.
GATEWAYS = "tritonrank_gateway_"


@dataclass(frozen=True)
class Image:
    """A tree as the image has it, and how its process is started.

    Attributes:
        entrypoint: the command, with the tree's paths.
        healthcheck: the command that tells whether it is ready.
        environment: its variables.
    """

    entrypoint: list[str]
    healthcheck: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Container:
    """A process started as the image starts it; ``HOST:PORT`` of its services."""

    process: subprocess.Popen[bytes]
    grpc_url: str
    http_url: str
    metrics_url: str


@pytest.fixture(scope="module")
def image(int8_repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The stage ``serving`` with the weights that the last stage adds."""
    root = tmp_path_factory.mktemp("image")
    environment: dict[str, str] = {}
    for instruction, value in instructions("serving"):
        words = value.split()
        if instruction == "COPY":
            _copy(ROOT / words[0], root / words[1].lstrip("/"), words[1].endswith("/"))
        elif instruction == "RUN" and "pip install" in value:
            install = re.split(r"\s+", value.partition("python3 ")[2])
            command = [word.replace("/opt/", f"{root}/opt/") for word in install]
            subprocess.run([sys.executable, *command, "--quiet"], check=True)
        elif instruction == "ENV":
            environment = dict(word.split("=", 1) for word in words)
    current = root / "models" / "cross_encoder" / "current"
    shutil.copytree((int8_repository / "cross_encoder" / "current").resolve(), current)
    base = _base_image(root / "base", root / "opt" / "tritonrank" / "packages")
    entrypoint, healthcheck = _commands("serving")
    return Image(
        [word.replace("=/models", f"={root}/models") for word in entrypoint],
        healthcheck,
        serve.environment() | environment | {"PATH": f"{base}:{os.environ['PATH']}"},
    )


def instructions(stage: str) -> list[tuple[str, str]]:
    """What the Dockerfile says of a stage."""
    parser = DockerfileParser(fileobj=io.BytesIO((DOCKER / "Dockerfile").read_bytes()))
    found, here = [], False
    for each in parser.structure:
        if each["instruction"] == "FROM":
            here = each["value"].endswith(f" AS {stage}")
        elif here:
            found.append((each["instruction"], each["value"]))
    return found


def _commands(stage: str) -> tuple[list[str], list[str]]:
    """A stage's entry point, and its health check."""
    of = dict(instructions(stage))
    return json.loads(of["ENTRYPOINT"]), json.loads(of["HEALTHCHECK"].partition("CMD")[2])


def exposed(stage: str) -> set[int]:
    """The ports of a stage."""
    return {int(port) for port in dict(instructions(stage))["EXPOSE"].split()}


def _copy(source: Path, target: Path, into: bool) -> None:
    if source.is_file():
        target = target / source.name if into else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    else:
        unpublished = shutil.ignore_patterns(
            "current", "export-*", ".staging-*", "__pycache__", "*.egg-info"
        )
        shutil.copytree(source, target, symlinks=True, ignore=unpublished)


def _base_image(folder: Path, added: Path) -> str:
    """What the base image has: Python with NumPy, no more, and Triton. Gives their PATH.

    Args:
        folder: where.
        added: the packages that the image makes Python find, too.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "python"], check=True)
    [packages] = folder.glob("python/lib/python*/site-packages")
    for part in Path(np.__file__).parents[1].glob("numpy*"):
        shutil.copytree(part, packages / part.name)
    (packages / "tritonrank.pth").write_text(str(added))
    return f"{folder / 'python' / 'bin'}:{assets.tritonserver() / 'bin'}"


@contextmanager
def running(image: Image, log: Path, *arguments: str, **environment: str) -> Iterator[Container]:
    """``docker run IMAGE --model-config-name=cpu ARGUMENT…``, ready."""
    free = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
    ports = [each.getsockname()[1] for each in free]
    for each in free:
        each.close()
    embedded = [
        f"--backend-directory={serve.backends(assets.tritonserver())}",
        *("--model-config-name=cpu", "--allow-gpu-metrics=false", "--http-address=127.0.0.1"),
        *("--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"),
        *(f"--{name}-port={port}" for name, port in zip(("grpc", "http", "metrics"), ports)),
    ]
    command = [word for word in image.entrypoint if not word.startswith(NEWER)]
    urls = [f"127.0.0.1:{port}" for port in ports]
    with (
        log.open("wb") as sink,
        subprocess.Popen(
            [*DYING_WITH_PARENT, *command, *embedded, *arguments],
            env=image.environment | environment,
            stdout=sink,
            stderr=sink,
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 60
            while _status(f"http://{urls[1]}/v2/health/ready") != 200:
                assert process.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < deadline, log.read_text()[-2000:]
                time.sleep(0.1)
            yield Container(process, *urls)
        finally:
            process.terminate()
            process.wait(20)


def _status(url: str, **headers: str) -> int | None:
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


@pytest.fixture(scope="module")
def container(image: Image, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Container]:
    """One with an administrators' key, and connections that end every second."""
    folder = tmp_path_factory.mktemp("container")
    (folder / "key").write_text("secret\n")
    with running(
        image,
        folder / "log",
        "--grpc-max-connection-age=1000",
        TRITONRANK_ADMIN_KEY_FILE=str(folder / "key"),
    ) as container:
        yield container


def test_the_image_serves_with_what_it_has(image: Image, container: Container) -> None:
    for url, status in ((container.http_url, 0), ("127.0.0.1:9", 1)):
        check = [word.replace("127.0.0.1:8000", url) for word in image.healthcheck]
        done = subprocess.run(check, env=image.environment, stderr=subprocess.DEVNULL)
        assert done.returncode == status
    with RerankClient(container.grpc_url) as client:
        ranking = client.rank("tea", ["a car", "green tea"])
        assert [each.index for each in ranking] == [1, 0]
        # Connections end meanwhile, and none of the calls fails.
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            assert client.rank("tea", ["a car", "green tea"]) == ranking


def test_administration_needs_the_key(container: Container) -> None:
    shared_memory = f"http://{container.http_url}/v2/systemsharedmemory/status"
    assert _status(shared_memory) == 403
    assert _status(shared_memory, **{"tritonrank-admin-key": "wrong"}) == 403
    assert _status(shared_memory, **{"tritonrank-admin-key": "secret"}) == 200
    with triton.InferenceServerClient(container.grpc_url) as client:
        for call in (
            client.get_model_repository_index,
            client.get_system_shared_memory_status,
            client.get_trace_settings,
            client.get_log_settings,
        ):
            with pytest.raises(InferenceServerException, match="restricted"):
                call()
            call(headers={"triton-grpc-protocol-tritonrank-admin-key": "secret"})
        for call in (client.unload_model, client.load_model):
            with pytest.raises(InferenceServerException, match="restricted"):
                call("reranker")


def _metrics(url: str) -> str:
    with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as response:
        return str(response.read(), "utf-8")


def test_the_end_of_a_container(image: Image, tmp_path: Path) -> None:
    with running(image, tmp_path / "log") as container:
        family = descendants(container.process.pid)
        container.process.send_signal(signal.SIGTERM)
        assert container.process.wait(20) == 0
        await_end(family)
    with running(image, tmp_path / "log") as container:
        assert shared_memory(container.process.pid)
        [server] = {pid for pid in descendants(container.process.pid) if descendants(pid)}
        os.kill(max(descendants(server)), signal.SIGKILL)
        assert container.process.wait(20) == 1
    assert "a process of Triton's Python backend died" in (tmp_path / "log").read_text()
    assert not shared_memory(container.process.pid)


def test_a_stop_at_the_start_is_not_lost(tmp_path: Path) -> None:
    started = tmp_path / "started"
    command = ["sh", "-c", f"touch {started}; exec sleep 60"]
    supervise = [sys.executable, "-m", "tritonrank_server.serving.supervise", *command]
    with subprocess.Popen(supervise) as process:
        while not started.exists():
            assert process.poll() is None
            time.sleep(0.001)
        family = descendants(process.pid)
        process.terminate()
        process.wait(10)
    await_end(family)


# Transport security.


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    """PEM files: an authority, a server's and a client's certificate of it, and another's."""
    authority, stranger = trustme.CA(), trustme.CA()
    files = {"ca": tmp_path / "ca.pem"}
    authority.cert_pem.write_to_path(str(files["ca"]))
    for name, of in (("server", authority), ("client", authority), ("other", stranger)):
        certificate = of.issue_cert("127.0.0.1" if name == "server" else name)
        files[name], files[f"{name}-key"] = tmp_path / f"{name}.pem", tmp_path / f"{name}.key"
        certificate.private_key_pem.write_to_path(str(files[f"{name}-key"]))
        certificate.cert_chain_pems[0].write_to_path(str(files[name]))
    return files


def test_without_a_certificate_nobody_gets_in(
    int8_repository: Path, certificates: dict[str, Path]
) -> None:
    of = certificates
    arguments = [
        "--grpc-use-ssl-mutual=true",
        f"--grpc-server-cert={of['server']}",
        f"--grpc-server-key={of['server-key']}",
        f"--grpc-root-cert={of['ca']}",
    ]
    settings = Settings(int8_repository, grpc_port=0, http_port=0, metrics_port=0)
    known = TLS(of["ca"], of["client-key"], of["client"])
    strangers = [None, TLS(of["ca"]), TLS(of["ca"], of["other-key"], of["other"])]
    with EmbeddedServer(replace(settings, arguments=arguments)) as server:
        with RerankClient(server.grpc_url, tls=known) as client:
            assert client.rank("tea", ["a car", "green tea"])[0].index == 1
        files = [("root-certificates", "ca"), ("private-key", "client-key")]
        files += [("certificate-chain", "client")]
        command = [sys.executable, "-m", "tritonrank", "rank", "tea", "--url", server.grpc_url]
        command += [f"--{option}={of[name]}" for option, name in files]
        done = subprocess.run(command, input="a car\ngreen tea\n", capture_output=True, text=True)
        assert done.stdout.splitlines()[1].endswith("green tea")
        for stranger in strangers:
            with (
                RerankClient(server.grpc_url, tls=stranger, timeout=3) as client,
                pytest.raises(RerankError),
            ):
                client.rank("tea", ["a car", "green tea"])
        # HTTP has no TLS, and so is no way round.
        with tritonclient.http.InferenceServerClient(server.http_url) as client:
            assert client.is_server_ready()
            for call in (client.get_server_metadata, client.get_inference_statistics):
                with pytest.raises(InferenceServerException, match="restricted"):
                    call()
            query = tritonclient.http.InferInput("QUERY", [1], "BYTES")
            query.set_data_from_numpy(np.array(["tea"], object))
            with pytest.raises(InferenceServerException, match="restricted"):
                client.infer("reranker", [query])


# What it tells.


def test_a_request_is_traced_through_the_stages(int8_repository: Path, tmp_path: Path) -> None:
    spans: list[dict[str, Any]] = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            for resource in body["resourceSpans"]:
                spans.extend(span for scope in resource["scopeSpans"] for span in scope["spans"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    collector = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{collector.server_port}/v1/traces"
    # As docker/README.md has it.
    arguments = [
        *("--trace-config=mode=opentelemetry", f"--trace-config=opentelemetry,url={url}"),
        *("--trace-config=rate=1", "--trace-config=level=TIMESTAMPS"),
    ]
    settings = Settings(int8_repository, grpc_port=0, http_port=0, metrics_port=0)
    with EmbeddedServer(replace(settings, arguments=arguments)) as server:
        with RerankClient(server.grpc_url) as client:
            client.rank("tea", ["a car", "green tea"], request_id="search-17")
        with triton.InferenceServerClient(server.grpc_url) as client:
            parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
            for _ in range(3):  # Once, on a busy machine, the server overlooked one.
                client.infer("reranker", _inputs(), headers={"traceparent": parent})
        deadline = time.monotonic() + 30
        while sum(span["name"] == "InferRequest" for span in spans) < 4:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    collector.shutdown()
    traces: dict[str, set[str]] = {}
    for span in spans:
        traces.setdefault(span["traceId"], set()).add(span["name"])
    stages = {"InferRequest", "reranker", "tokenizer", "cross_encoder", "sorter", "compute"}
    assert all(names == stages for names in traces.values())
    assert "0af7651916cd43dd8448eb211c80319c" in traces
    assert json.dumps(spans).count("search-17") >= 4


def test_log_lines_carry_the_request_id(int8_repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    settings = Settings(int8_repository, grpc_port=0, http_port=0, metrics_port=0, log=log)
    verbose = replace(settings, arguments=["--log-verbose=1"])
    with (
        EmbeddedServer(verbose) as server,
        RerankClient(server.grpc_url) as client,
        pytest.raises(InvalidRequestError),
    ):
        client.rank("tea", [], request_id="search-18")
    assert "[request id: search-18] DOCUMENTS is empty: send at least one" in log.read_text()


def _inputs() -> list[triton.InferInput]:
    query = triton.InferInput("QUERY", [1], "BYTES")
    query.set_data_from_numpy(np.array(["tea"], object))
    documents = triton.InferInput("DOCUMENTS", [2], "BYTES")
    documents.set_data_from_numpy(np.array(["a car", "green tea"], object))
    return [query, documents]


def queries() -> dict[str, str]:
    """All of PromQL in the dashboard, the alerts and the autoscaling, by where it stands."""
    dashboard = json.loads((DOCKER / "grafana" / "tritonrank.json").read_text())
    found = {
        f"panel {panel['title']}, {target['refId']}": target["expr"]
        for panel in dashboard["panels"]
        for target in panel["targets"]
    }
    for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"]:
        found |= {f"alert {rule['alert']}": rule["expr"] for rule in group["rules"]}
    scaled = yaml.safe_load((MANIFESTS / "base" / "scaledobject.yaml").read_text())
    [trigger] = scaled["spec"]["triggers"]
    return found | {"autoscaling": trigger["metadata"]["query"]}


def test_every_metric_exists(container: Container) -> None:
    with RerankClient(container.grpc_url) as client:
        client.rank("tea", ["a car"])
    of_the_gateway = {name for name in named() if name.startswith(GATEWAYS)}
    missing = named() - of_the_gateway - told(container.metrics_url)
    assert missing <= OF_A_GPU


def named() -> set[str]:
    """The metrics that the queries name."""
    found = set(re.findall(r"\b(?:nv|tritonrank)_\w+", " ".join(queries().values())))
    assert found, "nothing was read"
    return found


def told(url: str) -> set[str]:
    """The metrics that there are."""
    return set(re.findall(r"^(\w+)(?:{| )", _metrics(url), re.M))


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt install prometheus")
def test_alerts_go_off() -> None:
    subprocess.run(["promtool", "test", "rules", ROOT / "tests" / "alerts.yml"], check=True)


@contextmanager
def prometheus(folder: Path, targets: dict[str, str]) -> Iterator[str]:
    """The one of compose; ``HOST:PORT`` of it.

    Args:
        folder: an empty one.
        targets: whom it asks, by their addresses in compose.
    """
    if not shutil.which("prometheus"):
        pytest.skip("no prometheus: apt install prometheus")
    config = (DOCKER / "prometheus.yml").read_text().replace("5s", "1s")
    for inside, outside in targets.items():
        assert inside in config
        config = config.replace(inside, outside)
    (folder / "prometheus.yml").write_text(config)
    shutil.copy(DOCKER / "alerts.yml", folder)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *(*DYING_WITH_PARENT, "prometheus", f"--config.file={folder}/prometheus.yml"),
        *(f"--storage.tsdb.path={folder}/data", f"--web.listen-address={url}"),
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield url
        finally:
            process.terminate()


def test_queries_on_a_real_prometheus(container: Container, tmp_path: Path) -> None:
    with (
        prometheus(tmp_path, {"server:8002": container.metrics_url}) as url,
        RerankClient(container.grpc_url) as client,
    ):
        deadline = time.monotonic() + 30
        of_requests = 'rate(nv_inference_request_success{model="sorter"}[1m]) > 0'
        while not _results(url, of_requests):
            assert time.monotonic() < deadline
            client.rank(f"tea {time.monotonic()}", ["a car", "green tea"])
            time.sleep(0.2)
        for place, query in queries().items():
            answer = _results(url, query.replace("$instance", ".*"))
            elsewhere = any(name in query for name in (*OF_A_GPU, GATEWAYS))
            if place.startswith("panel") and not elsewhere:
                assert answer, f"{place}: {query}"


def _results(url: str, query: str) -> list[Any]:
    """What Prometheus answers; none while it starts."""
    query = query.replace("$__rate_interval", "1m")
    data = urllib.parse.urlencode({"query": query}).encode()
    with suppress(ConnectionError, urllib.error.URLError):
        try:
            with urllib.request.urlopen(f"http://{url}/api/v1/query", data, timeout=10) as response:
                return list(json.load(response)["data"]["result"])
        except urllib.error.HTTPError as error:
            if error.code != 503:  # Then it starts.
                raise AssertionError(f"{query}: {error.read()!r}") from error
    return []


# Files for other programs.


def test_dockerfile_is_clean() -> None:
    subprocess.run([BIN / "hadolint", DOCKER / "Dockerfile"], check=True)


def test_compose_is_valid() -> None:
    schema = [BIN / "check-jsonschema", "--builtin-schema", "vendor.compose-spec"]
    subprocess.run([*schema, DOCKER / "compose.yaml"], check=True)
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    for service in compose["services"].values():
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert source in compose["volumes"] or (DOCKER / source).is_file(), mount
        for secret in service.get("secrets", []):
            assert secret in compose["secrets"], secret


def objects(overlay: str) -> list[dict[str, Any]]:
    """What ``kubectl apply -k`` would send."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    command = ["kubectl", "kustomize", MANIFESTS / overlay]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("overlay", ["base", "volume", "oci", "gateway"])
def test_manifests_are_valid(overlay: str) -> None:
    custom = {"ScaledObject": ScaledObject, "ServiceMonitor": ServiceMonitor}
    for each in objects(overlay):
        if model := custom.get(each["kind"]):
            # Fields that it does not know are lost on the way.
            known = model.model_validate(each).model_dump(by_alias=True, exclude_unset=True)
            assert _keys(each) <= _keys(known)
        else:
            kubernetes_validate.validate(each, "1.34", strict=True)


def _keys(value: object, path: str = "") -> set[str]:
    if isinstance(value, dict):
        return {path}.union(*(_keys(each, f"{path}.{key}") for key, each in value.items()))
    if isinstance(value, list):
        return {path}.union(*(_keys(each, path) for each in value))
    return {path}


def by_kind(overlay: str) -> dict[str, dict[str, Any]]:
    """The objects of an overlay, which has one of each kind."""
    every = objects(overlay)
    found = {each["kind"]: each for each in every}
    assert len(found) == len(every)
    return found


def pods() -> dict[str, dict[str, Any]]:
    """Specifications of the servers' pods, by the file they come from."""
    deployment = by_kind("base")["Deployment"]
    kserve = yaml.safe_load((MANIFESTS / "kserve.yaml").read_text())
    scaling = {"minReplicas", "maxReplicas"}
    predictor = kserve["spec"]["predictor"]
    return {
        "deployment": deployment["spec"]["template"]["spec"],
        "kserve": {name: value for name, value in predictor.items() if name not in scaling},
    }


@pytest.mark.parametrize("name", ["deployment", "kserve"])
def test_pods_fit_the_image(name: str, container: Container) -> None:
    spec = pods()[name]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}
    kubernetes_validate.validate(pod, "1.34", strict=True)
    [server] = spec["containers"]
    ports = {each["name"]: each["containerPort"] for each in server["ports"]}
    assert {*ports.values()} <= exposed("serving")
    probes = [value["httpGet"] for key, value in server.items() if key.endswith("Probe")]
    assert len(probes) >= 2
    for probe in probes:
        assert ports.get(probe["port"], probe["port"]) == 8000  # Triton's own default for HTTP.
        assert _status(f"http://{container.http_url}{probe['path']}") == 200
    # Long enough for the wait before the end, which is longer than a connection lasts.
    age = re.search(r"--grpc-max-connection-age=(\d+)", (DOCKER / "Dockerfile").read_text())[1]  # type: ignore[index]
    wait = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 2 * int(age) / 1000 < wait
    # And for what Triton has begun, by its own default.
    assert wait + 30 < spec["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", ["base", "gateway"])
def test_services_reach_the_pods(overlay: str) -> None:
    every = by_kind(overlay)
    template = every["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    [server] = template["spec"]["containers"]
    ports = {each["name"] for each in server["ports"]}
    service = every["Service"]
    selectors = {
        "Service": service["spec"]["selector"],
        "Deployment": every["Deployment"]["spec"]["selector"]["matchLabels"],
        "PodDisruptionBudget": every["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        "NetworkPolicy": every["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    }
    for kind, selector in selectors.items():
        assert selector.items() <= labels, kind
        assert selector, kind
    monitor = every["ServiceMonitor"]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    offered = {each["name"]: each["targetPort"] for each in service["spec"]["ports"]}
    assert {*offered.values()} <= ports
    assert {each["port"] for each in monitor["endpoints"]} <= {*offered}
    policy = every["NetworkPolicy"]["spec"]["ingress"]
    assert {port["port"] for rule in policy for port in rule["ports"]} <= ports
    [scaler] = {"ScaledObject", "HorizontalPodAutoscaler"} & {*every}
    target = every[scaler]["spec"]["scaleTargetRef"]
    assert target.get("kind", "Deployment") == "Deployment"
    assert target["name"] == every["Deployment"]["metadata"]["name"]
    # Else each `kubectl apply` would undo what the autoscaler did.
    assert "replicas" not in every["Deployment"]["spec"]


# Several servers.


@pytest.fixture(scope="module")
def fleet(
    int8_repository: Path, fp32_repository: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """Three servers of INT8, with FP32 beside it."""
    repository = new_repository(tmp_path_factory.mktemp("fleet") / "repository")
    for name, source in (("int8", int8_repository), ("fp32", fp32_repository)):
        published = (source / "cross_encoder" / "current").resolve()
        shutil.copytree(published, repository / "cross_encoder" / f"export-{name}")
    use(repository / "cross_encoder" / "export-int8")
    with Fleet(repository, 3) as fleet:
        yield fleet


def lossless(phases: Iterable[Phase]) -> None:
    """Checks that no request failed, in none of them, and that all servers share the load."""
    for phase in phases:
        assert phase.failures == {}, phase
        assert phase.requests > 0, phase
        if phase.name == "nothing":
            assert min(phase.shares) > 0.15, phase


def test_no_request_is_lost_by_the_client(fleet: Fleet) -> None:
    lossless(scenario(fleet, fleet.urls, "export-int8", "export-fp32", 1))


@pytest.mark.skipif(not shutil.which("nginx"), reason="no nginx: apt install nginx-light")
def test_no_request_is_lost_by_nginx(fleet: Fleet) -> None:
    with nginx(fleet.urls) as url:
        lossless(islice(scenario(fleet, url, "export-int8", "export-fp32", 1), 3))


def test_a_server_that_hangs_is_left(fleet: Fleet) -> None:
    with RerankClient(fleet.urls, timeout=30) as client:
        expected = client.rank("tea", ["a car", "green tea"])
        fleet.signal(0, signal.SIGSTOP)
        try:
            for _ in range(4):  # One of them reaches it, and is answered by another.
                assert client.rank("tea", ["a car", "green tea"]) == expected
        finally:
            fleet.signal(0, signal.SIGCONT)


# The gateway.


@pytest.fixture(scope="module")
def gateway_image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The stage ``gateway``: Python, and what it installs from what it copies."""
    folder = tmp_path_factory.mktemp("gateway-image")
    source, python = folder / "src", folder / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", python], check=True)
    for instruction, value in instructions("gateway"):
        if instruction == "COPY":
            *names, target = value.split()
            for name in names:
                _copy(ROOT / name, source / target, target.endswith("/"))
        elif instruction == "RUN":
            install = shlex.split(value.partition("pip install ")[2])
            pip = [sys.executable, "-m", "pip", "--python", python / "bin" / "python3", "--quiet"]
            subprocess.run([*pip, "install", *install], cwd=source, check=True)
    return Image(*_commands("gateway"), {"PATH": f"{python / 'bin'}:{os.environ['PATH']}"})


@contextmanager
def gateway_running(
    image: Image, container: Container, folder: Path, *options: str
) -> Iterator[GatewayProcess]:
    """``docker run IMAGE --url=… OPTION…``, with the key ``secret``."""
    (folder / "api-keys").write_text("secret\n")
    with gateway_at(
        container.grpc_url,
        folder / "log",
        *("--host=127.0.0.1", f"--api-key-file={folder}/api-keys", *options),
        start=image.entrypoint,
        environment=image.environment,
    ) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def gateway_container(
    gateway_image: Image, container: Container, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GatewayProcess]:
    folder = tmp_path_factory.mktemp("gateway-container")
    with gateway_running(gateway_image, container, folder, "--cache=1000") as gateway:
        yield gateway


def _rerank(gateway: GatewayProcess, key: str = "secret") -> httpx.Response:
    body = {"query": "tea", "documents": ["a car", "green tea"]}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{gateway.url}/rerank", json=body, headers=headers, timeout=30)


def test_the_gateways_image_has_what_it_needs(
    gateway_image: Image, gateway_container: GatewayProcess
) -> None:
    for url, status in ((gateway_container.url, 0), ("http://127.0.0.1:9", 1)):
        check = [word.replace("http://127.0.0.1:8080", url) for word in gateway_image.healthcheck]
        assert check != gateway_image.healthcheck
        done = subprocess.run(check, env=gateway_image.environment, stderr=subprocess.DEVNULL)
        assert done.returncode == status
    assert [each["index"] for each in _rerank(gateway_container).json()["results"]] == [1, 0]
    assert _rerank(gateway_container, "wrong").status_code == 401


def test_the_end_of_a_gateway(gateway_image: Image, container: Container, tmp_path: Path) -> None:
    # The client keeps its connection, which is no reason to wait.
    with (
        gateway_running(gateway_image, container, tmp_path) as gateway,
        httpx.Client() as client,
    ):
        assert client.get(f"{gateway.url}/health").status_code == 200
        gateway.process.terminate()
        assert gateway.process.wait(10) == 0


def test_the_gateways_pod_fits_its_image(
    gateway_image: Image, gateway_container: GatewayProcess
) -> None:
    spec = by_kind("gateway")["Deployment"]["spec"]["template"]["spec"]
    [each] = spec["containers"]
    ports = {port["name"]: port["containerPort"] for port in each["ports"]}
    assert {*ports.values()} == exposed("gateway")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        check = each[probe]["httpGet"]
        assert ports[check["port"]] == 8080  # Its own default.
        # Nodes have no key.
        assert _status(f"{gateway_container.url}{check['path']}") == 200
    assert each["livenessProbe"]["httpGet"]["path"] in gateway_image.healthcheck[-1]
    # The wait before the end, and then what was begun.
    wait = each["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert wait + GRACE < spec["terminationGracePeriodSeconds"]
    [mount], [volume] = each["volumeMounts"], spec["volumes"]
    assert mount["name"] == volume["name"]
    files = [word.partition("=")[2] for word in each["args"] if word.startswith("--api-key-file")]
    assert [str(Path(file).parent) for file in files] == [mount["mountPath"]]


def test_composes_gateway_fits_its_image(gateway_image: Image) -> None:
    services = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
    gateway, targets = services["gateway"], (DOCKER / "prometheus.yml").read_text()
    assert gateway["build"]["target"] == "gateway"
    [inside] = [each.partition(":")[2] for each in gateway["ports"]]
    assert {int(inside)} == exposed("gateway")
    assert f"gateway:{inside}" in targets
    options = dict(word.split("=") for word in gateway["command"])
    host, _, port = options["--url"].partition(":")
    assert host in services
    assert int(port) in exposed("serving")
    assert options["--api-key-file"] == f"/run/secrets/{gateway['secrets'][0]}"
    assert "HEALTHCHECK" in dict(instructions("serving")), "nobody would know that it is healthy"


def test_gateways_and_servers_reach_each_other() -> None:
    servers, gateways = by_kind("base"), by_kind("gateway")
    labels = gateways["Deployment"]["spec"]["template"]["metadata"]["labels"]
    [container] = gateways["Deployment"]["spec"]["template"]["spec"]["containers"]
    # The address is that of the servers' Service, which has none of its own.
    [url] = [word for word in container["args"] if word.startswith("--url=")]
    host, _, port = url.partition("=")[2].partition(":")
    service = servers["Service"]
    assert (host, service["spec"]["clusterIP"]) == (service["metadata"]["name"], "None")
    [grpc] = [each for each in service["spec"]["ports"] if each["port"] == int(port)]
    # The servers' policy lets gateways in.
    entries = servers["NetworkPolicy"]["spec"]["ingress"]
    [entry] = [each for each in entries if {"port": grpc["targetPort"]} in each["ports"]]
    [clients] = [each["podSelector"]["matchLabels"] for each in entry["from"]]
    assert clients.items() <= labels.items()
    # The gateways' policy lets calls out, and with them the look-up of names.
    out = gateways["NetworkPolicy"]["spec"]["egress"]
    template = servers["Deployment"]["spec"]["template"]
    [server] = template["spec"]["containers"]
    [of_grpc] = [each for each in server["ports"] if each["name"] == grpc["targetPort"]]
    [calls] = [each for each in out if {"port": of_grpc["containerPort"]} in each["ports"]]
    [whom] = [each["podSelector"]["matchLabels"] for each in calls["to"]]
    assert whom.items() <= template["metadata"]["labels"].items()
    names = [each["ports"] for each in out if "to" not in each]
    assert names == [[{"port": 53, "protocol": "UDP"}, {"port": 53, "protocol": "TCP"}]]
    # Nothing that is meant for one takes hold of the other.
    selectors = [gateways[kind]["spec"]["selector"] for kind in ("Service", "Deployment")]
    assert all(
        selector.get("matchLabels", selector).items() <= labels.items() for selector in selectors
    )
    for kind in ("Service", "Deployment", "PodDisruptionBudget"):
        selector = servers[kind]["spec"]["selector"]
        assert not selector.get("matchLabels", selector).items() <= labels.items(), kind
    taken = servers["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    assert not taken.items() <= labels.items()
    # A gateway's client does not get past its keys.
    admitted = gateways["NetworkPolicy"]["spec"]["ingress"][0]["from"][0]["podSelector"]
    assert not clients.items() <= admitted["matchLabels"].items()


def test_every_metric_of_the_gateway_exists(gateway_container: GatewayProcess) -> None:
    _rerank(gateway_container)
    own = {name for name in named() if name.startswith(GATEWAYS)}
    assert own
    assert own <= told(gateway_container.url.removeprefix("http://"))


def test_queries_of_the_gateway_on_a_real_prometheus(
    gateway_container: GatewayProcess, tmp_path: Path
) -> None:
    target = gateway_container.url.removeprefix("http://")
    with prometheus(tmp_path, {"gateway:8080": target}) as url:
        deadline = time.monotonic() + 30
        while not _results(url, f"rate({GATEWAYS}requests_total[1m]) > 0"):
            assert time.monotonic() < deadline
            _rerank(gateway_container)
            time.sleep(0.2)
        for place, query in queries().items():
            if place.startswith("panel") and GATEWAYS in query:
                assert _results(url, query), f"{place}: {query}"
        [target] = [each["metric"]["job"] for each in _results(url, "up == 1")]
        assert f'up{{job="{target}"}} == 0' in queries().values()
