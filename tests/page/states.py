"""Every state that the page can be in, each brought about as it comes to be in the field."""

from __future__ import annotations

from typing import Any

from tests.lab.axe import find_axe
from tests.page.browser import Browser
from tests.page.scene import CHANGES, MEMORY, OVER, VMS, health, task, vm
from tests.page.stage import Stage

ROWS = "document.querySelectorAll('#vm-rows tbody').length"
# What the host's memory is.
BUDGETS = {"memory": MEMORY, "over-budget": OVER}
STATES = ("history", "opened", "bars", "no-answer", "not-ready", "empty", "login", "forty-tasks", *BUDGETS)
# Bars of one vCPU, of as many as have a mark each, and of more.
MAXIMA = (1, 2, 16, 32, 33, 128)
REFUSAL = {
    "success": False,
    "error": "the request carries no credentials",
    "errorCode": "CREDENTIALS_MISSING",
    "remedy": "Send a token.",
}


def bring(browser: Browser, stage: Stage, state: str, **window: Any) -> None:
    """Open the page and bring it into a state; return when it is drawn."""
    stage.changes = CHANGES
    if state == "empty":
        stage.answers |= {"/vms": (200, {"vms": []}), "/tasks": (200, {"tasks": []}), "/healthz": (200, health())}
    elif state == "bars":
        bars = [vm(n, f"vm-{n}", cpus=(n, (n + 1) // 2, n)) for n in MAXIMA]
        bars += [vm(100 + n, f"half-{n}", cpus=((n + 1) // 2, None, n)) for n in MAXIMA]
        stage.answers["/vms"] = (200, {"vms": bars})
    elif state in BUDGETS:
        stage.answers |= {"/vms": (200, {"vms": VMS[7:8]}), "/healthz": (200, health(memory=BUDGETS[state]))}
    elif state == "not-ready":
        down = {"libvirt": "cannot connect to qemu:///system: Connection refused"}
        stage.answers["/healthz"] = (503, health(ready=False, down=down))
    elif state == "login":
        stage.answers = dict.fromkeys(stage.answers, (401, REFUSAL))
    elif state == "forty-tasks":
        many = [task(100 + n, "HotPlugCpu", "web-1", outcome="online", age_s=60.0 * n) for n in range(40)]
        stage.answers["/tasks"] = (200, {"tasks": many})
    browser.open(stage.url, **window)
    if state == "login":
        browser.wait("!document.querySelector('#login').hidden")
    elif state == "empty":
        browser.wait("!document.querySelector('#vms-none').hidden")
        browser.wait("document.querySelector('#task-list .muted')")
    else:
        browser.wait(f"{ROWS} && document.querySelector('#task-list li details')")
    if state in BUDGETS:
        browser.wait("document.querySelector('#figures .memory')")
    elif state == "opened":
        # All that a row can show, for whoever looks for the cause.
        for button in (".problems-of", ".history-of"):
            browser.run(f"document.querySelector('#vm-rows tbody:has(.problems-of) {button}').click()")
        browser.wait("document.querySelector('.ladder li') && document.querySelector('.history li')")
    elif state == "history":
        browser.run("[...document.querySelectorAll('.history-of')][1].click()")
        browser.wait("document.querySelectorAll('.history li').length")
    elif state == "no-answer":
        stage.stop()
        browser.wait("!document.querySelector('#stale').hidden && document.querySelector('#stale p')")
        # The time of the last answer is another each time.
        browser.run("document.querySelector('#stale span').textContent = 'The agent does not answer.'")
    browser.wait("document.fonts.status === 'loaded'")


def violations(browser: Browser) -> list[str]:
    """What axe-core finds wrong: the rule, and where."""
    browser.run(find_axe())
    found = browser.run(
        "return axe.run(document, {resultTypes: ['violations']}).then((done) => done.violations.map("
        "(one) => one.id + ': ' + one.nodes.map((node) => node.target.join(' ')).join(', ')))"
    )
    return list(found)
