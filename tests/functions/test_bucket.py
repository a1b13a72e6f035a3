"""Deployments, secrets and namespaces in NATS: two gateways see the same, and go on when the servers are away."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from nats.js.kv import KeyValue

from faashound.calls.model import QueueUnavailable
from faashound.functions.bucket import BucketDocuments, BucketShelves
from faashound.queues.jetstream.bucket import Bucket, ChangedMeanwhile
from faashound.watchdog import in_thread
from testkit.harness import Answer, wait_read, wait_until
from testkit.nats_servers import Cluster, NatsServer
from testkit.system import System
from tests.functions.kit import run

JSON_TYPE = {"Content-Type": "application/json"}
HANG_UPS_COUNT = 5


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@contextlib.asynccontextmanager
async def opened(cluster: Cluster, prefix: str) -> AsyncIterator[Bucket]:
    bucket = await Bucket.open(cluster.options(prefix))
    try:
        yield bucket
    finally:
        await bucket.close()


def test_documents_are_those_of_every_gateway(cluster: Cluster) -> None:
    async def test() -> None:
        async with opened(cluster, "same") as one, opened(cluster, "same") as other:
            ours, theirs = BucketDocuments(one, "functions"), BucketDocuments(other, "functions")
            await in_thread(ours.write, "cat.openfaas-fn", b"old")
            await in_thread(ours.write, "cat.openfaas-fn", b"new")
            assert ours.read("cat.openfaas-fn") == b"new"
            assert theirs.names() == []
            assert await other.look()
            assert dict(theirs.read_all()) == {"cat.openfaas-fn": b"new"}
            assert not await other.look()
            await in_thread(theirs.delete, "cat.openfaas-fn")
            assert await one.look()
            assert (ours.names(), ours.read("cat.openfaas-fn")) == ([], None)
            await in_thread(ours.write, "cat.openfaas-fn", b"again")
            assert "cat.openfaas-fn in NATS" in ours.place("cat.openfaas-fn")
        async with opened(cluster, "same") as later:
            assert BucketDocuments(later, "functions").read("cat.openfaas-fn") == b"again"

    run(test())


def test_all_is_read_when_the_first_of_it_comes_behind_the_word_that_nothing_waits(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servers count what they have begun to send as sent; nats-py tells that as "this is all"."""
    watch = KeyValue.watch

    class ToldTooEarly:
        def __init__(self, watcher: Any) -> None:
            self.watcher = watcher
            self.stop = watcher.stop

        async def __aiter__(self) -> AsyncIterator[Any]:
            yield None
            async for entry in self.watcher:
                yield entry

    async def told_too_early(bucket: KeyValue, *arguments: Any, **options: Any) -> Any:
        return ToldTooEarly(await watch(bucket, *arguments, **options))

    async def test() -> None:
        async with opened(cluster, "early") as one:
            await in_thread(BucketDocuments(one, "functions").write, "f", b"first")
            await in_thread(BucketDocuments(one, "functions").write, "g", b"second")
            monkeypatch.setattr(KeyValue, "watch", told_too_early)
            async with opened(cluster, "early") as other:
                assert dict(BucketDocuments(other, "functions").read_all()) == {"f": b"first", "g": b"second"}
                for name in ("f", "g"):
                    await in_thread(BucketDocuments(one, "functions").delete, name)
                assert await other.look()
                assert BucketDocuments(other, "functions").names() == []
            async with opened(cluster, "nothing-yet") as empty:
                assert BucketDocuments(empty, "functions").names() == []

    run(test())


def test_gateway_that_has_not_seen_a_change_cannot_undo_it(cluster: Cluster) -> None:
    async def test() -> None:
        async with opened(cluster, "cas") as one, opened(cluster, "cas") as other:
            ours, theirs = BucketDocuments(one, "functions"), BucketDocuments(other, "functions")
            await in_thread(ours.write, "f", b"ours")
            with pytest.raises(ChangedMeanwhile):
                await in_thread(theirs.write, "f", b"theirs")
            await other.look()
            await in_thread(theirs.write, "f", b"theirs")
            with pytest.raises(ChangedMeanwhile):
                await in_thread(ours.delete, "f")
            await one.look()
            assert ours.read("f") == b"theirs"

    run(test())


