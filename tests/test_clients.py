"""Real clients of other servers, in environments of their own, against the gateway.

``make clients`` runs all; else those run whose environment is there, which is few.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from clients.calls import BLANK, CALLS, DOCUMENTS, NAMES, QUERY
from conftest import gateway_of
from tritonrank import InvalidRequestError, RerankClient
from tritonrank_server.serving.serve import EmbeddedServer

CLIENTS = Path(__file__).parent / "clients"
#: Clients that give logits, since NVIDIA's server does.
LOGITS = ("NVIDIARerank", "NvidiaRanker", "nvidia_nim")
#: Those that show no more of an error than its status.
WORDLESS = (
    "InfinityRerank",
    "infinity_client",
    "llama-index NVIDIARerank",
    "llama-index TextEmbeddingInference",
    "rerankers",
)

#: Which ask for passages, and for how many.
IN_PASSAGES = {"cohere v1, objects": 10, "llama-index SiliconFlowRerank": 1024}


@pytest.mark.parametrize("environment", CALLS)
def test_real_clients(int8_server: EmbeddedServer, tmp_path: Path, environment: str) -> None:
    python = CLIENTS / "environments" / environment / "bin" / "python"
    if not python.exists():
        pytest.skip("not installed: make clients")
    names = [f"--served-model-name={name}" for name in NAMES]
    with gateway_of(int8_server, tmp_path / "log", *names) as gateway:
        command = [python, CLIENTS / "calls.py", gateway.url, environment]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    outcomes = json.loads(done.stdout.splitlines()[-1])
    with RerankClient(int8_server.grpc_url) as client:
        rankings = {
            most: client.rank(QUERY, DOCUMENTS, max_passages=most)
            for most in (None, *IN_PASSAGES.values())
        }
        with pytest.raises(InvalidRequestError, match="blank"):
            client.rank(BLANK, DOCUMENTS)
    for name, (ranking, refusal) in outcomes.items():
        logits = any(each in name for each in LOGITS)
        expected = rankings[IN_PASSAGES.get(name)]
        scores = [[each.index, each.logit if logits else each.score] for each in expected]
        assert len(ranking) >= 2, (name, ranking)
        assert ranking == scores[: len(ranking)], (name, ranking)
        # None takes an error for a ranking, and nearly all show its words.
        assert isinstance(refusal, str), (name, refusal)
        assert "blank" in refusal or any(each in name for each in WORDLESS), (name, refusal)
