"""The collection where Ansible looks for it, and a controller that runs playbooks on this host."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

COLLECTION = Path(__file__).parents[2] / "conf/ansible"


class Run(NamedTuple):
    """What a playbook printed, and how it ended."""

    status: int
    text: str

    @property
    def recap(self) -> dict[str, int]:
        """The last line's numbers: ok, changed, failed, ..."""
        return {name: int(count) for name, count in re.findall(r"(\w+)=(\d+)", self.text.rpartition("PLAY RECAP")[2])}


class Question(NamedTuple):
    """A module with its arguments, in check and diff mode or not."""

    module: str
    arguments: Mapping[str, Any]
    check: bool = False


class Controller:
    """Runs Ansible with the collection, on this host itself."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        #: What the last playbook printed.
        self.text = ""
        self.collection = directory / "ansible_collections/kvmagent/hotplug"
        shutil.copytree(COLLECTION, self.collection)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(directory),
            "ANSIBLE_COLLECTIONS_PATH": str(directory),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "False",
        }

    def play(self, playbook: Any, *options: str, **variables: Any) -> Run:
        """Run a playbook: the name of one, or the tasks of a play."""
        if not isinstance(playbook, str):
            plays = [{"hosts": "all", "gather_facts": False, "tasks": playbook}]
            file = self.directory / "play.yml"
            file.write_text(json.dumps(plays))
            playbook = str(file)
        own = {"ansible_connection": "local", "ansible_python_interpreter": "/usr/bin/python3"}
        inventory = self.directory / "inventory.yml"
        inventory.write_text(json.dumps({"kvmagent": {"hosts": {"node1": own}}}))
        command = ["ansible-playbook", "-i", str(inventory), "-e", json.dumps(variables), *options, playbook]
        done = subprocess.run(
            command, env=self.environment, cwd=self.directory, capture_output=True, text=True, check=False
        )
        return Run(done.returncode, done.stdout + done.stderr)

    def ask(self, *questions: Question) -> list[dict[str, Any]]:
        """Run modules one after the other, in one playbook; return the result of each, or its failure."""
        told = self.directory / "told.json"
        tasks: list[dict[str, Any]] = [
            {
                f"kvmagent.hotplug.{question.module}": {**question.arguments},
                "check_mode": question.check,
                "diff": question.check,
                "register": f"told{number}",
                "ignore_errors": True,
            }
            for number, question in enumerate(questions)
        ]
        names = ", ".join(f"told{number}" for number in range(len(questions)))
        content = f"{{{{ [{names}] | to_json }}}}"
        keep = {"content": content, "dest": str(told), "mode": "0600"}
        run = self.play([*tasks, {"ansible.builtin.copy": keep, "no_log": True}])
        assert run.status == 0, run.text
        self.text = run.text
        results: list[dict[str, Any]] = json.loads(told.read_text())
        return results


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Controller:
    """A controller."""
    return Controller(tmp_path_factory.mktemp("controller"))
