"""functions.py: reading the file, finding who answers, and keeping real watchdog processes alive (and then not)."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import faashound
from faashound.calls.names import FunctionName, parse_function_name
from faashound.functions import supervisor
from faashound.functions.local import LocalFunctions
from faashound.functions.supervisor import describe_exit, next_restart_s
from faashound.functions.table import (
    BadFunctions,
    Function,
    Functions,
    find_lines,
    parse_base_url,
    parse_function_url,
    parse_functions,
    read_functions,
    watchdog_settings,
)
from testkit.harness import Answer, InBackground, http_request, wait_until

DEADLINE_S = 20.0


# --- URLs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://h", "http://h"),
        ("https://h:8443/base/", "https://h:8443/base"),
        ("http://[::1]:80", "http://[::1]:80"),
        ("HTTP://10.0.0.7", "HTTP://10.0.0.7"),
    ],
)
def test_base_url_loses_its_trailing_slash(text: str, url: str) -> None:
    assert parse_base_url(text) == url


@pytest.mark.parametrize(
    "text",
    ["", "h:80", "ftp://h", "http://", "http://:80", "http://h:0", "http://h:99999", "http://h:x", "http://u:p@h"]
    + ["http://h?q", "http://h#f", "http://h /", "http://h\n", "http://[::1", "http://ä", "http://h\\x"],
)
def test_base_url_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: an http:// or https:// URL"):
        parse_base_url(text)


@pytest.mark.parametrize("text", ["http://{name}:8080", "https://{name}.{namespace}.svc", "http://router/{name}"])
def test_function_url_is_accepted(text: str) -> None:
    assert parse_function_url(text) == text


@pytest.mark.parametrize(
    "text",
    ["", "http://h:8080", "{name}", "http://{name}:{name}", "http://{name}/{other}", "http://{name}/{", "{name}://h"]
    + ["http://h/?f={name}", "http://{name}@h"],
)
def test_function_url_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"allowed: .*\{name\}"):
        parse_function_url(text)


# --- the file ----------------------------------------------------------------------------------------------------


CAT, F = parse_function_name("cat"), parse_function_name("f")


def parse(text: str) -> dict[FunctionName, Function]:
    return parse_functions(textwrap.dedent(text), "f.toml")


def problems_of(text: str) -> tuple[str, ...]:
    with pytest.raises(BadFunctions) as caught:
        parse(text)
    assert all(problem in str(caught.value) for problem in caught.value.problems)
    return caught.value.problems


def test_local_function_keeps_its_settings_as_typed() -> None:
    table = parse("""
        [cat]
        fprocess = "cat -u"
        exec_timeout = 10
        max_inflight = 4
        cgi_headers = false
        environment = { A = "1", N = 2 }
        labels.team = "core"
    """)
    assert table[CAT] == Function(
        CAT,
        settings={"fprocess": "cat -u", "exec_timeout": "10", "max_inflight": "4", "cgi_headers": "false"},
        environment={"A": "1", "N": "2"},
        labels={"team": "core"},
    )
    assert table[CAT].local


def test_remote_function_has_a_url_and_no_settings() -> None:
    function = parse('[f]\nurl = "http://h:80/"\n')[F]
    assert function == Function(F, url="http://h:80")
    assert not function.local


@pytest.mark.parametrize(
    "line",
    [
        'annotations = { "com.openfaas.queue" = "slow" }',
        'annotations = { com.openfaas.queue = "slow" }',
        '[f.annotations]\ncom.openfaas.queue = "slow"',
        '[f.annotations]\n"com.openfaas.queue" = "slow"',
    ],
)
def test_annotation_means_the_same_quoted_or_not(line: str) -> None:
    assert parse_functions(f'[f]\nurl = "http://h"\n{line}', "f.toml")[F].annotations == {"com.openfaas.queue": "slow"}


LOCAL = '[f]\nfprocess = "cat"\n'
REMOTE = '[f]\nurl = "http://h"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = 1", "f.toml:1: [a]: a key outside of any function's table"),
        ("\n[Bad]\nurl = 'http://h'", "f.toml:2: [Bad]: 'Bad' is no function's name; allowed: 1 to 63"),
        (REMOTE + "['f.openfaas-fn']\nurl='http://g'", "f.toml:3: [f.openfaas-fn]: f.openfaas-fn has a table already"),
        ("[f]\n", "f.toml:1: [f]: has neither fprocess nor url"),
        (LOCAL + "url = 'http://h'", "f.toml:2: [f] fprocess: means nothing beside url"),
        (LOCAL + "exec_timeout = 'banana'", "f.toml:3: [f] exec_timeout: 'banana': allowed: whole seconds"),
        (LOCAL + "exec_timeout = -1", "f.toml:3: [f] exec_timeout: '-1': allowed: whole seconds"),
        (LOCAL + "exec_timeout = 1.5", "f.toml:3: [f] exec_timeout: is a number with a fraction; allowed: a string"),
        (LOCAL + "exec_timeout = [1]", "f.toml:3: [f] exec_timeout: is an array"),
        (LOCAL + "exec_timeout = 12:30:00", "f.toml:3: [f] exec_timeout: is a date or time"),
        (LOCAL + "exec_timout = '1s'", "f.toml:3: [f] exec_timout: unknown key; did you mean exec_timeout?"),
        (LOCAL + "Exec_Timeout = '1s'", "f.toml:3: [f] Exec_Timeout: unknown key; did you mean exec_timeout?"),
        (LOCAL + "zzz = 1", "f.toml:3: [f] zzz: unknown key; allowed: fprocess, function_process, read_timeout"),
        (LOCAL + "host = 'h'", "f.toml:3: [f] host: not allowed here: the gateway opens the socket"),
        (LOCAL + "port = 80", "f.toml:3: [f] port: not allowed here: the gateway opens the socket"),
        (LOCAL + "metrics_port = 80", "f.toml:3: [f] metrics_port: not allowed here: the gateway counts"),
        (LOCAL + "suppress_lock = false", "f.toml:3: [f] suppress_lock: not allowed here: the gateway watches"),
        (LOCAL + "function_process = 'dog'", "f.toml:1: [f]: fprocess='cat' contradicts function_process='dog'"),
        ("[f]\nfprocess = ''", "f.toml:1: [f]: fprocess is not set"),
        (REMOTE + "exec_timeout = 1", "f.toml:3: [f] exec_timeout: means nothing beside url"),
        (REMOTE + "port = 1", "f.toml:3: [f] port: means nothing beside url"),
        (REMOTE + "environment.A = '1'", "f.toml:3: [f] environment: means nothing beside url"),
        ("[f]\nurl = 'h:80'", "f.toml:2: [f] url: 'h:80': allowed: an http:// or https:// URL"),
        (LOCAL + "labels = 'x'", 'f.toml:3: [f] labels: not a table; allowed: { NAME = "value" }'),
        (LOCAL + "labels = { a = 1.5 }", "f.toml:3: [f] labels.a: is a number with a fraction"),
        (LOCAL + "[f.environment]\nport = 1", "f.toml:4: [f] environment.port: a setting of the watchdog; write it"),
        (LOCAL + "environment.LISTEN_FDS = 1", "f.toml:3: [f] environment.LISTEN_FDS: reserved"),
        (LOCAL + "environment.'A=B' = 1", "f.toml:3: [f] environment.A=B: not a variable's name"),
        (LOCAL + 'environment.A = "\\u0000"', "f.toml:3: [f] environment.A: allowed: text without NUL"),
    ],
)
def test_problem_names_file_line_function_key_and_what_is_allowed(text: str, problem: str) -> None:
    found = problems_of(text)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_are_reported_at_once_in_the_order_of_the_file() -> None:
    found = problems_of("""
        [one]
        fprocess = "cat"
        write_timeout = "x"
        exec_timout = 1

        [two]
        url = "nowhere"
    """)
    assert [problem.split(": ")[0] for problem in found] == ["f.toml:4", "f.toml:5", "f.toml:8"]


@pytest.mark.parametrize(
    "spelling",
    [
        "annotations.com.openfaas.{} = '{}'",
        "annotations.'com.openfaas.{}' = '{}'",
        "'annotations'.com.'openfaas.{}'='{}'",
    ],
)
def test_bad_annotation_is_reported_with_its_line_like_every_other_problem(spelling: str) -> None:
    wrong = {"retry.attempts": "x", "retry.codes": "200", "retry.sometimes": "1", "queue": "no queue"}
    lines = [spelling.format(name, value) for name, value in wrong.items()]
    found = problems_of("\n".join(["[f]", "url = 'nowhere'", *lines]))
    assert [problem.split(": ")[:2] for problem in found] == [
        ["f.toml:2", "[f] url"],
        *([f"f.toml:{line}", f"[f] annotations.com.openfaas.{name}"] for line, name in enumerate(wrong, 3)),
    ]
    assert all("allowed: " in problem for problem in found)


def test_waits_that_contradict_each_other_are_reported_at_the_shorter_bound() -> None:
    text = 'annotations.com.openfaas.retry.max_wait = "1s"\nannotations.com.openfaas.retry.min_wait = "2s"\n'
    (problem,) = problems_of(REMOTE + text)
    assert problem.startswith("f.toml:4: [f] annotations.com.openfaas.retry.min_wait: is longer than com.openfaas")


@pytest.mark.parametrize(
    "text",
    [
        "url = 'http://user:s3cret@h'",
        "url = 'http://user:s3cret/x@h'",
        "url = 'user:s3cret@h'",
        "fprocess = 'curl http://user:s3cret@h \"'",
        "fprocess = 'cat'\nenvironment.A = \"s3cret\\u0000\"",
    ],
)
def test_problem_shows_no_password(text: str) -> None:
    (problem,) = problems_of("[f]\n" + text)
    assert "allowed" in problem
    assert "s3cret" not in problem


def test_syntax_error_keeps_the_parsers_line_and_column() -> None:
    assert problems_of("[f]\nfprocess = \n") == ("f.toml: Invalid value (at line 2, column 12)",)


def test_lines_are_found_in_every_spelling() -> None:
    text = textwrap.dedent('''
        # [no.header] in a comment
        [ "quoted one" . 'b' ]  # a comment
        a.b."c d" = 1
        long = """
        [not.a.header]
        key = 1
        """

        array = [
          "x", # y
        ]
        inline = { p = 1, q.r = 2 }
        [[tables]]
        x = 1
        [[tables]]
        y = 1
        ''')
    one = ("quoted one", "b")
    expected = {
        ("quoted one",): 3,
        one: 3,
        (*one, "a"): 4,
        (*one, "a", "b"): 4,
        (*one, "a", "b", "c d"): 4,
        (*one, "long"): 5,
        (*one, "array"): 10,
        (*one, "inline"): 13,
        (*one, "inline", "p"): 13,
        (*one, "inline", "q"): 13,
        (*one, "inline", "q", "r"): 13,
        ("tables",): 14,
        ("tables", "x"): 15,
        ("tables", "y"): 17,
    }
    assert find_lines(text) == expected
    assert find_lines(text.replace("\n", "\r\n")) == expected


@given(st.lists(st.tuples(st.text(max_size=5), st.text(alphabet='ab"\\#[]=\n', max_size=12)), max_size=6))
def test_lines_are_found_whatever_keys_and_values_hold(pairs: list[tuple[str, str]]) -> None:
    text, line, expected = "", 1, {}
    for index, (key, value) in enumerate(pairs):
        key = f"{index}{key}".replace("\x7f", "")  # which TOML wants escaped, and JSON does not
        statement = f"{json.dumps(key, ensure_ascii=False)} = '''x{value}'''\n"
        expected[(key,)] = line
        text, line = text + statement, line + statement.count("\n")
    assert find_lines(text) == expected


def test_missing_file_is_an_error_only_when_it_was_asked_for(tmp_path: Path) -> None:
    assert read_functions(tmp_path / "none.toml", missing_ok=True) == {}
    with pytest.raises(BadFunctions, match=r"none\.toml: there is no such file"):
        read_functions(tmp_path / "none.toml")


@pytest.mark.parametrize(("content", "text"), [(b"\xff", "not UTF-8 at byte 0"), (None, "Is a directory")])
def test_unreadable_file_is_reported_by_name(tmp_path: Path, content: bytes | None, text: str) -> None:
    path = tmp_path / "f.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(BadFunctions, match=rf"f\.toml: {text}"):
        read_functions(path, missing_ok=True)


def test_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[f]\nurl = "http://h"\n', encoding="utf-8-sig")
    assert list(read_functions(path)) == [F]


def test_file_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[z]\nurl = "http://z"\n[a]\nfprocess = "cat"\n', encoding="utf-8")
    assert [function.name.short for function in Functions(read_functions(path))] == ["z", "a"]


def test_examples_file_is_right() -> None:
    table = read_functions(Path(__file__).parents[2] / "examples" / "functions.toml")
    assert [name.short for name in table] == ["cat", "env", "wordcount", "slow", "flaky", "notify"]
    assert all(function.local for function in table.values())


# --- who answers -------------------------------------------------------------------------------------------------


def test_lookup_knows_a_function_in_its_own_namespace_only() -> None:
    table = parse('[cat]\nurl = "http://c"\n["cat.prod"]\nurl = "http://p"\n')
    found = {text: Functions(table).lookup(text) for text in ("cat", "cat.openfaas-fn", "cat.prod", "cat.dev", "dog")}
    assert {text: function and function.url for text, function in found.items()} == {
        "cat": "http://c",
        "cat.openfaas-fn": "http://c",
        "cat.prod": "http://p",
        "cat.dev": None,
        "dog": None,
    }


@pytest.mark.parametrize("name", ["cat.", ".cat", "cat.a.b", "cat.A", "cat./", "", "../cat", "cat.x/../y"])
def test_lookup_of_a_malformed_name_finds_nothing(name: str) -> None:
    assert Functions({CAT: Function(CAT, url="http://c")}, "http://{name}").lookup(name) is None


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("dog", "http://dog.openfaas-fn:8080"),
        ("dog.dev", "http://dog.dev:8080"),
        ("dog.kube-system", None),
        ("cat", "http://c"),
    ],
)
def test_lookup_falls_back_to_the_pattern_in_its_namespaces(name: str, url: str | None) -> None:
    table, pattern = {CAT: Function(CAT, url="http://c")}, "http://{name}.{namespace}:8080"
    found = Functions(table, pattern, ("openfaas-fn", "dev")).lookup(name)
    assert (found and found.url) == url


@given(st.text() | st.from_regex(r"[a-z0-9._/@:%-]{1,12}", fullmatch=True))
def test_a_strangers_name_never_changes_the_shape_of_the_url(name: str) -> None:
    found = Functions({}, "http://{name}.{namespace}:8080/in").lookup(name)
    if found is not None:
        parts = urllib.parse.urlsplit(found.url or "")
        assert (parts.port, parts.path, parts.query, parts.username) == (8080, "/in", "", None)
        assert parts.netloc == f"{name if '.' in name else name + '.openfaas-fn'}:8080"


# --- watchdogs run here: real processes; a small program stands in for the watchdog and does what fprocess says ----

STAND_IN = r"""
import json, os, signal, socket, sys, threading

