# Copyright: the kvmagent maintainers
# Apache License 2.0 (see https://www.apache.org/licenses/LICENSE-2.0)
"""One kvmagent, by HTTP: reads, questions, and commands that are waited for; and what the modules have in common.

    run   POST, as the same task until it is answered  ->  GET /tasks/ID until the task has ended

No callback is asked for. A lost connection and an agent that restarts are waited for: the task is on its disk.
"""

from __future__ import annotations

import http.client
import json
import re
import time
import uuid
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlencode

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.urls import open_url

ARGUMENTS = {
    "url": {"type": "str", "default": "unix:///run/kvmagent/kvmagent.sock"},
    "ca_path": {"type": "path"},
    "client_cert": {"type": "path"},
    "client_key": {"type": "path"},
    "token": {"type": "str", "no_log": True},
    "wait_timeout": {"type": "int", "default": 900},
}

_READ_S = 30
# So many VMs are asked for at once.
_PAGE = 100
# How long a command whose answer was lost is sent again, and how long an agent that has the task may be away.
_RESEND_S, _AWAY_S = 30.0, 120.0
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.05, 1.0
_UNFINISHED = ("accepted", "running")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}


class AgentError(Exception):
    """The agent was not reached, or it refused; `answer` is its JSON, `code` the error's stable name.

    `result` is what the module has done by then.
    """

    def __init__(self, code, message, remedy="", answer=None):
        super().__init__(f"{code}: {message.rstrip('.')}. {remedy}".rstrip())
        self.code = code
        self.answer = answer or {}
        self.result = {"changed": False}


def parse_size(text):
    """Return a size in bytes: 8G, 512MiB, 8589934592. Units are powers of 1024.

    Raises:
        ValueError: it is none.
    """
    found = _SIZE.fullmatch(str(text).strip())
    size = float(found.group(1)) * 1024 ** _UNITS[found.group(2).upper()] if found else 0
    if size < 1 or size != int(size):
        raise ValueError(f"{text!r} is no size; write it as 8G, 512M or a number of bytes")
    return int(size)


