"""One attempt at a callback: post a call's result where its caller wants it.

    outcome = await deliverer.attempt(call, destination, policy.max_retries_count)

Contract: `attempt` raises nothing but CancelledError.  Each address is judged again before each post, redirects
included; a destination that is given up for now (breakers.py) is not posted to, and that too is an outcome.  What it
refuses to do: run a function again, or follow a redirect that would turn the post into a GET.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass

from ..calls.callbacks import (
    CALLBACK_ID,
    CALLBACK_PROOF,
    MAX_REDIRECTS_COUNT,
    CallbackPolicy,
    CallFacts,
    Signer,
    build_callback_headers,
    build_callback_id,
    build_proof,
    parse_secrets,
)
from ..calls.model import Call, Headers
from ..calls.retries import AttemptOutcome, OutcomeKind
from ..queues import Queue
from ..watchdog import CannotStart, Client, ClientResponse, FaashoundError, Url, log, read_file
from .bodies import sendable
from .breakers import Breakers
from .outcomes import decoded, outcome_of_error

ANSWER_READ_BYTES = (
    1 << 20
)  # of the answer to a callback, which says nothing to us, but whose sender wants to be rid of it


@dataclass(slots=True)
class CallbackRules:
    """Where callbacks may go, what signs them (None: nothing does), and how long one may take."""

    policy: CallbackPolicy
    signer: Signer | None
    timeout_s: float

    def read_secrets(self, path: str | None) -> None:
        """Sign with what a file has by now, if there is one; with what it had before if that is wrong."""
        try:
            self.signer = read_signer(path)
        except CannotStart as error:
            log.error(f"callbacks are signed as before: {error}")
            return
        if path is not None:
            log.info(f"callbacks are signed with the secrets that {path} has now")


class Deliverer:
    """Posts results, each in one attempt, and learns which destinations cannot be reached."""

    def __init__(self, queue: Queue, client: Client, rules: CallbackRules, breakers: Breakers) -> None:
        self._queue = queue
        self._client = client
        self._rules = rules
        self._breakers = breakers

    async def attempt(self, call: Call, destination: str, max_retries_count: int) -> AttemptOutcome:
        """Post a result unless its destination has been given up for now, and learn how that one is."""
        started_s = time.monotonic()
        objection = self._breakers.objection(destination, started_s)
        if objection is not None:
            return AttemptOutcome(OutcomeKind.HELD_BACK, error=objection)
        outcome = await self._post(call, max_retries_count)
        if outcome.kind is OutcomeKind.ANSWERED and self._breakers.on_answer(destination):
            log.info(f"callbacks to {destination} are sent again")
        is_failure = outcome.kind in (OutcomeKind.UNREACHABLE, OutcomeKind.TIMED_OUT)
        if is_failure and self._breakers.on_failure(destination, str(outcome), started_s, time.monotonic()):
            log.warning(f"callbacks to {destination} are held back, and tried one at a time: {outcome}")
        return outcome

    async def _post(self, call: Call, max_retries_count: int) -> AttemptOutcome:
        try:
            async with asyncio.timeout(self._rules.timeout_s):
                return await self._post_and_follow(call, callback_facts(call, max_retries_count))
        except TimeoutError:
            return AttemptOutcome(OutcomeKind.TIMED_OUT, error="no answer before the deadline (callback_timeout)")
        except Exception as error:  # noqa: BLE001 - an attempt's boundary: what it raises is recorded, whatever it is
            return outcome_of_error(error, call.id)

    async def _post_and_follow(self, call: Call, facts: CallFacts) -> AttemptOutcome:
        """Post a result, following the redirects that keep method and body."""
        policy = self._rules.policy
        url: Url | None = policy.check_url(call.callback_url or "")
        status, retry_after = 0, None
        for _ in range(MAX_REDIRECTS_COUNT + 1):
            if url is None:
                break
            here = url
            async with await self._send(call, facts, here) as response:
                status, retry_after = response.status, decoded(response.header(b"retry-after"))
                with suppress(FaashoundError):  # a receiver that is cut off might think that it was not heard
                    await response.body.read(ANSWER_READ_BYTES)
                url = policy.check_redirect(here, status, decoded(response.header(b"location")))
        return AttemptOutcome(OutcomeKind.ANSWERED, status, retry_after)

    async def _send(self, call: Call, facts: CallFacts, url: Url) -> ClientResponse:
        callback_id = build_callback_id(call)
        signature = await self._signature(url, call, callback_id)
        headers = (*build_callback_headers(facts, call.result_headers), *signature)
        fields = [(name.encode(), value.encode("latin-1")) for name, value in headers]
        fields.append((CALLBACK_ID, callback_id.encode()))
        fields.append((CALLBACK_PROOF, build_proof(self._queue.token, callback_id).encode()))
        body = b"" if call.result is None else await sendable(self._queue, call.result)
        length = 0 if call.result is None else call.result.bytes_count
        return await self._client.request("POST", url, fields, body, length)

    async def _signature(self, url: Url, call: Call, callback_id: str) -> Headers:
        signer = self._rules.signer
        signature = None if signer is None else signer.start(url, callback_id, time.time())
        if signature is None:
            return ()
        if call.result is not None:
            async for chunk in self._queue.open_body(call.result):
                signature.update(chunk)
        return signature.finish()


def callback_facts(call: Call, max_retries_count: int) -> CallFacts:
    """Return what a callback tells of its call."""
    return CallFacts(
        call_id=call.id,
        function=call.function,
        status=call.status or 503,
        duration_s=call.duration_s or 0.0,
        retries_count=max(call.attempts - 1, 0),
        max_retries_count=max_retries_count,
    )


def read_signer(path: str | None) -> Signer | None:
    """Return what signs callbacks with the secrets of a file, None without a file.

    Raises CannotStart, without a word of a secret.
    """
    if path is None:
        return None
    text = read_file(path, "callback_secret_file")
    try:
        return Signer(parse_secrets(text))
    except ValueError as error:
        raise CannotStart(f"callback_secret_file {path}: {error}") from None
