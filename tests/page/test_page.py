"""The status page in a real browser: what stands on it is what the agent said, and nothing more comes of it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvmagent.api.security import new_token
from kvmagent.model.errors import CODES, Code
from tests.lab.agent import AgentProcess, new_task_uuid
from tests.lab.processes import wait_for
from tests.lab.server import ManagementServer
from tests.page.browser import Browser
from tests.page.scene import CHANGES, GIB, MEMORY, OVER, REMEDIES, TASKS, VMS, full_host, health, task, vm
from tests.page.stage import Stage
from tests.page.states import bring

CONTRAST = """
const channel = (value) => (value /= 255) <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
function ground(element) {
  for (let one = element; one; one = one.parentElement) {
    const colour = numbers(getComputedStyle(one).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
const found = [];
for (const element of document.querySelectorAll('body *')) {
  const words = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!words || !element.checkVisibility()) continue;
  const [a, b] = [light(numbers(getComputedStyle(element).color)), light(ground(element))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), element.textContent.slice(0, 40)]);
}
return found.sort((a, b) => a[0] - b[0])[0];
"""
ROWS = "document.querySelectorAll('#vm-rows tbody').length"
PLAN = "/vm/hotplug/plan"
NAMES = "return [...document.querySelectorAll('#vm-rows .name')].map((name) => name.textContent)"


@pytest.fixture
def opened(browser: Browser, stage: Stage) -> Iterator[Callable[..., Browser]]:
    """Opens the page and waits until it is drawn. In the end nothing may have been complained of, or sent elsewhere."""

    def open_page(**window: Any) -> Browser:
        browser.open(stage.url, **window)
        browser.wait(f"{ROWS} && document.querySelector('#task-list li details, #task-list .muted')")
        return browser

    yield open_page
    assert browser.complaints() == []
    assert {url for url in browser.requests() if not url.startswith(stage.url)} <= {"about:blank"}


def test_the_vms_in_trouble_come_first_with_what_is_plugged_and_offline(opened: Callable[..., Browser]) -> None:
    browser = opened()
    names = browser.run(NAMES)
    assert names[1:] == ["db-7", "build-3", "web-2", "legacy-erp", "cache-2", "ml-train", "web-1", "spare"]
    row = browser.text("#vm-rows tbody:nth-of-type(2)")
    assert "2 plugged but offline" in row
    assert "4 GiB plugged but offline" in row
    assert "max 32 GiB" in row
    assert "2 vCPUs, 4 GiB" in browser.text("#figures")


def test_of_200_vms_those_in_trouble_need_attention_and_no_healthy_one(
    stage: Stage, opened: Callable[..., Browser]
) -> None:
    everything = full_host()
    stage.answers["/vms"] = (200, {"vms": everything})
    browser = opened()
    assert len(everything) == 200
    assert re.search(r"Need attention\s+6\s+VMs", browser.text("#figures"))
    assert browser.run(NAMES)[1:6] == [f"trouble-{n}" for n in range(1, 6)]
    stage.answers["/vms"] = (200, {"vms": everything[6:]})
    browser = opened()
    assert "Need attention 0 VMs" in " ".join(browser.text("#figures").split())
    assert "at its maximum; more needs a prepare and a restart" in browser.text("#vm-rows")


def test_bars_are_as_wide_as_the_numbers(opened: Callable[..., Browser]) -> None:
    parts = opened().run(
        "const bar = document.querySelectorAll('#vm-rows tbody')[1].querySelectorAll('.bar')[1];"
        "return Object.fromEntries([...bar.children].map("
        "(part) => [part.className, part.getBoundingClientRect().width / bar.getBoundingClientRect().width]))"
    )
    assert parts == pytest.approx({"used": 8 / 32, "offline": 4 / 32, "room": 20 / 32}, abs=0.02)


def test_the_host_s_memory_is_a_bar_of_what_is_used_promised_left_and_kept(
    stage: Stage, opened: Callable[..., Browser]
) -> None:
    stage.answers["/healthz"] = (200, health(memory=MEMORY))
    words, parts = look_at_memory(opened())
    assert words.startswith("Memory promised to VMs 320 GiB of a budget of 480 GiB ")
    assert words.endswith("200 GiB used 120 GiB promised, not used 160 GiB left 32 GiB kept for the host")
    shares = {"used": 200 / 512, "promised": 120 / 512, "room": 160 / 512, "reserve": 32 / 512}
    assert parts == pytest.approx(shares, abs=0.02)
    # More than there is: a host that was over its budget before the agent came.
    stage.answers["/healthz"] = (200, health(memory=OVER))
    words, parts = look_at_memory(opened())
    assert "600 GiB of a budget of 480 GiB 200 GiB used 280 GiB promised, not used 120 GiB over the budget" in words
    assert words.endswith("Over the budget since 2026-09-21 11:26 UTC: no VM gets more memory until some is freed")
    shares = {"used": 200 / 632, "promised": 280 / 632, "over": 120 / 632, "reserve": 32 / 632}
    assert parts == pytest.approx(shares, abs=0.02)
    # VMs that use all of it and more.
    stage.answers["/healthz"] = (200, health(memory=msgspec.structs.replace(OVER, resident=610 * GIB)))
    words, parts = look_at_memory(opened())
    assert "610 GiB used 120 GiB over the budget 32 GiB kept for the host" in words
    assert parts == pytest.approx({"used": 480 / 632, "over": 120 / 632, "reserve": 32 / 632}, abs=0.02)


def look_at_memory(browser: Browser) -> tuple[str, dict[str, float]]:
    """What stands at the host's memory, and how wide each part of its bar is, of the whole."""
    browser.wait("document.querySelector('#figures .memory .bar')")
    parts = browser.run(
        "const bar = document.querySelector('#figures .memory .bar');"
        "return Object.fromEntries([...bar.children].map("
        "(part) => [part.className, part.getBoundingClientRect().width / bar.getBoundingClientRect().width]))"
    )
    return " ".join(browser.text("#figures .memory").split()), dict(parts)