def follow_lifeline():
    os.read(int(os.environ["FAASHOUND_LIFELINE_FD"]), 1)
    os._exit(9)

word, _, number = os.environ["fprocess"].partition(" ")
if word == "exit":
    print("refused: nothing fits", file=sys.stderr)
    sys.exit(int(number))
if word in ("deaf", "stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if word != "stubborn":
    threading.Thread(target=follow_lifeline, daemon=True).start()
listener = socket.socket(fileno=3)
while True:
    client, _ = listener.accept()
    listed = os.listdir("/proc/self/fd")
    fds = [int(fd) for fd in listed if os.path.exists(f"/proc/self/fd/{fd}") and int(fd) != client.fileno()]
    facts = {"pid": os.getpid(), "environ": dict(os.environ), "fds": sorted(fds), "group": os.getpgrp()}
    client.sendall(json.dumps(facts).encode())
    client.close()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> tuple[str, ...]:
    """The command of a program that serves LISTEN_FDS and obeys the lifeline as the watchdog does."""
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN, encoding="utf-8")
    return (sys.executable, str(path))


def locals_of(text: str, command: tuple[str, ...], **options: object) -> LocalFunctions:
    environ: Mapping[str, str] = {"PATH": os.environ["PATH"]}
    return LocalFunctions(parse(text), **{"environ": environ, "watchdog": command} | options)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(local: LocalFunctions, grace_s: float = DEADLINE_S) -> AsyncIterator[LocalFunctions]:
    local.open()
    local.start()
    try:
        yield local
    finally:
        await local.stop(grace_s)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until `condition` holds; AssertionError names `what` after DEADLINE_S."""
    end_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end_s, f"not within {DEADLINE_S} s: {what}"
        await asyncio.sleep(0.005)


async def ask(local: LocalFunctions, name: str) -> dict[str, object]:
    """Return what the stand-in tells of itself."""
    reader, writer = await asyncio.open_connection(*local.address(parse_function_name(name)))
    answer = json.loads(await asyncio.wait_for(reader.read(), DEADLINE_S))
    writer.close()
    await writer.wait_closed()
    assert isinstance(answer, dict)
    return answer


def run(test: Awaitable[None]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, 3 * DEADLINE_S)

    asyncio.run(bounded())


class Log:
    """What has been written to stderr, by us and by our watchdogs, since the test began."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self._capture = capture
        self._text = ""

    def __str__(self) -> str:
        self._text += self._capture.readouterr().err
        return self._text

    def __contains__(self, text: str) -> bool:
        return text in str(self)


