"""`serve` as root: who runs as whom, what each can reach, and what happens where that cannot be had. Needs root."""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from helixflow.confine.account import ROOT, SERVICES, Account
from helixflow.confine.belongings import software
from helixflow.confine.plan import PLAN, Plan
from helixflow.process import PARENT_PID
from tests.db.support import folder

from .stack import HEADERS, SCRIPTED, context, environment, until
from .test_lifecycle import alive
from .test_serve import CHAT, Served
from .test_supervision import answers, lines, worker_of

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others"),
    pytest.mark.timeout(120),
]
FIRST = 60601
DEMO = Path(__file__).resolve().parents[2] / "engines" / "demo"
UIDS = {name: FIRST + SERVICES.index(name) for name in ("gateway", "auth", "pool")}
SECRETS = {
    "HELIX_AUTH_OIDC_CLIENT_SECRET": "oidc-client-s3cret",
    "HELIX_DATABASE_ADMIN_URL": "postgresql://admin:admin-s3cret@127.0.0.1/x",
    "AWS_SECRET_ACCESS_KEY": "cloud-s3cret",
}
CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


def status(pid: int) -> dict[str, str]:
    read = Path(f"/proc/{pid}/status").read_text("ascii", "replace").splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in read)}


def environ(pid: int) -> str:
    return Path(f"/proc/{pid}/environ").read_bytes().decode("utf-8", "replace")


def serial(url: str, certs: Path) -> str:
    port = int(url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), 10) as plain:
        wrapped: ssl.SSLSocket = context(certs).wrap_socket(plain, server_hostname="localhost")
        with wrapped:
            return str((wrapped.getpeercert() or {})["serialNumber"])


Start = Callable[..., Served]


@pytest.fixture
def place() -> Iterator[Path]:
    with folder() as path:
        yield path


@pytest.fixture
def own(certs: Path, tmp_path: Path) -> Path:
    """Certificates that a test may change: behind folders that no service may pass."""
    return Path(shutil.copytree(certs, tmp_path / "certs"))


@pytest.fixture
def serve(own: Path, place: Path, tmp_path: Path) -> Iterator[Start]:
    """`helixflow serve` with accounts on, its state where accounts of services may go."""
    started: list[Served] = []

    def start(**options: str) -> Served:
        given = environment(own, place / "home", **{**SCRIPTED, **options})
        given |= {
            "HELIX_GATEWAY_ACCOUNTS": "true",
            "HELIX_AUTH_LISTEN": "127.0.0.1:0",
            "HELIX_DATABASE_DIRECTORY": str(place / "postgres"),
            **options,
        }
        with (tmp_path / "serve.log").open("ab") as output:
            started.append(Served(given, stderr=output))
        return started[-1]

    yield start
    for served in started:
        family = served.family()
        served.popen.kill()
        served.popen.communicate(timeout=20)
        # PostgreSQL takes a moment, and its files are removed next.
        until(lambda family=family: not any(alive(pid) for pid in family), "nothing is left running", 30)


def pids(served: Served) -> dict[str, int]:
    found = {name: served.child(name) for name in UIDS}
    return {**found, "worker": worker_of(found["gateway"])}


