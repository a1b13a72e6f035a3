"""Settings: every value that makes sense is understood, every other one is named, and nothing is guessed."""

from __future__ import annotations

import os
import re
import socket
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.watchdog import (
    LONGEST_DURATION_S,
    VERSION,
    BadSettings,
    CannotStart,
    Setting,
    Settings,
    format_duration,
    format_settings,
    free_server_port,
    lookalikes,
    parse_bool,
    parse_command,
    parse_duration,
    parse_settings,
    parse_size,
    settings_table,
    without_credentials,
)
from testkit.harness import run

TABLE = settings_table(Settings)
ROWS = [pytest.param(attribute, row, id=row.name) for attribute, row in TABLE.items()]

# Six days of nanoseconds: beyond, the two roundings of a float of seconds add up to more than half of one.
DURATIONS_NS = st.integers(0, 2**49) | st.integers(0, 10**6).map(lambda seconds: seconds * 10**9)

# For each parser by the setting that uses it: a value that parses, and values that do not.
GOOD_AND_BAD: dict[str, tuple[str, list[str]]] = {
    "fprocess": ("sh -c 'exit 1'", ["sh 'unbalanced", "''", " ", "cat \\"]),
    "mode": ("streaming", ["banana", "Streaming", "HTTP", "afterburn"]),
    "upstream_url": (
        "http://127.0.0.1:5000/api",
        ["127.0.0.1:5000", "ftp://h", "http://", "http://h:65536", "http://h/?a", "http://h/#a", "http://h:$HOME"],
    ),
    "http_buffer_req_body": ("true", ["yes"]),
    "ready_path": ("/ready?deep=1", ["ready", "/a b", "http://h/ready"]),
    "static_path": ("/srv", ["a\nb"]),
    "host": ("127.0.0.1", ["a\nb", "\x7f"]),
    "port": ("65535", ["65536", "-1", "http", "8080.0", "٨٠", "+1", " 1"]),
    "metrics_port": ("0", ["65536", "-1", "1e3"]),
    "read_timeout": ("1m30s", ["0", "-1", "banana", "1d", "0s"]),
    "write_timeout": ("500ms", ["0", "-1s", "1s ", "inf"]),
    "exec_timeout": ("0", ["-1", "banana", "1h30", "nan", "s", "1 s", "1e3s", "1s,2s"]),
    "healthcheck_interval": ("0", ["-5s", "5 seconds"]),
    "user": (
        "65534:65534",
        ["root", "0:0", "0:1", "no-such-user", "65534", "1:", "4294967295:1", "1:4294967295"],
    ),
    "term_grace": ("2s", ["-1", "soon"]),
    "max_body": ("512MiB", ["-1", "1.5MiB", "512 MiB", "1TiB", "big"]),
    "max_inflight": ("2147483647", ["2147483648", "-1", "1.5", "ten", "99999999999999999999"]),
    "max_connections": ("1", ["0", "-1", "1.5", "auto", "2147483648"]),
    "max_connections_per_address": ("2147483647", ["0", "-1", "1.5", "auto", "2147483648"]),
    "workers": ("2", ["0", "-1", "65", "1.5", "many", "AUTO"]),
    "prewarm": ("0", ["-1", "some"]),
    "cgi_headers": ("false", ["yes", "2", "on", "tru"]),
    "marshal_request": ("1", ["enabled"]),
    "cgi_response": ("true", ["yes", "2"]),
    "content_type": ("text/html; charset=utf-8", ["text/html\r\nSet-Cookie: a=b", " text/html", "tëxt/html"]),
    "combine_output": ("TRUE", ["none"]),
    "write_debug": ("0", ["-1"]),
    "debug_headers": ("true", ["t"]),
    "suppress_lock": ("False", ["no"]),
    "jwt_auth": ("false", ["true", "1", "yes"]),
    "prefix_logs": ("1", ["10"]),
    "log_callid": ("true", ["X-Call-Id"]),
    "log_format": ("json", ["JSON", "xml", "text,json"]),
}
BAD = [pytest.param(name, text, id=f"{name}={text!a}") for name, (_, bad) in GOOD_AND_BAD.items() for text in bad]


def parse(**environ: str) -> Settings:
    """Return the settings of a watchdog of the mode that `environ` needs, if it is of one mode."""
    (modes, *_) = [row.modes for row in TABLE.values() if row.name in environ and len(row.modes) == 1] or [("",)]
    least = {"http": {"mode": "http", "fprocess": "cat", "upstream_url": "http://h"}, "static": {"mode": "static"}}
    return parse_settings(Settings, least.get(modes[0], {"fprocess": "cat"}) | environ)


def problems_of(**environ: str) -> tuple[str, ...]:
    with pytest.raises(BadSettings) as caught:
        parse_settings(Settings, {"fprocess": "cat"} | environ)
    return caught.value.problems


