"""What a caller of the watchdog sees, request by request, and what the function and the log get to see of it."""

from __future__ import annotations

import base64
import fcntl
import functools
import http.client
import json
import os
import re
import resource
import shlex
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from testkit.harness import (
    REPLY_DEADLINE_S,
    TICK_S,
    Answer,
    InBackground,
    Program,
    connect,
    crowding,
    free_port,
    http_over,
    http_request,
    noise_s,
    parse,
    raw,
    read_all,
    read_until,
    run,
    wait_until,
)
from testkit.needed import want_root

RUNNING_METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
OTHER_METHODS = ["OPTIONS", "TRACE", "UPDATE", "PROPFIND", "get", "HEAD"]
UNTIL_GONE = b"exec sleep 600"  # a function that only its watchdog ends
SOON_S = 10.0  # until what follows an answer, or a deadline, has happened


def post(program: Program, body: bytes = b"", headers: Mapping[str, str] | None = None, path: str = "/") -> Answer:
    return http_request(program.port, "POST", path, headers, body)


def forks(program: Program) -> int:
    """Return how many processes were started so far, and one by this, behind whose line in the log none is missing."""
    call_id = str(uuid.uuid4())
    post(program, headers={"X-Call-Id": call_id})
    program.wait_log(f"call_id={call_id}")
    return program.log().count("Forking")


def environment_of(body: bytes) -> dict[str, str]:
    """Return what `env -0` printed, without the mark by which the watchdog knows its own."""
    pairs = (entry.decode("utf-8", "surrogateescape").partition("=") for entry in body.split(b"\0") if entry)
    return {name: value for name, _, value in pairs if name != "FAASHOUND_CALL"}


def theirs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what a function sees of its watchdog's environment, here all but the settings that tests begin with."""
    ours = ("fprocess", "port", "metrics_port", "workers", "cgi_headers")
    return {name: value for name, value in environment.items() if name not in ours}


def facts(program: Program, request: bytes) -> dict[str, str]:
    """Send `request` to a watchdog of `env -0`; return the Http_* variables that its function got."""
    (answer,) = parse(raw(program.port, request))
    assert answer.status == 200, answer
    return {name: value for name, value in environment_of(answer.body).items() if name.lower().startswith("http_")}


def get_with(*headers: str, target: str = "/", method: str = "GET") -> bytes:
    """Return a GET request with the header lines `headers`, exactly as they are."""
    lines = [f"{method} {target} HTTP/1.1", "Host: h.example", *headers, "Connection: close", "", ""]
    return "\r\n".join(lines).encode("latin-1")


# Methods and paths


@pytest.mark.parametrize("method", RUNNING_METHODS)
def test_function_runs_when_method_is_one_of_five(cat: Program, method: str) -> None:
    answer = http_request(cat.port, method, "/any/path?query", body=b"hello")
    assert (answer.status, answer.body) == (200, b"hello")


@pytest.mark.parametrize("path", ["/", "/_/health", "/_/ready", "/a/b"])
@pytest.mark.parametrize("method", OTHER_METHODS)
def test_watchdog_answers_405_and_runs_nothing_when_method_is_another(cat: Program, method: str, path: str) -> None:
    forks_before = forks(cat)
    answer = http_request(cat.port, method, path)
    assert answer.status == 405
    assert forks(cat) == forks_before + 1


def test_405_names_the_allowed_methods_when_sent(cat: Program) -> None:
    allowed = http_request(cat.port, "OPTIONS").headers["allow"]
    assert sorted(allowed.replace(" ", "").split(",")) == sorted(RUNNING_METHODS)


def test_connection_serves_on_when_a_405_refused_a_body(cat: Program) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", cat.port, timeout=10)
    assert http_over(connection, "OPTIONS", body=b"x" * 1000).status == 405
    assert http_over(connection, "POST", body=b"next").body == b"next"
    connection.close()


@pytest.mark.parametrize("path", ["/_/health", "/_/ready"])
def test_health_is_ok_and_runs_nothing_when_serving(cat: Program, path: str) -> None:
    forks_before = forks(cat)
    answer = http_request(cat.port, "GET", path)
    assert (answer.status, answer.body) == (200, b"OK")
    assert forks(cat) == forks_before + 1


@pytest.mark.parametrize("path", ["/_/healthy", "/_/", "/x/_/health"])
def test_function_runs_when_path_only_looks_like_health(cat: Program, path: str) -> None:
    assert http_request(cat.port, "POST", path, body=b"mine").body == b"mine"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_health_answers_405_when_method_is_not_get(cat: Program, method: str) -> None:
    assert http_request(cat.port, method, "/_/health").status == 405
    assert http_request(cat.port, method, "/_/ready").status == 405


# The end of the process decides the answer


def test_answer_is_200_with_the_duration_when_process_exits_0(shell: Program) -> None:
    answer = post(shell, b"echo out; exit 0")
    assert (answer.status, answer.body) == (200, b"out\n")
    assert re.fullmatch(r"\d+\.\d{6}", answer.headers["x-duration-seconds"])
    assert float(answer.headers["x-duration-seconds"]) <= answer.elapsed_s


