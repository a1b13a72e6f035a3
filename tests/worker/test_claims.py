"""How often a worker asks its queue: each claim is a turn of the queue's writer, whether it finds something or not."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from faashound.calls.callbacks import build_policy
from faashound.calls.model import Lease
from faashound.draining.delivery import CallbackRules
from faashound.queues.spool.queue import Spool
from faashound.watchdog import parse_settings
from faashound.worker import Settings, Worker
from testkit.system import Receiver, System

CALLS_COUNT = 20


class CountingSpool(Spool):
    """A spool that counts the claims made."""

    claims_count = 0

    async def claim(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]:
        self.claims_count += 1
        return await super().claim(queues, owner, lease_s, limit, capacity)

    async def claim_callbacks(
        self, queues: Sequence[str], owner: str, lease_s: float, limit: int, capacity: Mapping[str, int] | None = None
    ) -> list[Lease]:
        self.claims_count += 1
        return await super().claim_callbacks(queues, owner, lease_s, limit, capacity)


def test_call_at_rest_costs_one_round_of_claims_and_its_callback_another() -> None:
    with Receiver() as receiver, System(settings={"worker": "none"}) as system:
        claims_count = asyncio.run(count_claims(system, receiver))
    rounds, kinds = 2, 2
    assert claims_count <= CALLS_COUNT * rounds * kinds + kinds + 2, "and those of the start; one may come late"


async def count_claims(system: System, receiver: Receiver) -> int:
    """Return how many claims a worker makes for CALLS_COUNT calls, one after the other, each with a callback."""
    gateway_url = f"http://127.0.0.1:{system.port}"
    names = {"queue_url": f"spool:{system.spool}", "gateway_url": gateway_url, "callback_allow": "127.0.0.0/8"}
    settings = parse_settings(Settings, names)
    spool = await CountingSpool.open(system.spool)
    assert isinstance(spool, CountingSpool)
    try:
        rules = CallbackRules(build_policy([gateway_url], settings.callback_allow), None, 10.0)
        worker = Worker(settings, spool, await spool.enlist(), rules)
        work = asyncio.create_task(worker.run())
        for number in range(CALLS_COUNT):
            call_id = await asyncio.to_thread(system.submit, "cat", b"", {"X-Callback-Url": receiver.url()})
            await asyncio.to_thread(receiver.wait_for, number + 1)
            await asyncio.to_thread(system.until, call_id, lambda status: status["callback"]["state"] == "delivered")
        worker.stop()
        await work
    finally:
        await spool.close()
    return spool.claims_count