def test_blockers_are_told_with_their_remedies(opened: Callable[..., Browser]) -> None:
    browser = opened()
    browser.run("document.querySelectorAll('#vm-rows tbody')[4].querySelector('button').click()")
    told = browser.text("#vm-rows tbody:nth-of-type(5)")
    for code in (Code.CPU_ABOVE_MAXIMUM, Code.NO_NUMA_CELL, Code.NO_MAX_MEMORY):
        assert code in told
        assert REMEDIES[code] in told


def test_an_opened_row_shows_what_the_vm_can_have_now_after_a_restart_and_never(
    stage: Stage, opened: Callable[..., Browser]
) -> None:
    browser = opened()
    assert stage.asked[PLAN] == 0
    ready = browser.run(NAMES).index("web-1") + 1
    row = f"#vm-rows tbody:nth-of-type({ready})"
    assert browser.text(f"{row} button").split("\n")[0] == "What it can have"
    browser.run(f"document.querySelector('{row} button').click()")
    browser.wait(f"document.querySelectorAll('{row} .ladder li').length === 8")
    told = [" ".join(words.split()) for words in browser.text(f"{row} .ladder").splitlines() if words]
    assert told[:6] == ["vCPUs it can have", "1 vCPU now", "3 vCPUs now", "4 vCPUs now", "8 vCPUs now", told[5]]
    assert "2 GiB now" in told
    assert "16 GiB now" in told
    # legacy-erp was started without room.
    none = f"#vm-rows tbody:nth-of-type({browser.run(NAMES).index('legacy-erp') + 1})"
    browser.run(f"document.querySelector('{none} button').click()")
    browser.wait(f"document.querySelectorAll('{none} .ladder li').length > 4")
    told = [" ".join(words.split()) for words in browser.text(f"{none} .ladder").splitlines() if words]
    assert "4 vCPUs after a prepare and a restart" in told
    assert "4 GiB not possible" in told
    assert "The running definition has no <maxMemory>" in told
    assert "4 vCPUs requested, the running definition allows at most 2" in told
    assert stage.asked[PLAN] == 2
    # It is asked again when the VM is another than it was, and not before.
    stage.answers["/vms"] = (200, {"vms": [vm(1, "web-1", cpus=(3, 3, 8), memory=(4 * GIB, 0, 16 * GIB))]})
    browser.run("document.querySelector('#pause').click(); document.querySelector('#pause').click()")
    browser.wait("document.querySelector('.ladder').innerText.includes('6 vCPUs now')")
    assert stage.asked[PLAN] == 3


