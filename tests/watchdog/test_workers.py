"""workers=N: several processes share the port, and what an operator set, counts or stops is meant for all of them."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import signal
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress

import pytest

from testkit.harness import (
    REPLY_DEADLINE_S,
    START_DEADLINE_S,
    InBackground,
    Program,
    connect,
    free_port,
    http_request,
    read_until,
    run,
    wait_until,
)
from testkit.inspection import children_of, has_loop, in_flight, serves
from testkit.system import System

PARENT = "sh -c 'read pid name state parent rest < /proc/self/stat; echo $parent'"  # of the shell: who started it
WAIT_FOR_GO = """sh -c 'while [ ! -e "$TMPDIR/go" ]; do sleep 0.02; done; echo went'"""
TREE = "sh -c 'setsid -f sleep 60; sleep 60 & exec sleep 60'"
GONE_S = 10.0  # until what is killed, or told to end, is gone
TREE_COUNT = 3
TREE_CHILDREN_COUNT = 2  # of the worker: the root, and what has left the root's session
GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


def watchdog(fprocess: str, **settings: str) -> Program:
    return Program("watchdog", {"fprocess": fprocess, "workers": "2", "healthcheck_interval": "0"} | settings)


def workers_of(program: Program) -> set[int]:
    """Return the processes that serve: children of the first, as the guard is, but with an event loop."""
    return {pid for pid in program.children() if has_loop(pid)}


def kill_and_wait(program: Program, pid: int) -> None:
    """Kill a worker and wait until another has taken its place."""
    before = workers_of(program)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: workers_of(program) - before, 10.0, "a new worker")


def sessions_of(program: Program) -> int:
    """Return how many calls run: the process of each leads a session."""
    sessions = set()
    for pid in program.functions():
        with suppress(ProcessLookupError):
            sessions.add(os.getsid(pid))
    return len(sessions)


def total(program: Program) -> float:
    """Return http_requests_total, over all its labels."""
    text = http_request(program.metrics_port, "GET", "/metrics").text
    return sum(map(float, re.findall(r"^http_requests_total\{.*\} (\S+)$", text, re.MULTILINE)))


def ask(client: http.client.HTTPConnection) -> int:
    """Send a request on a connection that is kept, and return the number that its answer says."""
    client.request("GET", "/")
    return int(client.getresponse().read())


def kept(program: Program, count: int) -> list[http.client.HTTPConnection]:
    return [http.client.HTTPConnection("127.0.0.1", program.port, timeout=REPLY_DEADLINE_S) for _ in range(count)]


def kept_by_both(program: Program) -> tuple[list[http.client.HTTPConnection], list[int]]:
    """Return connections that are kept, six or more of them, and which of both workers has answered on each.

    One that stands still gets none meanwhile, and those that follow.
    """
    clients = kept(program, 6)
    answered = [ask(client) for client in clients]
    while len(set(answered)) < 2:
        assert len(clients) < 100, "only one of the workers has got connections"
        clients += kept(program, 1)
        answered.append(ask(clients[-1]))
    return clients, answered


def refuses(port: int) -> bool:
    """Tell whether nobody listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def opened(program: Program, count: int) -> list[socket.socket]:
    return [connect(program.port) for _ in range(count)]


def occupied(program: Program, count: int) -> list[socket.socket]:
    """Return so many connections, each with a call that runs."""
    clients = opened(program, count)
    for client in clients:
        client.sendall(GET)
    return clients


def close(clients: Sequence[socket.socket | http.client.HTTPConnection]) -> None:
    for client in clients:
        client.close()


@pytest.fixture
def parents() -> Iterator[Program]:
    """A watchdog with two workers, whose function says which of them has started it."""
    with watchdog(PARENT, metrics_port=str(free_port())) as program:
        yield program


def test_connections_are_spread_over_the_workers_when_clients_keep_them(parents: Program) -> None:
    def is_spread() -> bool:  # but for those that come while one of the workers stands still
        clients = kept(parents, 8)
        spread = Counter(ask(client) for client in clients)
        assert Counter(ask(client) for client in clients) == spread
        close(clients)
        return set(spread) == workers_of(parents) and max(spread.values()) <= 6

    wait_until(is_spread, 5.0, "both have their part")


