"""Which functions exist, and where each answers: a file's table, or a name pattern.

    table = read_functions(Path("functions.toml")).functions
    functions = Functions(table, pattern="http://{name}.{namespace}.svc:8080")
    functions.lookup("resize.prod").url                  # http://10.0.0.7:8080

The file is TOML, one table per function.  `fprocess` (or `mode = "static"`) has a watchdog run for it on this machine,
and any setting of the watchdog may stand beside it; `url` says that the function already answers elsewhere:

    [cat]
    fprocess = "cat"
    exec_timeout = "10s"
    environment = { GREETING = "hello" }

    ["resize.prod"]
    url = "http://10.0.0.7:8080"
    annotations = { "com.openfaas.retry.attempts" = "3" }

A table is called NAME, which means NAME.openfaas-fn, or "NAME.NAMESPACE" in quotes: a function is in one namespace.

Everything is checked when the file is read, and every problem is reported at once with its file, line, function and
key.  What this module refuses to do: speak HTTP, retry a call, or let an unchecked name into a URL.

Errors: BadFunctions, a FaashoundError.
"""

from __future__ import annotations

import difflib
import re
import sys
import tomllib
import urllib.parse
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from ..calls.names import DEFAULT_NAMESPACE, BadFunctionName, FunctionName, parse_function_name
from ..calls.queue_names import parse_queue_name
from ..calls.retries import BadAnnotations, parse_annotations
from ..watchdog import (
    MAX_EXEC_STRING_BYTES,
    BadSettings,
    FaashoundError,
    Settings,
    Url,
    parse_settings,
    parse_url,
    settings_table,
    without_credentials,
)
from .exposure import BadExposure, Exposure, parse_exposure
from .scaling import BadLabels, parse_scale
from .schedules import SCHEDULE, TOPIC, BadSchedule, parse_schedules
from .secret_names import SECRETS_ARE, is_secret_name


class BadFunctions(FaashoundError):
    """The functions file cannot be used.  `problems` names every one of its faults, a line each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("bad functions file:\n" + "\n".join(f"  {problem}" for problem in self.problems))


class UnreadableFunctions(BadFunctions):
    """The functions file could not be read now, whatever is in it."""


# ---------------------------------------------------------------------------------------------------------------
# URLs.  What is put into them besides is a FunctionName, which has been checked.
# ---------------------------------------------------------------------------------------------------------------

_URL_HELP = "an http:// or https:// URL with a host and, if need be, a port and a path"


def parse_base_url(text: str) -> str:
    """Return `text`, an upstream's URL, without a trailing slash, so that a request's path can be put behind it.

    Raises ValueError, which says what is allowed, for all but http(s)://host[:port][/path].
    """
    if not re.fullmatch(r"[\x21-\x7e]+", text):  # urlsplit drops some control characters without a word
        raise ValueError(f"allowed: {_URL_HELP}")
    try:
        parts = urllib.parse.urlsplit(text)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # whose text may show a part of a password
        usable = False
    if not usable or "@" in text or "?" in text or "#" in text or "\\" in text:
        raise ValueError(f"allowed: {_URL_HELP}")
    return text.rstrip("/")


UNIX_PREFIX = "unix:"  # of the url of a function that is run here


@lru_cache(maxsize=4096)
def parse_upstream(text: str) -> Url:
    """Return where a function with the base URL `text` is reached: over TCP, or at the path of a Unix socket."""
    if text.startswith(UNIX_PREFIX):
        return Url("http", text.removeprefix(UNIX_PREFIX), 80, "/")
    return parse_url(text)


def parse_function_url(text: str) -> str:
    """Return the pattern of the setting `function_url`, such as `http://{name}.{namespace}.svc:8080`.

    Raises ValueError, which says what is allowed, for one that is no URL or does not tell functions apart.
    """
    allowed = f"{_URL_HELP}, with {{name}} and, if need be, {{namespace}} in host or path"
    if "{name}" not in text:
        raise ValueError(f"{{name}} is missing; allowed: {allowed}")
    example = _fill(text, parse_function_name("name.namespace"))
    if "{" in example or "}" in example:
        raise ValueError(f"only {{name}} and {{namespace}} are filled in; allowed: {allowed}")
    try:
        parse_base_url(example)
    except ValueError:
        raise ValueError(f"allowed: {allowed}") from None
    return text.rstrip("/")


def completes_host(pattern: str | None) -> bool:
    """Return whether the host of a URL depends on the name of the function, which is a caller's word."""
    return pattern is not None and "{" in urllib.parse.urlsplit(pattern).netloc


