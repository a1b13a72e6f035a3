"""Several users with roles, whose passwords' hashes are in a file."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import os
import pty
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from faashound.functions.documents import write_whole
from faashound.serving.passwords import MAX_HASHES_COUNT, MAX_HASHES_OF_ADDRESS_COUNT, Hashes, TooManyGuesses
from faashound.serving.users import (
    SETTLED_NS,
    BadUsers,
    PasswordHash,
    Role,
    User,
    UserFile,
    hash_password,
    parse_hash,
    parse_users,
)
from faashound.watchdog import CannotStart, log
from testkit.harness import START_DEADLINE_S, Answer, command_of, crowding, run, wait_until
from testkit.system import System

# The cheapest that is taken: costs are checked, and these are the tests'.
ALICE = "$scrypt$ln=14,r=8,p=1$c2l4dGVlbiBieXRlcyBvZg$"  # the salt of all hashes here
SALT = b"sixteen bytes of"


def cheap(password: str) -> PasswordHash:
    key = hashlib.scrypt(password.encode(), salt=SALT, n=1 << 14, r=8, p=1, maxmem=1 << 26, dklen=32)
    return PasswordHash(14, 1, SALT, key)


def line(name: str, password: str, role: str = "") -> str:
    return f"{name}:{cheap(password)}" + (f":{role}" if role else "")


def test_hash_is_read_as_it_is_written() -> None:
    text = ALICE + "x" * 21 + "w"
    assert parse_hash(text).salt == SALT
    assert str(parse_hash(text)) == text


def test_vector_of_the_rfc_is_verified() -> None:
    """RFC 7914 12, the third: pleaseletmein, SodiumChloride, N 16384, r 8, p 1."""
    key = bytes.fromhex(
        "7023bdcb3afd7348461c06cd81fd38ebfda8fbba904f8e3ea9b543f6545da1f2"
        "d5432955613f0fcf62d49705242a9af9e61e85dc0d651e40dfcf017b45575887"
    )
    assert PasswordHash(14, 1, b"SodiumChloride", key).verify("pleaseletmein")
    assert not PasswordHash(14, 1, b"SodiumChloride", key).verify("pleaseletmeout")


def test_password_is_verified_by_what_is_kept_of_it() -> None:
    kept = parse_hash(str(hash_password("süß")))
    assert kept.verify("süß")
    assert not kept.verify("suss")


def test_file_has_a_user_a_line() -> None:
    text = f"# the team\n\n{line('alice', 'a', 'deploy')}  # since May\n{line('bob@example.com', 'b')}\r\n"
    found = parse_users(text, "users")
    assert [account.user for account in found.values()] == [
        User("alice", Role.DEPLOY),
        User("bob@example.com", Role.READ),
    ]


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ("alice", "the hash: allowed: $scrypt$"),
        ("alice:$apr1$x$y", "the hash: allowed: $scrypt$"),
        ("alice:" + ALICE.replace("ln=14", "ln=4") + "x" * 22, "the hash: allowed: $scrypt$"),
        ("alice:" + ALICE.replace("ln=14", "ln=20") + "x" * 22, "the hash: allowed: $scrypt$"),
        ("al ice:" + ALICE + "x" * 22, "the name: allowed: "),
        (":" + ALICE + "x" * 22, "the name: allowed: "),
        ("alice:" + ALICE + "x" * 22 + ":root", "the role of alice: allowed: read or deploy"),
        ("bob:" + ALICE + "x" * 22, "bob has a line already"),
    ],
)
def test_every_bad_line_is_reported_with_its_number_and_without_its_hash(bad: str, problem: str) -> None:
    good = "bob:" + ALICE + "x" * 22
    with pytest.raises(BadUsers) as caught:
        parse_users(f"{good}\n{bad}\n{bad}\n", "users")
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].startswith(f"users:2: {problem}")
    assert "xxxx" not in str(caught.value)


@given(st.text())
def test_whatever_stands_in_the_file_is_users_or_a_problem(text: str) -> None:
    with contextlib.suppress(BadUsers):
        assert all(account.user.name for account in parse_users(text, "users").values())


def test_change_is_seen_that_comes_within_a_tick_of_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text(line("alice", "a"))
    path.chmod(0o600)
    users, tick_ns = UserFile(path), path.stat().st_mtime_ns
    path.write_text(line("carol", "a"))
    os.utime(path, ns=(tick_ns, tick_ns))
    users.look()
    assert (users.find("alice"), users.find("carol") is not None) == (None, True)


@pytest.fixture
def followed(tmp_path: Path) -> tuple[Path, UserFile]:
    """Return a file with one user that has not changed for a while, and what follows it."""
    path = tmp_path / "users"
    path.write_text(line("alice", "a"))
    path.chmod(0o600)
    wait_until(lambda: is_settled(path), 5.0, "the file is old")
    return path, UserFile(path)


def is_settled(path: Path) -> bool:
    return path.stat().st_ctime_ns < time.time_ns() - SETTLED_NS


def test_file_is_taken_once_its_mode_is_mended(followed: tuple[Path, UserFile]) -> None:
    path, users = followed
    path.write_text(f"{line('alice', 'a')}\n{line('bob', 'b')}\n")
    path.chmod(0o664)
    wait_until(lambda: is_settled(path), 5.0, "the file is old")
    users.look()
    assert users.find("bob") is None
    path.chmod(0o600)
    users.look()
    assert users.find("bob") is not None


def test_file_that_cannot_be_read_is_read_as_soon_as_it_can_and_told_of_once(
    followed: tuple[Path, UserFile], capfd: pytest.CaptureFixture[str]
) -> None:
    path, users = followed
    path.write_text(line("bob", "b"))
    wait_until(lambda: is_settled(path), 5.0, "the file is old")
    with no_descriptors():
        users.look()
        users.look()
    assert (users.find("alice") is not None, users.find("bob")) == (True, None)
    users.look()
    assert (users.find("alice"), users.find("bob") is not None) == (None, True)
    log.flush()
    assert capfd.readouterr().err.count("the users are those of before: ") == 1


@contextlib.contextmanager
def no_descriptors() -> Iterator[None]:
    """Let this process open nothing: 0, 1 and 2 are taken."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "users"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(CannotStart, match="others may write it; allowed: a mode such as 0600"):
        UserFile(path)


