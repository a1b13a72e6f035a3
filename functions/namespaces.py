"""Namespaces that clients have made: kept in the state, beside the deployments, with their labels and annotations.

    namespaces = Namespaces(Documents(Path("state/namespaces")))
    namespaces.store(parse_namespace(document))       # in place of an older one of its name
    namespaces.find("blue"); namespaces.names(); namespaces.delete("blue")

A namespace is a part of functions' names; what is kept here says that it may be one, and what clients have noted of
it, which means nothing to us.  A damaged file is told in the log; its namespace is there nevertheless, without notes,
since functions may be in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..calls.names import is_label
from ..watchdog import FaashoundError, log, reason_of
from .documents import Store, parse_document

NAMESPACE_RULE = (
    "1 to 63 lower-case letters, digits, '-' and '_', a letter or digit first and last; no number, not localhost"
)


class BadNamespace(FaashoundError):
    """A request about a namespace makes no sense; the text has a line for each problem."""

    status = 400


class UnknownNamespace(FaashoundError):
    """There is no such namespace."""

    status = 404


class NamespaceExists(FaashoundError):
    """There is such a namespace already."""

    status = 409


class NamespaceInUse(FaashoundError):
    """The namespace is not empty, or is there by the operator's word."""

    status = 409


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace, and what clients have noted of it."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, object]:
        """Return the members of OpenFaaS' FunctionNamespace."""
        return {"name": self.name, "labels": dict(self.labels), "annotations": dict(self.annotations)}


def parse_namespace(document: Mapping[str, Any], name: str = "") -> Namespace:
    """Return what the JSON of a request asks for; `name` is that of its path, if it has one.  Raises BadNamespace."""
    problems: list[str] = []
    given = document.get("name") or name
    if not isinstance(given, str) or not is_label(given):
        problems.append(f"name: {str(given)[:100]!r}: allowed: {NAMESPACE_RULE}")
    elif name and given != name:
        problems.append(f"name: {given!r}: allowed: {name!r}, as in the path, or none")
    notes = {key: {} if document.get(key) is None else document[key] for key in ("labels", "annotations")}
    for key, texts in notes.items():
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            problems.append(f"{key}: allowed: an object whose values are strings")
    if problems:
        raise BadNamespace("\n".join(problems))
    return Namespace(str(given), **notes)


class Namespaces:
    """The namespaces that were made, each a document in `store`.  Its methods block."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: dict[str, Namespace] = {}
        self.load()

    def load(self) -> None:
        """Know what is stored by now."""
        self._known = {name: self._parse(name, text) for name, text in self._store.read_all() if is_label(name)}

    def _parse(self, name: str, content: bytes | OSError) -> Namespace:
        try:
            if isinstance(content, OSError):
                raise content
            document = parse_document(content)
            return parse_namespace(document if isinstance(document, dict) else {}, name)
        except (OSError, ValueError, BadNamespace) as error:
            place = self._store.place(name)
            log.error(f"what was noted of the namespace {name} is lost: {place}: {reason_of(error, place)}")
            return Namespace(name)

    def names(self) -> list[str]:
        """Return the names of all."""
        return sorted(self._known)

    def find(self, name: str) -> Namespace | None:
        """Return one of them; None if it was not made."""
        return self._known.get(name)

    def store(self, namespace: Namespace) -> None:
        """Keep one, in place of an older one of its name; raises NotStored."""
        self._store.write(namespace.name, json.dumps(namespace.describe()).encode())
        self._known[namespace.name] = namespace

    def delete(self, name: str) -> None:
        """Keep one no longer; raises NotStored."""
        self._store.delete(name)
        self._known.pop(name, None)