@pytest.mark.parametrize(
    ("program", "name", "value"),
    [
        ("gateway", "function_url", "http://user:s3cret@{name}:8080"),
        ("gateway", "queue_url", "nats://user:s3cret@one,user:s3cret@two"),
        ("gateway", "queue_url", "amqp://user:s3cret@one"),
        ("worker", "gateway_url", "http://user:s3cret@gateway"),
        ("worker", "gateway_url", "http://user:s3cret/more@gateway"),
        ("worker", "gateway_url", "user:s3cret@gateway"),
        ("worker", "queue_url", "nats:user:s3cret@one"),
    ],
)
def test_password_is_not_shown_when_the_url_that_has_it_is_refused(program: str, name: str, value: str) -> None:
    ended = run(program, settings={name: value})
    assert (ended.returncode, name in ended.stderr, "allowed" in ended.stderr) == (2, True, True)
    assert "s3cret" not in ended.stderr


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://u:p@h/x", "http://***@h/x"),
        ("http://u:p@one,u:p@two", "http://***@two"),
        ("u:p@h", "***@h"),
        ("mail me@home", "mail me@home"),
        ("http://h", "http://h"),
        ("", ""),
    ],
)
def test_refused_value_is_shown_without_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@given(DURATIONS_NS)
def test_duration_reads_back_to_the_nanosecond_when_formatted(value_ns: int) -> None:
    assert round(parse_duration(format_duration(value_ns / 1e9)) * 1e9) == value_ns


@given(st.integers(0, 10**9))
def test_bare_integer_is_seconds_when_given_as_a_duration(value_s: int) -> None:
    assert parse_duration(str(value_s)) == value_s == parse_duration(f"{value_s}s")


@given(st.lists(st.tuples(st.integers(0, 10**4), st.sampled_from(["h", "m", "s", "ms", "us", "µs", "ns"])), min_size=1))
def test_duration_is_the_sum_of_its_parts_when_it_has_several(parts: list[tuple[int, str]]) -> None:
    whole = "".join(f"{number}{unit}" for number, unit in parts)
    assert parse_duration(whole) == pytest.approx(sum(parse_duration(f"{number}{unit}") for number, unit in parts))


@pytest.mark.parametrize(
    ("text", "value_s"),
    [("0", 0), ("007", 7), ("1.5h", 5400), (".5s", 0.5), ("1.s", 1), ("1h1m1s", 3661), ("100us", 1e-4), ("2μs", 2e-6)],
)
def test_duration_means_what_it_means_to_go_when_unusual(text: str, value_s: float) -> None:
    assert parse_duration(text) == pytest.approx(value_s)


@pytest.mark.parametrize("text", [str(int(LONGEST_DURATION_S) * 10), "9" * 400, "9" * 400 + "h"])
def test_duration_is_refused_when_longer_than_go_can_say(text: str) -> None:
    with pytest.raises(ValueError, match="allowed"):
        parse_duration(text)


@pytest.mark.parametrize(
    "text", ["1" * 50_000 + "x", "1s" * 25_000 + "x", "1." * 25_000], ids=["digits", "parts", "dots"]
)
def test_duration_is_refused_at_once_when_a_stranger_sends_a_long_one(text: str) -> None:
    start_s = time.process_time()
    with pytest.raises(ValueError, match="allowed"):
        parse_duration(text)
    assert time.process_time() - start_s < 0.5


@given(st.text())
def test_any_text_either_parses_or_says_what_is_allowed_when_given_as_a_duration(text: str) -> None:
    try:
        value_s = parse_duration(text)
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = "allowed: " if 0 <= value_s <= LONGEST_DURATION_S else f"taken as {value_s}"
    assert "allowed: " in refusal


@pytest.mark.parametrize(
    ("text", "value_bytes"), [("0", 0), ("1B", 1), ("64KiB", 65536), ("512MiB", 2**29), ("1GiB", 2**30), ("1GB", 10**9)]
)
def test_size_is_in_bytes_when_it_has_a_unit(text: str, value_bytes: int) -> None:
    assert parse_size(text) == value_bytes


@pytest.mark.parametrize("text", ["", "-1", "1.5MiB", "1 MiB", "mib", "1TiB", "1kb", "0x10"])
def test_size_is_refused_when_it_makes_no_sense(text: str) -> None:
    with pytest.raises(ValueError, match="allowed: bytes"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "truth"), [("true", True), ("1", True), ("TRUE", True), ("false", False), ("0", False)]
)
def test_boolean_is_understood_when_spelled_as_documented(text: str, truth: bool) -> None:
    assert parse_bool(text) is truth


def test_command_is_split_as_a_shell_would_when_quoted() -> None:
    assert parse_command("""a 'b c' "d 'e'" f\\ g ''""") == ("a", "b c", "d 'e'", "f g", "")