@pytest.mark.parametrize("code", [1, 2, 99, 126, 127, 128, 137, 255])
def test_answer_is_500_with_status_and_output_when_process_exits_non_zero(shell: Program, code: int) -> None:
    answer = post(shell, b"echo out; exit %d" % code)
    assert (answer.status, answer.text) == (500, f"exit status {code}\nout\n")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("HUP", "hangup"),
        ("INT", "interrupt"),
        ("QUIT", "quit"),
        ("ABRT", "aborted"),
        ("KILL", "killed"),
        ("USR1", "user defined signal 1"),
        ("SEGV", "segmentation fault"),
        ("PIPE", "broken pipe"),
        ("ALRM", "alarm clock"),
        ("TERM", "terminated"),
        ("34", "signal 34"),
        ("64", "signal 64"),
    ],
)
def test_answer_is_500_with_signal_as_go_names_it_when_process_is_killed(shell: Program, name: str, text: str) -> None:
    answer = post(shell, b"ulimit -c 0; echo out; kill -%s $$" % name.encode())
    assert (answer.status, answer.text) == (500, f"signal: {text}\nout\n")


@pytest.mark.parametrize(
    ("content", "mode", "reason"),
    [
        (None, 0, "no such file"),
        (b"#!/bin/sh\n", 0o644, "permission denied"),
        (b"\x00\x01\x02 no program", 0o755, "exec format error"),
        (b"#!/nowhere/interpreter\n", 0o755, "no such file"),
    ],
    ids=["missing", "not-executable", "no-program", "no-interpreter"],
)
def test_answer_is_500_with_reason_when_process_cannot_start(
    tmp_path: Path, content: bytes | None, mode: int, reason: str
) -> None:
    path = tmp_path / "function"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with Program("watchdog", {"fprocess": str(path)}) as program:
        first, second = post(program), post(program, b"x" * 200_000)
        assert [first.status, second.status] == [500, 500]
        assert reason in first.text.lower()
        assert http_request(program.port, "GET", "/_/health").status == 200


def test_command_is_found_on_the_path_and_runs_without_a_shell_when_quoted() -> None:
    with Program("watchdog", {"fprocess": "printf '%s|' 'a b' $HOME \"c;d\" ''"}) as program:
        assert post(program).text == "a b|$HOME|c;d||"


def test_answer_is_200_when_function_does_not_read_its_body() -> None:
    with Program("watchdog", {"fprocess": "true"}) as program:
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=20)
        assert http_over(connection, "POST", body=b"x" * 1_000_000).status == 200
        connection.close()


def test_answer_is_200_when_function_reads_nothing_of_a_body_that_outlasts_it() -> None:
    with Program("watchdog", {"fprocess": "echo done"}) as program:
        answer = http_request(
            program.port, "POST", body=bytes(40 << 20)
        )  # well above what is discarded of a refused one
        assert (answer.status, answer.text) == (200, "done\n")


def test_answer_is_whole_when_output_and_input_are_large(cat: Program) -> None:
    body = os.urandom(1 << 20) * 8
    assert post(cat, body).body == body


@pytest.mark.parametrize("size_bytes", [65_536, 262_143, 262_144, 262_145, 327_680, 1 << 20, (1 << 20) + 1])
def test_answers_are_whole_on_one_connection_when_sizes_meet_our_bounds(cat: Program, size_bytes: int) -> None:
    body = os.urandom(size_bytes)
    connection = http.client.HTTPConnection("127.0.0.1", cat.port, timeout=REPLY_DEADLINE_S)
    with closing(connection):
        assert http_over(connection, "POST", body=body).body == body
        connected = connection.sock
        pieces = (body[start : start + 100_000] for start in range(0, size_bytes, 100_000))
        assert http_over(connection, "POST", body=pieces).body == body
        assert http_over(connection, "POST", body=b"small").body == b"small"
        assert connection.sock is connected


def test_large_output_of_a_failed_function_is_whole_when_reason_goes_before_it(shell: Program) -> None:
    answer = post(shell, b"head -c 3000000 /dev/zero; exit 3")
    assert (answer.status, answer.body) == (500, b"exit status 3\n" + bytes(3_000_000))


def test_large_answer_ends_with_the_connection_when_client_speaks_1_0(shell: Program) -> None:
    script = b"head -c 3000000 /dev/zero"
    (answer,) = parse(raw(shell.port, b"POST / HTTP/1.0\r\nContent-Length: %d\r\n\r\n%b" % (len(script), script)))
    assert (answer.status, answer.body) == (200, bytes(3_000_000))


def test_large_body_comes_back_when_the_kernel_grants_no_larger_pipes() -> None:
    # What a user may have in pipes (pipe(7), pipe-user-pages-soft) is taken; only privileged processes may go beyond.
    poor = ["setpriv", "--bounding-set=-sys_resource,-sys_admin"]
    body = os.urandom(5_000_000)
    with ExitStack() as stack:
        for _ in range(64):
            for fd in os.pipe():
                stack.callback(os.close, fd)
            with suppress(PermissionError):
                fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, 1 << 20)
        with Program("watchdog", {"fprocess": "cat"}, prefix=poor if os.geteuid() == 0 else []) as program:
            assert post(program, body).body == body


def test_memory_stays_bounded_when_body_and_output_are_huge() -> None:
    size_bytes = 150 << 20
    with Program("watchdog", {"fprocess": "cat"}) as program:
        assert post(program, b"warm").status == 200
        before_bytes = program.resident_bytes()
        assert len(post(program, bytes(size_bytes)).body) == size_bytes
        assert program.resident_bytes() - before_bytes < 40 << 20


def test_nothing_is_left_on_disk_when_an_output_was_spilled() -> None:
    with Program("watchdog", {"fprocess": "head -c 60000000 /dev/zero"}) as program:
        assert len(post(program).body) == 60_000_000
        assert {path.name for path in program.temporary.iterdir()} <= {".lock"}


@hypothesis_settings(max_examples=25)
@given(st.binary(max_size=3000))
def test_body_comes_back_unchanged_when_any_bytes(cat: Program, body: bytes) -> None:
    answer = post(cat, body)
    assert (answer.status, answer.body) == (200, body)


