"""Dead letters in people's hands: /system/calls, and `fworker dead` in a shell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from subprocess import CompletedProcess
from typing import Any

import pytest

from faashound.calls.ids import new_call_id
from faashound.calls.model import State
from faashound.calls.views import SHOWN_BODY_BYTES, BadQuery, describe_body, parse_call_filter
from faashound.queues.commands import format_table
from testkit.harness import run
from testkit.system import FUNCTIONS, Receiver, System, always, in_turn

GATED = FUNCTIONS + '[gated]  # fails until somebody opens the gate\nfprocess = "sh"'
SCRIPT = b'echo "to stderr" >&2; [ -e "$TMPDIR/open" ] && echo in'


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(GATED, {"max_retry_attempts": "2", "callback_retry_attempts": "1"}) as system:
        yield system


def dead(system: System, *arguments: str) -> CompletedProcess[str]:
    """Run `fworker dead ...` on the system's queue, as an operator would beside it."""
    return run("worker", ["dead", *arguments], {"queue_url": f"spool:{system.spool}"})


def dead_letter(system: System, function: str = "gated", headers: dict[str, str] | None = None) -> str:
    """Return the id of a call that was given up."""
    (system.temporary / "open").unlink(missing_ok=True)
    call_id = system.submit(f"{function}/path?q=1", SCRIPT, headers)
    assert system.ended(call_id)["state"] == "dead"
    return call_id


def undelivered(system: System, receiver: Receiver) -> str:
    """Return the id of a call that is done and whose callback was given up."""
    call_id = system.submit("cat", b"result", {"X-Callback-Url": receiver.url()})
    system.until(call_id, lambda status: status.get("callback", {}).get("state") == "dead")
    return call_id


