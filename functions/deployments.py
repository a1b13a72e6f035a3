"""What a client of OpenFaaS means by a deployment, read and judged; and where those that were taken are kept.

    deployment = parse_deployment(document, rules)       # every problem at once: BadDeployment
    deployment.function                                  # what is run for it
    deployment.document                                  # what is told of it, byte for byte what was sent

A deployment names an image.  This gateway runs programs: `process` (or `process:TAG`) is one that envProcess names
here, and the operator's table of images says which other names mean the same, or a directory to run it in, and what
such an image brings along.  That an envProcess is there decides nothing: templates send it beside real images.

envVars that are settings of the watchdog configure it, the rest is the program's environment.  What would be a promise
of security (limits, readOnlyRootFilesystem) is kept or refused, never passed over; `requests` and `constraints` are
told back and mean nothing here.

Pure but for `Deployments`, which keeps documents (documents.py), and for the look whether a program is there.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..calls.names import DEFAULT_NAMESPACE, BadFunctionName, FunctionName, is_label, parse_function_name
from ..watchdog import BadSettings, FaashoundError, Settings, log, parse_command, parse_settings, reason_of
from .documents import Store, parse_document, parse_time
from .exposure import AUTH_ANNOTATION, BadExposure, parse_exposure
from .namespaces import NAMESPACE_RULE
from .scaling import BadLabels, parse_scale
from .table import (
    PROCESS_IMAGE,
    REFUSED_SETTINGS,
    RESERVED_PREFIXES,
    TOO_LONG,
    WATCHDOG_ROWS,
    Function,
    Image,
    annotation_problems,
    exceeds_execve,
    watchdog_settings,
)

COMMAND_SETTINGS = ("fprocess", "function_process")

TOLD_FIELDS = ("image", "envProcess", "envVars", "secrets", "limits", "requests", "constraints")


class BadDeployment(FaashoundError):
    """A deployment cannot be taken.  `problems` names every field that is wrong, and what is allowed."""

    status = 400

    def __init__(self, problems: Collection[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


@dataclass(frozen=True, slots=True)
class Rules:
    """What deployments are judged by: the operator's images, the secrets and namespaces there are, and `path` to look
    for programs in; with `ignores_limits` limits are taken and mean nothing.
    """

    images: Mapping[str, Image] = field(default_factory=dict)
    secrets: Collection[tuple[str, str]] = ()  # namespace and name
    namespaces: Collection[str] = (DEFAULT_NAMESPACE,)
    path: str | None = None
    ignores_limits: bool = False


@dataclass(frozen=True, slots=True)
class Deployment:
    """A function that was deployed: as it was sent, as it is run, and when it was deployed first."""

    document: Mapping[str, Any]
    function: Function
    created_s: float

    def describe(self) -> dict[str, object]:
        """Return the members of FunctionStatus that come from the deployment alone.

        What was not sent, or is empty, is left out: clients compare.
        """
        told = {name: self.document[name] for name in TOLD_FIELDS if self.document.get(name)}
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.created_s))
        return {
            "name": self.function.name.name,
            "namespace": self.function.name.namespace,
            **told,
            "readOnlyRootFilesystem": False,
            "createdAt": created,
        }


def parse_deployment(document: object, rules: Rules, created_s: float, namespace: str = "") -> Deployment:
    """Return what `document`, the JSON of a request, asks for; `namespace` is that of the query, if it has one.

    Raises BadDeployment with every problem.
    """
    if not isinstance(document, dict):
        raise BadDeployment(["allowed: a JSON object with service, image and envProcess"])
    return _Reader(document, rules).read(created_s, namespace)


def name_of(document: Mapping[str, Any], namespace: str = "", key: str = "service") -> FunctionName:
    """Return the whole name of the function that a document means; raises BadDeployment."""
    name, space = document.get(key), document.get("namespace") or namespace or DEFAULT_NAMESPACE
    problems: list[str] = []
    if not isinstance(space, str) or not is_label(space):
        problems.append(f"namespace: {space!r:.100}: allowed: {NAMESPACE_RULE}")
        space = DEFAULT_NAMESPACE
    try:
        if name is None:
            raise BadFunctionName("it is missing")
        if not isinstance(name, str) or "." in name:
            raise BadFunctionName(f"{name!r:.200} is no function's name")
        found = parse_function_name(name, space)
    except BadFunctionName as error:
        problems.insert(0, f"{key}: {error}")
    if problems:
        raise BadDeployment(problems)
    return found


class _Reader:
    """One reading of a document; `problems` are gathered on the way."""

    def __init__(self, document: Mapping[str, Any], rules: Rules) -> None:
        self._document = document
        self._rules = rules
        self.problems: list[str] = []

    def read(self, created_s: float, namespace: str) -> Deployment:
        name = self._name(namespace)
        image = self._image()
        labels, annotations = self._texts("labels"), self._texts("annotations")
        settings, environment = self._split_variables(self._texts("envVars"))
        environment = {**image.environment, **environment}
        settings = {**image.settings, **settings}
        if settings.get("mode") != "static" or self._document.get("envProcess"):
            settings["fprocess"] = self._command(image, environment)
        settings.pop("function_process", None)  # the other name of fprocess, by which the image may have it
        self._check_meanings(labels, annotations)
        self._check_promises()
        secrets = self._secrets(name, annotations)
        self._check_settings(settings)
        if self.problems or name is None:
            raise BadDeployment(self.problems)
        function = Function(name, None, settings, environment, annotations, labels, secrets, image.directory)
        return Deployment(self._document, function, created_s)

    def _name(self, namespace: str) -> FunctionName | None:
        try:
            name = name_of(self._document, namespace)
        except BadDeployment as error:
            self.problems += error.problems
            return None
        if name.namespace not in self._rules.namespaces:
            allowed = ", ".join(sorted(self._rules.namespaces))
            self.problems.append(f"namespace: there is no {name.namespace}; allowed: {allowed}")
        return name

    def _image(self) -> Image:
        """Return what the image means here; an empty one if it means nothing."""
        image = self._document.get("image")
        if not isinstance(image, str) or not image:
            self.problems.append("image: missing; allowed: process, with an envProcess")
            return Image()
        found = find_image(image, self._rules.images)
        if found is None:
            known = ", ".join([PROCESS_IMAGE, *self._rules.images])
            self.problems.append(f"image: this gateway runs programs, not images: {image[:200]!r}; allowed: {known}")
        return found or Image()

    def _command(self, image: Image, environment: Mapping[str, str]) -> str:
        text = self._document.get("envProcess") or next(
            (image.settings[key] for key in COMMAND_SETTINGS if image.settings.get(key)), None
        )
        if not isinstance(text, str) or not text:
            self.problems.append("envProcess: missing; allowed: the command that is run for each call")
            return ""
        try:
            program = parse_command(text)[0]
        except ValueError as error:
            self.problems.append(f"envProcess: {error}")
            return ""
        beside = os.path.join(image.directory or "", program) if "/" in program else program  # noqa: PTH118 - a word
        if shutil.which(beside, path=environment.get("PATH", self._rules.path)) is None:
            self.problems.append(f"envProcess: there is no program {program[:200]!r} here that can be run")
        return text

    def _texts(self, key: str) -> dict[str, str]:
        """Return an object of texts; null is an empty one."""
        value = self._document.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
            self.problems.append(f"{key}: allowed: an object whose values are strings")
            return {}
        bad = [name for name, text in value.items() if "\0" in name + text]
        self.problems += [f"{key}: {name!r}: allowed: text without NUL characters" for name in bad]
        return dict(value)

    def _names(self, key: str) -> list[str]:
        """Return an array of texts; null is an empty one."""
        value = self._document.get(key) or []
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return value
        self.problems.append(f"{key}: allowed: an array of strings")
        return []

    def _split_variables(self, variables: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
        """Return the watchdog's settings among envVars, and the program's environment."""
        settings: dict[str, str] = {}
        environment: dict[str, str] = {}
        for name, text in variables.items():
            if name in COMMAND_SETTINGS:
                self.problems.append(f"envVars: {name}: not allowed here; envProcess says what is run")
            elif name in REFUSED_SETTINGS:
                self.problems.append(f"envVars: {name}: not allowed here: {REFUSED_SETTINGS[name]}")
            elif name in WATCHDOG_ROWS:
                settings[name] = text
            elif not name or "=" in name:
                self.problems.append(f"envVars: {name!r}: not a variable's name; allowed: anything without '='")
            elif name.startswith(RESERVED_PREFIXES):
                self.problems.append(f"envVars: {name}: reserved")
            elif exceeds_execve(name, text):
                self.problems.append(f"envVars: {name[:200]!r}: {TOO_LONG}")
            else:
                environment[name] = text
        return settings, environment

    def _check_settings(self, settings: Mapping[str, str]) -> None:
        if settings.get("fprocess") == "":  # said already
            return
        try:
            parse_settings(Settings, watchdog_settings(settings))
        except BadSettings as error:
            self.problems += [f"envVars: {problem}" for problem in error.problems]

    def _check_meanings(self, labels: Mapping[str, str], annotations: Mapping[str, str]) -> None:
        """Report labels and annotations that mean something to us and make no sense."""
        try:
            parse_scale(labels)
        except BadLabels as error:
            self.problems += [f"labels: {name}: {problem}" for name, problem in error.problems.items()]
        found = annotation_problems(annotations)
        self.problems += [f"annotations: {name}: {problem}" for name, problem in found.items()]

    def _check_promises(self) -> None:
        """Refuse what a client would rely on and we do not keep."""
        if self._texts("limits") and not self._rules.ignores_limits:
            self.problems.append("limits: this gateway limits no function; allowed: none, unless limits=ignore is set")
        self._texts("requests")
        self._names("constraints")
        if self._document.get("readOnlyRootFilesystem"):
            self.problems.append("readOnlyRootFilesystem: not kept by this gateway; allowed: false")

    def _secrets(self, name: FunctionName | None, annotations: Mapping[str, str]) -> tuple[str, ...]:
        """Return the names of secrets that the function gets; those that it means are to be there."""
        names = self._names("secrets")
        space = name.namespace if name else DEFAULT_NAMESPACE
        known = {each for namespace, each in self._rules.secrets if namespace == space}
        missing = [each for each in names if each not in known]
        self.problems += [f"secrets: there is no {each[:200]!r} in {space}" for each in missing]
        token = _token_of(annotations)
        if token is not None and token not in known:
            self.problems.append(f"annotations: {AUTH_ANNOTATION}: there is no secret {token} in {space}")
        return tuple(dict.fromkeys(names))

    def needed_secrets(self) -> set[str | None]:
        """Return the names of all secrets that the document means, whatever else is wrong with it."""
        return {*self._names("secrets"), _token_of(self._texts("annotations"))}


def _token_of(annotations: Mapping[str, str]) -> str | None:
    """Return the name of the secret by which callers are let in, if there is one; what is wrong is told elsewhere."""
    with suppress(BadExposure):
        return parse_exposure(annotations).secret
    return None


def find_image(image: str, images: Mapping[str, Image]) -> Image | None:
    """Return what an image means here; None: nothing.

    With or without `docker.io/` before it, and a tag behind it: clients add both.
    """
    bare = image.removeprefix("docker.io/")
    head, slash, last = bare.rpartition("/")
    untagged = head + slash + last.partition(":")[0]
    known = {PROCESS_IMAGE: Image()} | {name.removeprefix("docker.io/"): to for name, to in images.items()}
    return known.get(bare) or known.get(untagged)


class Deployments:
    """The deployments that were taken, each a document in `store`.  Its methods block on what keeps them."""

    def __init__(self, store: Store) -> None:
        self._documents = store

    def load(self, rules: Rules) -> dict[FunctionName, Deployment]:
        """Return every deployment that can be used; one that is damaged, or not allowed any more, is logged."""
        found: dict[FunctionName, Deployment] = {}
        for name, content in self._documents.read_all():
            try:
                if isinstance(content, OSError):
                    raise content
                stored = _parse_stored(content)
                deployment = parse_deployment(stored["deployment"], rules, parse_time(stored["created_s"]))
            except (OSError, ValueError, BadDeployment) as error:
                place = self._documents.place(name)
                log.error(f"the deployed function {name} is disabled: {place}: {reason_of(error, place)}")
            else:
                found[deployment.function.name] = deployment
        return found

    def names(self) -> list[str]:
        """Return the whole names of all that are kept, whether or not they can be used."""
        return self._documents.names()

    def users(self, namespace: str, secret: str) -> list[FunctionName]:
        """Return the functions that need a secret, whether or not they can be used; one that is damaged needs none."""
        found = []
        for name, content in self._documents.read_all():
            with suppress(OSError, ValueError):
                if isinstance(content, OSError):
                    raise content
                document, user = _parse_stored(content)["deployment"], FunctionName(name)
                needed = _Reader(document, Rules()).needed_secrets() if isinstance(document, dict) else ()
                if user.namespace == namespace and secret in needed:
                    found.append(user)
        return found

    def store(self, deployment: Deployment) -> None:
        """Keep a deployment, in place of an older one of its name; raises NotStored."""
        document = {"deployment": deployment.document, "created_s": deployment.created_s}
        # The namespace may have come from the query.
        document["deployment"] = {**deployment.document, "namespace": deployment.function.name.namespace}
        self._documents.write(str(deployment.function.name), json.dumps(document).encode())

    def delete(self, name: FunctionName) -> None:
        """Keep it no longer; raises NotStored."""
        self._documents.delete(str(name))


def _parse_stored(content: bytes) -> dict[str, Any]:
    """Return what a document holds, `deployment` and `created_s`; ValueError if it is none of ours."""
    stored = parse_document(content)
    if not isinstance(stored, dict) or not {"deployment", "created_s"} <= stored.keys():
        raise ValueError("not a document of ours")
    return stored