def test_requests_of_all_workers_are_counted_together_when_asked_for(parents: Program) -> None:
    clients, answered = kept_by_both(parents)
    assert [total(parents) for _ in range(4)] == [len(answered)] * 4
    close(clients)


def test_counts_go_on_when_the_workers_that_counted_were_killed(parents: Program) -> None:
    clients, answered = kept_by_both(parents)
    for pid in set(answered):
        kill_and_wait(parents, pid)
    close(clients)
    assert total(parents) == len(answered)
    assert http_request(parents.port, "GET").status == 200
    assert total(parents) == len(answered) + 1


def test_no_more_run_than_max_inflight_when_workers_share_it() -> None:
    with watchdog(WAIT_FOR_GO, max_inflight="3", metrics_port=str(free_port())) as program:
        calls = [InBackground(lambda: http_request(program.port, "GET").status) for _ in range(24)]
        wait_until(lambda: sum(call.done() for call in calls) == 21, REPLY_DEADLINE_S, "all but three refused")
        assert in_flight(program) == 3
        assert http_request(program.port, "GET", "/_/ready").status == 429
        (program.temporary / "go").touch()
        assert Counter(call.result() for call in calls) == {200: 3, 429: 21}
        wait_until(lambda: in_flight(program) == 0, GONE_S, "none in flight")


def test_limit_is_free_again_when_the_workers_that_held_it_were_killed() -> None:
    with watchdog("sleep 60", max_inflight="2") as program:
        clients = occupied(program, 2)
        program.wait_started(2)
        for pid in workers_of(program):
            kill_and_wait(program, pid)
        wait_until(lambda: not program.functions(), GONE_S, "the functions of both killed")
        wait_until(lambda: serves(program.port), START_DEADLINE_S, "healthy")
        assert http_request(program.port, "GET", "/_/ready").status == 200
        close(clients)


def test_trees_are_gone_and_those_of_others_live_on_when_their_worker_was_killed() -> None:
    with watchdog(TREE) as program:
        clients: list[socket.socket] = []
        one, other = workers_of(program)

        def trees() -> tuple[set[int], set[int]]:
            functions = program.functions()
            return functions & children_of(one), functions & children_of(other)

        while len(clients) < 6 or not all(trees()):  # a worker that stands still gets none meanwhile
            assert len(clients) < 100
            clients += occupied(program, 1)  # one after the other: who starts a process is slower than an idle worker
            grown_count = len(clients) * TREE_CHILDREN_COUNT
            wait_until(lambda: sum(map(len, trees())) == grown_count, GONE_S, "the tree is grown")  # noqa: B023
        _, others = trees()
        kill_and_wait(program, one)
        assert other in workers_of(program)
        left_count = len(others) // TREE_CHILDREN_COUNT * TREE_COUNT
        wait_until(lambda: len(program.functions()) == left_count, GONE_S, "the trees of the killed one gone")
        assert others <= program.functions()
        close(clients)
        program.wait_idle(GONE_S)


def test_everything_is_gone_when_the_first_process_was_killed() -> None:
    with watchdog(TREE) as program:
        clients = occupied(program, 4)
        program.wait_started(4 * TREE_COUNT)
        program.kill()
        wait_until(lambda: not program.survivors(), GONE_S, "workers, guard and functions gone")
        close(clients)


def test_guard_is_replaced_when_it_was_killed(parents: Program) -> None:
    (guard,) = set(parents.children()) - workers_of(parents)
    os.kill(guard, signal.SIGKILL)
    parents.wait_log("the guard was killed")
    wait_until(lambda: len(set(parents.children()) - workers_of(parents) - {guard}) == 1, GONE_S, "another guard")
    assert http_request(parents.port, "GET").status == 200


def test_calls_of_all_workers_are_answered_when_told_to_stop() -> None:
    with watchdog(WAIT_FOR_GO) as program:
        calls = [InBackground(lambda: http_request(program.port, "GET").text) for _ in range(6)]
        wait_until(lambda: sessions_of(program) == 6, GONE_S, "six run")
        program.terminate()
        program.wait_log("draining")
        (program.temporary / "go").touch()
        assert [call.result() for call in calls] == ["went\n"] * 6
        assert program.wait_exit() == 0
        assert not (program.temporary / ".lock").exists()