def test_requests_run_side_by_side_when_they_come_at_once(shell: Program) -> None:
    others = b'touch "$TMPDIR/side-$$"; until [ "$(ls "$TMPDIR" | grep -c side-)" = 8 ]; do sleep 0.05; done; echo done'
    calls = [InBackground(lambda: post(shell, others)) for _ in range(8)]
    assert all(call.result().text == "done\n" for call in calls)


# Content-Type of the response


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (b"plain", "text/plain; charset=utf-8"),
        (b"", "text/plain; charset=utf-8"),
        ("žluťoučký kůň".encode(), "text/plain; charset=utf-8"),
        (b"\xff\xfe\x00\x01", "application/octet-stream"),
        (b"\x00", "application/octet-stream"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "application/octet-stream"),
    ]
    + [(b"a" * before + "é".encode() * 9, "text/plain; charset=utf-8") for before in (511, 1023, 4095, 8191, 65535)],
    ids=["ascii", "empty", "utf-8", "binary", "nul", "png", "cut-511", "cut-1023", "cut-4095", "cut-8191", "cut-65535"],
)
def test_type_is_that_of_the_output_when_nobody_names_one(cat: Program, output: bytes, expected: str) -> None:
    assert post(cat, output).headers["content-type"] == expected


@pytest.mark.parametrize("content_type", ["application/json", "image/png", "text/html; charset=latin-1"])
def test_type_is_that_of_the_request_when_it_has_one(cat: Program, content_type: str) -> None:
    assert post(cat, b"{}", {"Content-Type": content_type}).headers["content-type"] == content_type


def test_type_is_the_forced_one_when_set() -> None:
    with Program("watchdog", {"fprocess": "cat", "content_type": "application/json"}) as program:
        assert post(program, b"\xff").headers["content-type"] == "application/json"
        assert post(program, b"a", {"Content-Type": "text/html"}).headers["content-type"] == "application/json"


# The environment of the process


@pytest.mark.parametrize(
    ("header", "variable"),
    [
        ("x-forwarded-by: v", "Http_X_Forwarded_By"),
        ("ETAG: v", "Http_Etag"),
        ("x-3abc: v", "Http_X_3abc"),
        ("X-cALL-iD: v", "Http_X_Call_Id"),
        ("x-a.b: v", "Http_X_A.b"),
        ("x--y-: v", "Http_X__Y_"),
        ("7up: v", "Http_7up"),
        ("Content-Type: v", "Http_Content_Type"),
    ],
)
def test_header_becomes_variable_in_canonical_case_when_sent(printenv: Program, header: str, variable: str) -> None:
    assert facts(printenv, get_with(header))[variable] == "v"


def test_first_value_wins_when_header_is_repeated(printenv: Program) -> None:
    assert facts(printenv, get_with("X-A: first", "x-a: second"))["Http_X_A"] == "first"


def test_value_is_passed_byte_for_byte_when_not_ascii(printenv: Program) -> None:
    assert os.fsencode(facts(printenv, get_with("X-A: caf\xe9 = \t;"))["Http_X_A"]) == b"caf\xe9 = \t;"


def test_facts_are_variables_when_request_has_a_body(printenv: Program) -> None:
    request = b"PUT /a%20b/%C3%A9?q=%20&p=1;2 HTTP/1.1\r\nHost: h.example:99\r\nContent-Length: 4\r\n"
    got = facts(printenv, request + b"Connection: close\r\n\r\nbody")
    assert got["Http_Method"] == "PUT"
    assert got["Http_Path"] == "/a b/é"
    assert got["Http_Query"] == "q=%20&p=1;2"
    assert got["Http_Host"] == "h.example:99"
    assert got["Http_ContentLength"] == got["Http_Content_Length"] == "4"
    assert "Http_Transfer_Encoding" not in got


def test_facts_say_so_when_body_is_chunked(printenv: Program) -> None:
    request = get_with("Transfer-Encoding: chunked", method="POST") + b"3\r\nabc\r\n0\r\n\r\n"
    got = facts(printenv, request)
    assert got["Http_ContentLength"] == got["Http_Content_Length"] == "-1"
    assert got["Http_Transfer_Encoding"] == "chunked"


def test_facts_are_zero_or_absent_when_there_is_no_body_and_no_query(printenv: Program) -> None:
    got = facts(printenv, get_with(target="/p"))
    assert got["Http_ContentLength"] == got["Http_Content_Length"] == "0"
    assert "Http_Query" not in got
    assert got["Http_Path"] == "/p"


def test_facts_come_from_the_target_when_it_is_absolute(printenv: Program) -> None:
    got = facts(printenv, get_with(target="http://other.example/p%41?q"))
    assert (got["Http_Path"], got["Http_Query"], got["Http_Host"]) == ("/pA", "q", "other.example")


def test_path_keeps_its_bytes_when_they_are_no_utf_8(printenv: Program) -> None:
    assert os.fsencode(facts(printenv, get_with(target="/%FF%fe"))["Http_Path"]) == b"/\xff\xfe"


@pytest.mark.parametrize("name", ["Query", "Path", "Method", "ContentLength"])
def test_header_does_not_override_a_fact_when_named_like_one(printenv: Program, name: str) -> None:
    plain = facts(printenv, get_with(target="/p?q"))
    assert facts(printenv, get_with(f"{name}: evil", target="/p?q")) == plain
    assert "evil" not in facts(printenv, get_with(f"{name.lower()}: evil", target="/")).values()