def test_test_table_covers_every_setting_when_one_is_added() -> None:
    assert list(GOOD_AND_BAD) == [row.name for row in TABLE.values()]


@pytest.mark.parametrize(("attribute", "row"), ROWS)
def test_default_is_a_value_an_operator_could_type_when_there_is_one(attribute: str, row: Setting) -> None:
    if row.default:
        assert getattr(parse(**{row.name: row.default}), attribute) == row.parse(row.default)


@pytest.mark.parametrize(("attribute", "row"), ROWS)
def test_empty_variable_counts_as_unset_when_optional(attribute: str, row: Setting) -> None:
    if row.default is not None:
        fixed = {"mode": "static"} if row.name == "fprocess" else {"fprocess": "cat"}
        unset, empty = (parse_settings(Settings, {**fixed, **more}) for more in ({}, {row.name: ""}))
        assert getattr(empty, attribute) == getattr(unset, attribute)


@pytest.mark.parametrize("name", GOOD_AND_BAD)
def test_value_is_taken_when_it_makes_sense(name: str) -> None:
    if name == "user" and os.geteuid() != 0:
        pytest.skip("only root may change users")
    attribute, row = next(item for item in TABLE.items() if item[1].name == name)
    good = GOOD_AND_BAD[name][0]
    assert getattr(parse(**{name: good}), attribute) == row.parse(good)


@pytest.mark.parametrize(("name", "text"), BAD)
def test_problem_names_the_variable_its_value_and_what_is_allowed_when_refused(name: str, text: str) -> None:
    (problem,) = problems_of(**{name: text})
    assert problem.startswith(f"{name}={text!r}")
    assert "allowed: " in problem


@given(st.sets(st.sampled_from(sorted(GOOD_AND_BAD)), min_size=1), st.data())
def test_every_problem_is_named_at_once_when_several_are_bad(names: set[str], data: st.DataObject) -> None:
    environ = {name: data.draw(st.sampled_from(GOOD_AND_BAD[name][1])) for name in sorted(names)}
    problems = problems_of(**environ)
    assert {problem.partition("=")[0] for problem in problems} == names
    assert len(problems) == len(names)


def test_contradiction_is_named_too_when_another_value_is_bad() -> None:
    problems = "\n".join(problems_of(port="9000", metrics_port="9000", exec_timeout="banana"))
    assert "exec_timeout='banana'" in problems
    assert "metrics_port" in problems


def test_contradiction_names_what_was_typed_and_shows_no_command() -> None:
    (problem,) = problems_of(fprocess="mysql -pgeheim", mode="static")
    assert problem.startswith("fprocess means nothing with mode=static")
    (problem,) = problems_of(fprocess="cat", buffer_http="true")
    assert problem.startswith("buffer_http='true' means nothing with mode=serializing")


def test_start_is_refused_when_the_required_setting_is_missing() -> None:
    with pytest.raises(BadSettings, match="fprocess is not set; it is required") as caught:
        parse_settings(Settings, {})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("name", ["fprocess", "function_process"])
def test_command_is_taken_when_under_its_name_or_its_alias(name: str) -> None:
    assert parse_settings(Settings, {name: "wc -c"}).fprocess == ("wc", "-c")


@pytest.mark.parametrize(
    ("name", "alias", "secret", "other"),
    [
        ("fprocess", "function_process", "curl -u u:geheim x", "cat"),
        ("upstream_url", "http_upstream_url", "http://u:geheim@h", "http://h"),
    ],
)
def test_alias_is_refused_when_it_contradicts_the_name(name: str, alias: str, secret: str, other: str) -> None:
    for values in ({name: secret, alias: other}, {name: other, alias: secret}):
        (problem,) = problems_of(**{"fprocess": "cat"} | values)
        assert problem == f"{name} and {alias} are both set, and differ; allowed: one of the two"


def test_alias_is_taken_when_it_repeats_the_name() -> None:
    assert parse(function_process="cat").fprocess == ("cat",)


def test_problem_names_the_alias_when_the_alias_is_bad() -> None:
    with pytest.raises(BadSettings, match="function_process="):
        parse_settings(Settings, {"function_process": "'"})


@pytest.mark.parametrize("ports", [{"port": "8081"}, {"metrics_port": "8080"}, {"port": "1", "metrics_port": "1"}])
def test_ports_are_refused_when_equal(ports: dict[str, str]) -> None:
    (problem,) = problems_of(**ports)
    assert "metrics_port" in problem
    assert "allowed" in problem


def test_prewarm_is_refused_when_the_environment_would_have_to_wait_for_the_request() -> None:
    (problem,) = problems_of(prewarm="2")
    assert "prewarm=2" in problem
    assert "cgi_headers" in problem
    assert parse(prewarm="2", cgi_headers="false").prewarm == 2


