"""What a queue does with a disk that is full, read-only or damaged, and how it keeps its own size in bounds."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from faashound.calls.model import (
    INLINE_BYTES,
    Bounds,
    Call,
    CallbackState,
    QueueDamaged,
    QueueFull,
    QueueUnavailable,
    State,
    StoredBody,
)
from faashound.calls.names import parse_function_name
from faashound.calls.steps import EXPIRED_STATUS
from faashound.queues.spool import database, directory
from faashound.queues.spool.directory import set_aside
from faashound.queues.spool.limits import BUSY_S, DATABASE, ORPHAN_S, STEP_COUNT
from faashound.queues.spool.queue import Spool
from faashound.queues.spool.schema import MIGRATIONS
from testkit.disks import fill
from testkit.harness import SOON_S, START_DEADLINE_S, clean_environment, crowding
from testkit.needed import want_root
from testkit.spool_kit import (
    LEASE_S,
    QUEUE,
    START_S,
    Desk,
    Remote,
    finish,
    inline,
    new_call,
    writer_connection,
    writer_has_all,
)

BIG = os.urandom(INLINE_BYTES + 1)
DAY_S = 86400.0


def put_until_refused(desk: Desk) -> None:
    while True:
        desk.put(body=inline(bytes(50_000)))


# -- a full disk


def test_full_disk_refuses_calls_and_takes_them_again_when_there_is_room(small_disk: Path) -> None:
    desk = Desk(small_disk / "spool")
    kept = desk.put()
    ballast = fill(small_disk)
    with pytest.raises(QueueFull):
        put_until_refused(desk)
    count = desk.do(desk.spool.stats()).by_state[State.QUEUED]
    ballast.unlink()
    again = desk.put()
    assert desk.get(kept.id) == kept
    assert desk.get(again.id) == again
    assert desk.do(desk.spool.stats()).by_state[State.QUEUED] == count + 1
    desk.close()


def test_full_disk_refuses_every_call_of_a_group(small_disk: Path) -> None:
    desk = Desk(small_disk / "spool")
    fill(small_disk)

    async def scenario() -> list[object]:
        puts = [desk.spool.put(new_call(body=inline(bytes(60_000)))) for _ in range(40)]
        return list(await asyncio.gather(*puts, return_exceptions=True))

    outcomes = desk.do(scenario())
    refused = [outcome for outcome in outcomes if isinstance(outcome, QueueFull)]
    assert len(refused) + desk.do(desk.spool.stats()).by_state[State.QUEUED] == 40
    assert refused
    desk.close()


def test_full_disk_refuses_a_body_and_keeps_nothing_of_it(small_disk: Path) -> None:
    desk = Desk(small_disk / "spool")
    with pytest.raises(QueueFull):
        desk.do(desk.spool.store_body(bytes(8 << 20)))
    assert desk.body_files() == set()
    desk.put()
    desk.close()


def test_full_disk_keeps_a_queue_from_being_created_but_not_for_ever(small_disk: Path) -> None:
    ballast = fill(small_disk)
    with pytest.raises(QueueFull, match="disk is full"):
        asyncio.run(Spool.open(small_disk / "spool"))
    ballast.unlink()
    desk = Desk(small_disk / "spool")
    desk.put()
    desk.close()


def test_full_disk_does_not_keep_a_killed_queue_from_being_read(small_disk: Path) -> None:
    remote = Remote(small_disk / "spool")
    calls = [remote.call("put", new_call(body=inline(bytes(9000)))) for _ in range(50)]
    remote.call("claim", [QUEUE], remote.owner, LEASE_S, 1)
    remote.kill()  # its journal is still to be written back, its lease to be taken back
    fill(small_disk)

    async def scenario() -> list[Call | None]:
        spool = await Spool.open(small_disk / "spool")
        found = [await spool.get(call.id) for call in calls]
        await spool.close()
        return found

    assert [call and call.body for call in asyncio.run(scenario())] == [call.body for call in calls]


# -- no access


def test_sqlite_that_is_too_old_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
    with pytest.raises(QueueUnavailable, match=r"needs SQLite 3\.38"):
        asyncio.run(Spool.open(tmp_path / "spool"))


def test_read_only_disk_is_reported(small_disk: Path) -> None:
    Desk(small_disk / "spool").close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(QueueUnavailable, match="Read-only"):
        asyncio.run(Spool.open(small_disk / "spool"))


@pytest.mark.parametrize("act", ["asyncio.run(Spool.open(Path({!r})))", "set_aside({!r})"])
@pytest.mark.parametrize("is_relative", [False, True], ids=["absolute", "relative"])
def test_directory_of_another_user_is_reported_with_path_and_owner(tmp_path: Path, act: str, is_relative: bool) -> None:
    want_root("becoming another user")
    directory = tmp_path / "spool"
    Desk(directory).close()
    program = f"""