def test_secrets_of_each_namespace_are_a_shelf_of_their_own(cluster: Cluster) -> None:
    async def test() -> None:
        async with opened(cluster, "shelves") as bucket:
            shelves = BucketShelves(bucket, "secrets")
            await in_thread(shelves.space("blue").write, "my.token", b"1")
            await in_thread(shelves.space("green").write, "my.token", b"2")
            assert shelves.spaces() == ["blue", "green"]
            assert dict(shelves.space("green").read_all()) == {"my.token": b"2"}
            assert BucketDocuments(bucket, "functions").names() == []

    run(test())


def test_what_the_servers_do_not_take_is_not_stored() -> None:
    async def test() -> None:
        with Cluster() as cluster:
            async with opened(cluster, "away") as bucket:
                documents = BucketDocuments(bucket, "functions")
                await in_thread(documents.write, "f", b"kept")
                with pytest.raises(QueueUnavailable, match="payload"):
                    await in_thread(documents.write, "big", b"x" * (2 << 20))
                cluster.servers[0].kill()
                with pytest.raises(QueueUnavailable):
                    await in_thread(documents.write, "f", b"new")
                assert documents.read("f") == b"kept"

    run(test())


def gateway(cluster: Cluster, prefix: str, state: Path, **settings: str) -> System:
    nats = {"queue_url": cluster.servers[0].url, "nats_prefix": prefix, "worker": "none"}
    return System("", nats | {"deploy": "process", "state": str(state)} | settings)


def send(system: System, method: str, what: str, document: object) -> Answer:
    return system.request(method, f"/system/{what}", json.dumps(document).encode(), JSON_TYPE, 60.0)


def deployment(script: str = "echo one", **more: object) -> dict[str, object]:
    return {"service": "f", "image": "process", "envProcess": f"sh -c '{script}'", **more}


def test_two_gateways_serve_what_is_deployed_to_one(cluster: Cluster, tmp_path: Path) -> None:
    def answers(system: System) -> tuple[int, str]:
        answer = system.request("POST", "/function/f.blue")
        return answer.status, answer.text.strip()

    with gateway(cluster, "two", tmp_path / "1", workers="2") as one:
        assert send(one, "POST", "namespace/blue", {"labels": {"a": "b"}}).status == 201
        assert send(one, "POST", "secrets?namespace=blue", {"name": "token", "value": "first"}).status == 201
        assert send(one, "POST", "functions", deployment(namespace="blue")).status == 202
        with gateway(cluster, "two", tmp_path / "2") as other:
            assert answers(other) == (200, "one"), "what was deployed before its start"
            reads = deployment("cat $secret_mount_path/token", namespace="blue", secrets=["token"])
            assert send(other, "PUT", "functions", reads).status == 200
            wait_until(lambda: answers(one) == (200, "first"), 15, "an update at the other")
            assert send(one, "PUT", "secrets", {"name": "token", "value": "second", "namespace": "blue"}).status == 200
            wait_until(lambda: answers(other) == (200, "second"), 15, "a changed secret at the other")
            assert send(one, "POST", "functions", deployment(namespace="blue")).status == 409
            one.kill()
            assert answers(other) == (200, "second")
            assert send(other, "DELETE", "functions", {"functionName": "f", "namespace": "blue"}).status == 202
        with gateway(cluster, "two", tmp_path / "1") as again:
            assert answers(again)[0] == 404, "removed while it was away"
            assert json.loads(again.request("GET", "/system/namespace/blue").body)["labels"] == {"a": "b"}