def _fill(pattern: str, name: FunctionName) -> str:
    return pattern.replace("{name}", name.name).replace("{namespace}", name.namespace)


DEFAULT_QUEUE = "faas-request"


QUEUE_ANNOTATION = "com.openfaas.queue"


@dataclass(frozen=True, slots=True)
class Function:
    """One function.  `url` is where it answers (see `parse_upstream`), or None while its watchdog has no socket yet.

    `settings` are the watchdog's settings as typed in the file (`fprocess` among them), or None for a function
    that runs elsewhere; `environment` is what its process gets besides, `secrets` the names of those that it finds in
    a directory of its own, `directory` where it is started (None: where the gateway was).  `token_digest` is that of
    the bearer token by which its callers are let in (exposure.py), None while there is no such secret.
    """

    name: FunctionName
    url: str | None = None
    settings: Mapping[str, str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    directory: str | None = None
    token_digest: str | None = None

    @property
    def local(self) -> bool:
        """Whether its watchdog is run by the gateway."""
        return self.settings is not None

    @property
    def queue(self) -> str:
        """The queue that its asynchronous calls wait in."""
        return self.annotations.get(QUEUE_ANNOTATION, DEFAULT_QUEUE)

    @property
    def exposure(self) -> Exposure:
        """Whom it is for."""
        return parse_exposure(self.annotations)


class Functions:
    """The answer to "who is NAME?": the table first, then the pattern, if there is one, in `namespaces` only.

    `are_elsewhere`: another process of this gateway runs the local ones.
    """

    def __init__(
        self,
        table: Mapping[FunctionName, Function],
        pattern: str | None = None,
        namespaces: Collection[str] = (DEFAULT_NAMESPACE,),
        *,
        are_elsewhere: bool = False,
    ) -> None:
        self.are_elsewhere = are_elsewhere
        self._table = table
        self._pattern = pattern
        self._namespaces = frozenset(namespaces)

    def lookup(self, text: str) -> Function | None:
        """Return the function that a caller means by NAME or NAME.NAMESPACE; None if there is none.

        `text` may be anything a stranger sends.  A function found by the pattern is made for the occasion; nothing is
        remembered of it.
        """
        listed = self._table.get(FunctionName(text if "." in text else f"{text}.{DEFAULT_NAMESPACE}"))
        if listed is not None or self._pattern is None:
            return listed
        try:
            name = parse_function_name(text)
        except BadFunctionName:
            return None
        return Function(name, url=_fill(self._pattern, name)) if name.namespace in self._namespaces else None

    def __contains__(self, name: object) -> bool:
        """Whether the table lists a function of this whole name, wherever the pattern leads."""
        return name in self._table

    def is_guarded(self, name: FunctionName) -> bool:
        """Tell whether a caller's word completes the host of a function, whose address is then to be judged."""
        return name not in self and completes_host(self._pattern)

    def __iter__(self) -> Iterator[Function]:
        """Yield the functions of the table, in the file's order; what the pattern covers cannot be listed."""
        return iter(self._table.values())


# ---------------------------------------------------------------------------------------------------------------
# Reading the file.  A scalar may be a TOML string, integer or boolean, and means what the same text would mean in an
# environment variable.  Tables of text are flattened: TOML reads an unquoted com.openfaas.queue as three nested
# tables, and no author of the file means that.
# ---------------------------------------------------------------------------------------------------------------

_COMMAND_KEYS = {"fprocess", "function_process"}


_TEXT_TABLES = ("environment", "annotations", "labels")


WATCHDOG_ROWS = {name: row for row in settings_table(Settings).values() for name in (row.name, row.alias) if name}


RESERVED_PREFIXES = ("FAASHOUND_", "LISTEN_")


REFUSED_SETTINGS = {
    "host": "the gateway opens the socket of a function that it runs",
    "port": "the gateway opens the socket of a function that it runs",
    "metrics_port": "the gateway counts the calls of a function that it runs",
    "suppress_lock": "the gateway watches its processes itself, and all of them would share one lock file",
}


_LOCAL_KEYS = [name for name in WATCHDOG_ROWS if name not in REFUSED_SETTINGS] + ["environment", "secrets"]


IMAGES_TABLE = "images"  # of the file: what deployments may call an image, unless it is a function of this name


PROCESS_IMAGE = "process"


_IMAGE_KEYS = ["directory", *(key for key in _LOCAL_KEYS if key != "secrets")]


_SCHEDULE_KEYS = (TOPIC, SCHEDULE)  # annotations that may stand beside fprocess or url as well


_KEYS = [*_LOCAL_KEYS, "url", "annotations", "labels", *_SCHEDULE_KEYS]


@dataclass(frozen=True, slots=True)
class Image:
    """What deployments may call an image: where it is run (None: where we were started), and what it brings along.

    As the ENV of a container's image does: `settings` of the watchdog as typed (`fprocess` among them, which a
    deployment then need not name), and the `environment` of its program.
    """

    directory: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FunctionsFile:
    """What is in a functions file: functions by whole name, in its order, and what deployments may call an image."""

    functions: Mapping[FunctionName, Function] = field(default_factory=dict)
    images: Mapping[str, Image] = field(default_factory=dict)


def read_functions(path: Path, *, missing_ok: bool = False) -> FunctionsFile:
    """Return what is in the file at `path`.

    With `missing_ok` (it is the default, not a file that was asked for) one that does not exist is an empty table.
    Raises BadFunctions with every problem in it.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin it with a byte order mark
    except FileNotFoundError:
        if missing_ok:
            return FunctionsFile()
        raise BadFunctions([f"{path}: there is no such file"]) from None
    except UnicodeDecodeError as error:
        raise BadFunctions([f"{path}: not UTF-8 at byte {error.start}"]) from None
    except OSError as error:
        raise UnreadableFunctions([f"{path}: {error.strerror}"]) from None
    return parse_file(text, str(path))


def parse_functions(text: str, source: str) -> dict[FunctionName, Function]:
    """Return the functions that `text` describes; see `parse_file`."""
    return dict(parse_file(text, source).functions)


def parse_file(text: str, source: str) -> FunctionsFile:
    """Return what `text` describes; `source` is what error messages call it.  Raises BadFunctions."""
    try:
        document, lines = tomllib.loads(text), find_lines(text)
    except tomllib.TOMLDecodeError as error:  # its text ends with line and column
        raise BadFunctions([f"{source}: {error}"]) from None
    except ValueError:  # int() refuses what would keep it busy for long
        limit = sys.get_int_max_str_digits()
        raise BadFunctions([f"{source}: a number has too many digits; allowed: {limit} of them"]) from None
    except RecursionError:
        raise BadFunctions([f"{source}: values are nested too deep"]) from None
    report = _Report(source, lines)
    table: dict[FunctionName, Function] = {}
    images: dict[str, Image] = {}
    for key, entry in document.items():
        if _is_images(key, entry):
            images = {name: _parse_image((key, name), value, report) for name, value in entry.items()}
        elif isinstance(entry, dict):
            function = _parse_function(key, entry, report)
            if function.name in table:
                report.add((key,), f"{function.name} has a table already")
            table[function.name] = function
        else:
            report.add((key,), "a key outside of any function's table; write [NAME] above it")
    if report.found:
        raise BadFunctions(report.problems())
    return FunctionsFile(table, images)


def _is_images(key: str, entry: object) -> bool:
    return key == IMAGES_TABLE and isinstance(entry, dict) and not {"url", *_COMMAND_KEYS} & entry.keys()


def _parse_image(path: tuple[str, ...], value: Any, report: _Report) -> Image:
    """Return what a row of the images means; what is wrong goes to `report`, and then the result is void."""
    entry = {} if value == PROCESS_IMAGE else value if isinstance(value, dict) else {"directory": value}
    for key in entry:
        if key not in _IMAGE_KEYS:
            report.add((*path, key), f"unknown key; allowed: {', '.join(_IMAGE_KEYS)}")
    directory = entry.get("directory")
    if directory is not None and not (isinstance(directory, str) and directory.startswith("/")):
        report.add(path, 'allowed: "process", the absolute path of a working directory, or a table with directory')
    environment = _parse_texts((*path, "environment"), entry.get("environment", {}), report)
    _check_environment((*path, "environment"), environment, report)
    return Image(directory, _parse_local(path, entry, report), environment)


def find_lines(text: str) -> dict[tuple[str, ...], int]:
    """Return the line, from 1, on which each key path of `text`, valid TOML, first appears.

    tomllib tells no lines, so it is asked piece by piece: a statement is the shortest run of lines that parses by
    itself.  No line-based prefix of a multi-line value parses, hence this holds for every spelling of keys.
    """
    lines: dict[tuple[str, ...], int] = {}
    header: tuple[str, ...] = ()
    piece, start = "", 1
    for number, line in enumerate(text.split("\n"), 1):
        piece += line + "\n"
        try:
            paths = list(_paths(tomllib.loads(piece)))
        except tomllib.TOMLDecodeError:
            continue
        if piece.lstrip().startswith("["):
            header = ()
        for path in paths:
            lines.setdefault(header + path, start)
        if piece.lstrip().startswith("["):
            header = paths[-1]
        piece, start = "", number + 1
    return lines


def _paths(value: Any) -> Iterator[tuple[str, ...]]:
    """Yield the path of every key below `value`, a parsed statement, outer keys first."""
    if isinstance(value, list):
        value = value[-1] if value and isinstance(value[-1], dict) else {}
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (key,)
        yield from ((key, *path) for path in _paths(inner))


class _Report:
    """Gathers problems, each with the place it belongs to."""

    def __init__(self, source: str, lines: Mapping[tuple[str, ...], int]) -> None:
        self.found: list[tuple[int, str]] = []
        self._source = source
        self._lines = {(path[0], ".".join(path[1:])): line for path, line in lines.items()}

    def add(self, path: tuple[str, ...], problem: str) -> None:
        """Note `problem` of the key at `path`: function, its key, a key within that key's table.

        Dots within a key and between keys are one to us: [f] annotations.a.b is what [f.annotations] "a.b" is.
        """
        name, key = path[0], ".".join(path[1:])
        place, known = f"[{name}] {key}".rstrip(), key
        while (name, known) not in self._lines:
            known = known.rpartition(".")[0]
        line = self._lines[name, known]
        self.found.append((line, f"{self._source}:{line}: {place}: {problem}"))

    def problems(self) -> list[str]:
        """Return every problem with its place, in the file's order."""
        return [problem for _, problem in sorted(self.found, key=lambda each: each[0])]


def _parse_function(name: str, entry: Mapping[str, Any], report: _Report) -> Function:
    """Return the function of the table `name`; what is wrong goes to `report`, and then the result is void."""
    try:
        whole_name = parse_function_name(name)
    except BadFunctionName as error:
        report.add((name,), str(error))
        whole_name = FunctionName(name)
    elsewhere = "url" in entry
    if not elsewhere and not entry.keys() & _COMMAND_KEYS and entry.get("mode") != "static":
        report.add((name,), "has neither fprocess nor url; give one of them")
    for key in entry:
        problem = _key_problem(key, entry[key], elsewhere)
        if problem:
            report.add((name, key), problem)
    texts = {key: _parse_texts((name, key), entry.get(key, {}), report) for key in _TEXT_TABLES}
    _check_environment((name, "environment"), texts["environment"], report)
    for key in entry.keys() & _SCHEDULE_KEYS:
        if key in texts["annotations"]:
            report.add((name, key), "is among the annotations as well; give one of them")
        texts["annotations"][key] = _parse_value((name, key), entry[key], _parse_no_nul, report) or ""
    _check_annotations(name, entry, texts["annotations"], report)
    if not elsewhere:
        _check_labels(name, texts["labels"], report)
    url = _parse_value((name, "url"), entry["url"], parse_base_url, report) if elsewhere else None
    secrets = _parse_names((name, "secrets"), entry.get("secrets", []), report)
    settings = None if elsewhere else _parse_local((name,), entry, report)
    environment, annotations, labels = (texts[key] for key in _TEXT_TABLES)
    return Function(whole_name, url, settings, environment, annotations, labels, secrets)


def _parse_names(path: tuple[str, ...], value: Any, report: _Report) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) and is_secret_name(each) for each in value):
        report.add(path, f"not a list of names of secrets; allowed: {SECRETS_ARE}")
        return ()
    return tuple(value)


