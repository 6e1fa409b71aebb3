"""The running agent against its own OpenAPI document: no 500, no answer that the document does not have."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.agent import write_node
from tests.lab.agent import AgentProcess
from tests.lab.domainxml import GuestSpec
from tests.lab.server import ManagementServer

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
)


# Which operations, and for how long: seconds for a whole run, which ends earlier when nothing new is found, or cases
# of each operation. Reads by themselves, so that commands do not take their time.
RUNS = {
    "commands": ("--exclude-tag", "reads", "--max-time", "30", "--max-examples", "60"),
    "reads": ("--include-tag", "reads", "--max-examples", "15"),
}


@pytest.mark.parametrize("run", RUNS)
def test_answers_as_its_own_document_says(tmp_path: Path, run: str) -> None:
    with AgentProcess(uri=write_node(tmp_path, GuestSpec(name="vm1"))) as agent, ManagementServer() as server:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{agent.url}/openapi.json"),
            # Else nearly every command would be refused for where its callback goes.
            *("--header", f"callbackurl: {server.url}", *RUNS[run]),
            *("--phases", "coverage,fuzzing", "--checks", ",".join(CHECKS)),
            *("--seed", "1", "--suppress-health-check", "all", "--no-color"),
        ]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        counts = re.findall(r"^  (?:Selected|Tested): (\d+)", done.stdout, re.MULTILINE)
        assert len(set(counts)) == 1, done.stdout[-2000:]
        assert agent.get("/healthz").status == 200
        assert "Traceback" not in agent.log()
