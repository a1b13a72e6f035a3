"""The names of queues, as the setting `queues` and the annotation com.openfaas.queue have them."""

from __future__ import annotations

import re

_QUEUE_NAME = re.compile(r"[a-zA-Z0-9](?:[-_.a-zA-Z0-9]{0,61}[a-zA-Z0-9])?", re.ASCII)


QUEUE_NAME_HELP = "1 to 63 of a-z, A-Z, 0-9, '-', '_' and '.', with a letter or digit at both ends"


def parse_queue_name(text: str) -> str:
    """The name of a queue, such as `faas-request`; ValueError, saying what is allowed, for anything else."""
    if not _QUEUE_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a queue's name; allowed: {QUEUE_NAME_HELP}")
    return text


def parse_queue_names(text: str) -> tuple[str, ...]:
    """The names in `text`, separated by commas, each once; ValueError for a bad one."""
    return tuple(dict.fromkeys(parse_queue_name(word.strip()) for word in text.split(",")))
