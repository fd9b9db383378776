"""All services as processes: database, auth-service, pool, one or more gateways; the command line as the operator."""

import contextlib
import functools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.db.support import folder

from .stack import SCRIPTED, Process, context, environment, until


@dataclass
class Platform:
    """What `helixflow serve` starts, each process in the test's hand."""

    certs: Path
    place: Path
    environ: dict[str, str]
    database: Process | None
    auth: Process
    pool: Process
    gateways: list[Process] = field(default_factory=list)

    def gateway(self, name: str = "", **options: str) -> Process:
        """Starts one more gateway."""
        number = len(self.gateways)
        environ = {
            **self.environ,
            "HELIX_GATEWAY_POOLS": self.pool.address,
            "HELIX_GATEWAY_AUTH": self.auth.address,
            "HELIX_LEDGER_SPOOL": str(self.place / f"spool{name or number}"),
            **options,
        }
        gateway = Process(("gateway",), environ, self.place / f"gateway{name or number}.log").start()
        self.gateways.append(gateway)
        with self.client("", gateway) as client:
            until(lambda: client.get("/ready").status_code == 200, "the gateway is ready")
        return gateway

    def client(self, key: str = "demo-key", gateway: Process | None = None, **options: Any) -> httpx.Client:
        """A client that trusts the CA and presents the key."""
        port = (gateway or self.gateways[0]).address.rpartition(":")[2]
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(
            base_url=f"https://localhost:{port}", verify=context(self.certs), headers=headers, timeout=25, **options
        )

    def run(self, *arguments: str, status: int = 0, text: str = "") -> str:
        """One command of `helixflow`; its standard output."""
        done = subprocess.run(
            [sys.executable, "-m", "helixflow", *arguments],
            env={**self.environ, "HELIX_GATEWAY_AUTH": self.auth.address, "HELIX_AUTH_LISTEN": self.auth.address},
            capture_output=True,
            text=True,
            input=text,
            timeout=25,
            check=False,
        )
        assert done.returncode == status, f"{arguments}: status {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    @functools.cached_property
    def admin_key(self) -> str:
        """A key of the owner that administers; made when it is first asked for."""
        made = self.json("key", "add", "administration", "--user", "owner@localhost", "--admin")
        return str(made["secret"])

    def json(self, *arguments: str) -> Any:
        """One command with `--json`."""
        return json.loads(self.run(*arguments, "--json"))

    def close(self) -> None:
        """Stops everything, gateways first."""
        with contextlib.ExitStack() as exits:
            for process in (self.database, self.auth, self.pool, *self.gateways):
                if process is not None:
                    exits.callback(process.stop)


@contextlib.contextmanager
def platform(certs: Path, *, gateways: int = 1, url: str = "", **options: str) -> Iterator[Platform]:
    """Starts everything. `url`: a database of the test's own instead of an embedded one."""
    with folder() as place:
        environ = environment(certs, place, **SCRIPTED)
        environ |= {
            "HELIX_GATEWAY_ACCOUNTS": "true",
            "HELIX_AUTH_LISTEN": "127.0.0.1:0",
            "HELIX_DATABASE_DIRECTORY": str(place / "postgres"),
            **options,
        }
        with contextlib.ExitStack() as exits:
            database = None
            if url:
                environ["HELIX_DATABASE_URL"] = url
            else:
                database = Process(("db", "run"), environ, place / "database.log").start()
                exits.callback(database.stop)
            auth = Process(("auth",), environ, place / "auth.log").start()
            exits.callback(auth.stop)
            pool = Process(("pool",), environ, place / "pool.log").start()
            exits.callback(pool.stop)
            made = Platform(certs, place, environ, database, auth, pool)
            exits.pop_all()
            try:
                for _ in range(gateways):
                    made.gateway()
                yield made
            finally:
                made.close()
