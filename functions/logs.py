"""The log lines of each function: kept in files across restarts and removals, read back by time, number and call.

    store = LogStore(Path("state/logs"), keep_bytes=16 << 20, as_json=False)
    pipe = store.open_pipe(function, instance)         # pipe.fd is the stderr of its watchdogs; `close` at the end
    async for line in await store.read(name, LogQuery(tail=100, follow=True)): ...

A watchdog writes its lines as JSON into a pipe that the gateway reads; each is added to the newest file of its
function, with the id of the call that it belongs to.  A file that is a quarter of `keep_bytes` long is followed by
another, and the oldest goes when all of them are longer than that.  The log of the gateway itself gets what an operator
has to see of them: what functions write, warnings and errors, and not a line for each step of a call.

Lines of functions that are no more are kept as well, of MAX_REMOVED_COUNT of them: those that wrote last.

Readers read the files, so one that is slow, or stops, slows no function; what is deleted before it has read it, it
does not see.  A disk that is full loses lines of functions, once told, and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..calls.names import FunctionName
from ..watchdog import FaashoundError, escape_line, in_thread, log, parse_bool
from .documents import parse_document, parse_time
from .table import Function

PARTS_COUNT = 4  # files that a function's lines are divided among

MAX_REMOVED_COUNT = 50  # functions that are no more, and whose lines are kept

MAX_LINE_BYTES = 16384  # a longer one is cut; those of watchdogs are shorter

READ_BYTES = 65536

GATHER_S = 0.02  # from the first line to the look at it: what comes meanwhile is taken with it

FOLLOW_POLL_S = 0.2

LINES_AT_ONCE_COUNT = 1000  # that a reader takes in one turn of a thread

SETTINGS = {"log_format": "json", "log_callid": "true"}  # of watchdogs whose lines are read here

_CALL = re.compile(r"\[([!-~]{1,255}?)\] ", re.ASCII)

STDERR_PREFIX = "stderr: "


class BadLogQuery(FaashoundError):
    """The parameters of a request for lines make no sense."""

    status = 422


@dataclass(frozen=True, slots=True)
class LogLine:
    """One line: when it was written, by which watchdogs, in which call, and what it says."""

    at_s: float
    instance: str
    call_id: str | None
    text: str

    def describe(self, name: FunctionName) -> dict[str, str]:
        """Return the members of OpenFaaS' log message."""
        moment = datetime.fromtimestamp(self.at_s, UTC)
        return {
            "name": name.name,
            "namespace": name.namespace,
            "instance": self.instance,
            "timestamp": moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "text": self.text,
        }

    def build(self) -> bytes:
        """Return the line as it is kept."""
        return json.dumps([self.at_s, self.instance, self.call_id, self.text]).encode() + b"\n"


@dataclass(frozen=True, slots=True)
class LogQuery:
    """Which lines are wanted: `tail_count` of the newest (None: all) of those that the rest lets through."""

    since_s: float | None = None
    tail_count: int | None = None
    follow: bool = False
    call_id: str | None = None
    instance: str | None = None

    def wants(self, line: LogLine) -> bool:
        """Tell whether a line is among those wanted."""
        return (
            (self.since_s is None or line.at_s >= self.since_s)
            and (self.call_id is None or line.call_id == self.call_id)
            and (self.instance is None or line.instance == self.instance)
        )


def parse_log_query(given: Mapping[str, str]) -> LogQuery:
    """Return what the parameters since, tail, follow, call and instance ask for, as clients of OpenFaaS spell them.

    Raises BadLogQuery with every problem.  Other parameters are not looked at.
    """
    problems: list[str] = []
    since_s = tail_count = None
    follow = False
    if text := given.get("since"):
        try:
            since = datetime.fromisoformat(text.replace(" ", "+"))  # a + that was not encoded
            if since.tzinfo is None:
                raise ValueError("a time without its offset is another one in each zone")
            since_s = since.timestamp()
        except (ValueError, OverflowError):
            problems.append(f"since: {text[:100]!r}: allowed: a time such as 2026-01-31T12:00:00Z (RFC 3339)")
    if text := given.get("tail"):
        if re.fullmatch(r"-?[0-9]{1,9}", text, re.ASCII):
            tail_count = int(text) if int(text) > 0 else None
        else:
            problems.append(f"tail: {text[:100]!r}: allowed: a whole number; 0 and less is all")
    if text := given.get("follow"):
        try:
            follow = parse_bool(text)
        except ValueError as error:
            problems.append(f"follow: {text[:100]!r}: {error}")
    if problems:
        raise BadLogQuery("\n".join(problems))
    return LogQuery(since_s, tail_count, follow, given.get("call") or None, given.get("instance") or None)


