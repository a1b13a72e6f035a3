"""What operators do with functions: the file followed, functions deployed, scaled, secrets and namespaces changed.

    control = Control(local, Path("functions.toml"), state=Path("state"), rules=Rules(path=environ.get("PATH")))
    await control.start()                              # after local.start(): what was deployed before is there
    following = asyncio.create_task(control.follow())  # the file; control.look_now() at SIGHUP
    await control.create(document); await control.update(document); await control.remove(document)

The functions in force are those of the file and, besides, those deployed: where both name one, the file wins.  A
change through the control plane is on the disk before it is answered.  Each operation takes the JSON of its request,
and raises a FaashoundError whose status and text are the answer.

The file is parsed whole: with any problem in it, all problems are logged and what runs goes on.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Mapping, Set
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calls.names import DEFAULT_NAMESPACE, FunctionName
from ..watchdog import FaashoundError, in_thread, log, reason_of
from .bucket import BucketDocuments, BucketShelves
from .deployments import BadDeployment, Deployment, Deployments, Rules, name_of, parse_deployment
from .documents import Documents, DocumentShelves, hold_state
from .local import LocalFunctions, UnknownFunction, with_annotations
from .namespaces import (
    Namespace,
    NamespaceExists,
    NamespaceInUse,
    Namespaces,
    UnknownNamespace,
    parse_namespace,
)
from .schedules import CRON_TOPIC, SCHEDULE, TOPIC
from .secrets import SecretFiles, Secrets, parse_secret_name, parse_secret_value
from .table import BadFunctions, Function, FunctionsFile, UnreadableFunctions, read_functions

if TYPE_CHECKING:  # which wants nats-py, an extra
    from ..queues.jetstream.bucket import Bucket

MAX_TOLD_COUNT = 10  # in one text: of what a namespace holds that is to be removed, of what has changed


LOOK_S = 1.0  # between two looks at the file; a change is applied when two looks have seen the same


class FunctionExists(FaashoundError):
    """There is a function of this name already."""

    status = 409


class DeployOff(FaashoundError):
    """Functions cannot be deployed here."""

    status = 501

    def __init__(self) -> None:
        super().__init__("deploy=off: functions are declared in the functions file of this gateway")


@dataclass(frozen=True, slots=True)
class _Kept:
    """What is kept of what clients have asked for; None where nothing is."""

    deployments: Deployments | None = None
    secrets: Secrets | None = None
    namespaces: Namespaces | None = None

    @classmethod
    def open(cls, state: Path | None, bucket: Bucket | None) -> _Kept:
        """Return what is kept in a bucket, or else in the directory `state`."""
        if bucket is not None:
            functions, namespaces = (BucketDocuments(bucket, kind) for kind in ("functions", "namespaces"))
            return cls(Deployments(functions), Secrets(BucketShelves(bucket, "secrets")), Namespaces(namespaces))
        if state is None:
            return cls()
        return cls(
            Deployments(Documents(state / "functions")),
            Secrets(DocumentShelves(state / "secrets")),
            Namespaces(Documents(state / "namespaces")),
        )


def _listed(names: Set[FunctionName]) -> str:
    """Return names for a line of the log, which a thousand of them would fill."""
    shown = sorted(name.short for name in names)[:MAX_TOLD_COUNT]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _tell_idle_schedule(function: Function) -> None:
    """Log that a function is called by no schedule though it has one: connectors know their functions by a topic."""
    if SCHEDULE in function.annotations and TOPIC not in function.annotations:
        log.warning(f"{function.name.short} has a schedule and no topic, so nothing calls it; allowed: {CRON_TOPIC}")


class Control:
    """The operations.  Without `state` nothing can be deployed and no secret be kept; the file is followed yet.

    `file_is_optional`: a file that was never there is an empty one.  `operator_secrets` is a directory in which
    functions of the file find the tokens of their callers besides.  With `bucket` all is kept there and not in `state`,
    and what other gateways change is applied here by `follow_bucket`.  Obligation: `close`.  Raises CannotStart.
    """

    def __init__(
        self,
        local: LocalFunctions,
        file: Path,
        *,
        state: Path | None = None,
        rules: Rules | None = None,
        file_is_optional: bool = False,
        operator_secrets: Path | None = None,
        bucket: Bucket | None = None,
    ) -> None:
        self._local = local
        self._file = file
        self._file_is_optional = file_is_optional
        self._rules = rules or Rules()
        self._cleanup = ExitStack()
        if state is not None and bucket is None:
            self._cleanup.enter_context(hold_state(state))
        kept = _Kept.open(state, bucket)
        self._declared: Mapping[FunctionName, Function] = dict(local.table)
        self._images = self._rules.images
        self._deployed: dict[FunctionName, Deployment] = {}
        self._bucket = bucket
        self._deployments, self._secrets, self._namespaces = kept.deployments, kept.secrets, kept.namespaces
        self._files = None if self._secrets is None else SecretFiles(local.directory / "secrets", self._secrets)
        self._operator_secrets = operator_secrets
        self._closed: set[FunctionName] = set()  # functions whose callers' token is not there, which has been told
        self._applied: tuple[int, ...] | None = ()  # None: what was seen last is to be tried again
        self._told_trouble = ""
        self._changing = asyncio.Lock()
        self._told = asyncio.Event()
        local.secrets, local.token_of = self._files, self._token_of

    async def start(self) -> None:
        """Have what was deployed before, and what the file says by now."""
        await self._load()
        self._tell_hidden(self._declared.keys())
        if not await self.reload():  # it was right when we were started: those of it go on, and so do those deployed
            await self._local.apply(self._in_force())

    def _tell_hidden(self, names: Set[FunctionName]) -> None:
        """Log which of `names`, that the file declares, are deployed as well."""
        for name in names & self._deployed.keys():
            log.warning(f"the functions file declares {name.short}: what was deployed under this name is not served")

    async def _load(self) -> None:
        """Know what is deployed by now; what serves and is kept, but is no good any more here, stays as it is."""
        if self._deployments is not None:
            found = await in_thread(self._deployments.load, self._current_rules())
            kept = set(await in_thread(self._deployments.names))
            self._deployed = {name: each for name, each in self._deployed.items() if name in kept} | found

    async def follow_bucket(self) -> None:
        """Apply what other gateways change, for ever; while the bucket cannot be asked, what is known holds."""
        last_error, changed = "", False
        while self._bucket is not None:
            await asyncio.sleep(LOOK_S)
            try:
                async with self._changing:
                    changed = await self._bucket.look() or changed
                    if changed:
                        await self._take_over()
                last_error, changed = "", False
            except (FaashoundError, OSError) as error:
                if str(error) != last_error:
                    log.error(f"what other gateways deploy is not all in force: {reason_of(error)}")
                last_error = str(error)

    async def _take_over(self) -> None:
        """Have what other gateways have changed; a function whose new version is no good here stays as it is."""
        if self._namespaces is not None:
            await in_thread(self._namespaces.load)
        if self._files is not None:
            await in_thread(self._files.refresh_all)
        before = self._deployed
        await self._load()
        try:
            postponed = await self._local.apply(self._in_force())
        except OSError:
            self._deployed = before  # so that the next try knows what serves
            raise
        for name in (before.keys() & self._deployed.keys()) - self._declared.keys():
            old, new = before[name], self._deployed[name].function
            if not self._local.serves(new):  # it did not get healthy here
                self._deployed[name] = dataclasses.replace(old, function=with_annotations(old.function, new))
        self._tell_hidden(self._declared.keys() - before.keys())
        if postponed:
            raise FaashoundError("; ".join(postponed))

    def close(self) -> None:
        """Let another gateway have the state."""
        self._cleanup.close()

    # The file.

    def look_now(self) -> None:
        """Look at the file at once, whether or not it seems to have changed."""
        self._told.set()

    async def follow(self) -> None:
        """Apply each change of the file, for ever."""
        seen = self._applied
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):  # wait_for swallows a cancellation that comes with the event
                    await self._told.wait()
            found = self._stat()
            if self._told.is_set() or (found == seen and found != self._applied):
                if self._told.is_set():
                    self._told_trouble = ""
                self._told.clear()
                await self._reload_or_tell()
            seen = found

    async def _reload_or_tell(self) -> None:
        """Apply the file; where the machine has no descriptors or no room for it, try again at the next look."""
        before = self._declared
        try:
            if await self.reload():
                self._tell_changes(before)
        except OSError as error:
            self._try_again(f"the functions file is not applied, and is tried again: {reason_of(error)}")

    def _tell_changes(self, before: Mapping[FunctionName, Function]) -> None:
        """Log what the file has brought, changed and taken away."""
        changes = {
            "new": self._declared.keys() - before.keys(),
            "changed": {name for name, each in self._declared.items() if before.get(name, each) != each},
            "gone": before.keys() - self._declared.keys(),
        }
        told = [f"{what}: {_listed(names)}" for what, names in changes.items() if names]
        if told:
            log.info(f"the functions file has changed; {'; '.join(told)}")

    def _try_again(self, trouble: str) -> None:
        """Read the file at the next look as well; say why, once."""
        self._applied = None
        if trouble != self._told_trouble:
            log.error(trouble)
        self._told_trouble = trouble

    def _stat(self) -> tuple[int, ...]:
        try:
            found = self._file.stat()
        except OSError:
            return ()
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns

    async def reload(self) -> bool:
        """Read the file and apply what has changed; tell whether it could be used.  Raises OSError."""
        async with self._changing:
            self._applied = self._stat()  # before it is read: what changes meanwhile is seen as a change
            try:
                file = await in_thread(self._read_file)
            except UnreadableFunctions as error:
                self._try_again(f"the functions file is not applied, and is tried again: {'; '.join(error.problems)}")
                return False
            except BadFunctions as error:
                for problem in error.problems:
                    log.error(f"the functions file is not applied: {problem}")
                return False
            before = self._declared, self._images, self._deployed
            self._declared, self._images = file.functions, file.images
            try:
                if file.images != before[1]:
                    await self._load()
                postponed = await self._local.apply(self._in_force())
            except OSError:
                self._declared, self._images, self._deployed = before
                raise
            self._tell_hidden(self._declared.keys() - before[0].keys())
            if postponed:
                self._try_again(f"not all of the functions file is applied, and is tried again: {'; '.join(postponed)}")
                return True
            self._told_trouble = ""
            await self._tell_missing_secrets()
            for function in self._declared.values():
                _tell_idle_schedule(function)
            return True

    async def _tell_missing_secrets(self) -> None:
        """Log which functions of the file name secrets that are not kept; a deployment is refused for that."""
        kept = await in_thread(self._kept_secrets)
        for name, function in self._declared.items():
            missing = [each for each in function.secrets if (name.namespace, each) not in kept]
            allowed = f"those that /system/secrets has in {name.namespace}"
            if self._secrets is None:
                allowed = "none, unless deploy=process is set"
            if missing:
                log.error(f"{name.short} does not find its secrets {', '.join(missing)}; allowed: {allowed}")

    def _kept_secrets(self) -> frozenset[tuple[str, str]]:
        return frozenset(() if self._secrets is None else self._secrets.names())

    def _read_file(self) -> FunctionsFile:
        # One that was there and has gone is not an empty one: a mount, or an editor, may bring it back.
        return read_functions(self._file, missing_ok=self._file_is_optional and not (self._declared or self._images))

    def _in_force(self) -> dict[FunctionName, Function]:
        return {**{name: each.function for name, each in self._deployed.items()}, **self._declared}

    # Functions.

    def describe(self, name: FunctionName) -> dict[str, object] | None:
        """Return what is told of a deployed function; None for any other."""
        found = self._deployed.get(name)
        return None if found is None or name in self._declared else found.describe()

    async def create(self, document: Mapping[str, Any], namespace: str = "") -> FunctionName:
        """Deploy a new function; when it returns, a call works, and it is there after a crash.  POST, 202."""
        async with self._changing:
            self._want_deployments()
            name = await self._name_of(document, namespace)
            self._want_undeclared(name)
            if name in self._local.table:
                raise FunctionExists(f"there is a function {name.short} already")
            await self._deploy(document, namespace, time.time())
            return name

    async def update(self, document: Mapping[str, Any], namespace: str = "") -> FunctionName:
        """Have a function in a new version, without a call that fails; else the old one serves on.  PUT, 200."""
        async with self._changing:
            self._want_deployments()
            name = await self._name_of(document, namespace)
            self._want_undeclared(name)
            if name not in self._deployed:
                raise UnknownFunction(f"there is no function {name.short}")
            await self._deploy(document, namespace, self._deployed[name].created_s)
            return name

    async def remove(self, document: Mapping[str, Any], namespace: str = "") -> FunctionName:
        """Have a function no longer; its running calls finish.  DELETE, 202."""
        async with self._changing:
            deployments = self._want_deployments()
            name = name_of(document, namespace, "functionName")
            self._want_undeclared(name)
            if name not in self._deployed and str(name) not in await in_thread(deployments.names):  # nor disabled
                raise UnknownFunction(f"there is no function {name.short}")
            await in_thread(deployments.delete, name)
            if name in self._deployed:
                await self._local.remove(name)
                del self._deployed[name]  # not before: where others could not be told, it can be removed again
            return name

    async def scale(self, name: FunctionName, count: object) -> None:
        """Have `count` processes; raises UnknownFunction, BadScale.  POST, 202."""
        if not isinstance(count, int) or isinstance(count, bool):
            raise BadDeployment(["replicas: allowed: a whole number"])
        await self._local.scale(name, count)

    async def _name_of(self, document: Mapping[str, Any], namespace: str) -> FunctionName:
        """Return whom a deployment is of; raises BadDeployment with every problem, those of the rest included."""
        try:
            return name_of(document, namespace)
        except BadDeployment:
            await in_thread(parse_deployment, document, self._current_rules(), 0.0, namespace)
            raise

    async def _deploy(self, document: Mapping[str, Any], namespace: str, created_s: float) -> None:
        deployments = self._want_deployments()
        deployment = await in_thread(parse_deployment, document, self._current_rules(), created_s, namespace)

        async def store() -> None:
            await self._keep_namespace(deployment.function.name.namespace)
            await in_thread(deployments.store, deployment)

        await self._local.put(deployment.function, store)
        self._deployed[deployment.function.name] = deployment
        _tell_idle_schedule(deployment.function)
        if document.get("limits"):
            log.warning(f"{deployment.function.name.short} has limits that are not kept (limits=ignore)")

    def _current_rules(self) -> Rules:
        return dataclasses.replace(
            self._rules,
            images=self._images,
            secrets=self._kept_secrets(),
            namespaces=frozenset(self.namespace_names()),
        )

    def _want_deployments(self) -> Deployments:
        if self._deployments is None:
            raise DeployOff
        return self._deployments

    def _want_undeclared(self, name: FunctionName) -> None:
        if name in self._declared:
            raise FunctionExists(f"{name.short} is declared in {self._file}, which is changed there")

    # Namespaces.

    def namespace_names(self) -> list[str]:
        """Return the namespaces that functions may be in, or are in: the default one first.  GET, 200."""
        made = () if self._namespaces is None else self._namespaces.names()
        found = {*self._rules.namespaces, *made, *(name.namespace for name in self._local.table)}
        return [DEFAULT_NAMESPACE, *sorted(found - {DEFAULT_NAMESPACE})]

    def find_namespace(self, name: str) -> Namespace:
        """Return what is known of one.  GET, 200; raises UnknownNamespace."""
        if name not in self.namespace_names():
            raise UnknownNamespace(f"there is no namespace {name[:100]}")
        found = None if self._namespaces is None else self._namespaces.find(name)
        return found or Namespace(name)

    async def create_namespace(self, document: Mapping[str, Any], name: str = "") -> None:
        """Have another one that functions may be in.  POST, 201."""
        async with self._changing:
            namespaces, namespace = self._want_namespaces(), parse_namespace(document, name)
            if namespace.name in self.namespace_names():
                raise NamespaceExists(f"there is a namespace {namespace.name} already")
            await in_thread(namespaces.store, namespace)

    async def update_namespace(self, document: Mapping[str, Any], name: str = "") -> None:
        """Note something else of a namespace.  PUT, 202."""
        async with self._changing:
            namespaces, namespace = self._want_namespaces(), parse_namespace(document, name)
            self.find_namespace(namespace.name)
            await in_thread(namespaces.store, namespace)

    async def delete_namespace(self, document: Mapping[str, Any], name: str = "") -> None:
        """Have a namespace no longer, in which there is nothing.  DELETE, 202."""
        async with self._changing:
            namespaces, space = self._want_namespaces(), parse_namespace(document, name).name
            self.find_namespace(space)
            if space in self._rules.namespaces:
                raise NamespaceInUse(f"{space} is always there, or by the setting namespaces")
            kept = await in_thread(self._want_deployments().names)  # those that do not serve now, too
            names = dict.fromkeys((*self._local.table, *map(FunctionName, kept)))
            held = [f"the function {each.name}" for each in names if each.namespace == space]
            held += [f"the secret {each}" for _, each in self._want_secrets().names(space)]
            if held:
                raise NamespaceInUse(f"{space} is not empty: {', '.join(held[:MAX_TOLD_COUNT])}")
            await in_thread(namespaces.delete, space)

    async def _keep_namespace(self, name: str) -> None:
        """Have a namespace for good that is there by functions of the file only."""
        namespaces = self._want_namespaces()
        if name not in self._rules.namespaces and name not in namespaces.names():
            await in_thread(namespaces.store, Namespace(name))

    def _want_namespaces(self) -> Namespaces:
        if self._namespaces is None:
            raise DeployOff
        return self._namespaces

    # Secrets.

    def secret_names(self, namespace: str | None = None) -> list[dict[str, str]]:
        """Return what is told of secrets: their names.  GET, 200."""
        secrets = self._want_secrets()
        return [{"name": name, "namespace": space} for space, name in secrets.names(namespace)]

    async def create_secret(self, document: Mapping[str, Any], namespace: str = "") -> tuple[str, str]:
        """Keep a new secret.  POST, 201."""
        return await self._change_secret(document, namespace, self._want_secrets().create)

    async def update_secret(self, document: Mapping[str, Any], namespace: str = "") -> tuple[str, str]:
        """Give a secret another value, which the next call of its functions sees.  PUT, 200."""
        return await self._change_secret(document, namespace, self._want_secrets().update)

    async def _change_secret(
        self, document: Mapping[str, Any], namespace: str, change: Callable[[str, str, bytes], None]
    ) -> tuple[str, str]:
        async with self._changing:
            space, name = parse_secret_name(document, namespace)
            if space not in self.namespace_names():
                raise UnknownNamespace(f"there is no namespace {space}; allowed: {', '.join(self.namespace_names())}")
            await in_thread(change, space, name, parse_secret_value(document))
            if self._files is not None:
                await in_thread(self._files.refresh, space, name)
            if any(name == each.exposure.secret for each in self._functions_in(space)):
                self._local.refresh_tokens()
            return space, name

    async def delete_secret(self, document: Mapping[str, Any], namespace: str = "") -> tuple[str, str]:
        """Keep a secret no longer, unless a function names it.  DELETE, 202."""
        async with self._changing:
            secrets = self._want_secrets()
            space, name = parse_secret_name(document, namespace)
            users = [each.name for each in self._functions_in(space) if name in (*each.secrets, each.exposure.secret)]
            users += await in_thread(self._want_deployments().users, space, name)  # those that do not serve now, too
            await in_thread(secrets.delete, space, name, tuple(dict.fromkeys(users)))
            return space, name

    def _functions_in(self, namespace: str) -> list[Function]:
        return [function for function in self._local.table.values() if function.name.namespace == namespace]

    def _token_of(self, function: Function) -> bytes | None:
        """Return the token by which callers of a function are let in; None, which lets none in, if there is none."""
        name, token = function.exposure.secret, None
        if name is None:
            raise AssertionError("this function is not for who knows a secret")
        if self._secrets is not None:
            token = self._secrets.read(function.name.namespace, name)
        if token is None and self._operator_secrets is not None and function.name in self._declared:
            with suppress(OSError):
                token = (self._operator_secrets / name).read_bytes()
        if token is not None:
            self._closed.discard(function.name)
        elif function.name not in self._closed:
            self._closed.add(function.name)
            log.error(f"{function.name.short} lets no caller in: {function.name.namespace} has no secret {name}")
        return token

    def _want_secrets(self) -> Secrets:
        if self._secrets is None:
            raise DeployOff
        return self._secrets