def test_each_service_is_somebody_without_rights(serve: Start, own: Path, place: Path, tmp_path: Path) -> None:
    served = serve(**SECRETS, HELIX_AUTH_OIDC_ISSUER="https://127.0.0.1:1", HELIX_AUTH_OIDC_CLIENT_ID="x").until_ready()
    until(lambda: answers(served, own), "it serves", 30)
    running = pids(served)
    for name, pid in running.items():
        said = status(pid)
        uid = str(UIDS["gateway" if name == "worker" else name])
        assert said["Uid"].split() == said["Gid"].split() == [uid] * 4, name
        assert said["Groups"] == ""
        assert {said[each] for each in CAPABILITIES} == {"0" * 16}, name
        assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2"), name
        assert "cloud-s3cret" not in environ(pid)
        assert "admin-s3cret" not in environ(pid)
        assert ("oidc-client-s3cret" in environ(pid)) == (name == "auth"), name
        limits = Path(f"/proc/{pid}/limits").read_text().splitlines()
        [core] = [line.split() for line in limits if line.startswith("Max core file size")]
        assert core[4:6] == ["0", "0"]
    owner = status(served.child("run"))
    assert owner["NoNewPrivs"] == "1"
    assert int(owner["CapBnd"], 16) == 0b11101011, "the owner of the database keeps what it starts PostgreSQL with"
    assert lines(tmp_path, "service keeps the account root, without its capabilities") == []

    run = place / "home" / "run"
    readable = {
        "gateway": [run / "gateway/certs/api-gateway-key.pem", place / "home/spool"],
        "auth": [run / "auth/certs/jwt-private.pem", place / "home/secrets/pepper"],
        "pool": [run / "pool/certs/inference-pool-key.pem"],
    }
    secret = [own / "helixflow-ca-key.pem", place / "postgres" / "data" / "PG_VERSION"]
    for name, number in UIDS.items():
        others = [path for other, paths in readable.items() if other != name for path in paths]
        assert opened(number, readable[name]) == readable[name], name
        assert opened(number, [*others, *secret]) == [], name
        socket_open = connects(number, place / "postgres" / "run" / ".s.PGSQL.5432")
        assert socket_open == (name == "auth"), name
    served.popen.send_signal(signal.SIGTERM)
    assert served.popen.wait(30) == 0


OPEN = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.open(path, os.O_RDONLY)
    except OSError:
        continue
    print(path)
"""
REPLACE = """
import os, sys
for path in sys.argv[1:]:
    try:
        os.rename(path, path + ".away")
        os.rename(path + ".away", path)
    except OSError:
        continue
    print(path)
"""
CONNECT = """
import socket, sys
try:
    socket.socket(socket.AF_UNIX).connect(sys.argv[1])
except OSError:
    sys.exit()
print("connected")
"""


def opened(uid: int, paths: list[Path]) -> list[Path]:
    """Which of the paths an account can open."""
    return [Path(line) for line in as_account(uid, OPEN, *map(str, paths)).splitlines()]


def replaced(uid: int, paths: list[Path]) -> list[Path]:
    """Which of the paths an account can put something else in place of."""
    return [Path(line) for line in as_account(uid, REPLACE, *map(str, paths)).splitlines()]


def connects(uid: int, path: Path) -> bool:
    """Whether an account reaches a socket."""
    return bool(as_account(uid, CONNECT, str(path)))


def as_account(uid: int, script: str, *arguments: str) -> str:
    """Runs Debian's Python, which everybody may, as an account."""
    python = next(path for path in ("/usr/bin/python3", sys.executable) if Path(path).exists())
    return subprocess.run(
        [python, "-c", script, *arguments], user=uid, group=uid, extra_groups=[], capture_output=True, text=True,
        check=True, cwd="/", env={},
    ).stdout  # fmt: skip


def test_new_certificates_reach_services_that_cannot_see_the_originals(serve: Start, own: Path, tmp_path: Path) -> None:
    served = serve().until_ready()
    until(lambda: answers(served, own), "it serves", 30)
    before = serial(served.url, own)
    command = [sys.executable, "-m", "helixflow", "pki", "renew", "--dir", str(own)]
    subprocess.run([*command, "api-gateway", "inference-pool", "auth-service"], check=True, capture_output=True)
    until(lambda: serial(served.url, own) != before, "the new certificate is served", 20)
    until(lambda: answers(served, own), "it serves", 20)
    # They are gone, and a worker and a service die: both come back with what they have.
    own.rename(tmp_path / "away")
    running = pids(served)
    for name in ("worker", "pool"):
        os.kill(running[name], signal.SIGKILL)
    until(lambda: not alive(running["worker"]), "the worker is dead")
    until(lambda: answers(served, tmp_path / "away"), "it serves again", 40)


