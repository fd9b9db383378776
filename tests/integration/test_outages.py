"""Database, Redis, auth-service and gateways stop, stall and die under load: nothing is lost, and nothing is open."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from helixflow.auth.keys import make
from helixflow.db.embedded import Embedded
from helixflow.db.target import connect
from tests.db.support import folder
from tests.limits.support import Redis

from .accounts import Platform, platform
from .pressure import Pressure, Sent, answered, judge
from .proxy import Proxy, proxy
from .stack import SCRIPTED, Process, context, environment, until
from .wire import CHAT, STATUS, Answer, Line, chat, request

pytestmark = pytest.mark.long

RATE = 200
"""Requests/s: two cores serve them beside everything else that runs on them."""
ENDLESS = 3000
"""Tokens of a stream that does not end by itself within a test."""
SLOW_S = 0.4


@dataclass
class Scene:
    """Everything, with its database and its Redis behind proxies."""

    place: Path
    environ: dict[str, str]
    database: Process
    database_proxy: Proxy
    redis: Redis
    redis_proxy: Proxy
    platform: Platform
    hands: ThreadPoolExecutor
    """One thread for all tests: a process dies with the thread that has started it."""
    keys: list[str] = field(default_factory=list)

    async def do(self, act: Callable[..., None], *arguments: Any) -> None:
        """Starts or stops a process while the load goes on."""
        await asyncio.get_running_loop().run_in_executor(self.hands, act, *arguments)

    def ports(self) -> list[int]:
        """Of the gateways that are up."""
        return [port(gateway) for gateway in self.platform.gateways]

    def line(self, gateway: Process) -> Line:
        """A connection to a gateway."""
        return Line(port(gateway), context(self.platform.certs))

    def pressure(self, name: str, keys: Sequence[str] = ()) -> Pressure:
        """A load on all gateways."""
        return Pressure(self.ports, context(self.platform.certs), keys or self.keys, name)

    def key(self, *limits: str) -> dict[str, Any]:
        """A new key."""
        made: dict[str, Any] = self.platform.json("key", "add", "a", "--user", "owner@localhost", *limits)
        return made

    def postgres(self) -> list[int]:
        """`helixflow db run` and everything below it."""
        return tree(self.database.popen.pid)

    def restart_auth(self) -> None:
        """Starts it again, where it was."""
        auth = self.platform.auth
        auth.environ = {**auth.environ, "HELIX_AUTH_LISTEN": auth.address}
        auth.start()

    async def rows(self, name: str) -> list[dict[str, Any]]:
        """The ledger's rows of the requests whose ids begin so."""
        database = await connect(Embedded(self.place / "postgres").target, search_path="helixflow")
        try:
            found = await database.fetch("SELECT * FROM requests WHERE request_id LIKE $1", name + "-%")
            return [dict(row) for row in found]
        finally:
            await database.close()

    async def arrived(self, name: str, ids: set[str]) -> list[dict[str, Any]]:
        """The rows, once all of these are there and nobody has anything left to ship."""
        while True:
            rows = await self.rows(name)
            if ids <= {row["request_id"] for row in rows} and all(
                [await self.shipped(g) for g in self.platform.gateways]
            ):
                return await self.rows(name)
            await asyncio.sleep(0.1)

    async def shipped(self, gateway: Process) -> bool:
        """Whether everything a gateway has noted, and those before it, is in the ledger."""
        ledger = (await self.status(gateway))["ledger"]
        spools = [entry for entry in spool(gateway).iterdir() if entry.is_dir()]
        # What it has adopted counts as shipped, too.
        return bool(len(spools) == 1 and not ledger["pending"] and ledger["shipped"] >= ledger["ended"])

    async def status(self, gateway: Process) -> Any:
        """The counters of a gateway."""
        line = self.line(gateway)
        try:
            return (await line.ask(request(STATUS, None, self.platform.admin_key))).json()
        finally:
            line.close()

    async def ask(self, gateway: Process, key: str, body: Any = None, name: str = "") -> Answer:
        """One chat on a connection of its own."""
        line = self.line(gateway)
        try:
            return await line.ask(request(CHAT, body or chat(2), key, name))
        finally:
            line.close()

    async def hold(self, gateway: Process, key: str, names: Sequence[str]) -> list[Line]:
        """Streams that have begun and do not end; one line each."""
        lines = [self.line(gateway) for _ in names]
        begun = [
            line.begin(request(CHAT, chat(ENDLESS, stream=True), key, name), 2)
            for line, name in zip(lines, names, strict=True)
        ]
        assert {status for status, _ in await asyncio.gather(*begun)} == {200}
        return lines

    async def warm(self, *more: str) -> None:
        """Every gateway knows every key."""
        for gateway in self.platform.gateways:
            for key in ("demo-key", *self.keys, *more):
                assert (await self.ask(gateway, key)).status == 200
            await self.status(gateway)