@pytest.fixture
def log(capfd: pytest.CaptureFixture[str]) -> Log:
    return Log(capfd)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_local_function_answers_at_its_url(stand_in: tuple[str, ...]) -> None:
    async def test() -> None:
        async with running(locals_of('[far]\nurl = "http://h"\n[near]\nfprocess = "serve"', stand_in)) as local:
            host, port = local.address(parse_function_name("near"))
            found = Functions(local.table).lookup("near")
            assert found is not None
            assert found.url == f"http://{host}:{port}" == f"http://127.0.0.1:{port}"
            assert local.table[parse_function_name("far")].url == "http://h"
            assert (await ask(local, "near"))["pid"] == local.status()[parse_function_name("near")].pid

    run(test())


def test_watchdog_gets_a_clean_environment_and_only_its_descriptors(stand_in: tuple[str, ...]) -> None:
    unwanted = {
        "exec_timeout": "1s",
        "function_process": "x",
        "basic_auth": "true",
        "LISTEN_PID": "1",
        "FAASHOUND_X": "1",
    }
    environ = {"PATH": os.environ["PATH"], "KEPT": "yes", "log_format": "json", **unwanted}
    text = '[f]\nfprocess = "serve"\nread_timeout = "7s"\nenvironment = { KEPT2 = "too" }'
    open_here = [int(name) for name in os.listdir("/proc/self/fd")]
    leaked_by_our_parent = [fd for fd in open_here if Path(f"/proc/self/fd/{fd}").exists() and os.get_inheritable(fd)]

    async def test() -> None:
        async with running(locals_of(text, stand_in, environ=environ, hidden={"basic_auth", "log_format"})) as local:
            facts = await ask(local, "f")
        inherited = facts["environ"]
        assert isinstance(inherited, dict)
        assert {name: text for name, text in inherited.items() if name not in ("PATH", "LC_CTYPE")} == {
            "KEPT": "yes",
            "log_format": "json",
            "FAASHOUND_FUNCTION_KEPT2": "too",
            "fprocess": "serve",
            "read_timeout": "7s",
            "healthcheck_interval": "0",
            "workers": "1",
            "metrics_port": "0",
            "suppress_lock": "true",
            "LISTEN_FDS": "1",
            "FAASHOUND_LIFELINE_FD": "4",
            "OPENFAAS_NAME": "f",
            "OPENFAAS_NAMESPACE": "openfaas-fn",
        }
        assert facts["fds"] == sorted({0, 1, 2, 3, 4, *leaked_by_our_parent})
        assert facts["group"] == facts["pid"]

    run(test())


