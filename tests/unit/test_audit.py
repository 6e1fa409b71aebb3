"""What those cost in log lines who have proved nothing."""

import logging

import pytest

from kvmagent.audit import Refusals, network_of


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "kvmagent.audit"]


def test_refusals_of_one_network_are_told_up_to_a_number_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    refusals = Refusals(clock=lambda: now)
    with caplog.at_level(logging.INFO):
        for n in range(1000):
            refusals.tell(f"2001:db8::{n:x}", what="connection", outcome="BAD_HTTP")
        refusals.tell("192.0.2.1", what="TLS", outcome="TLS_FAILED")
        assert len(lines(caplog)) == 21
        assert "client=192.0.2.1" in lines(caplog)[-1]
        now = 61.0
        refusals.flush()
        assert len(lines(caplog)) == 22
        assert "count=980" in lines(caplog)[-1]
        assert "client=2001:db8::/64" in lines(caplog)[-1]
        refusals.tell("2001:db8::1", what="connection", outcome="BAD_HTTP")
        assert len(lines(caplog)) == 23


def test_refusals_of_very_many_addresses_are_counted_together(caplog: pytest.LogCaptureFixture) -> None:
    refusals = Refusals(clock=lambda: 0.0)
    with caplog.at_level(logging.INFO):
        for n in range(5000):
            refusals.tell(f"198.{n >> 8}.{n & 255}.1", what="connection", outcome="BAD_HTTP")
    assert len(lines(caplog)) == 1020


@pytest.mark.parametrize(
    ("client", "network"),
    [
        ("127.0.0.1", "loopback"),
        ("127.9.9.9", "loopback"),
        ("::1", "loopback"),
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:0:1::5", "2001:db8:0:1::/64"),
        ("unix", "unix"),
    ],
)
def test_an_address_counts_for_its_host(client: str, network: str) -> None:
    assert network_of(client) == network