def _key_problem(key: str, value: Any, elsewhere: bool) -> str | None:
    """Return what is wrong with a key of a function's table, or None."""
    if elsewhere and (key in _LOCAL_KEYS or key in REFUSED_SETTINGS):
        return "means nothing beside url: a function that runs elsewhere has its own watchdog"
    if key in REFUSED_SETTINGS:
        return f"not allowed here: {REFUSED_SETTINGS[key]}"
    if key in _KEYS:
        return None
    is_table = isinstance(value, dict)
    close = difflib.get_close_matches(key.lower(), _TEXT_TABLES if is_table else _KEYS, 1)
    if is_table:
        start = f"did you mean {close[0]}? A" if close else "a"
        return f'unknown key; {start} function of a namespace {key} is written in quotes: ["NAME.{key}"]'
    if close:
        return f"unknown key; did you mean {close[0]}?"
    return f"unknown key; allowed: {', '.join(_KEYS)}"


def _parse_local(path: tuple[str, ...], entry: Mapping[str, Any], report: _Report) -> dict[str, str]:
    """Return the watchdog's settings of the table at `path` as text, checked alone and then together."""
    found_before = len(report.found)
    settings = {}
    for key in _LOCAL_KEYS:
        if key in WATCHDOG_ROWS and key in entry:
            settings[key] = _parse_value((*path, key), entry[key], _checked(WATCHDOG_ROWS[key].parse), report) or ""
    if len(report.found) == found_before and (settings.get("mode") == "static" or settings.keys() & _COMMAND_KEYS):
        try:
            parse_settings(Settings, watchdog_settings(settings))
        except BadSettings as error:
            for problem in error.problems:
                report.add(path, problem)
    return settings


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """Return a parser that returns the text as typed once `parse` has taken it; empty means unset, as elsewhere."""

    def check(text: str) -> str:
        if text:
            parse(text)
        return text

    return check