def basic(text: str) -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(text.encode()).decode()}"}


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    path = tmp_path / "basic-auth-users"
    path.write_text(f"{line('alice', 'a', 'deploy')}\n{line('bob', 'b', 'read')}\n")
    path.chmod(0o600)
    return tmp_path


@pytest.fixture
def system(secrets: Path) -> Iterator[System]:
    settings = {"basic_auth": "true", "secret_mount_path": str(secrets), "deploy": "process", "worker": "none"}
    with System(settings=settings | {"state": str(secrets / "state")}) as system:
        yield system


def deploy(system: System, headers: Mapping[str, str]) -> Answer:
    document = {"service": "f", "image": "process", "envProcess": "cat"}
    body = json.dumps(document).encode()
    return system.request("POST", "/system/functions", body, {**headers, "Content-Type": "application/json"})


def test_users_do_what_their_roles_let_them_and_the_log_has_their_names(system: System) -> None:
    assert system.request("GET", "/system/functions", headers=basic("bob:b")).status == 200
    assert system.request("GET", "/system/functions", headers=basic("bob:a")).status == 401
    assert system.request("GET", "/system/functions", headers=basic("carol:a")).status == 401
    answer = deploy(system, basic("bob:b"))
    assert (answer.status, answer.text.strip()) == (
        403,
        "bob may look, and change nothing; allowed: with the role deploy",
    )
    assert system.request("POST", "/system/calls/cancel", headers=basic("bob:b")).status == 403
    call_id = system.submit("cat", headers={"X-Delay": "1h"})
    assert system.request("GET", f"/async-function/{call_id}", headers=basic("bob:b")).status == 200
    assert system.request("DELETE", f"/async-function/{call_id}", headers=basic("bob:b")).status == 403
    assert deploy(system, basic("alice:a")).status == 202
    system.wait_log("Done: deploy function 'f' asker=\"alice from 127.0.0.1\"")
    assert system.request("DELETE", f"/async-function/{call_id}", headers=basic("alice:a")).status == 202
    system.wait_log(f'Done: [DELETE] /async-function/{call_id} asker="alice from 127.0.0.1"')


def test_file_that_is_made_after_the_start_is_followed_by_every_process(tmp_path: Path) -> None:
    for name, text in (("user", "admin"), ("password", "p")):
        (tmp_path / f"basic-auth-{name}").write_text(text)
    settings = {"basic_auth": "true", "secret_mount_path": str(tmp_path), "worker": "none", "workers": "2"}
    with System(settings=settings) as system:

        def statuses(text: str) -> set[int]:
            return {system.request("GET", "/system/info", headers=basic(text)).status for _ in range(4)}

        assert (statuses("admin:p"), statuses("alice:a")) == ({200}, {401})
        path = tmp_path / "basic-auth-users"
        path.touch(mode=0o600)
        path.write_text(line("alice", "a"))
        assert (statuses("admin:p"), statuses("alice:a")) == ({200}, {200})