def test_watchdog_stays_healthy_when_one_of_its_workers_was_told_to_stop(parents: Program) -> None:
    one, other = workers_of(parents)
    os.kill(one, signal.SIGTERM)
    wait_until(lambda: len(workers_of(parents) - {one, other}) == 1, GONE_S, "another in its place")
    assert (parents.temporary / ".lock").exists()
    clients, _ = kept_by_both(parents)
    for client in clients:
        client.request("GET", "/_/health")
        assert client.getresponse().read() == b"OK"
    close(clients)


def test_lock_file_goes_at_once_when_told_to_stop_while_the_workers_wait_for_health_checks() -> None:
    with watchdog("cat", healthcheck_interval="60s") as program:
        program.terminate()
        wait_until(lambda: not (program.temporary / ".lock").exists(), GONE_S, "the lock file gone")
        assert len(workers_of(program)) == 2
        program.terminate()
        assert program.wait_exit() == 0


def test_call_goes_on_when_told_to_stop_and_the_other_workers_have_nothing_to_do() -> None:
    with watchdog(WAIT_FOR_GO) as program:
        call = InBackground(lambda: http_request(program.port, "GET").text)
        program.wait_started()
        program.terminate()
        wait_until(lambda: len(workers_of(program)) == 1, GONE_S, "the idle one gone")
        (program.temporary / "go").touch()
        assert call.result() == "went\n"
        assert program.wait_exit() == 0


def test_calls_are_cut_and_the_status_says_so_when_told_to_stop_twice() -> None:
    with watchdog("sleep 60") as program:
        clients = occupied(program, 4)
        program.wait_started(4)
        program.terminate()
        wait_until(lambda: program.log().count("SIGTERM: draining") == 2, GONE_S, "both drain")
        program.terminate()
        assert program.wait_exit() == 1
        wait_until(lambda: not program.survivors(), GONE_S, "all gone")
        close(clients)


def test_each_worker_is_told_once_when_a_terminal_interrupts() -> None:
    with watchdog("cat") as program:
        program.process.send_signal(signal.SIGINT)
        assert program.wait_exit() == 0
        wait_until(lambda: program.log().count("Exiting.") == 2, GONE_S, "the last lines of both")
        assert program.log().count("SIGINT: draining") == 2


def test_pool_is_divided_when_processes_wait_started() -> None:
    function = f"{sys.executable} -c 'import sys; sys.stdout.write(sys.stdin.read())'"
    with watchdog(function, prewarm="4", cgi_headers="false") as program:
        wait_until(lambda: len(program.functions()) == 4, GONE_S, "four wait")
        assert http_request(program.port, "POST", body=b"x").text == "x"


LONG_LINE_BYTES, LONG_LINES_COUNT = 6000, 20  # more than a pipe takes as one piece; of eight calls, less than is kept
LONG_LINES = f"sh -c 'for each in $(seq {LONG_LINES_COUNT}); do printf %0{LONG_LINE_BYTES}d\\\\n $each >&2; done'"
SLOW_READER = "while (sysread STDIN, $piece, 4096) { syswrite STDOUT, $piece; select undef, undef, undef, 0.002 }"


def test_each_line_is_whole_when_all_workers_log_long_ones_to_a_reader_that_is_slow() -> None:
    prefix = ["bash", "-c", f"exec \"$@\" 2> >(exec perl -e '{SLOW_READER}')", "bash"]
    settings = {"fprocess": LONG_LINES, "workers": "2", "combine_output": "false", "prefix_logs": "false"}
    with Program("watchdog", settings, prefix=prefix) as program:
        calls = [InBackground(lambda: http_request(program.port, "GET").status) for _ in range(8)]
        assert [call.result() for call in calls] == [200] * 8

        def long_lines() -> list[str]:
            return [line for line in program.log_lines() if "0" * 100 in line]

        lines_count = 8 * LONG_LINES_COUNT
        wait_until(lambda: sum(map(len, long_lines())) >= lines_count * LONG_LINE_BYTES, GONE_S, "all is read")
        assert [len(line) for line in long_lines()] == [LONG_LINE_BYTES] * lines_count


def test_start_fails_with_one_reason_when_the_metrics_port_is_taken(parents: Program) -> None:
    settings = {"fprocess": "cat", "workers": "2", "port": "0", "metrics_port": str(parents.port)}
    ended = run("watchdog", settings=settings | {"suppress_lock": "true"})
    assert ended.returncode == 1
    assert ended.stderr.count("cannot listen") == 1


