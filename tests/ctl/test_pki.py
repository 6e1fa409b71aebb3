"""The shortcut of SECURITY.md's openssl lines: certificates that an agent and its clients take."""

import http.client
import ssl
import subprocess
from contextlib import closing
from pathlib import Path

import yaml

from tests.ctl.ctl import Ctl
from tests.lab.agent import AgentProcess
from tests.lab.pki import LOOPBACK
from tests.lab.promtool import find_promtool

EXAMPLE = Path(__file__).parents[2] / "conf/prometheus/scrape.example.yml"


def test_an_agent_and_its_client_take_what_is_issued(ctl: Ctl, node_uri: str, tmp_path: Path) -> None:
    pki = tmp_path / "pki"
    issue = ("pki", "init", str(pki), "--agent", f"node1,{LOOPBACK}", "--client", "server.example")
    done = ctl(*issue)
    names = ["ca.key", "ca.pem", "node1.key", "node1.pem", "server.example.key", "server.example.pem"]
    assert (done.status, done.out.splitlines()) == (0, [str(pki / name) for name in names])
    assert [path.stat().st_mode & 0o777 for path in sorted(pki.glob("*.key"))] == [0o600] * 3

    again = ctl(*issue)
    assert (again.status, again.err.count("\n"), "node1.key already exists" in again.err) == (1, 1, True)
    assert ctl("pki", "init", str(pki), "--client", "operator", "--json").json["files"] == [
        str(pki / "operator.key"),
        str(pki / "operator.pem"),
    ]
    for leaf, purpose in (("node1", "sslserver"), ("server.example", "sslclient"), ("operator", "sslclient")):
        verify = [
            "openssl",
            "verify",
            "-x509_strict",
            "-purpose",
            purpose,
            "-CAfile",
            pki / "ca.pem",
            pki / f"{leaf}.pem",
        ]
        assert subprocess.run(verify, capture_output=True, check=False).returncode == 0, leaf

    security = {
        "tls_cert": str(pki / "node1.pem"),
        "tls_key": str(pki / "node1.key"),
        "client_ca": str(pki / "ca.pem"),
        "allowed_names": "operator",
    }
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=_context(pki, "operator")) as agent:
        options = ("--url", agent.url, "--ca", str(pki / "ca.pem"))

        def ask(name: str) -> int:
            return ctl(*options, "--cert", str(pki / f"{name}.pem"), "--key", str(pki / f"{name}.key"), "status").status

        assert (ask("operator"), ask("server.example"), ask("node1")) == (0, 1, 4)
        told = ctl("doctor", "--config", str(agent.config_file), environment={"KVMAGENT_URL": ""})
        assert f"agent: unix://{agent.socket} is ready" in told.out
        assert told.status == 0, told.out


def test_prometheus_gets_its_metrics_in_each_way_of_the_example(ctl: Ctl, node_uri: str, tmp_path: Path) -> None:
    """As its comments say: certificates by pki, a token by kvmagent, the role read for each."""
    pki = tmp_path / "pki"
    assert ctl("pki", "init", str(pki), "--agent", f"node1,{LOOPBACK}", "--client", "prometheus.example").status == 0
    kvmagent = str(ctl.script.with_name("kvmagent"))
    printed = subprocess.run([kvmagent, "--new-token", "prometheus"], capture_output=True, text=True, check=True).stdout
    for file, line in zip((tmp_path / "tokens", pki / "token"), printed.splitlines(), strict=True):
        file.write_text(f"{line}\n")
        file.chmod(0o600)
    security = {
        "tls_cert": str(pki / "node1.pem"),
        "tls_key": str(pki / "node1.key"),
        "client_ca": str(pki / "ca.pem"),
        "tokens_file": str(tmp_path / "tokens"),
        "roles": "certificate:prometheus.example read, token:prometheus read",
    }
    text = EXAMPLE.read_text().replace("/etc/prometheus/kvmagent", str(pki))
    (tmp_path / EXAMPLE.name).write_text(text)
    for rules in yaml.safe_load(text)["rule_files"]:
        (tmp_path / rules).write_text((EXAMPLE.parent / rules).read_text())
    check = [find_promtool(), "check", "config", tmp_path / EXAMPLE.name]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with AgentProcess(uri=node_uri, settings={"security": security}, tls=_context(pki, "prometheus.example")) as agent:
        for job in yaml.safe_load(text)["scrape_configs"]:
            context = ssl.create_default_context(cafile=job["tls_config"]["ca_file"])
            if "cert_file" in job["tls_config"]:
                context.load_cert_chain(job["tls_config"]["cert_file"], job["tls_config"]["key_file"])
            headers = {}
            if "authorization" in job:
                token = Path(job["authorization"]["credentials_file"]).read_text().strip()
                headers["Authorization"] = f"Bearer {token}"
            for path, method, status in (("/metrics", "GET", 200), ("/vm/hotplug/cpu", "POST", 403)):
                with closing(http.client.HTTPSConnection(LOOPBACK, agent.port, timeout=60, context=context)) as scraper:
                    scraper.request(method, path, b"{}", {"Content-Type": "application/json", **headers})
                    answer = scraper.getresponse()
                    assert (answer.status, job["job_name"]) == (status, job["job_name"]), answer.read()


def test_nothing_to_issue_is_a_wrong_command_line(ctl: Ctl, tmp_path: Path) -> None:
    assert ctl("pki", "init", str(tmp_path / "pki")).status == 2
    assert not (tmp_path / "pki").exists()
    outside = ctl("pki", "init", str(tmp_path / "pki"), "--client", "../outside")
    assert (outside.status, "'../outside' is neither a host name nor an address" in outside.err) == (1, True)
    assert not list(tmp_path.glob("outside*"))


def _context(pki: Path, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=pki / "ca.pem")
    context.load_cert_chain(pki / f"{name}.pem", pki / f"{name}.key")
    return context
