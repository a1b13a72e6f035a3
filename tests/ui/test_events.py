"""GET /system/events: what changes is told in order, from where a client was, and one that stalls is no matter."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from faashound.calls.model import Changes
from faashound.queues.spool.queue import Spool
from faashound.serving.events import Events
from faashound.serving.followers import MAX_FOLLOWERS_COUNT, MAX_OF_ADDRESS_COUNT, Followers
from faashound.serving.history import History, Sources
from faashound.watchdog import Body, Request, Scoreboard, Slot, Stream
from testkit.harness import wait_until
from testkit.queue_kit import new_call
from tests.ui.kit import FUNCTIONS, Shown

Event = dict[str, str]


class Reader:
    """A client of the stream, with nothing but a socket."""

    def __init__(
        self, port: int, mark: str | None = None, *, source: str = "127.0.0.1", path: str = "/system/events"
    ) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), 5.0, (source, 0))
        last = "" if mark is None else f"Last-Event-ID: {mark}\r\n"
        self._socket.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{last}\r\n".encode())
        self._socket.settimeout(0.05)
        self._data = b""

    def close(self) -> None:
        self._socket.close()

    def read(self) -> str:
        """Return what has come by now; chunks of the framing are left in, which events do not look like."""
        try:
            while piece := self._socket.recv(65536):
                self._data += piece
        except TimeoutError:
            pass
        return self._data.decode()

    def status(self) -> int:
        wait_until(lambda: "\r\n" in self.read(), 15.0, "an answer")
        return int(self._data.split(b" ", 2)[1])

    def events(self) -> list[Event]:
        """Return the whole events so far."""
        found = []
        for part in self.read().partition("\r\n\r\n")[2].replace("\r\n", "\n").split("\n\n"):
            lines = [line.partition(": ") for line in part.split("\n")]
            event = {name: value for name, _, value in lines if name in ("id", "event", "data")}
            if "data" in event:
                found.append(event)
        return found

    def calls(self) -> list[dict[str, Any]]:
        """Return what was told of calls, in order."""
        told = [json.loads(event["data"]) for event in self.events() if event["event"] == "calls"]
        return [call for each in told for call in each["calls"]]

    def was_told_more(self) -> bool:
        return any(json.loads(event["data"])["more"] for event in self.events() if event["event"] == "calls")

    def states_of(self, call_id: str) -> list[str]:
        return [call["state"] for call in self.calls() if call["id"] == call_id]

    def mark(self) -> str:
        """Wait for an event with an id; return the last one."""
        wait_until(lambda: [event for event in self.events() if "id" in event], 15.0, "an event with an id")
        return [event["id"] for event in self.events() if "id" in event][-1]


@contextmanager
def reading(system: Shown, mark: str | None = None) -> Iterator[Reader]:
    reader = Reader(system.port, mark)
    try:
        yield reader
    finally:
        reader.close()


def readers_with_places(system: Shown, sources: Sequence[str], path: str = "/system/events") -> list[Reader]:
    """Return a reader for each address, once those that have gone have given their places back."""

    def all_have_places() -> list[Reader]:
        readers = [Reader(system.port, source=source, path=path) for source in sources]
        if all(reader.status() == 200 for reader in readers):
            return readers
        for reader in readers:
            reader.close()
        return []

    return wait_until(all_have_places, 40.0, "places are free")


@pytest.fixture(scope="module", params=["1", "3"], ids=["alone", "three"])
def system(request: pytest.FixtureRequest) -> Iterator[Shown]:
    with Shown(settings={"workers": request.param}) as system:
        yield system


def test_reader_is_told_of_a_call_from_queued_to_its_end(system: Shown) -> None:
    with reading(system) as reader:
        reader.mark()
        call_id = system.submit("cat", b"x", {"X-Delay": "4s"})
        wait_until(lambda: reader.states_of(call_id)[-1:] == ["done"], 30.0, "the end is told")
        assert reader.states_of(call_id)[0] == "queued"
        assert not reader.was_told_more()


def test_reader_is_told_that_a_call_runs_and_is_cancelled(system: Shown) -> None:
    with reading(system) as reader:
        reader.mark()
        call_id = system.submit("slow")
        wait_until(lambda: "running" in reader.states_of(call_id), 15.0, "that it runs is told")
        assert system.request("DELETE", f"/async-function/{call_id}").status == 202
        wait_until(lambda: reader.states_of(call_id)[-1] == "cancelled", 15.0, "its end is told")


def test_reader_that_comes_back_is_told_what_it_has_missed(system: Shown) -> None:
    with reading(system) as reader:
        mark = reader.mark()
    missed = system.submit("cat", b"x")
    system.ended(missed)
    with reading(system, mark) as reader:
        wait_until(lambda: reader.states_of(missed), 15.0, "what was missed is told at once")
        assert reader.states_of(missed)[0] == "done"  # the look that all readers share may tell it once more


@pytest.mark.parametrize("mark", ["nonsense", "n1-1", "s99999999-1-1.000000"])
def test_reader_with_a_mark_of_another_making_is_told_to_read_again(system: Shown, mark: str) -> None:
    with reading(system, mark) as reader:
        wait_until(reader.was_told_more, 15.0, "more")


class LateSpool(Spool):
    """A spool that is late to say where it stands when that is asked for the look that all readers share."""

    async def changes(self, mark: str | None, leased_ids: Collection[str], limit: int) -> Changes:
        if limit == 1:
            await asyncio.sleep(0.5)
        return await super().changes(mark, leased_ids, limit)


def test_reader_is_told_what_changes_though_the_look_that_all_share_begins_late(tmp_path: Path) -> None:
    async def scenario() -> None:
        spool = await LateSpool.open(tmp_path / "spool")
        history = History(Sources(Slot(Scoreboard()), spool, "spool", None), None, "life")
        events = Events(spool, history, Followers("events", "", 60.0))
        looking = asyncio.create_task(events.run())
        request = Request("GET", b"/system/events", b"/system/events", b"", b"localhost", (), Body(0, lambda: None))
        told = cast(Stream, events.answer(request).body)
        pieces = aiter(told)
        await anext(pieces)
        call = await spool.put(new_call())
        async with asyncio.timeout(20):
            while call.id.encode() not in await anext(pieces):
                pass
        await told.aclose()
        looking.cancel()
        await spool.close()

    asyncio.run(scenario())


LOGS = "/system/logs?name=cat&follow=1"


@pytest.mark.parametrize("path", ["/system/events", LOGS], ids=["events", "logs"])
def test_one_address_has_no_more_than_its_share_of_the_places(system: Shown, path: str) -> None:
    readers = readers_with_places(system, ["127.0.0.1"] * MAX_OF_ADDRESS_COUNT, path)
    try:
        answer = system.request("GET", path)
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert answer.text.startswith(f"{MAX_OF_ADDRESS_COUNT} clients of this address follow ")
        forged = system.request("GET", path, headers={"X-Faashound-Peer": "127.0.0.9"})
        assert forged.status == 503
        other = Reader(system.port, path=path, source="127.0.0.2")
        readers.append(other)
        assert other.status() == 200
        assert system.request("GET", "/system/logs?name=cat").status == 200, "who does not follow needs no place"
    finally:
        for reader in readers:
            reader.close()
    wait_until(lambda: system.request("HEAD", path).status == 200, 15.0, "an answer to HEAD, which needs none either")


def test_follower_of_lines_that_hangs_up_gives_its_place_back_though_no_line_comes(system: Shown) -> None:
    path = f"{LOGS}&tail=0"
    for reader in readers_with_places(system, ["127.0.0.1"] * MAX_OF_ADDRESS_COUNT, path):
        reader.close()

    def has_place() -> bool:
        reader = Reader(system.port, path=path)
        try:
            return reader.status() == 200
        finally:
            reader.close()

    wait_until(has_place, 15.0, "a place is free again")


def test_readers_beyond_the_limit_are_told_to_ask_instead_and_places_are_given_back(system: Shown) -> None:
    sources = [f"127.0.0.{2 + number // MAX_OF_ADDRESS_COUNT}" for number in range(MAX_FOLLOWERS_COUNT)]
    readers = readers_with_places(system, sources)
    try:
        for reader in readers:
            reader.mark()
        answer = system.request("GET", "/system/events")
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert "/system/calls" in answer.text
    finally:
        for reader in readers:
            reader.close()

    def has_place() -> bool:
        with reading(system) as reader:
            return reader.status() == 200

    wait_until(has_place, 120.0, "a place is free again")


def test_system_answers_in_every_process_while_all_places_are_taken() -> None:
    with Shown(settings={"workers": "10", "worker": "none"}) as system:
        sources = [f"127.0.0.{2 + number // MAX_OF_ADDRESS_COUNT}" for number in range(MAX_FOLLOWERS_COUNT)]
        readers: list[Reader] = []
        try:
            for path in ("/system/events", LOGS):
                readers += readers_with_places(system, sources, path)
            answers = [system.request("GET", "/system/functions").status for _ in range(30)]
            assert set(answers) == {200}
        finally:
            for reader in readers:
                reader.close()


def test_reader_that_stalls_holds_up_no_other(system: Shown) -> None:
    with reading(system) as stalled, reading(system) as reader:
        stalled.mark()
        reader.mark()
        for _ in range(30):  # nothing is read of `stalled` meanwhile
            call_id = system.submit("cat", b"x")
        wait_until(lambda: reader.states_of(call_id)[-1:] == ["done"], 20.0, "the other is told all")
        wait_until(lambda: stalled.was_told_more() or stalled.states_of(call_id)[-1:] == ["done"], 10.0, "as is this")


def test_reader_that_takes_nothing_loses_its_place() -> None:
    talks = "yes xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx | head -c 400000 >&2"
    program = f"combine_output = false\nfprocess = \"sh -c '{talks}'\""
    functions, path = f"{FUNCTIONS}\n[talks]\n{program}\n", "/system/logs?name=talks&follow=1"
    with ExitStack() as stack, Shown(functions, {"write_timeout": "2s"}) as system:
        for _ in range(MAX_OF_ADDRESS_COUNT):
            client = stack.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # which little fills
            client.connect(("127.0.0.1", system.port))
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            assert client.recv(64).startswith(b"HTTP/1.1 200 ")
        assert system.request("GET", path).status == 503

        def has_place() -> bool:
            system.request("POST", "/function/talks")
            reader = Reader(system.port, path=path)
            stack.callback(reader.close)
            return reader.status() == 200

        wait_until(has_place, 120.0, "a place of those who take nothing, and are still connected")


def test_reader_is_told_when_functions_change_and_let_go_when_the_gateway_stops() -> None:
    with Shown() as system, reading(system) as reader:
        reader.mark()
        path = system.temporary / "functions.toml"
        path.write_text(path.read_text() + '\n[another]\nfprocess = "cat"\n')
        wait_until(lambda: [each for each in reader.events() if each["event"] == "functions"], 15.0, "a change")
        system.process.terminate()
        wait_until(lambda: system.process.poll() is not None, 30.0, "the gateway has stopped, and not for its reader")
