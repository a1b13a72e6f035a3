"""table.py: reading the functions file, and finding who answers."""

from __future__ import annotations

import json
import textwrap
import urllib.parse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.calls.names import FunctionName, parse_function_name
from faashound.functions.table import (
    BadFunctions,
    Function,
    Functions,
    FunctionsFile,
    Image,
    find_lines,
    parse_base_url,
    parse_function_url,
    parse_functions,
    parse_upstream,
    read_functions,
)

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


@pytest.mark.parametrize("start", ['fprocess = "cat"', 'url = "http://h"'])
def test_schedule_means_the_same_beside_the_annotations_and_among_them(start: str) -> None:
    lines = 'topic = "cron-function"\nschedule = "* * * * *"\n'
    beside = parse_functions(f"[f]\n{start}\n{lines}annotations.a = 'b'\n", "f.toml")[F]
    among = parse_functions(f"[f]\n{start}\n[f.annotations]\n{lines}a = 'b'\n", "f.toml")[F]
    assert beside == among


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
        (LOCAL + "zzz = 1", "f.toml:3: [f] zzz: unknown key; allowed: fprocess, function_process, mode"),
        (LOCAL + "jwt_auth = true", "f.toml:3: [f] jwt_auth: 'true': callers' tokens are not checked here"),
        (
            LOCAL + "[f.prod]\nurl = 'http://h'",
            'f.toml:3: [f] prod: unknown key; a function of a namespace prod is written in quotes: ["NAME.prod"]',
        ),
        (LOCAL + "[f.users]\nurl = 'http://h'", "f.toml:3: [f] users: unknown key; a function of a namespace users"),
        (LOCAL + "[f.secret]\nurl = 'http://h'", "f.toml:3: [f] secret: unknown key; a function of a namespace secret"),
        (LOCAL + "[f.label]", "f.toml:3: [f] label: unknown key; did you mean labels? A function of a namespace label"),
        (LOCAL + "host = 'h'", "f.toml:3: [f] host: not allowed here: the gateway opens the socket"),
        (LOCAL + "port = 80", "f.toml:3: [f] port: not allowed here: the gateway opens the socket"),
        (LOCAL + "metrics_port = 80", "f.toml:3: [f] metrics_port: not allowed here: the gateway counts"),
        (LOCAL + "suppress_lock = false", "f.toml:3: [f] suppress_lock: not allowed here: the gateway watches"),
        (LOCAL + "function_process = 'dog'", "f.toml:1: [f]: fprocess and function_process are both set"),
        ("[f]\nfprocess = ''", "f.toml:1: [f]: fprocess is not set"),
        (LOCAL + f"max_body = 1{'0' * 5000}", "f.toml: a number has too many digits; allowed: 4300 of them"),
        (LOCAL + f"max_body = 0x1{'0' * 5000}", "f.toml:3: [f] max_body: is a number that 64 bits do not hold"),
        (LOCAL + "labels = " + "{a=" * 2000 + "1" + "}" * 2000, "f.toml: values are nested too deep"),
        (REMOTE + "exec_timeout = 1", "f.toml:3: [f] exec_timeout: means nothing beside url"),
        (REMOTE + "port = 1", "f.toml:3: [f] port: means nothing beside url"),
        (REMOTE + "environment.A = '1'", "f.toml:3: [f] environment: means nothing beside url"),
        ("[f]\nurl = 'h:80'", "f.toml:2: [f] url: 'h:80': allowed: an http:// or https:// URL"),
        (LOCAL + "labels = 'x'", 'f.toml:3: [f] labels: not a table; allowed: { NAME = "value" }'),
        (LOCAL + "labels = { a = 1.5 }", "f.toml:3: [f] labels.a: is a number with a fraction"),
        (LOCAL + "[f.environment]\nport = 1", "f.toml:4: [f] environment.port: a setting of the watchdog; write it"),
        (LOCAL + "environment.LISTEN_FDS = 1", "f.toml:3: [f] environment.LISTEN_FDS: reserved"),
        (LOCAL + "environment.'A=B' = 1", "f.toml:3: [f] environment.A=B: not a variable's name"),
        (LOCAL + f"environment.A = '{'x' * 131070}'", "f.toml:3: [f] environment.A: allowed: less than 131072 bytes"),
        (f"[f]\nfprocess = 'cat {'x' * 131072}'", "f.toml:2: [f] fprocess: 'cat xx"),
        (LOCAL + "topic = 1.5", "f.toml:3: [f] topic: is a number with a fraction"),
        (LOCAL + "topic = 'cron-function'\nschedule = '61 * * * *'", "f.toml:4: [f] schedule: '61 * * * *': "),
        (LOCAL + "topic = 'a'\nannotations.topic = 'b'", "f.toml:3: [f] topic: is among the annotations as well"),
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
    assert read_functions(tmp_path / "none.toml", missing_ok=True) == FunctionsFile()
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
    assert list(read_functions(path).functions) == [F]