def test_what_it_can_have_is_not_known_is_told_with_the_remedy(stage: Stage, opened: Callable[..., Browser]) -> None:
    refusal = {"success": False, "error": "VM web-1 is not there", "errorCode": "VM_NOT_FOUND", "remedy": "Look again."}
    stage.answers[PLAN] = (404, lambda _question: refusal)
    browser = opened()
    browser.run("document.querySelector('#vm-rows .problems-of').click()")
    browser.wait("document.querySelector('.ladder').innerText.includes('VM web-1 is not there')")
    assert "Look again." in browser.text(".ladder")
    browser.complaints()  # the browser logs every answer of 404 itself


def test_what_is_plugged_for_nothing_is_told_before_what_is_good_to_know(
    stage: Stage, opened: Callable[..., Browser]
) -> None:
    told = [(Code.GUEST_OS_LIMITED, "good to know"), (Code.GUEST_CPU_OFFLINE, "for nothing")]
    entry = vm(1, "web-1", cpus=(2, 1, 4), warnings=tuple(told), blockers=((Code.NO_ACPI, "in the way"),))
    stage.answers["/vms"] = (200, {"vms": [entry]})
    browser = opened()
    browser.run("document.querySelector('#vm-rows .problems-of').click()")
    places = [browser.text(".problems").index(words) for words in ("For nothing", "In the way", "Good to know")]
    assert places == sorted(places)


def test_a_refused_task_is_told_with_its_remedy_and_one_under_way_as_such(opened: Callable[..., Browser]) -> None:
    tasks = opened().text("#task-list")
    assert "4 vCPUs requested, the running definition allows at most 2" in tasks
    assert REMEDIES[Code.CPU_ABOVE_MAXIMUM] in tasks
    assert "for 14 s" in tasks
    assert "waiting for its turn" in tasks
    assert "Callback not accepted after 3 attempts: connection refused" in tasks


def test_a_step_that_was_cut_off_is_told_as_such(stage: Stage, opened: Callable[..., Browser]) -> None:
    cut = task(11, "HotPlugMemory", "web-1", outcome="plugged")
    steps = [
        {"step": "AttachMemory", "elapsedMs": None, "cutOff": True, "problem": None},
        {"step": "AwaitGuestMemory", "elapsedMs": None, "cutOff": False, "problem": None},
        {"step": "OnlineGuestMemory", "elapsedMs": 40.0, "cutOff": False, "problem": None},
    ]
    stage.stop()
    stage.answers["/tasks"] = (200, {"tasks": [cut]})
    stage.answers[f"/tasks/{cut['taskUuid']}"] = (200, cut | {"steps": steps, "reply": None, "plan": None})
    stage.start()
    browser = opened()
    browser.run("document.querySelector('#task-list summary').click()")
    browser.wait("document.querySelector('.steps li')")
    told = [words.split(" · ")[1] for words in browser.text(".steps ol").splitlines() if " · " in words]
    assert told == ["interrupted", "running", "40 ms"]


def test_refreshes_itself_and_reads_the_vms_when_a_task_has_ended(stage: Stage, opened: Callable[..., Browser]) -> None:
    browser = opened()
    grown = vm(1, "web-1", cpus=(5, 5, 8))
    stage.answers["/vms"] = (200, {"vms": [grown, *VMS[1:]]})
    stage.answers["/tasks"] = (200, {"tasks": [task(10, "HotPlugCpu", "web-1", outcome="online"), *TASKS[2:]]})
    # /vms alone would be read after ten seconds.
    browser.wait("document.querySelector('#vm-rows').innerText.includes('5 vCPUs')", timeout_s=8)
    assert "online in the guest" in browser.text("#task-list li:first-child")