def test_where_an_account_cannot_reach_root_stays_without_capabilities(
    serve: Start, own: Path, place: Path, tmp_path: Path
) -> None:
    """A checkpoint that only root may read; everything else is as it was. Afterwards, no account but root's."""
    model = Path(shutil.copytree(DEMO, place / "model"))
    for path in model.iterdir():
        if path.is_file():
            path.chmod(0o600)
    served = serve(HELIX_MODEL=str(model)).until_ready()
    until(lambda: served.chat_with(own, "model") == 200, "it serves", 30)
    running = pids(served)
    assert status(running["pool"])["Uid"].split() == ["0"] * 4
    assert status(running["gateway"])["Uid"].split() == [str(UIDS["gateway"])] * 4
    said = status(running["pool"])
    assert {said[each] for each in CAPABILITIES} == {"0" * 16}
    assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
    [line] = lines(tmp_path, "service keeps the account root, without its capabilities")
    assert line["name"] == "pool"
    assert str(model) in line["reason"]
    served.popen.send_signal(signal.SIGTERM)
    assert served.popen.wait(30) == 0

    again = serve(HELIX_SUPERVISE_SEPARATE="false").until_ready()
    until(lambda: answers(again, own), "what the accounts owned is root's again", 30)
    assert {status(pid)["Uid"].split()[0] for pid in pids(again).values()} == {"0"}
    assert {status(pid)["CapEff"] for pid in pids(again).values()} == {"0" * 16}


def test_an_engine_is_built_by_the_account_that_serves_it(serve: Start, own: Path, place: Path, tmp_path: Path) -> None:
    """The checkpoint, a stranger's, lies where its engines go: the account adds them, and cannot touch the files."""
    model = Path(shutil.copytree(DEMO, place / "models" / "demo", ignore=shutil.ignore_patterns("onnx-*", ".*")))
    places = {"HELIX_MODEL": str(model), "HELIX_ENGINES": str(model.parent)}
    served = serve(HELIX_POOL_ENGINE="onnx", HELIX_POOL_MAX_LEN="256", **places).until_ready()
    until(lambda: served.chat_with(own, "demo") == 200, "it serves", 30)
    assert lines(tmp_path, "service keeps the account root, without its capabilities") == []
    [built] = [path.parent for path in model.glob("*/manifest.json")]
    assert {path.stat().st_uid for path in (built, *built.iterdir())} == {UIDS["pool"]}
    assert model.stat().st_uid == (model / "config.json").stat().st_uid == 0
    assert replaced(UIDS["pool"], [model / "config.json", built / "config.json"]) == [built / "config.json"]
    served.popen.send_signal(signal.SIGTERM)
    assert served.popen.wait(30) == 0


def test_a_port_for_the_privileged_and_a_log_of_its_own(serve: Start, own: Path, place: Path) -> None:
    port, logs = free_port(range(700, 1000)), place / "logs"
    logs.mkdir()
    logs.chmod(0o1777)
    served = serve(HELIX_GATEWAY_LISTEN=f"127.0.0.1:{port}", HELIX_LOG_FILE=f"{logs}/{{service}}.log").until_ready()
    until(lambda: answers(served, own), "it serves", 30)
    assert served.url.endswith(f":{port}")
    for pid in (pids(served)["gateway"], pids(served)["worker"]):
        said = status(pid)
        assert said["Uid"].split() == [str(UIDS["gateway"])] * 4
        assert {said[each] for each in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}, "given back once bound"
    names = {"api-gateway": "gateway", "auth-service": "auth", "inference-pool": "pool"}
    assert {name: (logs / f"{name}.log").stat().st_uid for name in names} == {
        name: UIDS[service] for name, service in names.items()
    }