def test_watchdog_is_told_name_and_namespace_as_openfaas_tells_them(stand_in: tuple[str, ...]) -> None:
    async def test() -> None:
        async with running(locals_of('["f.prod"]\nfprocess = "serve"', stand_in)) as local:
            inherited = (await ask(local, "f.prod"))["environ"]
        assert isinstance(inherited, dict)
        assert (inherited["OPENFAAS_NAME"], inherited["OPENFAAS_NAMESPACE"]) == ("f", "prod")

    run(test())


def test_file_may_set_the_healthcheck_interval(stand_in: tuple[str, ...]) -> None:
    settings = parse('[f]\nfprocess = "x"\nhealthcheck_interval = "3s"')[F].settings
    assert settings is not None
    assert watchdog_settings(settings)["healthcheck_interval"] == "3s"


def test_connection_is_never_refused_across_a_restart(stand_in: tuple[str, ...], log: Log) -> None:
    async def test() -> None:
        async with running(locals_of('[f]\nfprocess = "serve"', stand_in)) as local:
            first = (await ask(local, "f"))["pid"]
            assert isinstance(first, int)
            os.kill(first, signal.SIGKILL)
            await until(lambda: local.status()[F].pid != first, "the death is seen")
            assert (await ask(local, "f"))["pid"] not in (first, None)  # connects while nobody accepts
            assert local.status()[F].restart_count == 1

    run(test())
    assert "error: the watchdog of f was ended by SIGKILL; next start in 0.1 s" in log