def _parse_value(path: tuple[str, ...], value: Any, parse: Callable[[str], str], report: _Report) -> str | None:
    """Return the text of a scalar after `parse`, or None, with the problem reported."""
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, int) and value.bit_length() > 63:  # TOML promises no more
        report.add(path, "is a number that 64 bits do not hold")
        return None
    elif isinstance(value, str | int):
        text = str(value)
    else:
        report.add(path, f"is {_describe_toml(value)}; allowed: a string, a whole number, true or false")
        return None
    try:
        return parse(text)
    except ValueError as error:
        secret = "environment" in path[1:-1]
        report.add(path, str(error) if secret else f"{without_credentials(text)!r}: {error}")
        return None


def _describe_toml(value: Any) -> str:
    words = {float: "a number with a fraction", list: "an array", dict: "a table"}
    return words.get(type(value), "a date or time")


def _parse_texts(path: tuple[str, ...], value: Any, report: _Report) -> dict[str, str]:
    """Return a table of text, flattened: keys joined by dots, values as text."""
    if not isinstance(value, dict):
        report.add(path, 'not a table; allowed: { NAME = "value" }')
        return {}
    texts: dict[str, str] = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            texts |= {f"{key}.{rest}": text for rest, text in _parse_texts((*path, key), inner, report).items()}
        else:
            texts[key] = _parse_value((*path, key), inner, _parse_no_nul, report) or ""
    return texts


