"""fgateway password NAME [ROLE]: writes a user's line for the file of users; the password comes from stdin.

    fgateway password alice deploy >>/run/secrets/basic-auth-users

Contract: exit status 0 and the line on stdout, or 2 and what is allowed.  The password is in no argument, which other
users of the machine see, and is not shown where it is typed.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence

from ..queues.commands import CommandParser
from ..watchdog import OutputFailed, report_failure, write_out
from .users import NAME_RULE, Role, hash_password, is_user_name


def write_user(argv: Sequence[str]) -> int:
    """Do what the command line `argv` asks for; return the exit status."""
    try:
        return _write_user(argv)
    except OutputFailed as error:
        return report_failure(error)


def _write_user(argv: Sequence[str]) -> int:
    parser = CommandParser(prog="fgateway password", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", type=_parse_name, help=f"of the user: {NAME_RULE}")
    roles = [role.value for role in Role]
    parser.add_argument("role", nargs="?", choices=roles, default=Role.READ.value, help="read unless told")
    try:
        options = parser.parse_args(argv)
    except SystemExit as error:  # which has been told
        return int(error.code or 0)
    password = _read_password()
    if not password:
        print("the password: allowed: a line of stdin that is not empty, in UTF-8", file=sys.stderr)
        return 2
    write_out(f"{options.name}:{hash_password(password)}:{options.role}")
    return 0


def _read_password() -> str:
    """Return the password; an empty one if there is none, or none that is text."""
    if sys.stdin is None:  # it was closed when we were started
        return ""
    try:
        if sys.stdin.isatty():
            return getpass.getpass()
        return sys.stdin.buffer.readline().decode().rstrip("\r\n")
    except (OSError, EOFError, UnicodeError):
        return ""


def _parse_name(text: str) -> str:
    if not is_user_name(text):
        raise argparse.ArgumentTypeError(f"allowed: {NAME_RULE}")
    return text
