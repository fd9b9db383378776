"""A gateway that starts while the database is away: it serves what the auth-service remembers, and nothing else."""

import signal
import time
from pathlib import Path

import httpx

from helixflow.auth.keys import make

from .accounts import platform
from .stack import until

CHAT = {"model": "gpt-4", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def ask(client: httpx.Client, key: str) -> int:
    return client.post("/v1/chat/completions", json=CHAT, headers={"Authorization": f"Bearer {key}"}).status_code


def test_known_keys_are_served_by_a_gateway_that_starts_without_the_database(certs: Path) -> None:
    with platform(certs) as started:
        made = {name: started.json("key", "add", name) for name in ("used", "revoked", "unused")}
        used, revoked, unused = (made[name]["secret"] for name in ("used", "revoked", "unused"))
        with started.client("") as first:
            assert ask(first, used) == ask(first, revoked) == 200
            started.run("key", "revoke", made["revoked"]["key"]["id"])
            until(lambda: ask(first, revoked) == 401, "the revocation is heard")
        assert started.database is not None
        assert started.database.stop(signal.SIGTERM) == 0
        second = started.gateway()
        with started.client("", second) as client:
            began = time.monotonic()
            assert ask(client, used) == 200
            assert time.monotonic() - began < 3
            for unknown in (revoked, unused, make()):
                assert ask(client, unknown) == 503, "nobody can tell now"
            answer = client.get("/admin/v1/keys", headers={"Authorization": f"Bearer {used}"})
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "unavailable"
