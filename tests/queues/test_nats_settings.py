"""What a NATS queue is told by settings and their files: what is wrong with them is said, and not what is in them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]
import pytest
from nats.errors import TimeoutError as NatsTimeoutError

from faashound.calls.model import QueueUnavailable
from faashound.queues.jetstream.connection import queue_error
from faashound.queues.nats_settings import NatsSettings, build_tls, default_nats_settings, read_login
from faashound.watchdog import CannotStart

SEED = nkeys.encode_seed(bytes(range(32)), nkeys.PREFIX_BYTE_USER).decode()
JWT_PART = "-----BEGIN NATS USER JWT-----\neyJhbGciOi.eyJqdGki.c2ln\n------END NATS USER JWT------\n"
SEED_PART = f"-----BEGIN USER NKEY SEED-----\n{SEED}\n------END USER NKEY SEED------\n"


def settings(**changes: Any) -> NatsSettings:
    return dataclasses.replace(default_nats_settings(), **changes)


@pytest.mark.parametrize("name", ["nats_nkey_file", "nats_creds_file"])
@pytest.mark.parametrize(
    "text",
    [
        *("geheim", SEED[:-3], "SUAB geheim", SEED_PART.replace(SEED, "geheim") + JWT_PART, JWT_PART + JWT_PART[:29]),
        *(SEED_PART, JWT_PART, (JWT_PART + SEED_PART).replace("\n", "\r\n"), JWT_PART + SEED_PART[:32]),
    ],
)
def test_file_that_holds_no_login_is_refused_by_name_and_nothing_of_it_is_told(
    tmp_path: Path, name: str, text: str
) -> None:
    path = tmp_path / "login"
    path.write_bytes(text.encode())
    with pytest.raises(CannotStart, match=f"{path} .*{name}.*allowed: ") as caught:
        read_login(settings(**{name: str(path)}))
    assert "geheim" not in str(caught.value)
    assert SEED not in str(caught.value)


def test_file_that_holds_a_login_is_taken(tmp_path: Path) -> None:
    (tmp_path / "seed").write_text(f"{SEED}\n")
    (tmp_path / "creds").write_text(f"{JWT_PART}\n{SEED_PART}")
    assert read_login(settings(nats_nkey_file=str(tmp_path / "seed"))) == {"nkeys_seed_str": SEED}
    creds = str(tmp_path / "creds")
    assert read_login(settings(nats_creds_file=creds)) == {"user_credentials": creds}


@pytest.mark.parametrize("missing", ["nats_ca_file", "nats_cert_file", "nats_key_file"])
@pytest.mark.parametrize("junk", [None, "junk"])
def test_file_of_tls_that_cannot_be_used_is_named(tmp_path: Path, missing: str, junk: str | None) -> None:
    path = tmp_path / "file"
    if junk is not None:
        path.write_text(junk)
    there = tmp_path / "there"
    there.touch()
    own = {} if missing == "nats_ca_file" else {"nats_cert_file": str(there), "nats_key_file": str(there)}
    with pytest.raises(CannotStart, match=missing) as caught:
        build_tls(settings(**own | {missing: str(path)}))
    assert str(path) in str(caught.value)
    assert "Errno" not in str(caught.value)
    assert "_ssl.c" not in str(caught.value)


@pytest.mark.parametrize("error", [TimeoutError(), NatsTimeoutError()], ids=["ours", "theirs"])
def test_queue_that_does_not_answer_is_said_so(error: Exception) -> None:
    reason = queue_error(error)
    assert isinstance(reason, QueueUnavailable)
    assert str(reason) == "NATS cannot be used: no answer in time"
