"""The running agent against its own OpenAPI document: no 500, no answer that the document does not have."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.server import ManagementServer

# Seconds for the whole run, which ends earlier when nothing new is found.
TIME_S = 30
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


@pytest.mark.parametrize("seed", [1])
def test_answers_as_its_own_document_says(tmp_path: Path, seed: int) -> None:
    with AgentProcess(uri=write_node(tmp_path, GuestSpec(name="vm1"))) as agent, ManagementServer() as server:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{agent.url}/openapi.json"),
            # Else nearly every command would be refused for where its callback goes.
            *("--header", f"callbackurl: {server.url}"),
            *("--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS)),
            *("--max-time", str(TIME_S), "--max-examples", "60", "--seed", str(seed)),
            *("--suppress-health-check", "all", "--no-color"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=4 * TIME_S)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert agent.get("/healthz").status == 200
        assert "Traceback" not in agent.log()