def test_watchdog_that_refuses_its_settings_is_logged_and_tried_again_late(stand_in: tuple[str, ...], log: Log) -> None:
    async def test() -> None:
        async with running(locals_of('[f]\nfprocess = "exit 2"', stand_in)):
            await until(lambda: "next start in 30 s" in log, "the exit is logged")

    run(test())
    assert "refused: nothing fits" in log
    assert "the watchdog of f exited with status 2: it refuses its settings" in log


def test_watchdog_that_cannot_be_started_is_logged_and_tried_again(log: Log) -> None:
    async def test() -> None:
        async with running(locals_of('[f]\nfprocess = "x"', ("/nowhere/watchdog",))) as local:
            await until(lambda: local.status()[F].restart_count >= 2, "two restarts")

    run(test())
    assert "the watchdog of f cannot be started: No such file or directory; next start in 0.1 s" in log
    assert "next start in 0.2 s" in log


@pytest.mark.parametrize("word", ["serve", "deaf", "stubborn"])
def test_stop_ends_every_watchdog_however_it_takes_signals(
    stand_in: tuple[str, ...], word: str, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(supervisor, "KILL_GRACE_S", 0.3)
    before = len(os.listdir("/proc/self/fd"))

    async def test() -> None:
        async with running(locals_of(f'[f]\nfprocess = "{word}"', stand_in), grace_s=0.3) as local:
            pid = (await ask(local, "f"))["pid"]
        assert isinstance(pid, int)
        assert not exists(pid)  # not even as a zombie

    run(test())
    assert len(os.listdir("/proc/self/fd")) == before
    assert "error" not in log


def test_stop_right_after_start_leaves_nothing(stand_in: tuple[str, ...]) -> None:
    async def test() -> None:
        local = locals_of('[f]\nfprocess = "serve"\n[g]\nfprocess = "serve"', stand_in)
        local.open()
        local.start()
        await local.stop(0)
        assert all(status.pid is None for status in local.status().values())
        await local.stop(0)  # twice is no harm

    run(test())


def test_start_that_runs_out_of_descriptors_closes_what_it_opened(stand_in: tuple[str, ...]) -> None:
    text = "\n".join(f'[f{number}]\nfprocess = "serve"' for number in range(20))

    async def test() -> None:
        local = locals_of(text, stand_in)
        before = len(os.listdir("/proc/self/fd"))
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                local.open()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(os.listdir("/proc/self/fd")) == before

    run(test())


GATEWAY = """
import asyncio, sys
from pathlib import Path
from faashound.functions import LocalFunctions, read_functions

async def main():
    local = LocalFunctions(read_functions(Path(sys.argv[1])), environ={}, watchdog=sys.argv[2:])
    local.open()
    local.start()
    while None in [status.pid for status in local.status().values()]:
        await asyncio.sleep(0.005)
    print(*[f"{status.pid} {status.address[1]}" for status in local.status().values()], flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_killed_gateway_takes_its_watchdogs_with_it(tmp_path: Path, stand_in: tuple[str, ...]) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[f]\nfprocess = "deaf"\n[g]\nfprocess = "deaf"\n', encoding="utf-8")
    command = [sys.executable, "-c", GATEWAY, str(path), *stand_in]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        pids = [int(word) for word in gateway.stdout.readline().split()[::2]]
        gateway.kill()
    assert len(pids) == 2
    wait_until(lambda: not any(exists(pid) for pid in pids), DEADLINE_S, "both watchdogs gone")


# --- the same with the real watchdog -----------------------------------------------------------------------------


async def call(local: LocalFunctions, name: str, body: bytes) -> Answer:
    port = local.address(parse_function_name(name))[1]
    return await asyncio.to_thread(http_request, port, "POST", "/", body=body, timeout_s=DEADLINE_S)


def real(text: str) -> LocalFunctions:
    return LocalFunctions(parse(text), environ={"PATH": os.environ["PATH"]})


def test_real_watchdog_runs_the_function_with_its_environment() -> None:
    text = """
        [f]
        fprocess = "/bin/sh"
        environment = { GREETING = "hello" }
    """

    async def test() -> None:
        async with running(real(text)) as local:
            assert (await call(local, "f", b"echo $GREETING")).body == b"hello\n"
            inherited = (await call(local, "f", b"env; ls /proc/self/fd")).body.decode()
            assert not [line for line in inherited.splitlines() if line.startswith(("LISTEN_", "FAASHOUND_L"))]

    run(test())


def test_log_of_a_function_in_another_namespace_names_it_whole(log: Log) -> None:
    async def test() -> None:
        async with running(real('["f.prod"]\nfprocess = "cat"')) as local:
            await call(local, "f.prod", b"")

    run(test())
    assert "f.prod: " in log


def test_real_watchdog_that_is_killed_again_and_again_never_refuses_a_connection() -> None:
    async def test() -> None:
        async with running(real('[f]\nfprocess = "cat"')) as local:
            for _ in range(3):
                pid = local.status()[F].pid
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    await until(lambda: local.status()[F].pid != pid, "the death is seen")  # noqa: B023
                assert (await call(local, "f", b"still here")).body == b"still here"

    run(test())


def test_real_watchdog_finishes_its_calls_before_it_stops(tmp_path: Path) -> None:
    started = tmp_path / "started"

    async def test() -> None:
        async with running(real('[f]\nfprocess = "/bin/sh"')) as local:
            script = f"touch {started}; sleep 0.5; echo whole"
            calling = asyncio.create_task(call(local, "f", script.encode()))
            await until(started.exists, "the function runs")
        assert (await calling).body == b"whole\n"

    run(test())


def test_killed_gateway_takes_its_functions_with_it(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[f]\nfprocess = "/bin/sh"\n', encoding="utf-8")
    watchdog = str(Path(faashound.__file__).with_name("watchdog.py"))
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY, str(path), sys.executable, watchdog], stdout=subprocess.PIPE, text=True
    ) as gateway:
        assert gateway.stdout is not None
        pid, port = (int(word) for word in gateway.stdout.readline().split())
        script = f"setsid sleep 1000 & echo $! $$ >{tmp_path}/new; mv {tmp_path}/new {tmp_path}/pids; wait"
        calling = InBackground(lambda: http_request(port, "POST", body=script.encode()))
        wait_until((tmp_path / "pids").exists, DEADLINE_S, "the function runs")
        gateway.kill()
    pids = [pid, *(int(word) for word in (tmp_path / "pids").read_text().split())]
    wait_until(lambda: not any(exists(each) for each in pids), DEADLINE_S, f"{pids} gone")
    with contextlib.suppress(OSError, http.client.HTTPException):
        assert calling.result().status != 200


@pytest.mark.parametrize(
    ("delay_s", "lived_s", "status", "expected_s"),
    [
        pytest.param(None, 0.0, 1, 0.1, id="first death"),
        pytest.param(0.1, 0.0, 1, 0.2, id="doubles"),
        pytest.param(25.6, 9.9, -9, 30.0, id="is bounded"),
        pytest.param(30.0, 10.0, 1, 0.1, id="starts over after a proven life"),
        pytest.param(None, 0.0, 2, 30.0, id="no haste with bad settings"),
    ],
)
def test_restart_delay(delay_s: float | None, lived_s: float, status: int, expected_s: float) -> None:
    assert next_restart_s(delay_s, lived_s, status) == expected_s


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "exited with status 0"),
        (2, "exited with status 2: it refuses its settings (its message is above)"),
        (-9, "was ended by SIGKILL"),
        (-40, "was ended by signal 40"),
    ],
)
def test_exit_is_described(status: int, words: str) -> None:
    assert describe_exit(status) == words
