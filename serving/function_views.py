"""What clients of OpenFaaS' gateway see of a function, and of the gateway itself (pure).

    describe_function(function, Replicas(wanted_count=1, available_count=1), invocations_count=17)
    describe_gateway("1.4.0", "3f2a...", "x86_64")

Contract: the members that faas-cli, its SDK and the certifier read, in the types that they read them into: `labels` and
`annotations` are objects, `replicas` whole numbers, and what there is not is left out.

What it refuses to show: the address of a function, and the environment of one that the functions file declares, where
an operator may have put what is no caller's business.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..functions.table import Function

FUNCTION_LABEL = "faas_function"  # that OpenFaaS gives each function, and its dashboards ask for


@dataclass(frozen=True, slots=True)
class Replicas:
    """How many processes serve a function: as it should be, and as it is."""

    wanted_count: int
    available_count: int


@dataclass(frozen=True, slots=True)
class Usage:
    """What the processes of a function take now: thousandths of a processor, and bytes of memory."""

    cpu_millis: int
    memory_bytes: int


# A function that answers elsewhere is there as far as we know, and so is a client told that waits for it.
ELSEWHERE = Replicas(1, 1)


def describe_function(
    function: Function,
    replicas: Replicas,
    invocations_count: int,
    usage: Usage | None = None,
    deployed: Mapping[str, object] | None = None,
) -> dict[str, object]:
    """Return a function's status as JSON members; `deployed` are those that come from its deployment, if it was."""
    settings = function.settings or {}
    declared: dict[str, object] = {
        "name": function.name.name,
        "namespace": function.name.namespace,
        "image": "process" if function.local else "remote",
        "envProcess": settings.get("fprocess") or settings.get("function_process", ""),
        **({"secrets": list(function.secrets)} if function.secrets else {}),
    }
    status: dict[str, object] = {
        **(declared if deployed is None else deployed),
        "labels": {FUNCTION_LABEL: function.name.name, **function.labels},
        "annotations": dict(function.annotations),
        "invocationCount": invocations_count,
        "replicas": replicas.wanted_count,
        "availableReplicas": replicas.available_count,
        "local": function.local,
    }
    if usage is not None:
        status["usage"] = {"cpu": usage.cpu_millis, "totalMemoryBytes": usage.memory_bytes}
    return status


def describe_gateway(version: str, sha: str, architecture: str) -> dict[str, object]:
    """Return what `faas-cli version` shows of a gateway; `sha` names the sources that it runs."""
    release = {"release": version, "sha": sha}
    return {
        "provider": {"provider": "faashound", "orchestration": "processes", "version": release},
        "version": {**release, "commit_message": ""},
        "arch": architecture,
    }