def test_file_is_followed_and_a_bad_one_changes_nothing(system: System, secrets: Path) -> None:
    def status(text: str) -> int:
        return system.request("GET", "/system/functions", headers=basic(text)).status

    path = secrets / "basic-auth-users"
    assert status("bob:b") == 200
    path.write_text(f"{line('alice', 'a', 'deploy')}\n{line('carol', 'c')}\n")
    assert status("bob:b") == 401, "who was known a moment ago"
    assert status("carol:c") == 200
    path.write_text(f"{line('carol', 'c')}\n{line('dave', 'd')}\n")
    assert status("dave:d") == 200, "who is new and asks first"
    path.write_text("carol:secret\n")
    assert status("carol:c") == 200
    system.wait_log("the users are those of before: ")
    assert "secret" not in system.log()


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("path", ["/system/events", "/system/logs?name=cat&follow=1"], ids=["events", "logs"])
def test_stream_ends_for_a_user_who_is_struck_and_goes_on_for_others(secrets: Path, path: str, workers: str) -> None:
    settings = {"basic_auth": "true", "secret_mount_path": str(secrets), "worker": "none", "workers": workers}
    users = secrets / "basic-auth-users"
    with System(settings=settings | {"state": str(secrets / "state")}) as system:
        for kept, struck in (("alice:a", "bob:b"), ("carol:c", "alice:a")):
            if kept == "carol:c":  # a role that is lost ends it too
                users.write_text(f"{line('alice', 'a', 'deploy')}\n{line('carol', 'c')}\n")
            with following(system, path, kept) as stays, following(system, path, struck) as goes:
                left = line("alice", "a", "deploy") if kept == "alice:a" else line("alice", "a", "read")
                write_whole(users, f"{left}\n{line('carol', 'c')}\n".encode())  # half of it would strike others
                wait_until(lambda: has_ended(goes), 15, "the stream has ended")
                assert not has_ended(stays)


@contextlib.contextmanager
def following(system: System, path: str, text: str) -> Iterator[socket.socket]:
    """Yield the connection of a user that follows, once the answer has begun."""
    with socket.create_connection(("127.0.0.1", system.port), 20) as client:
        field = basic(text)["Authorization"]
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {field}\r\n\r\n".encode())
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.setblocking(False)
        yield client


def has_ended(client: socket.socket) -> bool:
    """Read what has come; tell whether that was all."""
    try:
        while client.recv(65536):
            pass
    except BlockingIOError:
        return False
    except ConnectionResetError:
        return True
    return True


def test_right_password_costs_its_hash_once(system: System) -> None:
    first = system.request("GET", "/system/functions", headers=basic("bob:b"))
    again = [system.request("GET", "/system/functions", headers=basic("bob:b")) for _ in range(20)]
    assert {first.status, *(answer.status for answer in again)} == {200}
    assert min(answer.elapsed_s for answer in again) < first.elapsed_s


def test_few_passwords_wait_for_their_hash_and_the_same_one_waits_once(secrets: Path) -> None:
    def encode(password: str) -> bytes:
        return base64.b64encode(f"bob:{password}".encode())

    async def test() -> None:
        hashes = Hashes(UserFile(secrets / "basic-auth-users"))
        guesses = [hashes.check(encode(f"guess {number}"), "192.0.2.1") for number in range(10)]
        same = [hashes.check(encode("b"), "192.0.2.2") for _ in range(10)]
        found = await asyncio.gather(*guesses, *same, return_exceptions=True)
        refused = [isinstance(each, TooManyGuesses) for each in found]
        assert refused[:10].count(False) == MAX_HASHES_OF_ADDRESS_COUNT
        assert found[10:20] == [User("bob", Role.READ)] * 10
        assert await hashes.check(encode("b"), "192.0.2.1") == User("bob", Role.READ), "it is known by now"
        assert await hashes.check(encode("guess"), "192.0.2.1") is None

    asyncio.run(test())


def test_no_more_passwords_wait_for_their_hash_than_may(secrets: Path) -> None:
    async def test() -> None:
        hashes = Hashes(UserFile(secrets / "basic-auth-users"))
        numbers = range(2 * MAX_HASHES_COUNT)
        guesses = [hashes.check(base64.b64encode(b"bob:%d" % number), f"192.0.2.{number}") for number in numbers]
        found = await asyncio.gather(*guesses, return_exceptions=True)
        assert [isinstance(each, TooManyGuesses) for each in found].count(False) == MAX_HASHES_COUNT

    asyncio.run(test())