import asyncio, os
from pathlib import Path
from faashound.calls.model import QueueUnavailable
from faashound.queues.spool.directory import set_aside; from faashound.queues.spool.queue import Spool
os.setuid(65534)
try:
    {act.format(directory.name if is_relative else str(directory))}
except QueueUnavailable as error:
    print(error)
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=START_DEADLINE_S * crowding(),
        check=True,
    ).stdout
    assert re.match(rf"cannot use the queue in ({directory}|spool):", said)
    assert "belongs to root" in said
    assert "mode 0700" in said
    assert "runs as nobody" in said


def test_all_that_a_queue_makes_is_private(desk: Desk) -> None:
    desk.put(body=desk.do(desk.spool.store_body(BIG)))
    modes = {path.name: path.stat().st_mode & 0o077 for path in desk.directory.rglob("*") if not path.is_socket()}
    assert modes
    assert set(modes.values()) == {0}
    assert desk.directory.stat().st_mode & 0o777 == 0o700


def test_every_commit_is_synced(desk: Desk) -> None:
    """No kill shows this, only a power cut: so it is asked for by name."""
    db = writer_connection(desk.spool)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert db.execute("PRAGMA synchronous").fetchone() == (2,)


def test_token_is_made_once(desk: Desk) -> None:
    token = desk.spool.token
    assert len(token) >= 32
    assert desk.open().token == token
    assert (desk.directory / "token").read_text() == token


# -- damage


def cut(database: Path) -> None:
    os.truncate(database, database.stat().st_size - 4096)


def empty(database: Path) -> None:
    os.truncate(database, 0)


def garble(database: Path) -> None:
    database.write_bytes(os.urandom(database.stat().st_size))


