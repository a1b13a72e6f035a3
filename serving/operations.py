"""/system, where it changes something: functions deployed, updated, removed, scaled; secrets; namespaces; schedules.

    operations = Operations(control, scheduler, off=None)
    await operations.change_function(request, "admin from 192.0.2.1")
    await operations.scale(request, "cat", asker)
    await operations.secrets(request, asker)
    await operations.namespace(request, "blue", asker)
    operations.schedules(request)

Contract: the codes that clients of OpenFaaS' gateway need (functions: POST and DELETE 202, PUT 200; secrets: POST 201,
PUT 200, DELETE 202; namespaces: POST 201, PUT and DELETE 202); the namespace stands in the body or in the query, where
the body's counts.  Every change, and every attempt at one that was refused, is a line in the log that tells who asked
for what, from where.  A change that has begun goes on when its client hangs up: what is stored is in force as well.

What it refuses: a body that is no JSON object, or longer than MAX_DOCUMENT_BYTES (MAX_SECRET_DOCUMENT_BYTES with a
secret).  What is turned off is a 501 that says how to turn it on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from ..calls.names import DEFAULT_NAMESPACE, BadFunctionName, FunctionName, parse_function_name
from ..functions.control import Control
from ..functions.documents import parse_document
from ..functions.scheduler import Scheduler
from ..functions.secrets import MAX_SECRET_BYTES
from ..watchdog import FaashoundError, Request, Response, log
from .answers import BadField, allow, json_response, parse_parameters

MAX_DOCUMENT_BYTES = 2 << 20  # of a request
MAX_SECRET_DOCUMENT_BYTES = 8 * MAX_SECRET_BYTES  # sent twice: as text, a byte of which may be \ufffd, and in base64
SCHEDULES_OFF = "schedules=off: scheduled calls are made by another program"


class NotOffered(FaashoundError):
    """This gateway has no such thing, or it is turned off (RFC 9110 15.6.2)."""

    status = 501


async def read_document(request: Request, limit_bytes: int = MAX_DOCUMENT_BYTES) -> dict[str, Any]:
    """Return the JSON object that is the body of a request; raises BadField.

    What Python reads as JSON and others do not (NaN, a number beyond all floats, half of a surrogate pair, for which
    UTF-8 has no bytes) is refused: it would be told back.
    """
    text = await request.body.read(limit_bytes)
    try:
        found = parse_document(text)
        json.dumps(found, ensure_ascii=False).encode()
    except ValueError:
        raise BadField("the body is no JSON; allowed: a JSON object, of finite numbers and whole characters") from None
    if not isinstance(found, dict):
        raise BadField("the body is no JSON object; allowed: a JSON object")
    return found


@dataclass(frozen=True, slots=True)
class Operations:
    """Changes functions and secrets by `control`; `off` says why that cannot be, None if it can.

    `scheduler` is None where schedules are off.  Obligation: `close`, before what `control` works with is closed.
    """

    control: Control
    scheduler: Scheduler | None
    off: str | None
    _running: set[asyncio.Task[None]] = field(default_factory=set, init=False)

    async def close(self) -> None:
        """Break off the changes for which no client waits any more; the next start has what they have stored."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)

    async def change_function(self, request: Request, asker: str) -> Response:
        """Deploy, update or remove the function that the body describes."""
        self._check_on()
        namespace, document = parse_parameters(request.query).get("namespace", ""), await read_document(request)
        work, status, what = {
            "POST": (self.control.create, 202, "deploy"),
            "PUT": (self.control.update, 200, "update"),
            "DELETE": (self.control.remove, 202, "remove"),
        }[request.method]
        name = document.get("functionName" if request.method == "DELETE" else "service")
        await self._log(f"{what} function {name!r:.100}", asker, work(document, namespace))
        return Response(status)

    async def scale(self, request: Request, name: str, asker: str) -> Response:
        """Give a function that is run here as many replicas as the body says."""
        allow(request, "POST")
        document = await read_document(request)
        namespace = document.get("namespace") or parse_parameters(request.query).get("namespace") or DEFAULT_NAMESPACE
        function, count = parse_name(name, namespace), document.get("replicas")
        await self._log(f"scale function {name[:100]!r} to {count!r:.20}", asker, self.control.scale(function, count))
        return Response(202)

    async def secrets(self, request: Request, asker: str) -> Response:
        """List the names of secrets, or create, update, delete one."""
        allow(request, "GET", "POST", "PUT", "DELETE")
        self._check_on()
        namespace = parse_parameters(request.query).get("namespace", "")
        if request.method in ("GET", "HEAD"):
            return json_response(200, self.control.secret_names(namespace or DEFAULT_NAMESPACE))
        document = await read_document(request, MAX_SECRET_DOCUMENT_BYTES)
        work, status, what = {
            "POST": (self.control.create_secret, 201, "create"),
            "PUT": (self.control.update_secret, 200, "update"),
            "DELETE": (self.control.delete_secret, 202, "delete"),
        }[request.method]
        await self._log(f"{what} secret {document.get('name')!r:.100}", asker, work(document, namespace))
        return Response(status)

    async def namespace(self, request: Request, name: str, asker: str) -> Response:
        """Show a namespace, or create, update, delete one; clients that create one have its name in the body alone."""
        allow(request, "GET", "POST", "PUT", "DELETE")
        if request.method in ("GET", "HEAD"):
            return json_response(200, self.control.find_namespace(name).describe())
        self._check_on()
        document = {} if request.body.length == 0 else await read_document(request)
        work, status, what = {
            "POST": (self.control.create_namespace, 201, "create"),
            "PUT": (self.control.update_namespace, 202, "update"),
            "DELETE": (self.control.delete_namespace, 202, "delete"),
        }[request.method]
        told = document.get("name") or name
        await self._log(f"{what} namespace {told!r:.100}", asker, work(document, name))
        return Response(status)

    def schedules(self, request: Request) -> Response:
        """List what is scheduled."""
        allow(request, "GET")
        if self.scheduler is None:
            raise NotOffered(SCHEDULES_OFF)
        return json_response(200, self.scheduler.describe())

    def _check_on(self) -> None:
        if self.off is not None:
            raise NotOffered(self.off)

    async def _log(self, what: str, asker: str, work: Coroutine[Any, Any, object]) -> None:
        """Do `work`, with a line in the log that says so, or why it was refused.

        A client that hangs up ends this wait, and not the work: broken off between the store and the table it would
        leave something that is kept and not served.
        """
        task = asyncio.create_task(self._do(what, asker, work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.shield(task)

    async def _do(self, what: str, asker: str, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except FaashoundError as error:
            log.warning(f"Refused to {what} - [{error.status}]", asker=asker, error=error)
            raise
        except Exception as error:  # the client may have gone, and what was stored stays
            log.error(f"Failed to {what}", asker=asker, error=error)
            raise
        log.info(f"Done: {what}", asker=asker)


def parse_name(text: str, namespace: object) -> FunctionName:
    """Return the whole name of the function NAME or NAME.NAMESPACE; raises BadField."""
    try:
        return parse_function_name(text, str(namespace))
    except BadFunctionName as error:
        raise BadField(str(error)) from None