def _parse_no_nul(text: str) -> str:
    if "\0" in text:
        raise ValueError("allowed: text without NUL characters")
    return text


def _check_environment(table: tuple[str, ...], environment: Mapping[str, str], report: _Report) -> None:
    """Report variables that execve cannot carry, or that the watchdog would take for its own."""
    for key in environment:
        path = (*table, key)
        if not key or "=" in key or "\0" in key:
            report.add(path, "not a variable's name; allowed: anything without '=' and NUL")
        elif key in WATCHDOG_ROWS:
            report.add(path, "a setting of the watchdog; write it beside fprocess")
        elif key.startswith(RESERVED_PREFIXES):
            report.add(path, f"reserved; allowed: names that do not start with {' or '.join(RESERVED_PREFIXES)}")
        elif exceeds_execve(key, environment[key]):
            report.add(path, TOO_LONG)


TOO_LONG = f"allowed: less than {MAX_EXEC_STRING_BYTES} bytes, name and value"


def exceeds_execve(name: str, text: str) -> bool:
    """Tell whether a variable is longer than one may be; its program could never be started (execve(2))."""
    return len(f"{name}={text}".encode()) >= MAX_EXEC_STRING_BYTES


def _check_annotations(name: str, entry: Mapping[str, Any], annotations: Mapping[str, str], report: _Report) -> None:
    for annotation, problem in annotation_problems(annotations).items():
        report.add((name, annotation) if annotation in entry else (name, "annotations", annotation), problem)