@pytest.mark.parametrize(
    "header", ["Proxy: http://evil", "PROXY: http://evil", "X_Foo: evil", "Content_Length: 99", "Transfer_Encoding: x"]
)
def test_header_is_not_exported_when_it_could_deceive(printenv: Program, header: str) -> None:
    assert facts(printenv, get_with(header)) == facts(printenv, get_with())


def test_dashed_header_keeps_its_value_when_its_underscored_twin_comes_first(printenv: Program) -> None:
    assert facts(printenv, get_with("X_User: evil", "X-User: good"))["Http_X_User"] == "good"


def test_function_inherits_the_environment_of_the_watchdog_when_started(printenv: Program) -> None:
    inherited = environment_of(http_request(printenv.port).body)
    facts_removed = {name: value for name, value in inherited.items() if not name.startswith("Http_")}
    assert facts_removed == theirs(printenv.environment)


def test_function_gets_no_facts_when_cgi_headers_is_false() -> None:
    with Program("watchdog", {"fprocess": "env -0", "cgi_headers": "false"}) as program:
        answer = http_request(program.port, "GET", "/p?q", {"X-A": "1"})
        assert environment_of(answer.body) == theirs(program.environment)


@pytest.mark.parametrize("size_bytes", [200_000, 3_000_000])
def test_answer_is_431_when_a_header_is_too_large(printenv: Program, size_bytes: int) -> None:
    (answer,) = parse(raw(printenv.port, get_with("X-A: " + "a" * size_bytes)))
    assert answer.status == 431
    assert http_request(printenv.port).status == 200


@pytest.mark.parametrize("size_bytes", [1 << 14, 1 << 16, (1 << 17) - 100, (1 << 17) - 8, 1 << 17, (1 << 17) + 8])
def test_header_is_passed_or_answered_431_when_near_the_limit_of_execve(printenv: Program, size_bytes: int) -> None:
    (answer,) = parse(raw(printenv.port, get_with("X-A: " + "a" * size_bytes)))
    assert answer.status in (200, 431), answer.text[:200]
    if answer.status == 200:
        assert len(environment_of(answer.body)["Http_X_A"]) == size_bytes


def test_answer_is_431_when_headers_are_too_many(printenv: Program) -> None:
    (answer,) = parse(raw(printenv.port, get_with(*(f"X-{number}: a" for number in range(200_000)))))
    assert answer.status == 431


def test_answer_is_431_or_414_when_the_target_is_too_large_for_execve(printenv: Program) -> None:
    (answer,) = parse(raw(printenv.port, get_with(target="/" + "a" * 200_000)))
    assert answer.status in (414, 431)


# What the process inherits besides


def test_function_has_three_descriptors_when_started(shell: Program) -> None:
    # ls adds the one for the directory it lists.
    assert len(post(shell, b"exec ls /proc/self/fd").text.split()) == 4


def test_function_has_default_signals_when_started(shell: Program) -> None:
    # Bits 31 and 32 are signals of the C library's own, which nobody's function can mean.
    masks = dict(re.findall(r"Sig(Blk|Ign):\s+(\w+)", post(shell, b"exec cat /proc/self/status").text))
    assert {name: int(mask, 16) & 0x7FFFFFFF for name, mask in masks.items()} == {"Blk": 0, "Ign": 0}


def test_watchdog_keeps_no_descriptor_and_no_zombie_when_requests_are_done() -> None:
    with Program("watchdog", {"fprocess": "/bin/sh"}) as program:
        scripts = [b"true", b"exit 1", b"kill -9 $$", b"head -c 300000 /dev/zero", b"exec <&-; exec >&-; exec 2>&-"]
        for script in scripts:
            post(program, script)
        before, children = program.descriptors(), program.children()
        for script in scripts * 4:
            post(program, script)
        wait_until(lambda: program.children() == children, 5.0, f"no children but {children}")
        wait_until(lambda: program.descriptors() <= before, 5.0, f"no more than {before} descriptors")


# Time limits of one call


@pytest.fixture(scope="module")
def limited() -> Iterator[Program]:
    """A watchdog of shell scripts that may run for 0.4 s."""
    with Program("watchdog", {"fprocess": "/bin/sh", "exec_timeout": "400ms"}) as program:
        yield program


def test_answer_is_408_at_the_deadline_when_function_runs_on(limited: Program) -> None:
    answer = post(limited, b"echo out; " + UNTIL_GONE)
    assert (answer.status, answer.text) == (408, "Killed process.\n")
    assert 0.4 - TICK_S <= answer.elapsed_s < 0.4 + SOON_S * crowding()
    limited.wait_idle(SOON_S)


@pytest.mark.parametrize("given", ["100ms", "0.1s", "100000us"])
def test_caller_shortens_its_limit_when_it_sends_x_timeout(shell: Program, given: str) -> None:
    with Program("watchdog", {"fprocess": "/bin/sh", "exec_timeout": "1m"}) as limited:
        for program in (limited, shell):
            answer = post(program, UNTIL_GONE, {"X-Timeout": given})
            assert answer.status == 408
            assert 0.1 - TICK_S <= answer.elapsed_s < 0.1 + SOON_S * crowding()
    shell.wait_idle()


def test_call_has_no_limit_of_its_own_when_x_timeout_is_empty(shell: Program) -> None:
    assert post(shell, b"true", {"X-Timeout": ""}).status == 200


@pytest.mark.parametrize("given", ["1h", "10", "0"])
def test_caller_does_not_lengthen_its_limit_when_it_sends_x_timeout(limited: Program, given: str) -> None:
    answer = post(limited, UNTIL_GONE, {"X-Timeout": given})
    assert answer.status in ((400, 408) if given == "0" else (408,))
    assert answer.elapsed_s < 10