def test_a_row_that_is_open_stays_open_while_others_change(stage: Stage, opened: Callable[..., Browser]) -> None:
    browser = opened()
    browser.run("document.querySelectorAll('#vm-rows tbody')[1].querySelector('button').click()")
    stage.answers["/vms"] = (200, {"vms": [vm(1, "web-1", cpus=(6, 6, 8)), *VMS[1:]]})
    stage.answers["/tasks"] = (200, {"tasks": TASKS[1:]})
    browser.run("document.querySelector('#pause').click(); document.querySelector('#pause').click()")
    browser.wait(
        "[...document.querySelectorAll('#vm-rows .amount')].some((cell) => cell.innerText.includes('6 vCPUs'))"
    )
    assert REMEDIES[Code.GUEST_CPU_OFFLINE] in browser.text("#vm-rows tbody:nth-of-type(2)")


def test_never_asks_again_before_it_was_answered(stage: Stage, opened: Callable[..., Browser]) -> None:
    browser = opened()
    stage.gate.clear()
    before = stage.asked.copy()
    browser.run("document.dispatchEvent(new Event('visibilitychange'))")
    browser.wait("document.querySelector('#tasks-age').innerText.includes('waiting for an answer')")
    for _ in range(20):
        browser.run("document.dispatchEvent(new Event('visibilitychange'))")
    for path in ("/vms", "/tasks"):
        assert stage.asked[path] - before[path] <= 1
        assert stage.most_waiting[path] == 1
    stage.gate.set()
    browser.wait("!document.querySelector('#tasks-age').innerText.includes('waiting for an answer')")


def test_asks_for_nothing_while_nobody_looks_and_at_once_when_somebody_does(
    stage: Stage, opened: Callable[..., Browser]
) -> None:
    browser = opened()
    see = "Object.defineProperty(document, 'hidden', {configurable: true, get: () => arguments[0]});"
    browser.run(f"{see} document.dispatchEvent(new Event('visibilitychange'))", True)
    pause = "return new Promise((resolve) => setTimeout(resolve, arguments[0]))"
    browser.run(pause, 300)  # what was under way has come in
    before = stage.asked.copy()
    browser.run(pause, 3000)  # longer than between two reads of /healthz, and of /tasks
    assert stage.asked == before
    browser.run(f"{see} document.dispatchEvent(new Event('visibilitychange'))", False)
    wait_for(
        lambda: set(stage.asked - before) == set(stage.answers) - {PLAN}, timeout_s=2, what="all to be read at once"
    )


def test_says_so_when_the_agent_is_down_and_goes_on_when_it_is_back(browser: Browser, stage: Stage) -> None:
    browser.open(stage.url)
    browser.wait(ROWS)
    stage.stop()
    browser.wait("!document.querySelector('#stale').hidden")
    told = browser.text("#stale")
    assert "The agent does not answer. This data is from" in told
    assert "systemctl status kvmagent" in told
    assert browser.run("return document.body.classList.contains('stale')")
    assert browser.text("#health") == "No answer"
    assert "db-7" in browser.text("#vm-rows")
    stage.start()
    browser.wait("document.querySelector('#stale').hidden && !document.body.classList.contains('stale')")
    assert browser.text("#health") == "Ready"


def test_says_what_is_down_when_the_agent_is_not_ready(stage: Stage, opened: Callable[..., Browser]) -> None:
    down = {"libvirt": "cannot connect to qemu:///system: Connection refused"}
    stage.answers["/healthz"] = (503, health(ready=False, down=down))
    refusal = {
        "success": False,
        "error": "libvirt is away",
        "errorCode": "LIBVIRT_UNAVAILABLE",
        "remedy": CODES[Code.LIBVIRT_UNAVAILABLE].remedy,
    }
    browser = opened()
    stage.answers["/vms"] = (503, refusal)
    assert "Not ready" in browser.text("#health")
    assert down["libvirt"] in browser.text("#health")
    assert browser.run("return document.title").startswith("⚠")
    browser.run("document.querySelector('#pause').click(); document.querySelector('#pause').click()")
    browser.wait("!document.querySelector('#vms-error').hidden")
    assert CODES[Code.LIBVIRT_UNAVAILABLE].remedy in browser.text("#vms-error")
    assert browser.run(f"return {ROWS}") == len(VMS)
    browser.complaints()  # the browser logs every answer of 503 itself


