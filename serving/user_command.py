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

from .users import NAME_RULE, Role, hash_password, is_user_name


def write_user(argv: Sequence[str]) -> int:
    """Do what the command line `argv` asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="fgateway password", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", type=_parse_name, help=f"of the user: {NAME_RULE}")
    roles = [role.value for role in Role]
    parser.add_argument("role", nargs="?", choices=roles, default=Role.READ.value, help="read unless told")
    try:
        options = parser.parse_args(argv)
    except SystemExit as error:  # which has been told
        return int(error.code or 0)
    password = getpass.getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if not password:
        print("the password: allowed: a line of stdin that is not empty", file=sys.stderr)
        return 2
    print(f"{options.name}:{hash_password(password)}:{options.role}")
    return 0


def _parse_name(text: str) -> str:
    if not is_user_name(text):
        raise argparse.ArgumentTypeError(f"allowed: {NAME_RULE}")
    return text