def free_port(ports: range) -> int:
    for port in ports:
        try:
            with closing(socket.create_server(("127.0.0.1", port))):
                return port
        except OSError:
            continue
    raise AssertionError("no free port")


def test_started_by_somebody_else_services_have_no_way_up_either(certs: Path, place: Path, tmp_path: Path) -> None:
    """Not root: the same account for all, but no new rights, no core dumps, a filter, an environment of its own."""
    somebody = Account("somebody", 61998, 61998)
    mine = Path(shutil.copytree(certs, place / "certs"))
    home = place / "home"
    home.mkdir()
    for path in (mine, home, *mine.iterdir()):
        os.chown(path, somebody.uid, somebody.gid)
    plan = Plan.of(somebody, shown=tuple(map(str, [*software(), place, DEMO])))
    given: dict[str, Any] = environment(mine, home, **SCRIPTED, **SECRETS, HELIX_MODEL=str(DEMO), HOME=str(home))
    given |= {PLAN: plan.dumps(), PARENT_PID: str(os.getpid())}
    with (tmp_path / "serve.log").open("ab") as output:
        served = Served(given, stderr=output, launcher=("helixflow.confine.launch",))
    try:
        served.until_ready()
        with httpx.Client(base_url=served.url, verify=context(mine), headers=HEADERS, timeout=20) as client:
            body = {**CHAT, "model": "demo", "max_tokens": 3}
            until(lambda: client.post("/v1/chat/completions", json=body).status_code == 200, "it serves", 30)
        for name in ("gateway", "pool"):
            said = status(served.child(name))
            assert said["Uid"].split() == ["61998"] * 4
            assert (said["NoNewPrivs"], said["Seccomp"]) == ("1", "2")
            assert "s3cret" not in environ(served.child(name))
        served.popen.send_signal(signal.SIGTERM)
        assert served.popen.wait(30) == 0
    finally:
        served.popen.kill()
        served.popen.communicate(timeout=20)


CONTAINER = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31)
"""Capabilities that Docker leaves to root: no mounts."""


@pytest.mark.parametrize("rights", [CONTAINER, tuple(set(CONTAINER) - {8})], ids=["container", "without SETPCAP"])
def test_in_a_container_it_serves_as_far_apart_as_it_may(
    own: Path, place: Path, tmp_path: Path, rights: tuple[int, ...]
) -> None:
    """Without mounts, services whose software lies where only root may go stay root, with nothing of its rights."""
    given = environment(own, place / "home", **SCRIPTED, HELIX_GATEWAY_ACCOUNTS="true")
    given |= {
        "HELIX_AUTH_LISTEN": "127.0.0.1:0",
        "HELIX_DATABASE_DIRECTORY": str(place / "postgres"),
        PLAN: Plan.of(ROOT, rights).dumps(),
        PARENT_PID: str(os.getpid()),
    }
    with (tmp_path / "serve.log").open("ab") as output:
        served = Served(given, stderr=output, launcher=("helixflow.confine.launch",))
    try:
        served.until_ready()
        until(lambda: answers(served, own), "it serves", 30)
        closed = Account.of("gateway", FIRST).closed(Path(sys.base_prefix).resolve() / "x") is not None
        for name, pid in pids(served).items():
            said = status(pid)
            uid = UIDS["gateway" if name == "worker" else name]
            # The certificates are copied either way; the state is where everybody may go.
            assert said["Uid"].split()[0] == str(0 if closed else uid)
            if 8 in rights:
                assert {said[each] for each in CAPABILITIES} == {"0" * 16}
            assert said["NoNewPrivs"] == "1"
        told = lines(tmp_path, "service keeps the account root, without its capabilities")
        assert {line["name"] for line in told} == (set(UIDS) if closed else set())
        assert all("Operation not permitted" in line["reason"] for line in told)
        served.popen.send_signal(signal.SIGTERM)
        assert served.popen.wait(30) == 0
    finally:
        served.popen.kill()
        served.popen.communicate(timeout=20)