def test_file_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text('[z]\nurl = "http://z"\n[a]\nfprocess = "cat"\n', encoding="utf-8")
    assert [function.name.short for function in Functions(read_functions(path).functions)] == ["z", "a"]


def test_examples_file_is_right() -> None:
    table = read_functions(Path(__file__).parents[2] / "examples" / "functions.toml").functions
    names = ["cat", "env", "wordcount", "slow", "flaky", "notify", "tokens", "counter", "site", "door"]
    assert [name.short for name in table] == names
    assert all(function.local for function in table.values())


def test_images_are_read_with_what_they_bring_along(tmp_path: Path) -> None:
    path = tmp_path / "f.toml"
    path.write_text(
        textwrap.dedent("""
            [images]
            "functions/alpine" = "process"
            "shop/cart" = "/srv/cart"
            "shop/till" = { directory = "/srv/till", fprocess = "./till", max_inflight = 4, environment = { A = "1" } }
        """)
    )
    file = read_functions(path)
    assert file.functions == {}
    assert file.images == {
        "functions/alpine": Image(),
        "shop/cart": Image("/srv/cart"),
        "shop/till": Image("/srv/till", {"fprocess": "./till", "max_inflight": "4"}, {"A": "1"}),
    }


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ('"cart"', ': allowed: "process", the absolute path of a working directory, or a table with directory'),
        ("1", ': allowed: "process", the absolute path of a working directory, or a table with directory'),
        ("{ port = 1 }", ".port: unknown key; allowed: directory, "),
        ("{ secrets = ['a'] }", ".secrets: unknown key; allowed: directory, "),
        ("{ exec_timeout = 'banana' }", ".exec_timeout: 'banana': allowed: "),
        ("{ environment = { exec_timeout = '1s' } }", ".environment.exec_timeout: a setting of the watchdog"),
        ("{ environment = { A = 1.5 } }", ".environment.A: is a number with a fraction"),
    ],
)
def test_bad_image_is_reported_with_its_line(row: str, problem: str) -> None:
    (found,) = problems_of(f"[images]\n'shop/cart' = {row}")
    assert found.startswith(f"f.toml:2: [images] shop/cart{problem}")


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


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        pytest.param("http://h:81/base", ("h", 81, "/base"), id="elsewhere"),
        pytest.param("unix:/run/x/1", ("/run/x/1", 80, "/"), id="run here"),
    ],
)
def test_function_is_reached_where_its_url_says(url: str, expected: tuple[str, int, str]) -> None:
    found = parse_upstream(url)
    assert (found.host, found.port, found.target) == expected


@pytest.mark.parametrize(
    ("label", "problem"),
    [
        ("min = 'x'", "f.toml:3: [f] labels.com.openfaas.scale.min: 'x': allowed: "),
        ("zero = 'x'", "f.toml:3: [f] labels.com.openfaas.scale.zero: 'x': allowed: "),
        ("zero-duration = '0'", "f.toml:3: [f] labels.com.openfaas.scale.zero-duration: '0': must be longer"),
        ("min = 21", "f.toml:3: [f] labels.com.openfaas.scale.min: is more than com.openfaas.scale.max (20)"),
    ],
)
def test_bad_label_of_scaling_is_reported_with_its_line(label: str, problem: str) -> None:
    (found,) = problems_of(LOCAL + f"labels.com.openfaas.scale.{label}")
    assert found.startswith(problem)
