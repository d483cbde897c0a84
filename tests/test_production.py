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

import kubernetes_validate
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.http
import trustme
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import ServiceMonitor
from dockerfile_parse import DockerfileParser
from test_serve import await_end, descendants, shared_memory
from tritonclient.utils import InferenceServerException
from tritonrank import TLS, InvalidRequestError, RerankClient, RerankError
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
    parser = DockerfileParser(fileobj=io.BytesIO((DOCKER / "Dockerfile").read_bytes()))
    stage, entrypoint, healthcheck, environment = "", [], [], {}
    for each in parser.structure:
        words = each["value"].split()
        if each["instruction"] == "FROM":
            stage = words[-1] if "AS" in words else ""
        if stage != "serving":
            continue
        if each["instruction"] == "COPY":
            _copy(ROOT / words[0], root / words[1].lstrip("/"), words[1].endswith("/"))
        elif each["instruction"] == "RUN" and "pip install" in each["value"]:
            install = re.split(r"\s+", each["value"].partition("python3 ")[2])
            command = [word.replace("/opt/", f"{root}/opt/") for word in install]
            subprocess.run([sys.executable, *command, "--quiet"], check=True)
        elif each["instruction"] == "ENV":
            environment = dict(word.split("=", 1) for word in words)
        elif each["instruction"] == "ENTRYPOINT":
            entrypoint = json.loads(each["value"])
        elif each["instruction"] == "HEALTHCHECK":
            healthcheck = json.loads(each["value"].partition("CMD")[2])
    current = root / "models" / "cross_encoder" / "current"
    shutil.copytree((int8_repository / "cross_encoder" / "current").resolve(), current)
    base = _base_image(root / "base", root / "opt" / "tritonrank" / "packages")
    return Image(
        [word.replace("=/models", f"={root}/models") for word in entrypoint],
        healthcheck,
        serve.environment() | environment | {"PATH": f"{base}:{os.environ['PATH']}"},
    )


def _copy(source: Path, target: Path, into: bool) -> None:
    if source.is_file():
        target = target / source.name if into else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    else:
        unpublished = shutil.ignore_patterns("current", "export-*", ".staging-*", "__pycache__")
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
    exposed = set(re.findall(r"^(\w+)(?:{| )", _metrics(container.metrics_url), re.M))
    named = set(re.findall(r"\b(?:nv|tritonrank)_\w+", " ".join(queries().values())))
    assert named & exposed, "nothing was read"
    assert named - exposed - OF_A_GPU == set()


@pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool: apt install prometheus")
def test_alerts_go_off() -> None:
    subprocess.run(["promtool", "test", "rules", ROOT / "tests" / "alerts.yml"], check=True)


@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus: apt install prometheus")
def test_queries_on_a_real_prometheus(container: Container, tmp_path: Path) -> None:
    config = (DOCKER / "prometheus.yml").read_text().replace("server:8002", container.metrics_url)
    (tmp_path / "prometheus.yml").write_text(config.replace("5s", "1s"))
    shutil.copy(DOCKER / "alerts.yml", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        *(*DYING_WITH_PARENT, "prometheus", f"--config.file={tmp_path}/prometheus.yml"),
        *(f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address={url}"),
    ]
    with (
        subprocess.Popen(command, stderr=subprocess.DEVNULL) as process,
        RerankClient(container.grpc_url) as client,
    ):
        try:
            deadline = time.monotonic() + 30
            of_requests = 'rate(nv_inference_request_success{model="sorter"}[1m]) > 0'
            while not _results(url, of_requests):
                assert time.monotonic() < deadline
                client.rank(f"tea {time.monotonic()}", ["a car", "green tea"])
                time.sleep(0.2)
            for place, query in queries().items():
                answer = _results(url, query.replace("$instance", ".*"))
                if place.startswith("panel") and not any(name in query for name in OF_A_GPU):
                    assert answer, f"{place}: {query}"
        finally:
            process.terminate()


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


def objects(overlay: str) -> list[dict[str, Any]]:
    """What ``kubectl apply -k`` would send."""
    if not shutil.which("kubectl"):
        pytest.skip("no kubectl")
    command = ["kubectl", "kustomize", MANIFESTS / overlay]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.parametrize("overlay", ["base", "volume", "oci"])
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


def pods() -> dict[str, dict[str, Any]]:
    """Pod specifications, by the file they come from."""
    [deployment] = [each for each in objects("base") if each["kind"] == "Deployment"]
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
    exposed = re.search(r"^EXPOSE (.*)$", (DOCKER / "Dockerfile").read_text(), re.M)[1]  # type: ignore[index]
    assert {str(port) for port in ports.values()} <= {*exposed.split()}
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


def test_services_reach_the_pods() -> None:
    every = {each["kind"]: each for each in objects("base")}
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
    target = every["ScaledObject"]["spec"]["scaleTargetRef"]["name"]
    assert target == every["Deployment"]["metadata"]["name"]


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
