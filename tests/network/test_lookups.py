"""lookups.py: names that no server answers for delay nothing else, and are asked for once at a time."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvloop

from faashound.network import lookups
from faashound.network.lookups import STRANGERS_WAIT_S, Answer, Lookups, by_origin, strangers_names, system_names
from faashound.watchdog import Address, Resolver, Unreachable, Url, parse_url, resolve_any
from testkit.apart import dead_dns, run_apart
from testkit.harness import InBackground, noise_s, wait_until
from testkit.system import Receiver, System, Worker

DEAD_COUNT = 300
DEAD_S = 3.0  # that a look-up of a dead name takes at least: so long c-ares waits, and the C library twice as long


def url_of(host: str) -> Url:
    return parse_url(f"http://{host}/")


async def timed(lookup: Resolver, host: str) -> tuple[float, Sequence[Address] | Unreachable]:
    """Return how long a look-up took, and what came of it."""
    started_s = time.monotonic()
    try:
        found: Sequence[Address] | Unreachable = await lookup(url_of(host))
    except Unreachable as error:
        found = error
    return time.monotonic() - started_s, found


@asynccontextmanager
async def closing(*resolvers: Lookups) -> AsyncIterator[None]:
    try:
        yield
    finally:
        for resolver in resolvers:
            await resolver.close()


# --- With a DNS server that never answers ----------------------------------------------------------------------


def inside_strangers_do_not_delay() -> None:
    async def test() -> None:
        strangers, system = strangers_names(), system_names()
        async with closing(strangers, system):
            dead = [asyncio.create_task(timed(strangers, f"dead{number}.test")) for number in range(DEAD_COUNT)]
            await asyncio.sleep(0)
            for resolver in (system, strangers):
                took_s, found = await timed(resolver, "two.test")
                assert found == [(socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.3")]
                assert took_s < noise_s() or not any(task.done() for task in dead)
            for took_s, found in await asyncio.gather(*dead):
                assert isinstance(found, Unreachable), found
                assert took_s < 2 * STRANGERS_WAIT_S + noise_s()  # one behind the other they would take minutes
            assert threading.active_count() < 20, threading.enumerate()

    with dead_dns():
        uvloop.run(test())


def test_strangers_dead_names_delay_neither_the_operators_names_nor_other_strangers() -> None:
    run_apart(inside_strangers_do_not_delay)


def inside_one_name_is_asked_once() -> None:
    async def test(make: Callable[[], Lookups], host: str) -> None:
        resolver = make()
        async with closing(resolver):
            ended = await asyncio.gather(*(timed(resolver, host) for _ in range(100)))
            assert all(isinstance(found, Unreachable) and host in str(found) for _, found in ended)
            took_s, found = await timed(resolver, host)  # remembered, or late already
            assert isinstance(found, Unreachable)
            assert took_s < DEAD_S / 2 + noise_s()

    lookups.FAILURE_AGE_S = 60.0  # however slow we are
    with dead_dns() as asked:
        uvloop.run(test(strangers_names, "strange.test"))
        uvloop.run(test(system_names, "ours.test"))
        assert 0 < asked["strange.test"] <= 4, asked  # A and AAAA, two tries
        assert 0 < asked["ours.test"] <= 4, asked


def test_name_is_asked_for_once_when_many_wait_for_it() -> None:
    run_apart(inside_one_name_is_asked_once)


def inside_operators_names_do_not_delay_each_other() -> None:
    async def test() -> None:
        system = system_names()
        async with closing(system):
            dead = [asyncio.create_task(timed(system, f"dead{number}.test")) for number in range(8)]
            await asyncio.sleep(0)
            took_s, found = await timed(system, "good.test")
            assert found == [(socket.AF_INET, "127.0.0.1")]
            assert took_s < noise_s() or not any(task.done() for task in dead)
            for task in dead:
                task.cancel()

    with dead_dns():
        uvloop.run(test())


def test_operators_dead_names_do_not_delay_the_others() -> None:
    run_apart(inside_operators_names_do_not_delay_each_other)


def inside_program_ends_while_a_name_is_looked_up() -> None:
    async def test() -> None:
        system, strangers = system_names(), strangers_names()
        async with closing(system, strangers):
            for resolver in (system, strangers):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(resolver(url_of("dead.test")), 0.2)

    with dead_dns():
        started_s = time.monotonic()
        uvloop.run(test())
        assert time.monotonic() - started_s < DEAD_S + noise_s()


def test_program_ends_at_once_when_names_are_still_looked_up() -> None:
    started_s = time.monotonic()
    run_apart(inside_program_ends_while_a_name_is_looked_up)
    assert time.monotonic() - started_s < 5 + noise_s()  # the interpreter included: the C library takes six more


# --- The programs, with the same server ------------------------------------------------------------------------


def inside_gateway_with_dead_functions() -> None:
    with dead_dns() as asked, Receiver() as receiver:
        authorities = {f"dead{number}": f"dead{number}.test:9" for number in range(8)}
        authorities["good"] = f"good.test:{receiver.port}"
        text = "".join(f'[{name}]\nurl = "http://{authority}"\n' for name, authority in authorities.items())
        with System(text, {"worker": "none"}) as system:
            dead = [
                InBackground(partial(system.request, "POST", f"/function/dead{number}", b"")) for number in range(8)
            ]
            wait_until(lambda: len(asked) >= 2, 5, "the dead names are looked up")
            answer = system.request("POST", "/function/good", b"")
            assert (answer.status, answer.elapsed_s < DEAD_S + noise_s()) == (200, True), answer
            assert [call.result().status for call in dead] == [502] * 8


def test_function_answers_at_once_when_the_names_of_others_lead_nowhere() -> None:
    run_apart(inside_gateway_with_dead_functions)


def inside_worker_with_dead_callbacks() -> None:
    with ExitStack() as stack:
        asked = stack.enter_context(dead_dns())
        system = stack.enter_context(System(settings={"worker": "none"}))
        stack.enter_context(Worker(system, {"gateway_url": f"http://good.test:{system.port}"}))
        for number in range(16):
            system.submit("cat", b"", {"X-Callback-Url": f"http://dead{number}.test/"})
        wait_until(lambda: len(asked) >= 2, 5, "the dead names are looked up")
        submitted_s = time.monotonic()
        for call_id in [system.submit("shell", b"sleep 0.5") for _ in range(6)]:  # more than are connected
            assert system.ended(call_id)["state"] == "done"
        assert time.monotonic() - submitted_s < 1 + DEAD_S + noise_s()


def test_call_is_made_at_once_when_the_names_of_callbacks_lead_nowhere() -> None:
    run_apart(inside_worker_with_dead_callbacks)


# --- What is remembered ----------------------------------------------------------------------------------------


class Names:
    """A source of names that counts its questions; each is held until `let_go`."""

    def __init__(self, answer: Answer = "unknown") -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.held: list[asyncio.Event] = []
        self.holding = False

    async def ask(self, host: str) -> Answer:
        self.asked.append(host)
        if self.holding:
            self.held.append(event := asyncio.Event())
            await event.wait()
        return self.answer

    async def close(self) -> None:
        pass


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


HERE = [(socket.AF_INET, "127.0.0.1")]


@pytest.mark.parametrize(("answer", "setting"), [(HERE, "ANSWER_AGE_S"), ("unknown", "FAILURE_AGE_S")])
def test_answer_is_remembered_for_a_moment(answer: Answer, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test() -> None:
        names = Names(answer)
        async with closing(resolver := Lookups(names, 60, 5)):
            assert 0 < getattr(lookups, setting) < 10
            monkeypatch.setattr(lookups, setting, 60.0)  # however slow we are
            await timed(resolver, "a.test")
            await timed(resolver, "a.test")
            assert names.asked == ["a.test"]
            monkeypatch.setattr(lookups, setting, 0.0)
            await timed(resolver, "a.test")
            assert names.asked == ["a.test"] * 2

    run(test())


def test_address_is_its_own_answer() -> None:
    async def test() -> None:
        names = Names()
        async with closing(resolver := Lookups(names, 60, 5)):
            assert await resolver(url_of("127.0.0.1")) == HERE
            assert await resolver(url_of("[::1]")) == [(socket.AF_INET6, "::1")]
            assert names.asked == []

    run(test())


def test_look_up_is_refused_when_too_many_others_are_under_way() -> None:
    async def test() -> None:
        names = Names(HERE)
        names.holding = True
        async with closing(resolver := Lookups(names, 60, 2)):
            first = [asyncio.create_task(resolver(url_of(host))) for host in ("a.test", "b.test")]
            await asyncio.sleep(0)
            with pytest.raises(Unreachable, match="2 other names are being looked up"):
                await resolver(url_of("c.test"))
            await asyncio.sleep(0)
            for event in names.held:
                event.set()
            assert await asyncio.gather(*first) == [HERE, HERE]
            names.holding = False
            assert await resolver(url_of("c.test")) == HERE

    run(test())


def test_caller_that_gives_up_takes_the_answer_from_no_other() -> None:
    async def test() -> None:
        names = Names(HERE)
        names.holding = True
        async with closing(resolver := Lookups(names, 60, 5)):
            one, other = (asyncio.create_task(resolver(url_of("a.test"))) for _ in range(2))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            one.cancel()
            names.held[0].set()
            assert await other == HERE
            assert names.asked == ["a.test"]

    run(test())


def test_no_more_names_are_remembered_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookups, "REMEMBERED_COUNT", 3)
    monkeypatch.setattr(lookups, "FAILURE_AGE_S", 60.0)  # however slow we are

    async def test() -> None:
        names = Names()
        async with closing(resolver := Lookups(names, 60, 5)):
            for number in (1, 2, 3, 4, 1, 4):
                await timed(resolver, f"n{number}.test")
            assert names.asked == [f"n{number}.test" for number in (1, 2, 3, 4, 1)]

    run(test())


@pytest.mark.parametrize("host", ["a" * 64 + ".test", "nowhere.invalid"])
def test_system_says_why_a_name_leads_nowhere(host: str) -> None:
    async def test() -> None:
        async with closing(resolver := system_names()):
            for lookup in (resolver, resolve_any):
                with pytest.raises(Unreachable, match=f"cannot resolve {host}: [a-zA-Z ]+$"):
                    await lookup(url_of(host))

    run(test())


def test_names_are_asked_for_where_they_belong() -> None:
    async def test() -> None:
        ours, strangers = Names(HERE), Names(HERE)
        resolver = by_origin(lambda url: url.host == "ours.test", Lookups(ours, 5, 5), Lookups(strangers, 5, 5))
        for host in ("ours.test", "strange.test"):
            await resolver(url_of(host))
        assert (ours.asked, strangers.asked) == (["ours.test"], ["strange.test"])

    run(test())
