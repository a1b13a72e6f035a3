"""The password before what operators see and do: what opens, what is told of failures, and how slow guessing is."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator

import pytest

from faashound.serving.passwords import (
    FORGOTTEN_AFTER_S,
    FREE_FAILURES_COUNT,
    LONGEST_DELAY_S,
    MAX_ADDRESSES_COUNT,
    MAX_LATE_COUNT,
    Credentials,
    FailureLog,
    network_of,
)
from testkit.harness import Answer, InBackground, wait_until
from testkit.system import System


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


@pytest.fixture
def guarded() -> Iterator[System]:
    system = System(settings={"basic_auth": "true", "worker": "none"})
    (system.temporary / "basic-auth-user").write_text("admin\n")
    (system.temporary / "basic-auth-password").write_text("secret\n")
    system.environment["secret_mount_path"] = str(system.temporary)
    with system:
        yield system


@pytest.mark.parametrize(
    ("given", "opens"),
    [("admin:secret", True), ("admin:secre", False), ("admin:secrets", False), (":", False), ("", False)],
)
def test_credentials_match_themselves_alone(given: str, opens: bool) -> None:
    assert Credentials("admin", "secret").match(base64.b64encode(given.encode())) is opens


def test_answers_to_failures_are_later_each_time_up_to_a_bound() -> None:
    failures = FailureLog()
    delays = [failures.add("a", 0.0)[1] for _ in range(40)]
    assert delays[:FREE_FAILURES_COUNT] == [0.0] * FREE_FAILURES_COUNT
    assert delays[FREE_FAILURES_COUNT:] == sorted(delays[FREE_FAILURES_COUNT:])
    assert delays[-1] == LONGEST_DELAY_S
    assert failures.add("b", 0.0) == (1, 0.0), "another address is another matter"


def test_failures_are_forgotten_after_a_while() -> None:
    failures = FailureLog()
    for _ in range(10):
        failures.add("a", 0.0)
    assert failures.add("a", FORGOTTEN_AFTER_S + 1) == (1, 0.0)


def test_failure_log_is_bounded_and_keeps_the_latest() -> None:
    failures = FailureLog()
    for number in range(MAX_ADDRESSES_COUNT + 10):
        failures.add(str(number), float(number))
        failures.told(str(number))
    failures.told("0")  # forgotten meanwhile
    now_s = float(MAX_ADDRESSES_COUNT + 10)
    assert failures.add("0", now_s)[0] == 1
    assert failures.add(str(MAX_ADDRESSES_COUNT), now_s)[0] == 2


def test_address_is_busy_while_as_many_answers_are_late_as_may_be() -> None:
    failures = FailureLog()
    for _ in range(MAX_LATE_COUNT):
        assert not failures.is_busy("a")
        failures.add("a", 0.0)
    assert failures.is_busy("a")
    failures.told("a")
    assert not failures.is_busy("a")


@pytest.mark.parametrize(
    ("peer", "network"),
    [("192.0.2.1", "192.0.2.1"), ("2001:db8::1:2", "2001:db8::/64"), ("fe80::1%eth0", "fe80::/64"), ("", "")],
)
def test_network_is_what_one_host_has_for_itself(peer: str, network: str) -> None:
    assert network_of(peer) == network


def test_wrong_password_is_logged_with_its_address_and_not_with_itself(guarded: System) -> None:
    assert guarded.request("GET", "/system/calls", headers=basic("admin:guess")).status == 401
    guarded.wait_log("warning: wrong password for [GET] /system/calls peer=127.0.0.1 failures=1")
    assert "guess" not in guarded.log()


def test_client_that_is_not_logged_in_is_no_failure(guarded: System) -> None:
    for headers in ({}, {"Authorization": "Bearer "}, {"Authorization": "Bearer"}, {"Authorization": ""}):
        answers = [guarded.request("GET", "/system/functions", headers=headers) for _ in range(10)]
        assert {answer.status for answer in answers} == {401}
    assert guarded.request("GET", "/system/functions", headers=basic("admin:secret")).status == 200
    assert "wrong password" not in guarded.log()


def test_guesses_of_one_address_are_slow_whatever_the_number_of_connections(guarded: System) -> None:
    def guess() -> Answer:
        return guarded.request("GET", "/system/calls", headers=basic("admin:guess"))

    for _ in range(FREE_FAILURES_COUNT):
        guess()
    started_s = time.monotonic()
    answers = [guess.result() for guess in [InBackground(guess) for _ in range(40)]]
    looked_at = sum(answer.status == 401 for answer in answers)
    refused = [answer for answer in answers if answer.status == 429]
    assert looked_at + len(refused) == 40
    assert looked_at <= 2 * MAX_LATE_COUNT
    assert {answer.headers["retry-after"] for answer in refused} == {"4"}
    assert time.monotonic() - started_s >= LONGEST_DELAY_S


def test_right_password_opens_at_once_after_failures(guarded: System) -> None:
    def ask(password: str) -> Answer:
        return guarded.request("GET", "/system/calls", headers=basic(f"admin:{password}"))

    def is_sooner_than_a_guess() -> bool:
        guess, right = ask("guess"), ask("secret")  # the former is a second late, or more
        assert right.status == 200
        return right.elapsed_s < guess.elapsed_s / 4

    for _ in range(FREE_FAILURES_COUNT + 2):
        ask("guess")
    wait_until(is_sooner_than_a_guess, 20, "an answer that is not late")


def test_long_password_opens_while_too_many_are_guessed_at_its_address() -> None:
    system = System(settings={"basic_auth": "true", "worker": "none"})
    (system.temporary / "basic-auth-user").write_text("admin")
    (system.temporary / "basic-auth-password").write_text("correct horse battery staple")
    system.environment["secret_mount_path"] = str(system.temporary)

    def ask(password: str) -> Answer:
        return system.request("GET", "/system/calls", headers=basic(f"admin:{password}"))

    with system:
        is_enough = threading.Event()

        def guess_on() -> None:
            while not is_enough.is_set():  # as many answers are late at any time as may be, whenever we look
                ask("guess")
                is_enough.wait(0.1)

        held = [InBackground(guess_on) for _ in range(2 * MAX_LATE_COUNT)]
        wait_until(lambda: ask("guess").status == 429, 20, "too many guesses")
        assert ask("correct horse battery staple").status == 200
        is_enough.set()
        for each in held:
            each.result()


def test_metrics_are_not_where_the_password_is_asked_for(guarded: System) -> None:
    """They have a port of their own; on the port of the functions there are none to protect."""
    assert guarded.request("GET", "/metrics").status == 404
