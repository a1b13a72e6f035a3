"""What a secret may be called.  Pure."""

from __future__ import annotations

import re

SECRETS_ARE = "1 to 253 lower-case letters, digits, '-' and '.', a letter or digit first and last"


def is_secret_name(text: str) -> bool:
    """Tell whether `text` may be the name of a secret, which is the name of a file (as Kubernetes has it)."""
    return len(text) <= 253 and re.fullmatch(r"[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?", text, re.ASCII) is not None