class Agent:
    """One agent, as a module's parameters name it."""

    def __init__(self, params):
        url = params["url"].rstrip("/")
        self._socket = url[len("unix://") :] if url.startswith("unix://") else None
        self._base = "http://localhost" if self._socket else url
        self.url = url
        self._options = {
            "unix_socket": self._socket,
            "ca_path": params["ca_path"],
            "client_cert": params["client_cert"],
            "client_key": params["client_key"],
            "use_proxy": False,
            "use_netrc": False,
            "follow_redirects": "none",
            "timeout": _READ_S,
        }
        self._headers = {"Authorization": f"Bearer {params['token']}"} if params["token"] else {}

    def get(self, *segments, **query):
        """Return what a path answers.

        Raises:
            AgentError: no answer; a refusal.
        """
        path = "/" + "/".join(quote(segment, safe="") for segment in segments)
        try:
            status, answer = self._request("GET", path + ("?" + urlencode(query) if query else ""))
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if status != 200:
            raise _refusal(status, answer)
        return answer

    def list_vms(self):
        """Return all VMs, read page by page.

        Raises:
            AgentError: no answer; a refusal.
        """
        found, query = [], {"limit": _PAGE}
        while True:
            answer = self.get("vms", **query)
            found += answer["vms"]
            if "next" not in answer:
                return found
            query["cursor"] = answer["next"]

    def ask(self, path, question):
        """Return the answer to a question that changes nothing.

        Raises:
            AgentError: no answer; a refusal.
        """
        try:
            status, answer = self._request("POST", path, json.dumps(question), {"Content-Type": "application/json"})
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        if status != 200:
            raise _refusal(status, answer)
        return answer

    def run(self, path, request, wait_s):
        """Carry a command out and return its reply, with the `taskUuid` in it.

        Raises:
            AgentError: refused at once; no answer; UNFINISHED after `wait_s`, while the task goes on.
        """
        task_uuid = uuid.uuid4().hex
        self._post(path, request, task_uuid)
        began_at, away_at, pause_s = time.monotonic(), None, _FIRST_LOOK_S
        while True:
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, _LONGEST_LOOK_S)
            trouble = None
            try:
                status, task = self._request("GET", f"/tasks/{task_uuid}")
                if status == 200:
                    away_at = None
                    if task["state"] not in _UNFINISHED:
                        return dict(task["reply"], taskUuid=task_uuid)
                elif status >= 500:
                    trouble = _refusal(status, task)
                else:
                    raise _refusal(status, task)
            except (OSError, http.client.HTTPException) as error:
                trouble = self._unreachable(error)
            now = time.monotonic()
            if trouble is not None:
                away_at = away_at or now
                if now - away_at >= _AWAY_S:
                    raise trouble
            if now - began_at >= wait_s:
                message = f"no outcome after {wait_s} s; the task continues in the agent as {task_uuid}"
                raise AgentError("UNFINISHED", message, f"Run: kvmagentctl task {task_uuid}")

    def _post(self, path, request, task_uuid):
        """Send a command, always as the same task, until it is answered."""
        headers = {"Content-Type": "application/json", "taskuuid": task_uuid, "callbackurl": "none"}
        give_up_at, pause_s = time.monotonic() + _RESEND_S, 0.25
        while True:
            try:
                status, answer = self._request("POST", path, json.dumps(request), headers)
                if status == 200:
                    return
                trouble = _refusal(status, answer)
                if status < 500:
                    raise trouble
            except (OSError, http.client.HTTPException) as error:
                trouble = self._unreachable(error)
            if time.monotonic() + pause_s >= give_up_at:
                raise trouble
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 4.0)

    def _request(self, method, path, content=None, headers=None):
        """Return the status and the JSON of an answer. Raises OSError and HTTPException where no whole answer came."""
        try:
            response = open_url(
                self._base + path,
                data=content,
                method=method,
                headers=dict(self._headers, **(headers or {})),
                **self._options,
            )
        except HTTPError as error:
            response = error
        text = response.read()
        status = response.getcode()
        try:
            answer = json.loads(text)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise AgentError("NOT_AN_AGENT", f"{self.url} answered HTTP {status}, but is not a kvmagent")
        return status, answer

    def _unreachable(self, error):
        reason = error.reason if isinstance(error, URLError) else error
        return AgentError("AGENT_UNREACHABLE", f"{self.url}: {reason}", "Run kvmagentctl doctor on its host.")


def _refusal(status, answer):
    code = answer.get("errorCode") or f"HTTP_{status}"
    return AgentError(code, answer.get("error") or "refused", answer.get("remedy") or "", answer)


def tell_warnings(module, reply):
    """Show what a reply warns of."""
    for warning in reply.get("warnings") or []:
        module.warn("{code}: {message}. {remedy}".format(**warning))


def run_module(spec, perform, **options):
    """Run a module with these options beside those that all have; `perform(module, agent)` returns its result.

    What it raises ends the module with what the agent said, and with the error's `result`.
    """
    module = AnsibleModule(argument_spec=dict(ARGUMENTS, **spec), supports_check_mode=True, **options)
    try:
        result = perform(module, Agent(module.params))
    except ValueError as error:
        module.fail_json(msg=str(error))
    except AgentError as error:
        module.fail_json(msg=str(error), error_code=error.code, reply=error.answer, **error.result)
    module.exit_json(**result)


def parse_sizes(params, *names):
    """Return a module's parameters with these as bytes; one that is not given stays None.

    Raises:
        ValueError: one is no size.
    """
    return dict(params, **{name: None if params[name] is None else parse_size(params[name]) for name in names})


def describe_failure(reply):
    """Return the error of a task that did not succeed, as its reply has it."""
    what = reply.get("error") or f"the outcome is {reply['outcome']}"
    code = reply.get("errorCode") or reply["outcome"].upper()
    return AgentError(code, what, reply.get("remedy") or "", reply)