def port(process: Process) -> int:
    return int(process.address.rpartition(":")[2])


def spool(gateway: Process) -> Path:
    return Path(gateway.environ["HELIX_LEDGER_SPOOL"])


def tree(pid: int) -> list[int]:
    """A process and all below it, the lowest first."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [*(each for child in children for each in tree(int(child))), pid]


def worker(gateway: Process) -> int:
    """The process that serves."""
    return tree(gateway.popen.pid)[0]


def send(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        os.kill(pid, number)


@pytest.fixture(scope="module")
def scene(certs: Path) -> Iterator[Scene]:
    with folder() as place:
        redis = Redis(place)
        redis.command = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            *redis.command,
        ]  # it must not outlive a test run that is killed
        environ = environment(certs, place, **SCRIPTED, HELIX_DATABASE_DIRECTORY=str(place / "postgres"))
        sockets = Embedded(place / "postgres").target
        with proxy(Path(f"{sockets.host}/.s.PGSQL.{sockets.port}")) as one, proxy(place / "redis.sock") as two:
            database = Process(("db", "run"), environ, place / "database.log").start()
            redis.start()
            options = {
                "HELIX_DATABASE_TLS": "disable",
                "HELIX_REDIS_URL": f"redis://127.0.0.1:{two.port}",
                "HELIX_POOL_SLOTS": "64",
                "HELIX_POOL_SCRIPT_STEP_MS": "2",
            }
            url = f"postgresql://{sockets.user}@127.0.0.1:{one.port}/{sockets.database}"
            try:
                with platform(certs, gateways=2, url=url, **options) as started, ThreadPoolExecutor(1) as hands:
                    made = Scene(place, environ, database, one, redis, two, started, hands)
                    made.keys = [made.key()["secret"] for _ in range(3)]
                    yield made
            finally:
                redis.stop()
                database.stop()


def stopped(scene: Scene) -> None:
    scene.database.stop(signal.SIGINT)


def killed(scene: Scene) -> None:
    send(scene.postgres()[::-1], signal.SIGKILL)
    scene.database.wait()


def paused(scene: Scene) -> None:
    send(scene.postgres(), signal.SIGSTOP)


def slow(scene: Scene) -> None:
    scene.database_proxy.delay_s = SLOW_S


def started(scene: Scene) -> None:
    scene.database.start()


def goes_on(scene: Scene) -> None:
    send(scene.postgres(), signal.SIGCONT)


def quick(scene: Scene) -> None:
    scene.database_proxy.delay_s = 0.0


@pytest.mark.parametrize(("strike", "heal"), [(stopped, started), (killed, started), (paused, goes_on), (slow, quick)])
def test_the_database_is_away_and_a_gateway_is_killed(
    scene: Scene, strike: Callable[[Scene], None], heal: Callable[[Scene], None]
) -> None:
    name = strike.__name__
    held = [f"{name}-held-{number}" for number in range(5)]

    async def act(load: Pressure) -> None:
        await asyncio.sleep(0.3)
        await scene.do(strike, scene)
        await asyncio.sleep(0.3)
        assert (await scene.ask(scene.platform.gateways[1], make())).status in (401, 503)
        victim = scene.platform.gateways[0]
        lines = await scene.hold(victim, scene.keys[0], held)
        os.kill(worker(victim), signal.SIGKILL)
        await asyncio.sleep(1.0)
        assert (await scene.ask(scene.platform.gateways[1], make())).status in (401, 503)
        await scene.do(heal, scene)
        for line in lines:
            line.close()

    async def run() -> tuple[list[Sent], list[dict[str, Any]]]:
        await scene.warm()
        load = scene.pressure(name)
        await asyncio.gather(load.run(RATE, 3.0), act(load))
        return load.sent, await scene.arrived(name, {*held, *answered(load.sent)})

    sent, rows = uvloop.run(asyncio.wait_for(run(), 20))
    mine = [row for row in rows if row["request_id"] in held]
    verdict = judge(sent, [row for row in rows if row["request_id"] not in held])
    assert (verdict.lost, verdict.duplicated, verdict.strange) == ([], [], [])
    assert sorted(row["request_id"] for row in mine) == held
    assert {(row["finish"], row["status"]) for row in mine} == {("interrupted", 0)}
    assert len(sent) == RATE * 3
    assert sum(each.served for each in sent) >= 0.999 * len(sent)


def test_a_gateway_is_killed_and_another_one_takes_over_its_spool(scene: Scene) -> None:
    """The whole gateway, not its worker alone: the next process that is given its folder ships what it left."""
    names = [f"gone-{number}" for number in range(8)]

    async def kill(gateway: Process) -> None:
        assert (await scene.ask(gateway, scene.keys[0], name="gone-done")).status == 200
        lines = await scene.hold(gateway, scene.keys[0], names)
        pids = tree(gateway.popen.pid)
        gateway.stop(signal.SIGKILL)
        for line in lines:
            line.close()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "its worker is gone, too")

    victim = scene.platform.gateways.pop()
    uvloop.run(asyncio.wait_for(kill(victim), 20))
    assert len(list(spool(victim).iterdir())) == 1
    scene.platform.gateway(HELIX_LEDGER_SPOOL=str(spool(victim)))
    rows = uvloop.run(asyncio.wait_for(scene.arrived("gone", {*names, "gone-done"}), 20))
    found = {row["request_id"]: (row["finish"], row["status"], row["completion_tokens"]) for row in rows}
    assert found == {**dict.fromkeys(names, ("interrupted", 0, 0)), "gone-done": ("length", 200, 2)}


def test_the_auth_service_is_killed_under_load_and_comes_back(scene: Scene) -> None:
    """Known keys go on, each gateway counts its share of a limit by itself, and then everything is told."""
    limit = 60
    limited = scene.key("--requests-per-minute", str(limit), "--tokens-per-day", "1M")
    before: list[int] = []

    async def act() -> None:
        await asyncio.sleep(0.7)
        before.extend([(await scene.status(each))["limits"]["fallbacks"] for each in scene.platform.gateways])
        scene.platform.auth.stop(signal.SIGKILL)
        await asyncio.sleep(1.6)
        assert (await scene.ask(scene.platform.gateways[0], make())).code == "unavailable"
        after = [(await scene.status(each))["limits"]["fallbacks"] for each in scene.platform.gateways]
        assert after == [count + 1 for count in before]
        await scene.do(scene.restart_auth)

    async def run() -> None:
        await scene.warm(limited["secret"])
        known, few = scene.pressure("known"), scene.pressure("few", [limited["secret"]])
        await asyncio.gather(known.run(RATE, 3.5), few.run(40, 3.5), act())
        rows = await scene.arrived("known", set(answered(known.sent)))
        verdict = judge(known.sent, rows)
        assert (verdict.lost, verdict.duplicated, verdict.strange, verdict.interrupted) == ([], [], [], 0)
        assert sum(each.served for each in known.sent) >= 0.999 * len(known.sent)
        rows = await scene.arrived("few", set(answered(few.sent)))
        verdict = judge(few.sent, rows)
        assert (verdict.lost, verdict.duplicated, verdict.strange, verdict.interrupted) == ([], [], [], 0)
        assert {each.tries[-1].code for each in few.sent} == {"", "rate_limit_exceeded"}
        windows = len({row["at"].replace(second=0, microsecond=0) for row in rows})
        # What was left when nobody counted any more is divided between the gateways: no window is opened anew.
        assert verdict.answered <= limit * windows

    uvloop.run(asyncio.wait_for(run(), 25))
    scene.platform.run("key", "revoke", limited["key"]["id"])
    for gateway in scene.platform.gateways:
        with scene.platform.client(limited["secret"], gateway) as client:
            until(lambda client=client: client.post(CHAT, json=chat(1)).status_code == 401, "it is revoked", 1.0)


def redis_stops(scene: Scene) -> None:
    scene.redis.stop()


def redis_starts(scene: Scene) -> None:
    scene.redis.start()


def redis_is_slow(scene: Scene) -> None:
    scene.redis_proxy.delay_s = SLOW_S


def redis_is_quick(scene: Scene) -> None:
    scene.redis_proxy.delay_s = 0.0


@pytest.mark.parametrize(("strike", "heal"), [(redis_stops, redis_starts), (redis_is_slow, redis_is_quick)])
def test_redis_is_away_under_load(scene: Scene, strike: Callable[[Scene], None], heal: Callable[[Scene], None]) -> None:
    """PostgreSQL counts meanwhile: at each change a window may begin anew, and never is anything uncounted."""
    limit = 40
    key = scene.key("--requests-per-minute", str(limit))["secret"]
    log = scene.platform.auth
    away, back = log.text().count("a backend of limits is away"), log.text().count("of limits answers again")

    async def phase(name: str) -> None:
        load = scene.pressure(f"{strike.__name__}-{name}", [key])
        began = time.time() // 60
        await load.run(100, 0.6)
        windows = 1 + time.time() // 60 - began
        served = sum(each.served for each in load.sent)
        assert {each.tries[-1].code for each in load.sent} <= {"", "rate_limit_exceeded"}
        assert served <= limit * windows
        assert max(each.latency_s for each in load.sent) < 1.5

    async def run() -> None:
        await scene.warm()
        await phase("before")
        await scene.do(strike, scene)
        await phase("away")
        await phase("still")
        await scene.do(heal, scene)
        while log.text().count("of limits answers again") == back:  # noqa: ASYNC110 - a log sends no event
            await asyncio.sleep(0.05)
        await phase("back")

    uvloop.run(asyncio.wait_for(run(), 20))
    assert log.text().count("a backend of limits is away") == away + 1
    assert log.text().count("of limits answers again") == back + 1


def test_a_full_spool_refuses_or_serves_as_configured(scene: Scene) -> None:
    """With the database away until there is no room; afterwards everything that was accepted is in the ledger."""
    small = {"HELIX_LEDGER_SPOOL_MAX_BYTES": str(1 << 20)}
    refusing = scene.platform.gateway("refusing", **small)
    serving = scene.platform.gateway("serving", **small, HELIX_LEDGER_WHEN_FULL="serve")
    del scene.platform.gateways[-2:]
    wordy = {**chat(1), "model": "no-such-model-" * 18}
    codes: dict[str, list[str]] = {"refusing": [], "serving": []}

    async def fill(gateway: Process, name: str) -> None:
        """20 clients, until the spool has been full for some requests."""
        line = scene.line(gateway)
        while codes[name].count("ledger_full") < 50 and len(codes[name]) < 2500:
            codes[name].append("")
            number = len(codes[name])
            answer = await line.ask(request(CHAT, wordy, scene.keys[0], f"{name}-{number}-" + "x" * 100))
            codes[name][number - 1] = answer.code
        line.close()

    async def run() -> None:
        for gateway in (refusing, serving):
            assert (await scene.ask(gateway, scene.keys[0])).status == 200
            assert (await scene.ask(gateway, "demo-key")).status == 200
        await scene.do(stopped, scene)
        await asyncio.gather(
            *(fill(each, name) for each, name in ((refusing, "refusing"), (serving, "serving")) for _ in range(10))
        )
        unrecorded = (await scene.status(serving))["ledger"]["unrecorded"]
        assert unrecorded > 100
        assert set(codes["serving"]) == {"model_not_found"}
        assert set(codes["refusing"]) == {"model_not_found", "ledger_full"}
        assert (await scene.status(refusing))["requests"]["refused.ledger_full"] == codes["refusing"].count(
            "ledger_full"
        )
        await scene.do(started, scene)
        for gateway in (refusing, serving):
            # Nobody tells when room has been made.
            while not await scene.shipped(gateway) or (await scene.status(gateway))["ledger"]["bytes"] > 1 << 19:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            assert (await scene.ask(gateway, scene.keys[0])).status == 200
        taken = {
            f"refusing-{number}-{'x' * 100}"
            for number, code in enumerate(codes["refusing"], 1)
            if code == "model_not_found"
        }
        assert {row["request_id"] for row in await scene.rows("refusing")} == taken
        assert len(await scene.rows("serving")) == len(codes["serving"]) - unrecorded

    try:
        uvloop.run(asyncio.wait_for(run(), 25))
    finally:
        refusing.stop()
        serving.stop()
    for gateway in (refusing, serving):
        for alarm in ("spool fills up", "spool takes no more", "spool has room again"):
            assert gateway.text().count(alarm) == 1, alarm