def test_right_password_is_behind_no_wrong_one_after_a_change_of_others_in_the_file(secrets: Path) -> None:
    path, right = secrets / "basic-auth-users", base64.b64encode(b"bob:b")

    async def test() -> None:
        hashes = Hashes(UserFile(path))
        assert await hashes.check(right, "192.0.2.1") == User("bob", Role.READ)
        path.write_text(f"{line('bob', 'b', 'read')}\n{line('carol', 'c')}\n")
        numbers = range(MAX_HASHES_COUNT)
        guesses = [hashes.check(base64.b64encode(b"bob:%d" % number), f"192.0.2.{number}") for number in numbers]
        tasks = [asyncio.create_task(guess) for guess in guesses]
        await asyncio.sleep(0)  # all wait for their turn
        assert await hashes.check(right, "192.0.2.1") == User("bob", Role.READ)
        assert not any(task.done() for task in tasks)
        path.write_text(line("bob", "another", "read"))
        assert hashes.known(right) is None
        assert await asyncio.gather(*tasks) == [None] * MAX_HASHES_COUNT

    asyncio.run(test())


def test_pair_of_files_opens_besides(secrets: Path) -> None:
    (secrets / "basic-auth-user").write_text("admin")
    (secrets / "basic-auth-password").write_text("sesame")
    with System(settings={"basic_auth": "true", "secret_mount_path": str(secrets), "worker": "none"}) as system:
        for text, status in (("admin:sesame", 200), ("bob:b", 200), ("admin:b", 401)):
            assert system.request("GET", "/system/functions", headers=basic(text)).status == status


def test_gateway_does_not_start_with_a_bad_file_of_users(secrets: Path) -> None:
    (secrets / "basic-auth-users").write_text("alice:secret\nbob\n")
    ended = run("gateway", settings={"basic_auth": "true", "secret_mount_path": str(secrets), "worker": "none"})
    assert ended.returncode == 1
    assert "basic-auth-users:1: the hash: allowed: " in ended.stderr
    assert "basic-auth-users:2: the hash: allowed: " in ended.stderr
    assert "secret\n" not in ended.stderr


def test_operator_makes_a_line_with_a_command() -> None:
    def made(*arguments: str, password: str = "sesame\n") -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "faashound.gateway", "password", *arguments]
        return subprocess.run(command, input=password, capture_output=True, text=True, timeout=60, env=dict(os.environ))

    done = made("alice", "deploy")
    assert done.returncode == 0, done.stderr
    (account,) = parse_users(done.stdout, "users").values()
    assert account.user == User("alice", Role.DEPLOY)
    assert account.password.verify("sesame")
    for arguments, password in (((), "x"), (("al ice",), "x"), (("alice", "root"), "x"), (("alice",), "\n")):
        refused = made(*arguments, password=password)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "allowed: " in refused.stderr or "usage: " in refused.stderr


@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        ("<password", 2, "allowed: a line of stdin"),
        ("<&-", 2, "allowed: a line of stdin"),
        ("</dev/null", 2, "allowed: a line of stdin"),
        ("0>/dev/null", 2, "allowed: a line of stdin"),
        ("<good >/dev/full", 1, "cannot write to standard output: no space left on device"),
        ("<good >&-", 1, "cannot write to standard output: it is closed"),
        ("--help >/dev/full", 1, "cannot write to standard output: no space left on device"),
    ],
)
def test_command_for_a_line_says_what_is_wrong_with_its_input_or_output(
    tmp_path: Path, redirection: str, status: int, said: str
) -> None:
    (tmp_path / "password").write_bytes(b"\xff\n")
    (tmp_path / "good").write_bytes(b"sesame\n")
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command_of("gateway"), "password", "alice"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_DEADLINE_S * crowding(),
        check=False,
    )
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (status, "")


def test_command_for_a_line_ends_when_a_terminal_gives_no_password() -> None:
    master, terminal = pty.openpty()
    with subprocess.Popen(
        [*command_of("gateway"), "password", "alice"], stdin=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        said = b""
        while b"Password:" not in said:
            said += os.read(master, 1000)
        os.write(master, b"\x04")  # Ctrl-D
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while more := os.read(master, 1000):
                said += more
        assert process.wait(START_DEADLINE_S * crowding()) == 2
    os.close(master)
    assert b"allowed: a line of stdin" in said