def test_version_that_is_no_good_for_one_gateway_leaves_the_old_one_serving_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    program = tmp_path / "bin" / "only-here"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho two\n")
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    with gateway(cluster, "uneven", tmp_path / "1", PATH=path) as one:
        assert send(one, "POST", "functions", deployment()).status == 202
        with gateway(cluster, "uneven", tmp_path / "2") as other:
            update = {**deployment(), "envProcess": "only-here"}
            assert send(one, "PUT", "functions", update).status == 200
            assert one.request("POST", "/function/f").text == "two\n"
            other.wait_log("the deployed function f.openfaas-fn is disabled: ", 15)
            assert other.request("POST", "/function/f").text == "one\n"
            assert json.loads(other.request("GET", "/system/function/f").body)["envProcess"] == "sh -c 'echo one'"
            assert send(one, "DELETE", "functions", {"functionName": "f"}).status == 202
            wait_until(lambda: other.request("POST", "/function/f").status == 404, 15, "removed everywhere")


def test_functions_serve_on_while_the_servers_are_away(tmp_path: Path) -> None:
    with Cluster() as cluster, gateway(cluster, "away", tmp_path) as system:
        assert send(system, "POST", "functions", deployment()).status == 202
        cluster.servers[0].kill()
        assert system.request("POST", "/function/f").text == "one\n"
        answer = send(system, "PUT", "functions", deployment("echo two"))
        assert (answer.status, "NATS" in answer.text) == (503, True)
        assert system.request("POST", "/function/f").text == "one\n"
        cluster.servers[0].start()
        wait_until(lambda: send(system, "PUT", "functions", deployment("echo two")).status == 200, 30, "it is stored")
        assert system.request("POST", "/function/f").text == "two\n"


def hang_up_on(cluster: Cluster, system: System, method: str, what: str, document: object) -> None:
    """Ask for a change that the servers do not store before its client has hung up.

    It is asked for again where it was refused at once: a gateway that has just lost the servers may do so.
    """
    answers: list[tuple[int, str]] = []
    while not answers or (answers[-1][0] == 503 and len(answers) < HANG_UPS_COUNT):
        answered = ask_and_hang_up(cluster.servers[0], system, method, what, document)
        if answered is None:
            return
        answers.append(answered)
        wait_until(partial(has_servers, system), 30, "it has them again")
    raise AssertionError(f"it answers though the servers stand still: {answers}")


def has_servers(system: System) -> bool:
    return send(system, "POST", "secrets", {"name": "probe", "value": "x"}).status != 503  # 201, then 409


def ask_and_hang_up(
    server: NatsServer, system: System, method: str, what: str, document: object
) -> tuple[int, str] | None:
    """Return the answer to a change while `server` stands still; None if there was none for a second."""
    client = http.client.HTTPConnection("127.0.0.1", system.port)
    server.pause()
    try:
        client.request(method, f"/system/{what}", json.dumps(document).encode(), JSON_TYPE)
        wait_read(client.sock)
        client.sock.settimeout(1.0)
        with client.getresponse() as answer:
            return answer.status, answer.read().decode()
    except TimeoutError:
        return None
    finally:
        client.close()
        server.resume()


def test_change_is_in_force_when_its_client_hangs_up_while_it_is_stored(tmp_path: Path) -> None:
    reads = deployment("cat $secret_mount_path/token", secrets=["token"])
    with (
        Cluster() as cluster,
        gateway(cluster, "gone", tmp_path / "1") as one,
        gateway(cluster, "gone", tmp_path / "2") as other,
    ):

        def answers(status: int, text: str) -> None:
            for system in (one, other):

                def found(system: System = system) -> bool:
                    answer = system.request("POST", "/function/f")
                    return answer.status == status and text in answer.text

                wait_until(found, 15, f"{status} {text}")

        hang_up_on(cluster, one, "POST", "functions", deployment())
        answers(200, "one")
        hang_up_on(cluster, one, "POST", "secrets", {"name": "token", "value": "first"})
        wait_until(lambda: send(one, "PUT", "functions", reads).status == 200, 15, "the secret is kept")
        answers(200, "first")
        hang_up_on(cluster, one, "PUT", "secrets", {"name": "token", "value": "second"})
        answers(200, "second")
        hang_up_on(cluster, one, "PUT", "functions", deployment("echo three"))
        answers(200, "three")
        hang_up_on(cluster, one, "DELETE", "functions", {"functionName": "f"})
        answers(404, "")
        assert send(one, "POST", "functions", deployment("echo four")).status == 202
        answers(200, "four")
