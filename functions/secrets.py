"""Secrets: kept in the state, and handed to each function as files that only it can read.

    secrets = Secrets(DocumentShelves(Path("state/secrets")))
    secrets.create("openfaas-fn", "token", b"...")     # update, delete, names
    desk = SecretFiles(directory, secrets)
    desk.directory_of(function, "1.1")                 # its own, with a file for each secret that it names
    desk.refresh("openfaas-fn", "token")               # after a change: the next call reads the new value
    desk.forget("1.1")                                 # when the last call of this version has ended

A value leaves this module in files for functions only: no listing, no log line and no error text has one.  The files
of a function are in a directory of its own, whose owner is the user that it runs as; a changed value takes the old
one's name at once, so a reader sees one or the other.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import shutil
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..calls.names import DEFAULT_NAMESPACE, FunctionName, is_label
from ..watchdog import FaashoundError, Identity, log, parse_user, reason_of
from .documents import Shelves, name_of_new
from .namespaces import NAMESPACE_RULE
from .secret_names import is_secret_name
from .table import Function

MAX_SECRET_BYTES = 1 << 20  # as in Kubernetes

MOUNT_VARIABLE = "secret_mount_path"  # by which a function finds its secrets, as in OpenFaaS


class BadSecret(FaashoundError):
    """A request about a secret makes no sense."""

    status = 400


class UnknownSecret(FaashoundError):
    """There is no such secret."""

    status = 404


class SecretExists(FaashoundError):
    """There is such a secret already."""

    status = 409


class SecretInUse(FaashoundError):
    """Functions need this secret."""

    status = 409


class Secrets:
    """The secrets of all namespaces, each a document on the shelf of its own.  Its methods block on what keeps them."""

    def __init__(self, shelves: Shelves) -> None:
        self._shelves = shelves

    def names(self, namespace: str | None = None) -> list[tuple[str, str]]:
        """Return namespace and name of each secret, or of those in one namespace."""
        spaces = [space for space in self._shelves.spaces() if namespace in (None, space)]
        return [(space, name) for space in spaces for name in self._shelves.space(space).names()]

    def read(self, namespace: str, name: str) -> bytes | None:
        """Return a value; None if there is no such secret."""
        if not is_secret_name(name) or namespace not in self._shelves.spaces():
            return None
        return self._shelves.space(namespace).read(name)

    def create(self, namespace: str, name: str, value: bytes) -> None:
        """Keep a new secret; raises SecretExists, NotStored."""
        if self.read(namespace, name) is not None:
            raise SecretExists(f"there is a secret {name} in {namespace} already")
        self._shelves.space(namespace).write(name, value)

    def update(self, namespace: str, name: str, value: bytes) -> None:
        """Give a secret another value; raises UnknownSecret, NotStored."""
        if self.read(namespace, name) is None:
            raise UnknownSecret(f"there is no secret {name} in {namespace}")
        self._shelves.space(namespace).write(name, value)

    def delete(self, namespace: str, name: str, users: Collection[FunctionName] = ()) -> None:
        """Keep a secret no longer; raises UnknownSecret, SecretInUse if `users` need it, NotStored."""
        if self.read(namespace, name) is None:
            raise UnknownSecret(f"there is no secret {name} in {namespace}")
        if users:
            raise SecretInUse(f"{name} is in use by {', '.join(user.short for user in users)}")
        self._shelves.space(namespace).delete(name)


def parse_secret_name(document: object, namespace: str = "") -> tuple[str, str]:
    """Return namespace and name in the JSON of a request; raises BadSecret."""
    if not isinstance(document, dict):
        raise BadSecret("allowed: a JSON object with name and, if need be, namespace")
    name, space = document.get("name"), document.get("namespace") or namespace or DEFAULT_NAMESPACE
    if not isinstance(name, str) or not is_secret_name(name):
        raise BadSecret(
            "name: allowed: 1 to 253 lower-case letters, digits, '-' and '.', none of these two first or last"
        )
    if not isinstance(space, str) or not is_label(space):
        raise BadSecret(f"namespace: allowed: {NAMESPACE_RULE}")
    return space, name


def parse_secret_value(document: Mapping[str, Any]) -> bytes:
    """Return the value in the JSON of a request; raises BadSecret, whose text never shows it.

    A client that reads a file sends it raw, and as text without the white space around it: what is raw wins, unless
    the text is all of it but for that white space.
    """
    text, raw = document.get("value"), document.get("rawValue")
    if text is not None and not isinstance(text, str):
        raise BadSecret("value: allowed: a string")
    value = (text or "").encode()
    if raw:
        try:
            decoded = base64.b64decode(raw, validate=True)
        except (binascii.Error, TypeError, ValueError):
            raise BadSecret("rawValue: allowed: base64") from None
        value = value if value and decoded.strip() == value else decoded
    if not value:
        raise BadSecret("value: missing; allowed: value, or rawValue in base64")
    if len(value) > MAX_SECRET_BYTES:
        raise BadSecret(f"value: {len(value)} bytes; allowed: up to {MAX_SECRET_BYTES}")
    return value


class SecretFiles:
    """The directories of functions, below `directory`, which is gone when the gateway is.

    Each version of a function that is at work has one under a name of its own, `place`: versions that name other
    secrets are at work at once while one takes the place of the other, and the new one may yet be refused.

    Threads may use it at once: functions wake in the loop while a change is told in a thread.  The lock is held from
    the reading of a value until it is written, so that an old value never takes the place of a new one; and for one
    directory at a time, so that the loop does not wait for all of them.
    """

    def __init__(self, directory: Path, secrets: Secrets) -> None:
        self._directory = directory
        self._secrets = secrets
        self._users: dict[str, Function] = {}
        self._lock = threading.Lock()

    def directory_of(self, function: Function, place: str) -> Path:
        """Return the directory of a version's secrets, written anew; raises OSError.  `forget` is to follow."""
        with self._lock:
            self._users[place] = function
            return self._write_all(function, self._directory / place)

    def _write_all(self, function: Function, path: Path) -> Path:
        owner = _owner_of(function)
        if owner is not None:
            self._directory.parent.chmod(0o711)  # its files are for one user, who has to get there
        self._directory.mkdir(mode=0o711, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        for name in function.secrets:
            self._write(path, name, self._secrets.read(function.name.namespace, name), owner)
        for stale in set(os.listdir(path)) - set(function.secrets):
            (path / stale).unlink(missing_ok=True)
        if owner is not None:
            os.chown(path, owner.uid, owner.gid)
        return path

    def refresh(self, namespace: str, name: str) -> None:
        """A secret has changed: have the functions that name it see so."""
        for place, function in self._known():
            if function.name.namespace == namespace and name in function.secrets:
                try:
                    self._renew(place, function, name)
                except OSError as error:  # its own doing, perhaps; others are to have theirs
                    log.error(f"{function.name.short} does not see the new {name}: {reason_of(error)}")

    def refresh_all(self) -> None:
        """Any secret may have changed: have every function see so."""
        for namespace, name in {(each.name.namespace, secret) for _, each in self._known() for secret in each.secrets}:
            self.refresh(namespace, name)

    def forget(self, place: str) -> None:
        """A version has gone, and its calls with it."""
        with self._lock:
            if self._users.pop(place, None) is not None:
                shutil.rmtree(self._directory / place, ignore_errors=True)

    def _known(self) -> list[tuple[str, Function]]:
        with self._lock:
            return list(self._users.items())

    def _renew(self, place: str, function: Function, name: str) -> None:
        with self._lock:
            if place in self._users:  # it may have gone since we were told of it
                value = self._secrets.read(function.name.namespace, name)
                self._write(self._directory / place, name, value, _owner_of(function))

    def _write(self, path: Path, name: str, value: bytes | None, owner: Identity | None) -> None:
        if value is None:
            with contextlib.suppress(FileNotFoundError):
                (path / name).unlink()
            return
        new = path / name_of_new(name)
        new.unlink(missing_ok=True)  # the directory is the function's: what lies there may be its trap
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400)
        with open(fd, "wb") as file:
            file.write(value)
            if owner is not None:
                os.fchown(fd, owner.uid, owner.gid)
        new.rename(path / name)


def _owner_of(function: Function) -> Identity | None:
    """Return the user that a function's secrets are for, None if ours.  Raises OSError if there is none such now."""
    text = (function.settings or {}).get("user")
    try:
        return parse_user(text) if text else None
    except ValueError as error:
        raise OSError(f"user={text}: {error}") from None