def test_whoever_is_not_let_in_is_told_why_and_what_to_do(browser: Browser, stage: Stage) -> None:
    info = CODES[Code.CERTIFICATE_NOT_ALLOWED]
    refusal = {"success": False, "error": "the certificate is for me", "errorCode": "X", "remedy": info.remedy}
    for path in stage.answers:
        stage.answers[path] = (403, refusal)
    browser.open(stage.url)
    browser.wait("document.querySelector('#stale').innerText.includes('the certificate is for me')")
    assert info.remedy in browser.text("#stale")


HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>{{7*7}}\u202e\'"&amp;'


def test_a_hostile_name_is_text_and_nothing_else(stage: Stage, opened: Callable[..., Browser]) -> None:
    blocker = (Code.NO_ACPI, HOSTILE)
    stage.answers["/vms"] = (200, {"vms": [vm(1, HOSTILE, blockers=(blocker,), warnings=(blocker,))]})
    plan = {"target": {"cpuNum": 3}, "verdict": HOSTILE, "memorySize": None, "prepare": []}
    plan["reasons"] = [{"code": "X", "message": HOSTILE, "remedy": HOSTILE}]
    stage.answers[PLAN] = (200, lambda _question: {"plans": [plan]})
    refused = task(1, "HotPlugCpu", HOSTILE, outcome="refused", error=(Code.NO_ACPI, HOSTILE), delivery_error=HOSTILE)
    stage.answers["/tasks"] = (200, {"tasks": [refused | {"remedy": HOSTILE, "state": "finished"}]})
    stage.answers["/healthz"] = (200, health(down={HOSTILE: HOSTILE}, ready=False))
    browser = opened()
    assert browser.run(NAMES) == [HOSTILE]
    assert browser.text("#task-list").count("<img src=x") >= 4
    browser.run("document.querySelector('#vm-rows .problems-of').click()")
    browser.wait("document.querySelector('.ladder').innerText.split('<img src=x').length === 3")
    assert browser.run("return document.querySelectorAll('img, script:not([src])').length") == 0
    assert browser.run("return document.title") == "⚠ node-17 \u2013 kvmagent"


def test_markup_could_not_become_elements_even_by_mistake(opened: Callable[..., Browser]) -> None:
    browser = opened()
    tried = "try { document.body.innerHTML = arguments[0]; return 'done' } catch (error) { return error.name }"
    assert browser.run(tried, "<b>x</b>") == "TypeError"
    browser.complaints()


def test_a_thousand_vms_can_be_filtered(stage: Stage, opened: Callable[..., Browser]) -> None:
    fleet = [vm(n, f"vm-{n}", memory=(GIB, 0, 4 * GIB)) for n in range(1, 1000)]
    late = vm(1000, "vm-1000", cpus=(4, 3, 8), warnings=((Code.GUEST_CPU_OFFLINE, "CPUs 3 are offline in the guest"),))
    stage.answers["/vms"] = (200, {"vms": [*fleet, late]})
    browser = opened()
    names = browser.run(NAMES)
    assert names[:3] == ["vm-1000", "vm-1", "vm-2"]
    assert len(names) == 100
    assert stage.asked["/vms"] >= 10, "by pages"
    assert browser.text("#more") == "Show all 1,000 VMs"
    browser.run(
        "const filter = document.querySelector('#filter');"
        "filter.value = 'vm-77 running'; filter.dispatchEvent(new Event('input')); "
    )
    assert browser.run(NAMES) == ["vm-77", *(f"vm-77{n}" for n in range(10))]
    assert browser.text("#vms-count") == "11 of 1,000 VMs"
    browser.run(
        "const filter = document.querySelector('#filter'); filter.value = 'guest_cpu_offline';"
        "filter.dispatchEvent(new Event('input'))"
    )
    assert browser.run(NAMES) == ["vm-1000"]