@pytest.mark.parametrize("ports", [{"port": "0", "metrics_port": "0"}, {"port": "8081", "metrics_port": "0"}])
def test_ports_are_taken_when_one_of_them_is_off_or_picked_later(ports: dict[str, str]) -> None:
    assert parse(**ports).port == int(ports["port"])


@pytest.mark.parametrize(
    ("name", "meant"),
    [("exec_timout", "exec_timeout"), ("FPROCESS", "fprocess"), ("Write_Timeout", "write_timeout")]
    + [("max_in_flight", "max_inflight"), ("function_proces", "function_process"), ("suppres_lock", "suppress_lock")],
)
def test_lookalike_is_warned_about_when_it_is_nearly_ours(name: str, meant: str) -> None:
    (warning,) = lookalikes(Settings, {name: "1", "fprocess": "cat"})
    assert name in warning
    assert meant in warning


@pytest.mark.parametrize(
    "name", ["PATH", "HOME", "HOSTNAME", "TMPDIR", "LANG", "PWD", "Http_Path", "write", "LISTEN_FDS"]
)
def test_variable_is_left_alone_when_it_is_nothing_like_ours(name: str) -> None:
    assert lookalikes(Settings, {name: "1"}) == []


def test_none_of_our_own_names_is_warned_about_when_set() -> None:
    assert lookalikes(Settings, dict.fromkeys([*GOOD_AND_BAD, "function_process"], "1")) == []


@given(st.dictionaries(st.sampled_from(sorted(GOOD_AND_BAD)), st.text(max_size=20)))
def test_any_environment_is_either_taken_or_refused_by_name_when_arbitrary(environ: dict[str, str]) -> None:
    try:
        parse_settings(Settings, environ)
    except BadSettings as error:
        problems = error.problems
    else:
        problems = ("fprocess",)
    assert problems
    assert all(any(name in problem for name in GOOD_AND_BAD) for problem in problems)


def test_help_prints_every_setting_when_asked() -> None:
    done = run("watchdog", ["--help"])
    assert done.returncode == 0
    assert format_settings(Settings) in done.stdout
    assert all(re.search(rf"^ +{row.name}\b.*{re.escape(row.help)}$", done.stdout, re.M) for row in TABLE.values())


def test_version_is_printed_when_asked() -> None:
    done = run("watchdog", ["--version"])
    assert done.returncode == 0
    assert VERSION in done.stdout


def test_program_explains_and_exits_2_when_a_flag_is_unknown() -> None:
    done = run("watchdog", ["--frobnicate"], {"fprocess": "cat"})
    assert done.returncode == 2
    assert "--frobnicate" in done.stderr


def test_program_names_every_bad_variable_and_exits_2_when_started_with_them() -> None:
    bad = {"fprocess": "'", "exec_timeout": "banana", "port": "-1", "cgi_headers": "maybe"}
    done = run("watchdog", settings=bad)
    assert done.returncode == 2
    assert all(f"{name}={text!r}" in done.stderr for name, text in bad.items())
    assert done.stderr.count("bad settings") == 1
    assert "Traceback" not in done.stderr


def test_settings_have_no_mutable_or_hidden_field_when_declared() -> None:
    fields: dict[str, Any] = dict.fromkeys(TABLE)
    assert set(fields) == set(Settings.__dataclass_fields__)
    assert Settings.__dataclass_params__.frozen  # type: ignore[attr-defined]


LONG_LABEL = "a" * 64 + ".x"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"port": "TAKEN"}, "cannot listen on port TAKEN (port) of all interfaces (host): address already in use"),
        (
            {"port": "0", "metrics_port": "TAKEN", "host": "127.0.0.1"},
            "cannot listen on port TAKEN (metrics_port) of 127.0.0.1 (host): address already in use",
        ),
        (
            {"port": "0", "host": LONG_LABEL},
            f"cannot listen on port 0 (port) of {LONG_LABEL} (host): it cannot be the name of a host",
        ),
        (
            {"port": "0", "mode": "http", "upstream_url": f"http://{LONG_LABEL}:0"},
            f"no port of {LONG_LABEL} for the server (upstream_url): it cannot be the name of a host",
        ),
    ],
    ids=["port", "metrics-port", "host", "upstream-url"],
)
def test_program_names_the_setting_when_it_cannot_listen(given: dict[str, str], said: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        settings = {name: text.replace("TAKEN", port) for name, text in given.items()}
        ended = run("watchdog", settings={"fprocess": "cat", "suppress_lock": "true"} | settings)
    assert ended.stderr.strip().endswith(said.replace("TAKEN", port))
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr


def test_host_of_a_server_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(host: str, *details: Any, **more: Any) -> Any:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(CannotStart, match=r"nowhere.test .*\(upstream_url\): name or service not known"):
        free_server_port("nowhere.test")
    assert asked == ["nowhere.test"]