def annotation_problems(annotations: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong with those annotations that mean something to us; all others are the operator's own."""
    problems: dict[str, str] = {}
    for parse in (partial(parse_annotations, "function"), parse_schedules, parse_exposure):
        try:
            parse(annotations)
        except (BadAnnotations, BadSchedule, BadExposure) as error:
            problems |= error.problems
    try:
        parse_queue_name(annotations.get(QUEUE_ANNOTATION, DEFAULT_QUEUE))
    except ValueError as error:
        problems[QUEUE_ANNOTATION] = str(error)
    return problems


def _check_labels(name: str, labels: Mapping[str, str], report: _Report) -> None:
    try:
        parse_scale(labels)
    except BadLabels as error:
        for label, problem in error.problems.items():
            report.add((name, "labels", label), problem)


def watchdog_settings(settings: Mapping[str, str]) -> dict[str, str]:
    """Return the environment that tells a local watchdog what the file says, and what it is to be without a file.

    Nothing probes it, so it need not stay up unhealthy after SIGTERM; its socket is inherited.  One process is enough
    where functions share the processors with each other and with the gateway.
    """
    given = {name: text for name, text in settings.items() if text}
    return {"healthcheck_interval": "0", "workers": "1", **given, "metrics_port": "0", "suppress_lock": "true"}