def listed(system: System, query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(system.request("GET", f"/system/calls?{query}").body)["calls"]
    return found


def ids(calls: Sequence[dict[str, Any]]) -> list[str]:
    return [call["id"] for call in calls]


# Over HTTP


def test_operator_sees_payload_headers_attempts_and_answer_of_a_dead_letter(system: System) -> None:
    call_id = dead_letter(system, headers={"X-Mine": "1", "Authorization": "Bearer secret"})
    answer = system.request("GET", f"/system/calls/{call_id}")
    call = json.loads(answer.body)
    assert (call["state"], call["status"], call["error"]) == ("dead", 500, "gave up after 2 attempts: status 500")
    assert (call["method"], call["path"], call["query"], call["queue"]) == ("POST", "/path", "q=1", "faas-request")
    assert call["body"] == {"bytes": len(SCRIPT), "text": SCRIPT.decode()}
    assert ["x-mine", "1"] in call["headers"]
    assert call["result"]["text"] == "exit status 1\nto stderr\n"
    assert [(attempt["status"], attempt["started"] <= attempt["finished"]) for attempt in call["history"]] == [
        (500, True),
        (500, True),
    ]
    assert "secret" not in answer.text


def test_operator_retries_a_dead_letter_and_it_is_done(system: System) -> None:
    call_id = dead_letter(system)
    (system.temporary / "open").touch()
    answer = system.request("POST", f"/system/calls/{call_id}/retry")
    assert (answer.status, json.loads(answer.body)["attempts"]) == (202, 0)
    status = system.ended(call_id)
    assert (status["state"], status["attempts"]) == ("done", 1)
    assert "in\n" in system.request("GET", f"/async-function/{call_id}/result").text
    assert system.request("POST", f"/system/calls/{call_id}/retry").status == 409


def test_operator_retries_an_undelivered_result_and_the_function_does_not_run_again(system: System) -> None:
    with Receiver(in_turn(500, 200)) as receiver:
        call_id = undelivered(system, receiver)
        assert call_id in ids(listed(system, "callback=dead"))
        assert system.request("POST", f"/system/calls/{call_id}/retry").status == 202
        status = system.until(call_id, lambda status: status["callback"]["state"] == "delivered")
        assert [got.body for got in receiver.received()] == [b"result", b"result"]
    assert status["attempts"] == 1
    assert call_id not in ids(listed(system, "callback=dead"))


def test_list_chooses_by_state_and_function_and_goes_on_page_by_page(system: System) -> None:
    letters = [dead_letter(system, "shell") for _ in range(3)]
    assert ids(listed(system, "state=dead&function=shell"))[:3] == letters[::-1]
    page = json.loads(system.request("GET", "/system/calls?state=dead&function=shell&limit=2").body)
    assert ids(page["calls"]) == letters[:0:-1]
    assert ids(listed(system, f"state=dead&function=shell&limit=1&before={page['before']}")) == letters[:1]
    assert listed(system, "state=running") == []


def test_list_shows_what_is_delayed(system: System) -> None:
    call_id = system.submit("cat", b"", {"X-Delay": "1h"})
    (call,) = listed(system, "state=queued")
    assert (call["id"], call["due"] > call["accepted"]) == (call_id, True)
    system.request("DELETE", f"/async-function/{call_id}")


def test_operator_deletes_one_call_or_all_of_a_kind(system: System) -> None:
    first, second, other = dead_letter(system, "shell"), dead_letter(system, "shell"), dead_letter(system)
    assert system.request("DELETE", f"/system/calls/{first}").status == 204
    assert system.request("GET", f"/async-function/{first}").status == 404
    answer = system.request("DELETE", "/system/calls?state=dead&function=shell")
    assert json.loads(answer.body)["deleted"] >= 1
    assert system.request("GET", f"/async-function/{second}").status == 404
    assert system.status(other)["state"] == "dead"


def test_what_has_not_ended_cannot_be_deleted_or_retried(system: System) -> None:
    call_id = system.submit("cat", b"", {"X-Delay": "1h"})
    assert system.request("DELETE", f"/system/calls/{call_id}").status == 409
    assert system.request("POST", f"/system/calls/{call_id}/retry").status == 409
    system.request("DELETE", f"/async-function/{call_id}")


@pytest.mark.parametrize("way", ["http", "shell"])
def test_operator_cancels_all_that_waits_of_one_function(system: System, way: str) -> None:
    waiting = [system.submit("cat", b"", {"X-Delay": "1h"}) for _ in range(3)]
    other = system.submit("gated", b"", {"X-Delay": "1h"})
    if way == "http":
        answer = system.request("POST", "/system/calls/cancel?function=cat")
        assert json.loads(answer.body) == {"cancelled": 3}
    else:
        queue = {"queue_url": f"spool:{system.spool}"}
        assert run("worker", ["cancel", "--function", "cat"], queue).stdout == "3 cancelled\n"
    assert {system.status(call_id)["state"] for call_id in waiting} == {"cancelled"}
    assert system.status(other)["state"] == "queued"
    system.request("POST", "/system/calls/cancel")
    assert system.status(other)["state"] == "cancelled"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/system/calls/cancel", 405),
        ("POST", "/system/calls/cancel?state=queued", 400),
        ("GET", "/system/calls/{}", 404),
        ("DELETE", "/system/calls/{}", 404),
        ("POST", "/system/calls/{}/retry", 404),
        ("GET", "/system/calls/{}/retry", 405),
        ("GET", "/system/calls/{}/other", 404),
        ("PUT", "/system/calls", 405),
        ("GET", "/system/calls?state=lost", 400),
        ("GET", "/system/calls?limit=0", 400),
        ("GET", "/system/calls?limit=1001", 400),
        ("GET", "/system/calls?stat=dead", 400),
        ("GET", "/system/calls?before={}", 404),
        ("DELETE", "/system/calls", 400),
        ("DELETE", "/system/calls?state=queued", 400),
        ("DELETE", "/system/calls?state=dead&limit=5", 400),
    ],
)
def test_system_calls_says_what_is_wrong(system: System, method: str, path: str, status: int) -> None:
    answer = system.request(method, path.format(new_call_id()))
    assert answer.status == status
    assert answer.text.strip()


# In a shell


def test_shell_lists_dead_letters_and_undelivered_results(system: System) -> None:
    call_id = dead_letter(system)
    with Receiver(always(500)) as receiver:
        result_id = undelivered(system, receiver)
    lines = dead(system, "list").stdout.splitlines()
    assert lines[0].split() == ["ID", "FUNCTION", "DEAD", "ATTEMPTS", "SINCE", "ERROR"]
    assert any(line.split()[:4] == [call_id, "gated.openfaas-fn", "call", "2"] for line in lines)
    assert any(line.split()[:4] == [result_id, "cat.openfaas-fn", "callback", "1"] for line in lines)
    shown = dead(system, "list", "--json", "--function", "cat").stdout.splitlines()
    assert {json.loads(line)["function"] for line in shown} == {"cat.openfaas-fn"}