def garble_schema(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(100)
        file.write(os.urandom(3996))


def lose(database: Path) -> None:
    database.rename(database.with_name("elsewhere"))
    database.with_name(f"{DATABASE}-wal").write_bytes(b"a journal")


def make_newer(database: Path) -> None:
    change(database, f"PRAGMA user_version = {len(MIGRATIONS) + 1}")


def make_unversioned(database: Path) -> None:
    change(database, "PRAGMA user_version = 0")


def make_foreign(database: Path) -> None:
    change(database, "PRAGMA application_id = 7")


def change(database: Path, sql: str) -> None:
    db = sqlite3.connect(database)
    db.execute(sql)
    db.close()


def contents(directory: Path) -> dict[str, bytes]:
    """The files of the queue; those that are empty, or only an index of the journal, say nothing."""
    files = [path for path in directory.glob(f"{DATABASE}*") if path.stat().st_size and path.suffix != ".sqlite3-shm"]
    return {path.name: path.read_bytes() for path in files}


DAMAGES = [cut, empty, garble, garble_schema, lose, make_unversioned, make_foreign]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_file_is_refused_with_the_remedy_and_left_alone(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    directory = tmp_path / "spool"
    desk = Desk(directory)
    for _ in range(50):
        desk.put(body=inline(bytes(3000)))
    desk.close()
    damage(directory / DATABASE)
    before = contents(directory)
    with pytest.raises(QueueDamaged, match=f"{directory / DATABASE}.*set_aside"):
        asyncio.run(Spool.open(directory))
    assert contents(directory) == before


def test_file_of_a_newer_version_is_refused_and_nothing_is_said_of_damage(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    Desk(directory).close()
    make_newer(directory / DATABASE)
    with pytest.raises(QueueDamaged, match=f"version {len(MIGRATIONS) + 1}.*use the newer program") as caught:
        asyncio.run(Spool.open(directory))
    assert "backup" not in str(caught.value)


def test_file_cut_short_behind_a_journal_is_refused(tmp_path: Path) -> None:
    """SQLite itself takes the size of the file from the journal then, and would read zeros for what is missing."""
    directory = tmp_path / "spool"
    desk = Desk(directory)
    first = desk.put()
    for _ in range(50):
        desk.put(body=inline(bytes(30_000)))
    desk.close()
    remote = Remote(directory)
    remote.call("cancel", first.id)  # into the journal, and nowhere near the end of the file
    remote.kill()
    cut(directory / DATABASE)
    with pytest.raises(QueueDamaged, match="cut short"):
        asyncio.run(Spool.open(directory))


def test_empty_file_is_called_that(tmp_path: Path) -> None:
    Desk(tmp_path / "spool").close()
    empty(tmp_path / "spool" / DATABASE)
    with pytest.raises(QueueDamaged, match="is empty"):
        asyncio.run(Spool.open(tmp_path / "spool"))


def test_torn_page_is_reported_when_it_is_met(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    desk = Desk(directory)
    for _ in range(50):
        desk.put(body=inline(bytes(3000)))
    desk.close()
    with (directory / DATABASE).open("r+b") as file:
        for page in range(1, 300):  # all but the first one, which holds the schema
            file.seek(page * 4096)
            if file.read(1):
                file.seek(page * 4096)
                file.write(b"\xff" * 512)
    with pytest.raises(QueueDamaged, match=DATABASE):
        asyncio.run(use(directory))


async def use(directory: Path) -> None:
    spool = await Spool.open(directory)
    try:
        await spool.put(new_call())
    finally:
        await spool.close()


def test_set_aside_keeps_everything_and_makes_room_for_a_new_queue(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    desk = Desk(directory)
    call = desk.put(body=desk.do(desk.spool.store_body(BIG)))
    desk.close()
    before = (directory / DATABASE).read_bytes()
    aside = set_aside(directory)
    assert aside.name.startswith(f"{DATABASE}.damaged-")
    assert aside.read_bytes() == before
    (bodies,) = directory.glob("bodies.damaged-*")
    assert (bodies / str(call.body.file)).read_bytes() == BIG
    desk = Desk(directory)
    assert desk.do(desk.spool.calls()) == []
    desk.close()


def test_command_that_a_refusal_tells_sets_the_queue_aside_where_no_python_is_on_the_path(tmp_path: Path) -> None:
    directory = tmp_path / "the operator's spool"
    directory.mkdir(0o700)
    (directory / DATABASE).write_bytes(b"not a queue")
    with pytest.raises(QueueDamaged) as refused:
        asyncio.run(use(directory))
    command = str(refused.value).partition("put in its place, after ")[2]
    subprocess.run(["/bin/sh", "-c", command], env=clean_environment({"PATH": "/nowhere"}), check=True)
    (aside,) = directory.glob(f"{DATABASE}.damaged-*")
    assert aside.read_bytes() == b"not a queue"


def test_set_aside_moves_the_journal_with_the_file(tmp_path: Path) -> None:
    for tail in ("", "-wal", "-shm"):
        (tmp_path / f"{DATABASE}{tail}").write_text(f"damaged{tail}")
    aside = set_aside(tmp_path)
    assert aside.with_name(f"{aside.name}-wal").read_text() == "damaged-wal"


def test_set_aside_refuses_when_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(QueueUnavailable, match="set aside"):
        set_aside(tmp_path / "spool")


def test_queue_whose_file_was_moved_takes_no_more_calls(desk: Desk) -> None:
    desk.put()
    set_aside(desk.directory)
    with pytest.raises(QueueUnavailable, match="moved or removed"):
        desk.put()


@pytest.mark.parametrize("body", [inline(b"in"), None], ids=["in a row", "in a file"])
def test_queue_whose_path_cannot_be_followed_fails_each_step_and_works_again_afterwards(
    small_disk: Path, body: StoredBody | None
) -> None:
    """On a small disk, where each call has a look at the room for the journal, by its path."""
    parent = small_disk / "parent"
    parent.mkdir()
    desk = Desk(parent / "spool")
    call = desk.put()
    parent.rename(small_disk / "elsewhere")
    parent.touch()

    async def put() -> None:
        await desk.spool.put(new_call(body=body or await desk.spool.store_body(BIG)))

    async def at_once() -> list[object]:
        steps = [put(), desk.spool.cancel(call.id), desk.spool.sweep(60, 60)]
        async with asyncio.timeout(SOON_S):
            return [*await asyncio.gather(*steps, return_exceptions=True)]

    for _ in range(2):
        outcomes = desk.do(at_once())
        assert {type(outcome) for outcome in outcomes} == {QueueUnavailable}
        assert str(desk.spool.trouble) == "the queue cannot use its disk: Not a directory"
    assert list((small_disk / "elsewhere" / "spool" / "bodies").iterdir()) == []
    parent.unlink()
    (small_disk / "elsewhere").rename(parent)
    assert desk.spool.trouble is None
    desk.do(put())
    assert desk.do(desk.spool.cancel(call.id)) is State.CANCELLED
    desk.close()


@pytest.mark.parametrize("count", [1, 2], ids=["one", "a group"])
def test_queue_that_has_no_memory_says_so_and_takes_what_it_has_memory_for(tmp_path: Path, count: int) -> None:
    program = f"""
import asyncio
from pathlib import Path
from faashound.queues.spool.queue import Spool
from testkit.spool_kit import inline, new_call, writer_connection
async def main():
    spool = await Spool.open(Path({str(tmp_path / "spool")!r}))
    for limit_kib in range(8192, 0, -32):  # there is no way to raise it again
        writer_connection(spool).execute(f"PRAGMA hard_heap_limit = {{limit_kib << 10}}").fetchone()
        puts = [spool.put(new_call(body=inline(bytes(60_000)))) for _ in range({count})]
        outcomes = await asyncio.gather(*puts, return_exceptions=True)
        errors = [repr(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
        if errors:
            break
    await spool.put(new_call())
    print(*errors, sep="\\n")
    await spool.close()
asyncio.run(main())
"""
    said = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=START_DEADLINE_S * crowding(),
        check=True,
    ).stdout
    assert said.splitlines() == ["QueueUnavailable('the queue cannot be used: no memory')"] * count


def test_queue_goes_on_when_the_socket_of_a_dead_process_cannot_be_removed(desk: Desk) -> None:
    (desk.directory / "bells" / "dead.sock").mkdir()  # refuses a connection as a dead one does, and `unlink`

    async def put() -> None:
        async with asyncio.timeout(SOON_S):
            await desk.spool.put(new_call())

    for _ in range(2):
        desk.do(put())


def test_creation_that_was_interrupted_is_begun_again(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    directory.mkdir()
    (directory / f"{DATABASE}.new").write_bytes(b"half")
    (directory / "token.new").write_bytes(b"half")
    desk = Desk(directory)
    desk.put()
    assert len(desk.spool.token) >= 32
    desk.close()


def test_older_file_is_brought_to_the_newest_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "spool"
    desk = Desk(directory)
    call = desk.put()
    desk.close()
    more = "CREATE TABLE later (seq INTEGER PRIMARY KEY) STRICT;"
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, more))
    desk = Desk(directory)
    assert desk.get(call.id) == call
    desk.close()
    db = sqlite3.connect(directory / DATABASE)
    assert db.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS) + 1,)
    assert db.execute("SELECT count(*) FROM later").fetchone() == (0,)
    db.close()


def old_file(directory: Path, version: int, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a queue as a program of that time has left it, with `rows` that SQL puts in."""
    with monkeypatch.context() as patch:
        patch.setattr(database, "MIGRATIONS", MIGRATIONS[:version])
        Desk.create(directory)
    db = sqlite3.connect(directory / DATABASE)
    db.executescript(rows)
    db.close()


def old_call(number: int, state: str, callback_url: str = "", callback_state: str = "", queue: str = QUEUE) -> str:
    """A call of a function `f`, as the first versions have kept it."""
    values = f"{number}, 'id{number}', 'f', '{queue}', '{state}', {START_S}, {START_S}, 1, {START_S}"
    columns = "seq, id, function, queue, state, due_s, accepted_s, attempts, finished_s"
    rows = f"INSERT INTO calls ({columns}) VALUES ({values});"
    columns = "seq, method, path, query, callback_url, headers, bytes_count, inline"
    rows += f"INSERT INTO requests ({columns}) VALUES ({number}, 'POST', '/', '', '{callback_url}', '[]', 0, x'');"
    if callback_state:
        rows += f"INSERT INTO callbacks (seq, state, due_s) VALUES ({number}, '{callback_state}', {START_S});"
    return rows


def test_callbacks_of_an_older_file_belong_to_the_queues_of_their_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        old_call(1, "done", "http://a/1", "pending"),
        old_call(2, "dead", "http://a/2", "pending"),
        old_call(3, "done", "http://b:81/", "pending"),
        old_call(4, "done", "http://a/4", "pending", "internal"),
        old_call(5, "done", "http://a/5", "dead"),
    ]
    old_file(tmp_path / "spool", 2, "".join(rows), monkeypatch)
    desk = Desk(tmp_path / "spool")
    assert [lease.call.id for lease in desk.claim_callbacks(capacity={"a:80": 1})] == ["id1", "id3"]
    assert desk.get("id5").function == "f.openfaas-fn"
    desk.do(desk.spool.requeue_callback("id5"))
    assert [lease.call.id for lease in desk.claim_callbacks()] == ["id2", "id5"]
    desk.close()


def test_calls_of_an_older_file_are_of_the_default_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old_file(tmp_path / "spool", 2, old_call(1, "queued") + old_call(2, "dead"), monkeypatch)
    desk = Desk(tmp_path / "spool")
    f = parse_function_name("f")
    assert [lease.call.function for lease in desk.claim(capacity={f: 9})] == [f]
    assert {call.id for call in desk.do(desk.spool.calls(function=f))} == {"id1", "id2"}
    desk.close()


# -- housekeeping


def test_sweep_expires_what_no_worker_has_run_in_time_and_tells_its_callback(desk: Desk) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.clock.now_s += DAY_S
    assert desk.do(desk.spool.sweep(60, 60, Bounds(queue_age_s=DAY_S - 1))).expired_count == 1
    lease = desk.claim_callback()
    assert (lease.call.id, lease.call.state, lease.call.status) == (call.id, State.EXPIRED, EXPIRED_STATUS)


def age(directory: Path, age_s: float) -> None:
    for path in (directory / "bodies").iterdir():
        os.utime(path, (time.time() - age_s,) * 2)


def test_sweep_drops_results_before_calls_and_leaves_the_excerpt(desk: Desk) -> None:
    small, large = desk.put(), desk.put()
    desk.finish(desk.claim_one(), result=b"small")
    desk.do(finish(desk.spool, desk.claim_one(), State.DONE, desk.do(desk.spool.store_body(BIG))))
    desk.clock.now_s = START_S + 3601
    swept = desk.do(desk.spool.sweep(3600, DAY_S))
    assert (swept.result_count, swept.file_count, swept.call_count) == (2, 1, 0)
    assert (desk.get(small.id).result, desk.get(small.id).excerpt) == (None, b"small")
    assert (desk.get(large.id).result, desk.get(large.id).excerpt) == (None, BIG[:4096])
    assert desk.body_files() == set()


def test_sweep_drops_calls_past_retention_with_their_bodies(desk: Desk) -> None:
    done = desk.put(body=desk.do(desk.spool.store_body(BIG)))
    desk.finish(desk.claim_one())
    cancelled = desk.put()
    desk.do(desk.spool.cancel(cancelled.id))
    waiting = desk.put(due_s=START_S + 9 * DAY_S)
    desk.clock.now_s = START_S + DAY_S + 1
    assert desk.do(desk.spool.sweep(3600, DAY_S)).call_count == 2
    assert [call.id for call in desk.do(desk.spool.calls())] == [waiting.id]
    assert desk.body_files() == set()
    assert desk.do(desk.spool.get(done.id)) is None


def test_sweep_leaves_what_is_not_old_enough(desk: Desk) -> None:
    call = desk.put()
    desk.finish(desk.claim_one())
    desk.clock.now_s = START_S + 3599
    desk.do(desk.spool.sweep(3600, DAY_S))
    assert desk.get(call.id).result is not None


def test_sweep_never_drops_a_dead_letter(desk: Desk) -> None:
    call = desk.put(body=desk.do(desk.spool.store_body(BIG)))
    desk.finish(desk.claim_one(), State.DEAD)
    age(desk.directory, 99 * DAY_S)
    desk.clock.now_s += 99 * DAY_S
    assert desk.do(desk.spool.sweep(3600, DAY_S)).call_count == 0
    assert desk.do(desk.spool.requeue_dead(call.id)).state is State.QUEUED
    assert desk.body_files() == {call.body.file}


@pytest.mark.parametrize("state", [CallbackState.PENDING, CallbackState.RUNNING, CallbackState.DEAD])
def test_sweep_keeps_a_call_and_its_result_until_the_callback_is_delivered(desk: Desk, state: CallbackState) -> None:
    call = desk.put(callback_url="http://caller/")
    desk.finish(desk.claim_one())
    if state is not CallbackState.PENDING:
        lease = desk.claim_callback()
        if state is CallbackState.DEAD:
            desk.do(desk.spool.callback_dead(lease, desk.attempt()))
    desk.clock.now_s += 99 * DAY_S
    swept = desk.do(desk.spool.sweep(3600, DAY_S))
    assert (swept.call_count, swept.result_count) == (0, 0)
    assert desk.get(call.id).result is not None


def test_sweep_goes_through_more_rows_than_one_step(desk: Desk) -> None:
    count = 2 * STEP_COUNT + 7

    async def scenario() -> None:
        calls = await asyncio.gather(*(desk.spool.put(new_call()) for _ in range(count)))
        await asyncio.gather(*(desk.spool.cancel(call.id) for call in calls))

    desk.do(scenario())
    desk.clock.now_s += 2 * DAY_S
    assert desk.do(desk.spool.sweep(3600, DAY_S)).call_count == count


def test_sweep_expires_calls_of_queues_that_no_worker_claims(desk: Desk) -> None:
    call = desk.put(queue="unclaimed", expires_s=START_S + 1)
    desk.clock.now_s += 2
    assert desk.do(desk.spool.sweep(3600, DAY_S)).expired_count == 1
    assert desk.get(call.id).state is State.EXPIRED


def test_sweep_leaves_a_body_that_is_still_being_written(desk: Desk) -> None:
    async def scenario() -> bytes:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow() -> AsyncIterator[bytes]:
            yield BIG
            begun.set()
            await go_on.wait()

        storing = asyncio.create_task(desk.spool.store_body(slow()))
        await begun.wait()
        age(desk.directory, 2 * ORPHAN_S)  # as when a function is silent for hours
        assert (await desk.spool.sweep(60, 60)).file_count == 0
        go_on.set()
        body = await storing
        assert (await desk.spool.sweep(60, 60)).file_count == 0  # its time to be named has just begun
        return b"".join([piece async for piece in desk.spool.open_body(body)])

    assert desk.do(scenario()) == BIG


def size_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob(f"{DATABASE}*"))


def test_file_shrinks_after_a_rush(desk: Desk) -> None:
    async def rush() -> None:
        calls = await asyncio.gather(*(desk.spool.put(new_call(body=inline(os.urandom(9000)))) for _ in range(2000)))
        await asyncio.gather(*(desk.spool.cancel(call.id) for call in calls))

    desk.do(rush())
    full_bytes = size_bytes(desk.directory)
    desk.clock.now_s += 2 * DAY_S
    freed_bytes = desk.do(desk.spool.sweep(3600, DAY_S)).freed_bytes
    assert full_bytes > 18_000_000
    assert size_bytes(desk.directory) < 3_000_000
    assert freed_bytes > 15_000_000


def test_sweep_does_not_wait_for_a_reader(desk: Desk) -> None:
    desk.put()
    reader = sqlite3.connect(desk.directory / DATABASE, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM calls").fetchone()
    took_s = []
    for _ in range(3):  # one that waits for the reader does so each time
        desk.put()
        began_s = time.monotonic()
        desk.do(desk.spool.sweep(3600, DAY_S))
        took_s.append(time.monotonic() - began_s)
    assert min(took_s) < BUSY_S / 2
    reader.close()


def test_reading_does_not_wait_for_a_writer(desk: Desk) -> None:
    call = desk.put()
    with (desk.directory / "writer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert desk.get(call.id) == call


def test_writes_that_come_while_another_waits_for_the_lock_fail_with_it_and_name_the_holder(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "LOCK_S", 60.0)
    call = new_call(body=desk.do(desk.spool.store_body(BIG)))

    async def scenario() -> list[object]:
        first = asyncio.create_task(desk.spool.put(new_call()))
        await writer_has_all(desk.spool)
        others = [asyncio.create_task(desk.spool.put(call)), asyncio.create_task(desk.spool.reclaim())]
        for _ in range(2):  # they submit, and the writer is handed what they have submitted
            await asyncio.sleep(0)
        monkeypatch.setattr(directory, "LOCK_S", 0.5)
        return [*await asyncio.gather(first, *others, return_exceptions=True)]

    with (desk.directory / "writer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error, *others = desk.do(scenario())
    assert isinstance(error, QueueUnavailable)
    assert f"held for 0.5 s by process {os.getpid()}" in str(error)
    assert all(other is error for other in others)
    assert desk.body_files() == set()
    assert desk.get(desk.put().id).state is State.QUEUED


def test_end_that_comes_while_a_claim_waits_for_the_lock_fails_with_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "LOCK_S", 60.0)
    desk.put()
    lease = desk.claim_one()

    async def scenario() -> list[object]:
        claiming = asyncio.create_task(desk.spool.claim([QUEUE], desk.owner, LEASE_S, 1))
        await writer_has_all(desk.spool)
        ending = asyncio.create_task(desk.spool.callback_done(lease, desk.attempt()))
        await asyncio.sleep(0)
        monkeypatch.setattr(directory, "LOCK_S", 0.5)
        return [*await asyncio.gather(claiming, ending, return_exceptions=True)]

    with (desk.directory / "writer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error, other = desk.do(scenario())
    assert isinstance(error, QueueUnavailable)
    assert other is error


def test_queue_can_be_closed_while_its_lock_is_held(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "LOCK_S", 0.2)

    async def scenario() -> object:
        putting = asyncio.create_task(desk.spool.put(new_call()))
        await writer_has_all(desk.spool)
        await desk.spool.close()
        await asyncio.wait([putting])
        return putting.exception()

    with (desk.directory / "writer.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        error = desk.do(scenario())
    assert isinstance(error, QueueUnavailable)


def test_open_and_close_leave_no_descriptors_and_no_threads(tmp_path: Path) -> None:
    Desk(tmp_path / "spool").close()
    before = {*os.listdir("/proc/self/fd"), *threading.enumerate()}
    desk = Desk(tmp_path / "spool")
    desk.open()
    desk.put()
    desk.close()
    assert {*os.listdir("/proc/self/fd"), *threading.enumerate()} <= before  # what another test has left may have gone
    assert sorted(path.name for path in (tmp_path / "spool").iterdir()) == sorted(
        [DATABASE, "bells", "bodies", "owners", "reserve", "token", "writer.lock"]
    )
    assert list((tmp_path / "spool" / "owners").iterdir()) == list((tmp_path / "spool" / "bells").iterdir()) == []


def test_close_leaves_no_descriptors_and_no_threads_when_names_cannot_be_removed(tmp_path: Path) -> None:
    Desk(tmp_path / "spool").close()
    before = {*os.listdir("/proc/self/fd"), *threading.enumerate()}
    desk = Desk(tmp_path / "spool")
    for path in (*(desk.directory / "owners").iterdir(), *(desk.directory / "bells").iterdir()):
        path.unlink()
        path.mkdir()
    desk.close()
    assert {*os.listdir("/proc/self/fd"), *threading.enumerate()} <= before


def test_failed_open_leaves_no_descriptors(tmp_path: Path) -> None:
    Desk(tmp_path / "spool").close()
    make_foreign(tmp_path / "spool" / DATABASE)
    before = set(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(QueueDamaged):
            asyncio.run(Spool.open(tmp_path / "spool"))
    assert set(os.listdir("/proc/self/fd")) <= before


def test_disk_that_answers_nothing_is_an_error_of_the_queue_to_who_asks_for_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async def scenario() -> None:
        spool = await Spool.open(tmp_path / "spool")
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstatvfs", fail)
            with pytest.raises(QueueUnavailable, match="cannot use its disk"):
                await spool.stats()
        await spool.close()

    asyncio.run(scenario())
