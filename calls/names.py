"""What a function is called: NAME.NAMESPACE, one type from the URL of a request to the callback of its outcome.

    parse_function_name("cat")           # FunctionName("cat.openfaas-fn")
    parse_function_name("cat.prod").namespace

Contract: a `FunctionName` is always whole, so two of them are equal only if they mean the same function; it is text,
and may stand in a URL, a metric, a queue's subject or a log line as it is.

What it refuses: names that something could read as an address.  They come from strangers, and a pattern such as
`http://{name}:8080` makes a host of them: `2852039166` is 169.254.169.254 to most resolvers, `localhost` is us.
"""

from __future__ import annotations

import re

from ..watchdog import FaashoundError

DEFAULT_NAMESPACE = "openfaas-fn"  # where OpenFaaS puts a function that names no namespace


# A DNS label as in Kubernetes (RFC 1123 2.1), where OpenFaaS also lets underscores through.
_LABEL = re.compile(r"[a-z0-9](?:[-a-z0-9_]{0,61}[a-z0-9])?", re.ASCII)


# inet_aton(3) reads decimal, octal and hexadecimal numbers as (parts of) an IPv4 address; URL parsers follow it.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*", re.ASCII)


_OURSELVES = frozenset(("localhost", "localdomain"))  # RFC 6761 6.3: `x.localhost` is the loopback address as well


NAME_HELP = (
    "1 to 63 of a-z, 0-9, '-' and '_', with a letter or digit at both ends, that is no number and not localhost,"
    " and optionally '.' and a namespace of the same form"
)


class BadFunctionName(FaashoundError):
    """Text that names no function, whatever functions there are."""

    status = 404


class FunctionName(str):
    """The whole name of a function, `NAME.NAMESPACE`.  Made by `parse_function_name`, which checks it."""

    __slots__ = ()

    @property
    def name(self) -> str:
        """The name within its namespace: `cat` of `cat.openfaas-fn`."""
        return self.partition(".")[0]

    @property
    def namespace(self) -> str:
        """The namespace: `openfaas-fn` of `cat.openfaas-fn`."""
        return self.partition(".")[2]

    @property
    def short(self) -> str:
        """What people type: without the namespace where that is the default one."""
        return self.name if self.namespace == DEFAULT_NAMESPACE else str(self)


def is_label(text: str) -> bool:
    """Return whether `text` may be the name of a function within a namespace, or of a namespace."""
    return bool(_LABEL.fullmatch(text)) and not _NUMBER.fullmatch(text) and text not in _OURSELVES


def parse_function_name(text: str, namespace: str = DEFAULT_NAMESPACE) -> FunctionName:
    """Return the whole name that `text`, NAME or NAME.NAMESPACE, means; `namespace` is that of a bare NAME.

    Raises BadFunctionName, which says what is allowed.
    """
    name, dot, given = text.partition(".")
    wanted = given if dot else namespace
    if not is_label(name) or not is_label(wanted):
        raise BadFunctionName(f"{text!r:.200} is no function's name; allowed: {NAME_HELP}")
    return FunctionName(f"{name}.{wanted}")


def parse_namespaces(text: str) -> frozenset[str]:
    """Return the namespaces of a setting; ValueError says what is allowed."""
    words = frozenset(word.strip() for word in text.split(","))
    if not all(map(is_label, words)):
        raise ValueError("allowed: namespaces, by commas: each 1 to 63 of a-z, 0-9, '-' and '_', and no number")
    return words