@pytest.mark.parametrize("given", ["banana", "-1s", "1d", "1 s", "5,5", "9" * 400, "1" * 15_000 + "x"])
def test_answer_is_400_and_nothing_runs_when_x_timeout_makes_no_sense(shell: Program, given: str) -> None:
    forks_before = forks(shell)
    answers = [post(shell, b"true", {"X-Timeout": given}) for _ in range(3)]
    assert {answer.status for answer in answers} == {400}
    assert "X-Timeout" in answers[0].text
    assert min(answer.elapsed_s for answer in answers) < noise_s()  # who stands still once makes one of them late
    assert forks(shell) == forks_before + 1


def test_process_is_killed_when_its_client_hangs_up(shell: Program) -> None:
    with connect(shell.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (len(UNTIL_GONE), UNTIL_GONE))
        shell.wait_started()
    shell.wait_idle(SOON_S)
    assert post(shell, b"echo alive").text == "alive\n"


def test_process_is_killed_when_its_client_hangs_up_within_the_body(cat: Program) -> None:
    with connect(cat.port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf")
        cat.wait_started()
    cat.wait_idle(SOON_S)


# max_inflight


@pytest.fixture(scope="module")
def one_at_a_time() -> Iterator[Program]:
    """A watchdog of shell scripts that runs one of them at once."""
    with Program("watchdog", {"fprocess": "/bin/sh", "max_inflight": "1"}) as program:
        yield program


def test_second_call_gets_429_when_one_is_the_limit(one_at_a_time: Program) -> None:
    port = one_at_a_time.port
    with connect(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\n\r\n%s" % (len(UNTIL_GONE), UNTIL_GONE))
        one_at_a_time.wait_started()
        answer = post(one_at_a_time, b"true")
        assert (answer.status, answer.text) == (429, "Concurrent request limit exceeded. Max concurrent requests: 1\n")
        assert answer.headers["x-openfaas-internal"] == "faas-middleware"
        assert answer.elapsed_s < SOON_S * crowding()
        assert http_request(port, "GET", "/_/ready").status == 429
        assert http_request(port, "POST", "/_/ready").status == 405
        assert http_request(port, "GET", "/_/health").status == 200
    one_at_a_time.wait_idle()
    wait_until(lambda: http_request(port, "GET", "/_/ready").status == 200, SOON_S, "ready again")
    assert post(one_at_a_time, b"true").status == 200


@pytest.mark.parametrize("script", [b"true", b"exit 3", b"kill -9 $$"])
def test_calls_in_a_row_are_not_limited_when_each_ends_first(one_at_a_time: Program, script: bytes) -> None:
    assert 429 not in [post(one_at_a_time, script).status for _ in range(5)]


# max_body


@pytest.fixture(scope="module")
def small_bodies() -> Iterator[Program]:
    """A watchdog of `cat` that takes bodies of up to 1000 bytes."""
    with Program("watchdog", {"fprocess": "cat", "max_body": "1000"}) as program:
        yield program


@pytest.mark.parametrize(("size_bytes", "status"), [(0, 200), (1000, 200), (1001, 413), (500_000, 413)])
@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
def test_body_is_refused_when_above_the_limit(
    small_bodies: Program, size_bytes: int, status: int, chunked: bool
) -> None:
    body = bytes(size_bytes)
    answer = http_request(small_bodies.port, "POST", body=iter([body]) if chunked and body else body)
    assert answer.status == status
    assert "1000" in answer.text or status == 200
    small_bodies.wait_idle()


# Lock file, health check, flags


def test_lock_file_stands_for_health_when_not_suppressed() -> None:
    with Program("watchdog", {"fprocess": "cat"}) as program:
        lock = program.temporary / ".lock"
        assert lock.exists()
        assert run("watchdog", ["--run-healthcheck"], {"TMPDIR": str(program.temporary)}).returncode == 0
        lock.unlink()
        assert http_request(program.port, "GET", "/_/health").status == 503
        done = run("watchdog", ["--run-healthcheck"], {"TMPDIR": str(program.temporary)})
        assert done.returncode == 1
        assert "lock" in done.stderr


def test_health_needs_no_file_when_lock_is_suppressed() -> None:
    with Program("watchdog", {"fprocess": "cat", "suppress_lock": "true"}) as program:
        assert list(program.temporary.iterdir()) == []
        assert http_request(program.port, "GET", "/_/health").status == 200


def test_start_succeeds_when_an_old_lock_file_is_there() -> None:
    program = Program("watchdog", {"fprocess": "cat"})
    (program.temporary / ".lock").touch()
    with program:
        assert http_request(program.port, "GET", "/_/health").status == 200


def test_lock_file_is_of_one_port_when_two_watchdogs_share_a_directory() -> None:
    port = free_port()
    with Program("watchdog", {"fprocess": "cat"}) as first:
        here = {"TMPDIR": str(first.temporary), "port": str(port)}
        with Program("watchdog", {"fprocess": "cat", "healthcheck_interval": "0", **here}) as second:
            assert run("watchdog", ["--run-healthcheck"], here).returncode == 0
            second.terminate()
            assert second.wait_exit() == 0
        assert run("watchdog", ["--run-healthcheck"], here).returncode == 1
        assert http_request(first.port, "GET", "/_/health").status == 200


def to_a_file(lock: Path) -> None:
    (lock.parent / "precious").touch()
    lock.symlink_to("precious")


def of_another_user(lock: Path) -> None:
    lock.touch()
    want_root("making a file another user's")
    os.chown(lock, 65534, 65534)


PLANTED = {
    "directory": Path.mkdir,
    "link": to_a_file,
    "dangling-link": lambda lock: lock.symlink_to("nowhere"),
    "fifo": os.mkfifo,
    "another-user's": pytest.param(of_another_user, marks=pytest.mark.skipif(os.geteuid() != 0, reason="needs root")),
}


@pytest.mark.parametrize("plant", PLANTED.values(), ids=PLANTED)
def test_start_fails_with_a_reason_when_the_lock_file_is_not_ours(
    tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    settings = {"fprocess": "cat", "port": "0", "metrics_port": "0", "TMPDIR": str(tmp_path)}
    plant(tmp_path / ".lock")
    before = sorted(path.name for path in tmp_path.iterdir())
    done = run("watchdog", settings=settings)
    assert done.returncode == 1
    assert ".lock" in done.stderr
    assert "suppress_lock" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


# marshal_request, combine_output


def test_function_reads_json_when_marshal_request_is_set() -> None:
    with Program("watchdog", {"fprocess": "cat", "marshal_request": "true"}) as program:
        framing = ("Transfer-Encoding: chunked", "Trailer: X-T")
        fields = ("x-one: 1", "X-Two: a", "X-Two: b", "X-Name: Zo\u00c3\u00ab")  # which is UTF-8
        request = get_with(*fields, *framing, method="POST") + b"3\r\n\x00\xffz\r\n0\r\nX-T: 1\r\n\r\n"
        (answer,) = parse(raw(program.port, request))
        got = json.loads(answer.body)
        assert base64.b64decode(got["body"]["raw"]) == b"\x00\xffz"
        assert got["header"]["X-One"] == ["1"]
        assert got["header"]["X-Two"] == ["a", "b"]
        assert got["header"]["X-Name"] == ["Zo\u00eb"]
        assert not {"Host", "Trailer", "Transfer-Encoding"} & got["header"].keys()  # Go has them elsewhere
        assert set(got) == {"header", "body"}


@pytest.mark.parametrize("body", [b"", b"a", b"ab", b"abc", b"x" * 1_000_000], ids=len)
def test_base64_is_whole_when_marshalled_body_has_any_length(body: bytes) -> None:
    # Sent in uneven chunks: base64 must be carried over their boundaries.
    with Program("watchdog", {"fprocess": "cat", "marshal_request": "true"}) as program:
        pieces = (body[start : start + 7001] for start in range(0, len(body), 7001))
        answer = http_request(program.port, "POST", body=pieces)
        assert base64.b64decode(json.loads(answer.body)["body"]["raw"]) == body


def test_stderr_is_in_the_response_in_order_when_combined(shell: Program) -> None:
    assert post(shell, b"echo 1; echo 2 >&2; echo 3; exit 4").text == "exit status 4\n1\n2\n3\n"


def test_stderr_is_in_the_log_when_not_combined() -> None:
    with Program("watchdog", {"fprocess": "/bin/sh", "combine_output": "false"}) as program:
        assert post(program, b"echo out; echo oops >&2").text == "out\n"
        assert post(program, b"echo out; echo wrong >&2; exit 1").text == "exit status 1\nout\n"
        program.wait_log("oops")
        program.wait_log("wrong")


# The log


def test_log_tells_of_the_start_and_the_end_when_a_function_runs(cat: Program) -> None:
    post(cat, b"x" * 12345)
    assert re.search(r"Wrote 12345 Bytes - Duration: \d+\.\d{6}s( |$)", cat.wait_log("Wrote 12345 Bytes"))
    cat.wait_log("Forking fprocess.")


def test_bodies_and_headers_are_logged_when_asked_for() -> None:
    settings = {"fprocess": "tr a-z A-Z", "write_debug": "true", "debug_headers": "true"}
    with Program("watchdog", settings) as program:
        post(program, b"secret-in", {"X-Seen": "seen-value"})
        program.wait_log("SECRET-IN")
        assert "x-seen" in program.wait_log("seen-value").lower()
        wait_until(lambda: "x-duration-seconds" in program.log().lower(), 5.0, "headers of the response in the log")


def test_secrets_are_not_logged_when_headers_are() -> None:
    with Program("watchdog", {"fprocess": "cat", "debug_headers": "true"}) as program:
        secret = {"Authorization": "Bearer s3cret", "Cookie": "id=s3cret", "Proxy-Authorization": "Basic s3cret"}
        post(program, b"", secret | {"X-Seen": "seen-value"})
        program.wait_log("Wrote 0 Bytes")
        assert "seen-value" in program.log()
        assert "s3cret" not in program.log()


def test_bodies_and_headers_are_not_logged_when_not_asked_for(cat: Program) -> None:
    post(cat, b"secret-in", {"X-Seen": "seen-value"})
    cat.wait_log("Wrote 9 Bytes")
    assert "secret-in" not in cat.log()
    assert "seen-value" not in cat.log()


@pytest.mark.parametrize("prefix_logs", ["true", "false"])
def test_stderr_line_has_a_prefix_when_prefix_logs_is_true(prefix_logs: str) -> None:
    settings = {"fprocess": "sh -c 'echo oops >&2'", "combine_output": "false", "prefix_logs": prefix_logs}
    with Program("watchdog", settings) as program:
        post(program)
        line = program.wait_log("oops")
        expected = r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d .*stderr: oops" if prefix_logs == "true" else "oops"
        assert re.fullmatch(expected, line)


def test_each_line_of_a_request_has_its_call_id_when_log_callid_is_true() -> None:
    settings = {"fprocess": "sh -c 'echo oops >&2'", "combine_output": "false", "log_callid": "true"}
    with Program("watchdog", settings) as program:
        post(program, b"", {"X-Call-Id": "call-42"})
        for text in ("Forking fprocess.", "oops", "Wrote 0 Bytes"):
            assert "call-42" in program.wait_log(text)


def test_log_lines_stay_whole_when_functions_write_them_at_the_same_time() -> None:
    settings = {"fprocess": "/bin/sh", "combine_output": "false", "prefix_logs": "false"}
    script = b"for i in 1 2 3 4 5; do printf aaaa >&2; printf 'bbbb\\n' >&2; done"
    with Program("watchdog", settings) as program:
        for call in [InBackground(lambda: post(program, script)) for _ in range(6)]:
            call.result()
        wait_until(lambda: program.log_lines().count("aaaabbbb") == 30, 5.0, f"30 whole lines in\n{program.log()}")


def test_every_line_is_json_when_log_format_is_json() -> None:
    settings = {"fprocess": 'sh -c \'printf "q\\" \\xff\\n" >&2\'', "combine_output": "false", "log_format": "json"}
    with Program("watchdog", settings | {"exec_timout": "1", "debug_headers": "true"}) as program:
        post(program, b"", {"X-A": '"'})
        program.wait_log("Wrote 0 Bytes")
        records = [json.loads(line) for line in program.log_lines()]
        assert all(isinstance(record, dict) for record in records)
        assert any("exec_timout" in str(record) for record in records)


def test_log_is_not_forged_when_the_path_has_a_line_break(cat: Program) -> None:
    call_id = str(uuid.uuid4())
    http_request(cat.port, "GET", "/a%0aForged%20line", {"X-Call-Id": call_id})
    cat.wait_log(f"call_id={call_id}")
    assert not any(line.startswith("Forged") for line in cat.log_lines())


def test_lookalike_is_warned_about_when_program_starts() -> None:
    with Program("watchdog", {"fprocess": "cat", "exec_timout": "5"}) as program:
        assert "exec_timeout" in program.wait_log("exec_timout")


# Metrics


def samples(program: Program) -> dict[str, float]:
    text = http_request(program.metrics_port, "GET", "/metrics").text
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_count_by_code_and_method_when_functions_run() -> None:
    with Program("watchdog", {"fprocess": "/bin/sh", "metrics_port": str(free_port())}) as program:
        post(program, b"true")
        post(program, b"exit 1")
        http_request(program.port, "GET", "/")
        http_request(program.port, "GET", "/_/health")
        got = samples(program)
        assert got['http_requests_total{code="200",method="post"}'] == 1
        assert got['http_requests_total{code="500",method="post"}'] == 1
        assert got['http_requests_total{code="200",method="get"}'] == 1
        assert got['http_request_duration_seconds_count{code="200",method="post"}'] == 1
        assert got["http_requests_in_flight"] == 0


def test_in_flight_follows_the_functions_when_they_run_and_end() -> None:
    with Program("watchdog", {"fprocess": "/bin/sh", "metrics_port": str(free_port())}) as program:
        with connect(program.port) as client:
            client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 14\r\n\r\nexec sleep 600")
            program.wait_started()
            assert samples(program)["http_requests_in_flight"] == 1
        wait_until(lambda: samples(program)["http_requests_in_flight"] == 0, SOON_S, "none in flight")


def test_label_values_stay_few_when_strangers_invent_methods() -> None:
    with Program("watchdog", {"fprocess": "true", "metrics_port": str(free_port())}) as program:
        for number in range(20):
            assert http_request(program.port, f"METHOD{number}").status == 405
        assert sum(name.startswith("http_requests_total") for name in samples(program)) <= 2


def test_metrics_port_serves_nothing_else_when_asked() -> None:
    with Program("watchdog", {"fprocess": "true", "metrics_port": str(free_port())}) as program:
        assert http_request(program.metrics_port, "GET", "/metrics").headers["content-type"].startswith("text/plain")
        assert http_request(program.metrics_port, "GET", "/").status == 404
        assert http_request(program.metrics_port, "POST", "/metrics").status == 405
        assert http_request(program.port, "GET", "/metrics").status == 200  # a path like any other: the function's


# Where it listens


def has_ipv6() -> bool:
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
def test_watchdog_listens_on_both_protocols_when_no_host_is_set(cat: Program) -> None:
    assert http_request(cat.port, "GET", host="127.0.0.1").status == 200
    assert http_request(cat.port, "GET", host="::1").status == 200


@needs_ipv6
def test_watchdog_listens_on_one_address_only_when_host_is_set() -> None:
    with Program("watchdog", {"fprocess": "cat", "host": "127.0.0.1"}) as program:
        assert http_request(program.port, "GET").status == 200
        with pytest.raises(ConnectionRefusedError):
            http_request(program.port, "GET", host="::1")


@needs_ipv6
def test_watchdog_listens_on_both_families_when_the_host_is_every_address_of_ipv6() -> None:
    with Program("watchdog", {"fprocess": "cat", "host": "::"}) as program:
        assert http_request(program.port, "GET", host="::1").status == 200
        assert http_request(program.port, "GET", host="127.0.0.1").status == 200


@pytest.mark.parametrize("which", ["port", "metrics_port"])
def test_start_fails_with_a_reason_when_a_port_is_taken(which: str, cat: Program) -> None:
    settings = {"fprocess": "cat", "suppress_lock": "true", "port": "0", "metrics_port": "0"}
    done = run("watchdog", settings=settings | {which: str(cat.port)})
    assert done.returncode == 1
    assert str(cat.port) in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("host", ["256.1.1.1", "no.such.host.invalid", "192.0.2.1"])
def test_start_fails_with_a_reason_when_the_host_is_not_ours(host: str) -> None:
    done = run("watchdog", settings={"fprocess": "cat", "host": host, "port": "0", "metrics_port": "0"})
    assert done.returncode == 1
    assert host in done.stderr
    assert "Traceback" not in done.stderr


ACTIVATE = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.close(int(sys.argv[1]))
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.argv[2], sys.argv[2:])
"""


def activated(listener: socket.socket) -> Program:
    """Return a watchdog that finds `listener` at descriptor 3, as systemd would hand it over."""
    number = listener.fileno()
    prefix = [sys.executable, "-c", ACTIVATE, str(number)]
    return Program("watchdog", {"fprocess": "/bin/sh"}, prefix=prefix, pass_fds=[number], ready_line="Listening on")


def test_watchdog_serves_an_inherited_socket_when_activated() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, activated(listener):
        port = listener.getsockname()[1]
        assert http_request(port, "POST", body=b"echo hello").text == "hello\n"
        assert len(http_request(port, "POST", body=b"exec ls /proc/self/fd").text.split()) == 4


def test_watchdog_serves_a_unix_socket_when_activated(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with activated(listener), socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 10\r\n\r\necho hello")
            (answer,) = parse(read_all(client))
            assert answer.text == "hello\n"


def test_inherited_sockets_are_ignored_when_they_are_meant_for_another_process() -> None:
    with Program("watchdog", {"fprocess": "cat", "LISTEN_FDS": "1", "LISTEN_PID": "1"}) as program:
        assert post(program, b"hello").body == b"hello"


@pytest.mark.parametrize("count", ["many", "-1", "99", "1"])
def test_start_fails_with_a_reason_when_the_inherited_sockets_are_not_there(count: str) -> None:
    settings = {"fprocess": "cat", "port": "0", "metrics_port": "0", "suppress_lock": "true", "LISTEN_FDS": count}
    done = run("watchdog", settings=settings)
    assert done.returncode in (1, 2)
    assert "LISTEN_FDS" in done.stderr
    assert "Traceback" not in done.stderr


# When the machine runs short


def limited_by(limit: str, settings: Mapping[str, str]) -> Program:
    """Return a watchdog under the shell's `ulimit` LIMIT."""
    return Program("watchdog", settings, prefix=["/bin/sh", "-c", f'ulimit {limit}; exec "$@"', "sh"])


def test_watchdog_serves_again_when_it_had_run_out_of_descriptors() -> None:
    with Program("watchdog", {"fprocess": "cat"}) as program:
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (40, 40))  # fewer than it counts on
        clients = [connect(program.port) for _ in range(60)]
        wait_until(lambda: program.descriptors() >= 39, 5.0, "all descriptors taken")
        for client in clients:
            client.close()
        wait_until(lambda: program.descriptors() < 30, 5.0, "descriptors given back")
        assert post(program, b"hello").body == b"hello"
        assert len(program.log_lines()) < 200


def test_answer_is_500_with_reason_when_there_is_no_descriptor_for_the_pipes() -> None:
    with Program("watchdog", {"fprocess": "cat"}) as program, connect(program.port) as client:
        client.sendall(b"GET /_/health HTTP/1.1\r\nHost: h\r\n\r\n")
        read_until(client, b"OK")
        allowed = resource.prlimit(program.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (program.descriptors(), allowed[1]))
        client.sendall(b"POST / HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        (answer,) = parse(read_all(client))
        assert answer.status == 500
        assert "too many open files" in answer.text.lower()
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, allowed)
        assert post(program, b"hello").body == b"hello"


def test_answer_is_500_and_watchdog_lives_on_when_the_disk_takes_no_more() -> None:
    with limited_by("-f 1000", {"fprocess": "/bin/sh"}) as program:
        answer = post(program, b"head -c 60000000 /dev/zero")
        assert answer.status == 500
        assert "file too large" in answer.text.lower()
        program.wait_idle()
        assert post(program, b"echo on").text == "on\n"


def test_memory_stays_bounded_when_a_client_pipelines_and_never_reads(shell: Program) -> None:
    before_bytes = shell.resident_bytes()
    request = b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 24\r\n\r\nhead -c 100000 /dev/zero"
    with connect(shell.port, timeout_s=1.0) as client:
        with pytest.raises(TimeoutError):
            client.sendall(request * 1_000_000)
        assert shell.resident_bytes() - before_bytes < 32 << 20
    assert post(shell, b"echo on").text == "on\n"


# As a part of something larger


def test_file_runs_alone_when_copied_elsewhere(tmp_path: Path) -> None:
    copy = tmp_path / "watchdog.py"
    copy.write_bytes((Path(__file__).parents[2] / "watchdog.py").read_bytes())
    command = shlex.join([sys.executable, "-I", str(copy)])
    with Program("watchdog", {"fprocess": "cat"}, prefix=["/bin/sh", "-c", f"exec {command}"]) as program:
        assert post(program, b"hello").body == b"hello"


def test_many_clients_are_served_when_each_keeps_its_connection(cat: Program) -> None:
    start_s = time.monotonic()

    def client(number: int) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", cat.port, timeout=20)
        bodies = [f"{number}-{turn}".encode() for turn in range(10)]
        echoed = [http_over(connection, "POST", body=body).body for body in bodies]
        connection.close()
        return echoed == bodies

    calls = [InBackground(functools.partial(client, number)) for number in range(16)]
    assert all(call.result() for call in calls)
    assert time.monotonic() - start_s < 15 * crowding()