def test_can_be_read_by_a_screen_reader_and_used_by_keyboard(opened: Callable[..., Browser]) -> None:
    browser = opened()
    found = browser.run(
        "return {main: document.querySelectorAll('main').length, header: document.querySelectorAll('header').length,"
        "named: [...document.querySelectorAll('section')].every((s) => document.getElementById("
        "s.getAttribute('aria-labelledby'))?.textContent), rows: document.querySelectorAll('th[scope=row]').length,"
        "columns: document.querySelectorAll('th[scope=col]').length, lang: document.documentElement.lang,"
        "labels: [...document.querySelectorAll('input, select')].every((e) => e.labels.length),"
        "drawn: [...document.querySelectorAll('.bar')].every((e) => e.getAttribute('aria-hidden') === 'true')}"
    )
    expected = {"main": 1, "header": 1, "named": True, "rows": len(VMS), "columns": 4, "lang": "en", "labels": True}
    assert found == expected | {"drawn": True}
    stops = browser.run(
        "const stops = [...document.querySelectorAll('a, button, input, select, summary')].filter((e) => "
        "e.checkVisibility()); return stops.every((e) => { e.focus(); return document.activeElement === e })"
    )
    assert stops


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_have_enough_contrast(opened: Callable[..., Browser], scheme: str) -> None:
    """WCAG 2.2, 1.4.3: 4.5 to 1."""
    worst = opened(scheme=scheme).run(CONTRAST)
    assert worst[0] >= 4.5, worst


@pytest.mark.parametrize("width", [320, 390, 768, 1024, 1440, 2200])
def test_nothing_has_to_be_scrolled_sideways(opened: Callable[..., Browser], width: int) -> None:
    """WCAG 2.2, 1.4.10: 320 CSS pixels."""
    assert opened(width=width).run("return document.documentElement.scrollWidth") <= width


OUTSIDE = """
const boxes = '#login, #figures, #vm-rows tbody, #task-list';
return [...document.querySelectorAll('body *')].filter((one) => one.checkVisibility() && one.closest(boxes) &&
  one.getBoundingClientRect().right > one.closest(boxes).getBoundingClientRect().right + 0.5
).map((one) => one.id || one.className || one.textContent);
"""


@pytest.mark.parametrize("state", ["login", "opened"])
def test_on_the_narrowest_screen_nothing_sticks_out_of_its_box(browser: Browser, stage: Stage, state: str) -> None:
    bring(browser, stage, state, width=320, height=800)
    assert browser.run(OUTSIDE) == []