def test_workers_are_as_many_as_processors_when_auto() -> None:
    with watchdog("cat", workers="auto") as program:
        count = len(os.sched_getaffinity(program.pid))
        assert len(workers_of(program)) == (count if count > 1 else 0)


def test_workers_are_none_beside_the_first_process_when_auto_and_there_is_one_processor() -> None:
    only = str(min(os.sched_getaffinity(0)))
    with Program("watchdog", {"fprocess": "cat", "workers": "auto"}, prefix=["taskset", "-c", only]) as program:
        assert http_request(program.port, "POST", body=b"x").body == b"x"
        assert workers_of(program) == set()


def test_port_is_free_for_the_next_when_the_first_process_was_killed() -> None:
    with watchdog("cat") as first:
        assert http_request(first.port, "POST", body=b"x").body == b"x"
        first.kill()
        wait_until(lambda: refuses(first.port), GONE_S, "its workers accept no more")
        with watchdog("cat", port=str(first.port)) as second:
            assert http_request(second.port, "POST", body=b"x").body == b"x"
        wait_until(lambda: not first.survivors(), GONE_S, "its workers gone")


# The gateway.


def test_ports_are_free_for_the_next_gateway_when_the_first_process_was_killed() -> None:
    ports = {"port": str(free_port()), "metrics_port": str(free_port())}
    with System(settings={"workers": "2", **ports}) as system:
        call_id = system.submit("cat", b"x", {"X-Delay": "1s"})
        os.kill(system.worker_pid(), signal.SIGSTOP)  # then its keeper waits for it in vain
        system.kill()
        wait_until(lambda: all(map(refuses, map(int, ports.values()))), GONE_S, "its workers accept no more")
        with System(settings={"workers": "2", **ports}, spool=system.spool) as again:
            assert again.request("GET", f"/async-function/{call_id}/result?wait=20s").text == "x"
        wait_until(lambda: not system.survivors(), GONE_S, "all that the killed one had started gone")
        exits = re.compile(r"^\S+ \S+ Exiting\.", re.MULTILINE)
        wait_until(lambda: len(exits.findall(system.log())) == 2, GONE_S, "both workers have ended as they should")


def test_gateway_counts_and_passes_on_in_each_process_when_it_has_workers() -> None:
    settings = {"workers": "2", "metrics_port": str(free_port()), "worker_metrics_port": "0"}
    with System(settings=settings) as system:
        clients = opened(system, 6)
        for client in clients:
            client.sendall(b"POST /function/cat HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\nhi\r\n")
            assert read_until(client, b"\r\n\r\nhi\r\n").startswith(b"HTTP/1.1 200")
        close(clients)
        call_id = system.submit("cat", b"later")
        assert system.request("GET", f"/async-function/{call_id}/result?wait=10s").text == "later"
        invoked = 'gateway_function_invocation_total{code="200",function_name="cat.openfaas-fn"} 6.0'
        wait_until(lambda: invoked in system.metrics(), GONE_S, "the last one is counted too")
        for text in [system.metrics() for _ in range(4)]:
            assert invoked in text
            assert 'gateway_async_submissions_total{code="202"} 1.0' in text


def test_gateway_serves_on_when_each_of_its_processes_was_killed() -> None:
    with System(settings={"workers": "2"}) as system:
        for pid in workers_of(system):
            kill_and_wait(system, pid)
        call_id = system.submit("cat", b"on")
        assert system.request("GET", f"/async-function/{call_id}/result?wait=20s").text == "on"


def test_calls_of_the_worker_end_when_a_gateway_with_workers_is_told_to_stop() -> None:
    text = f"[slow]\nfprocess = '''{WAIT_FOR_GO}'''\n"
    with System(text, settings={"workers": "2"}) as system:
        call_ids = [system.submit("slow") for _ in range(4)]
        wait_until(lambda: sessions_of(system) == 4, START_DEADLINE_S, "four run")
        system.terminate()
        system.wait_log("draining")
        (system.temporary / "go").touch()
        assert system.wait_exit() == 0
        wait_until(lambda: not system.survivors(), GONE_S, "all gone")
        with System(text, {"worker": "none"}, system.spool) as again:
            calls = [json.loads(again.request("GET", f"/async-function/{call_id}").text) for call_id in call_ids]
        assert [call["state"] for call in calls] == ["done"] * 4