def test_shell_shows_retries_and_purges(system: System) -> None:
    call_id, other = dead_letter(system), dead_letter(system)
    shown = json.loads(dead(system, "show", call_id).stdout)
    assert shown["body"]["text"] == SCRIPT.decode()
    (system.temporary / "open").touch()
    assert dead(system, "retry", call_id).stdout == f"{call_id} queued\n"
    assert system.ended(call_id)["state"] == "done"
    assert dead(system, "purge", other).stdout == f"{other} deleted\n"
    assert system.request("GET", f"/async-function/{other}").status == 404


def test_shell_does_what_it_can_and_fails_when_some_failed(system: System) -> None:
    unknown, call_id = new_call_id(), dead_letter(system)
    done = dead(system, "purge", unknown, call_id)
    assert (done.returncode, done.stdout) == (1, f"{call_id} deleted\n")
    assert unknown in done.stderr


def test_shell_retries_and_purges_all_of_a_function(system: System) -> None:
    dead(system, "purge", "--all")
    letters = [dead_letter(system, "shell"), dead_letter(system, "shell"), dead_letter(system)]
    (system.temporary / "open").touch()
    assert dead(system, "retry", "--all", "--function", "shell").returncode == 0
    assert [system.ended(call_id)["state"] for call_id in letters] == ["done", "done", "dead"]
    assert dead(system, "purge", "--all").stdout == f"{letters[2]} deleted\n"
    assert "no dead letters" in dead(system, "list").stderr


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([], 2),
        (["bury"], 2),
        (["retry"], 2),
        (["purge", "--all", "x"], 2),
        (["show"], 2),
        (["show", "x"], 1),
        (["list", "--function", "0x7f000001"], 2),
        (["--help"], 0),
    ],
)
def test_shell_says_what_it_does_not_understand(system: System, arguments: list[str], status: int) -> None:
    done = dead(system, *arguments)
    assert done.returncode == status
    assert done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_shell_makes_no_queue_where_there_is_none(system: System) -> None:
    path = system.temporary / "nowhere"
    done = run("worker", ["dead", "list"], {"queue_url": f"spool:{path}"})
    assert (done.returncode, path.exists()) == (1, False)
    assert str(path) in done.stderr


# Pure


@pytest.mark.parametrize(
    ("start", "count", "shown"),
    [
        (b"", 0, {"bytes": 0, "text": ""}),
        ("ä".encode(), 2, {"bytes": 2, "text": "ä"}),
        (b"\xff", 1, {"bytes": 1, "base64": "/w=="}),
        ("ä".encode()[:1], 2, {"bytes": 2, "shown_bytes": 1, "text": ""}),
        ("ä".encode()[:1], 1, {"bytes": 1, "base64": "ww=="}),
        (b"x" * 4, SHOWN_BODY_BYTES + 1, {"bytes": SHOWN_BODY_BYTES + 1, "shown_bytes": 4, "text": "xxxx"}),
    ],
)
def test_body_is_shown_as_text_where_it_is_text(start: bytes, count: int, shown: dict[str, object]) -> None:
    assert describe_body(start, count) == shown


def test_query_is_read_with_its_defaults() -> None:
    choice = parse_call_filter(b"state=dead&limit=7&function=a")
    assert (choice.state, choice.limit_count, choice.function, choice.before) == (State.DEAD, 7, "a.openfaas-fn", None)
    assert parse_call_filter(b"function=a.prod").function == "a.prod"
    with pytest.raises(BadQuery, match="allowed: queued, running"):
        parse_call_filter(b"state=x")
    with pytest.raises(BadQuery, match="function='A': 'A' is no function's name; allowed: 1 to 63"):
        parse_call_filter(b"function=A")


def test_table_keeps_each_letter_on_one_line() -> None:
    table = format_table([("id", "f", "call", "1", "", "a\nb\x1b[31m")])
    assert table.splitlines()[1].endswith(r"a\nb\x1b[31m")