def test_the_running_agent_shows_its_vms_and_asks_for_a_token(browser: Browser, node_uri: str, tmp_path: Path) -> None:
    """End to end: the agent itself on libvirt's test driver, with a token."""
    token, line = new_token("operator")
    tokens = tmp_path / "tokens"
    tokens.write_text(line + "\n")
    tokens.chmod(0o600)
    settings = {"security": {"tokens_file": str(tokens)}}
    with ManagementServer() as server, AgentProcess(uri=node_uri, settings=settings, token=token) as agent:
        task_uuid = new_task_uuid()
        agent.post("/vm/hotplug/cpu", {"vmUuid": "vm1", "cpuNum": 64}, task_uuid=task_uuid, callback_url=server.url)
        reply = server.wait(task_uuid, 20)
        browser.open(agent.url + "/")
        browser.wait("!document.querySelector('#login').hidden")
        enter = "document.querySelector('#token').value = arguments[0]; document.querySelector('#login button').click()"
        browser.run(enter, "wrong")
        browser.wait("document.querySelector('#login-why').innerText.includes('unknown')")
        assert browser.run("return sessionStorage.length") == 0
        browser.run(enter, token)
        browser.wait(f"{ROWS} === 2")
        browser.wait("document.querySelector('#task-list').innerText.includes('CPU_ABOVE_MAXIMUM')")
        assert reply["remedy"] in browser.text("#task-list")
        browser.run("document.querySelector('#vm-rows .problems-of').click()")
        browser.wait("document.querySelectorAll('#vm-rows .ladder li').length > 4")
        browser.run("document.querySelector('#task-list summary').click()")
        browser.wait("document.querySelector('.steps').innerText.includes('The task took no steps')")
        assert browser.run("return [sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        assert token not in agent.log()


def test_a_vm_s_history_and_its_whole_uuid_are_told_when_somebody_asks(
    stage: Stage, opened: Callable[..., Browser]
) -> None:
    stage.changes = CHANGES
    browser = opened()
    browser.run("[...document.querySelectorAll('.history-of')][1].click()")
    browser.wait("document.querySelectorAll('.history li').length === 3")
    told = " ".join(browser.text(".history:not([hidden])").split())
    assert "UUID 6f1de2a0-5b7c-4a35-9d0e-000000000002" in told
    assert "7 min ago · by token:zstack vCPUs 4 → 6, memory 8 GiB → 12 GiB · plugged" in told
    assert "vCPUs 16 requested · refused · CPU_ABOVE_MAXIMUM" in told
    assert re.search(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC", told)


def test_each_button_is_named_with_its_vm(opened: Callable[..., Browser]) -> None:
    names = opened().run("return [...document.querySelectorAll('#vm-rows button')].map((one) => one.textContent)")
    assert len(names) == len(set(names)) > len(VMS)
    assert "What to do: build-3" in names
    assert "History of db-7" in names


def test_what_is_chosen_stands_in_the_address(stage: Stage, opened: Callable[..., Browser]) -> None:
    browser = opened()
    browser.run(
        "const filter = document.querySelector('#filter'); filter.value = 'web';"
        "filter.dispatchEvent(new Event('input'));"
        "const sort = document.querySelector('#sort'); sort.value = 'name'; sort.dispatchEvent(new Event('change'))"
    )
    assert browser.run("return location.hash") == "#filter=web&sort=name"
    browser.open(f"{stage.url}#filter=web&sort=name")
    browser.wait(ROWS)
    assert browser.run(NAMES) == ["web-1", "web-2"]
    browser.run("location.hash = '#tasks'")
    assert browser.run(NAMES) == ["web-1", "web-2"], "a place on the page is no choice"
    browser.run("location.hash = '#filter=db'")
    browser.wait(f"{ROWS} === 1")


def test_the_title_tells_that_nothing_answers(browser: Browser, stage: Stage) -> None:
    bring(browser, stage, "no-answer")
    assert browser.run("return document.title") == "✕ No answer \u2013 node-17"
    stage.start()
    browser.wait("document.title === 'node-17 \u2013 kvmagent'")


def test_forty_tasks_do_not_make_the_page_long(browser: Browser, stage: Stage) -> None:
    bring(browser, stage, "forty-tasks")
    listed = "document.querySelectorAll('#task-list > li').length"
    assert browser.run(f"return {listed}") == 10
    browser.run("document.querySelector('#more-tasks').click()")
    assert browser.run(f"return {listed}") == 40


def test_a_host_without_vms_says_what_to_do_next(browser: Browser, stage: Stage) -> None:
    bring(browser, stage, "empty")
    assert "Define one with virsh define FILE" in browser.text("#vms")
    assert "kvmagentctl doctor" in browser.text("#vms-none")


def test_bars_of_many_vcpus_have_marks_that_can_be_told_apart(stage: Stage, opened: Callable[..., Browser]) -> None:
    stage.answers["/vms"] = (200, {"vms": [vm(n, f"vm-{n}", cpus=(1, 1, n)) for n in (2, 16, 32, 128)]})
    marks = opened(width=390, height=844).run(
        "return [...document.querySelectorAll('.ticks')].map((bar) => [bar.title, "
        "bar.getBoundingClientRect().width / getComputedStyle(bar).getPropertyValue('--ticks')])"
    )
    assert [title for title, _ in marks] == ["", "", "each mark is 2 vCPUs", "each mark is 8 vCPUs"]
    assert min(width for _, width in marks) >= 10, "pixels, two of which are the gap"