@dataclass(frozen=True, slots=True)
class Record:
    """What a watchdog has said: `level` is "raw" for what is none of our lines."""

    level: str
    line: LogLine

    @property
    def is_for_operators(self) -> bool:
        """Whether the gateway's own log shows it: not the steps of a call or of a watchdog's life."""
        return self.level != "info" or self.line.text.startswith(STDERR_PREFIX)


def parse_record(data: bytes, instance: str, now_s: float) -> Record:
    """Return what one line of a watchdog's stderr says; whatever it is, it is a line."""
    text = data[:MAX_LINE_BYTES].decode("utf-8", "replace")
    level, at_s = "raw", now_s
    try:
        document = parse_document(text) if text.startswith("{") else None
        if isinstance(document, dict) and isinstance(document.get("msg"), str):
            level, at_s, text = str(document["level"]), parse_time(document["time"]), document["msg"]
    except (ValueError, KeyError):
        pass  # a traceback of Python, say, or JSON of the function's own
    call_id = None
    if match := _CALL.match(text):
        call_id, text = None if match[1] == "none" else match[1], text[match.end() :]
    return Record(level, LogLine(at_s, instance, call_id, escape_line(text)))


class LogFiles:
    """The files of one function, named by the time of their beginning.  Only one process may add to them."""

    def __init__(self, directory: Path, part_bytes: int) -> None:
        self._directory = directory
        self._part_bytes = part_bytes
        self._fd: int | None = None
        self._size_bytes = 0

    def add(self, data: bytes) -> None:
        """Write whole lines at the end; raises OSError."""
        if self._fd is None or self._size_bytes >= self._part_bytes:
            self._begin_part()
        if self._fd is None:
            raise AssertionError("a part has begun")
        self._size_bytes += os.write(self._fd, data)

    def _begin_part(self) -> None:
        self.close()
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        parts = list_parts(self._directory)
        if parts and parts[-1].stat().st_size < self._part_bytes:
            path = parts[-1]
        else:
            path = self._directory / f"{time.time_ns():020d}.jsonl"
            for old in parts[: max(len(parts) - PARTS_COUNT + 1, 0)]:
                old.unlink(missing_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size_bytes = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Hold no file open."""
        if self._fd is not None:
            os.close(self._fd)
        self._fd = None


def list_parts(directory: Path) -> list[Path]:
    """Return the files of a function, oldest first."""
    try:
        return sorted(path for path in directory.iterdir() if path.suffix == ".jsonl")
    except (FileNotFoundError, NotADirectoryError):
        return []


class LogPipe:
    """What the watchdogs of one version of a function write their lines to: `fd`."""

    def __init__(self, store: LogStore, function: Function, instance: str) -> None:
        self._store = store
        self._function = function
        self._instance = instance
        self._rest = b""
        self._read_fd, self.fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_fd, False)
        self._loop = asyncio.get_running_loop()
        self._look: asyncio.Handle | None = None
        self._watch()

    def close(self) -> None:
        """Take what is still in the pipe, and close it; its watchdogs have ended."""
        self._loop.remove_reader(self._read_fd)
        if self._look is not None:
            self._look.cancel()
        os.close(self.fd)
        while self._read():
            pass
        if self._rest:
            self._take([self._rest])
        os.close(self._read_fd)
        self._store.on_pipe_closed(self._function.name)

    def _watch(self) -> None:
        self._look = None
        self._loop.add_reader(self._read_fd, self._on_readable)

    def _on_readable(self) -> None:
        """Look at it in a moment: each look costs as much as some lines, which a busy function writes all the time."""
        self._loop.remove_reader(self._read_fd)
        self._look = self._loop.call_later(GATHER_S, self._take_some)

    def _take_some(self) -> None:
        if self._read() == READ_BYTES:
            self._look = self._loop.call_soon(self._take_some)  # the pipe was full
        else:
            self._watch()

    def _read(self) -> int:
        """Take what one read gives; return how many bytes that were."""
        try:
            data = os.read(self._read_fd, READ_BYTES)
        except BlockingIOError:
            return 0
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_LINE_BYTES:
            lines.append(self._rest)
            self._rest = b""
        self._take(lines)
        return len(data)

    def _take(self, lines: list[bytes]) -> None:
        now_s = time.time()
        records = [parse_record(line, self._instance, now_s) for line in lines if line]
        if records:
            self._store.add(self._function, records)


class LogStore:
    """The lines of all functions, below `directory`; `keep_bytes` of each.

    `as_json` is how the gateway's own log looks.
    """

    def __init__(self, directory: Path, keep_bytes: int, *, as_json: bool = False) -> None:
        self._directory = directory
        self._part_bytes = max(keep_bytes // PARTS_COUNT, 1)
        self._as_json = as_json
        self._files: dict[FunctionName, LogFiles] = {}
        self._pipes: Counter[FunctionName] = Counter()
        self._is_failing = False

    def open_pipe(self, function: Function, instance: str) -> LogPipe:
        """Return a pipe for the watchdogs of a function, which `instance` names; inside the running loop."""
        pipe = LogPipe(self, function, instance)
        self._pipes[function.name] += 1
        return pipe

    def on_pipe_closed(self, name: FunctionName) -> None:
        """One pipe of a function less: without any, its file is not held open."""
        self._pipes[name] -= 1
        if self._pipes[name] <= 0:
            del self._pipes[name]
            files = self._files.pop(name, None)
            if files is not None:
                files.close()

    def prune(self, known: Collection[str]) -> None:
        """Drop the lines of functions that are not `known`, but for MAX_REMOVED_COUNT of them; blocks on the disk."""
        removed = [path for path in _subdirectories(self._directory) if path.name not in known]
        for path in sorted(removed, key=_last_written_ns, reverse=True)[MAX_REMOVED_COUNT:]:
            if path.name not in self._pipes:  # it is just ending, and writes still
                shutil.rmtree(path, ignore_errors=True)

    def knows(self, name: FunctionName) -> bool:
        """Tell whether there are lines of a function, be it removed."""
        return bool(list_parts(self._directory / str(name)))

    def add(self, function: Function, records: list[Record]) -> None:
        """Keep lines, and show operators those that are for them."""
        for record in records:
            if record.is_for_operators:
                self._show(function, record)
        files = self._files.get(function.name)
        if files is None:
            files = self._files[function.name] = LogFiles(self._directory / str(function.name), self._part_bytes)
        try:
            files.add(b"".join(record.line.build() for record in records))
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:
                log.error(f"lines of functions are lost: {self._directory}: {error.strerror}")
            self._is_failing = True

    def _show(self, function: Function, record: Record) -> None:
        line, settings = record.line, function.settings or {}
        with_id = settings.get("log_callid") in ("true", "1") and line.call_id is not None
        text = f"[{line.call_id}] {line.text}" if with_id else line.text
        if record.level == "raw":
            log.raw(text)
        elif self._as_json:
            document = {"time": line.at_s, "level": record.level, "msg": text, "function": function.name.short}
            log.raw(json.dumps(document | ({"call_id": line.call_id} if line.call_id else {})))
        else:
            tell = {"warning": log.warning, "error": log.error}.get(record.level, log.info)
            tell(f"{function.name.short}: {text}")

    def close(self) -> None:
        """Hold no file open."""
        for files in self._files.values():
            files.close()
        self._files.clear()

    async def read(self, name: FunctionName, query: LogQuery) -> AsyncGenerator[LogLine, None]:
        """Return what yields the lines that `query` wants, oldest first; with `follow`, those to come too, for ever.

        Which ones a tail counts is settled when this returns: a line that is written after that is one to come.
        """
        cursor = Cursor(self._directory / str(name))
        newest: deque[LogLine] = deque(maxlen=query.tail_count)
        if query.tail_count is not None:
            while lines := await in_thread(cursor.next_lines):
                newest.extend(line for line in lines if query.wants(line))
        return _read_on(newest, cursor, query)


async def _read_on(newest: Iterable[LogLine], cursor: Cursor, query: LogQuery) -> AsyncGenerator[LogLine, None]:
    for line in newest:
        yield line
    if query.tail_count is not None and not query.follow:
        return
    while True:
        lines = await in_thread(cursor.next_lines)
        for line in lines:
            if query.wants(line):
                yield line
        if not lines and not query.follow:
            return
        if not lines:
            await asyncio.sleep(FOLLOW_POLL_S)


def _subdirectories(directory: Path) -> list[Path]:
    try:
        return [path for path in directory.iterdir() if path.is_dir()]
    except FileNotFoundError:
        return []


def _last_written_ns(directory: Path) -> int:
    return max((path.stat().st_mtime_ns for path in list_parts(directory)), default=0)


class Cursor:
    """A place in the files of a function, which moves on as lines are read.  Its methods block on the disk."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._part = ""
        self._offset = 0

    def next_lines(self) -> list[LogLine]:
        """Return some of the lines from here on, none at the end."""
        while True:
            parts = [path for path in list_parts(self._directory) if path.name >= self._part]
            if not parts:
                return []
            if parts[0].name != self._part:  # the first one, or ours was deleted
                self._part, self._offset = parts[0].name, 0
            lines = list(self._read(parts[0]))
            if lines or len(parts) == 1:
                return lines
            self._part, self._offset = parts[1].name, 0  # nothing is added to a part that has a successor

    def _read(self, path: Path) -> Iterator[LogLine]:
        with suppress(FileNotFoundError), path.open("rb") as file:
            file.seek(self._offset)
            for _ in range(LINES_AT_ONCE_COUNT):
                data = file.readline()
                if not data.endswith(b"\n"):  # the end, or what is just being written
                    return
                self._offset += len(data)
                with suppress(ValueError, TypeError):
                    at_s, *rest = parse_document(data)
                    yield LogLine(parse_time(at_s), *rest)
