"""The embedded PostgreSQL: made, started, watched and stopped by one process, and gone when that process is.

In the directory: `data/` (the account's), `run/` (the socket), `conf/` (who may connect), `postgres.log`, two locks.
`owner.lock` belongs to the process that runs the server; `server.lock` is inherited by every process of the server, so
that it is free only when none of them is left, whatever the files say.
"""

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from helixflow import log
from helixflow.db.errors import DatabaseError, EmbeddedError
from helixflow.db.place import (
    Account,
    Client,
    Lock,
    clear_stale_pid,
    find_binaries,
    make_directory,
    owner_lock,
    service_account,
    socket_folder,
    socket_path,
)
from helixflow.db.target import DEFAULT_PORT, Target, connect

ROLE = "helixflow"
"""Owns the database and everything in it."""
SERVICE_ROLE = "helixflow_service"
"""Of the services: owns nothing (`roles`)."""
READER_ROLE = "helixflow_reader"
"""Of whoever audits: reads the ledger and the audit log."""
DATABASE = "helixflow"
ADMIN = "helixflow_admin"
"""The superuser. Nobody is mapped to it: it exists for the single-user mode."""

START_TIMEOUT_S = 120.0
"""Recovery after a crash replays at most one checkpoint interval (5 min of writes)."""

LEFTOVER_S = 15.0
"""PostgreSQL kills its last processes 5 s after an immediate shutdown; this is ample."""

LEFTOVER_POLL_S = 0.02
STOP_TIMEOUT_S = 30.0
LOG_BYTES = 8 << 20
"""Size at which the log is moved to `postgres.log.1`, which is the only one kept."""

_READY = b"database system is ready to accept connections"
_PR_SET_PDEATHSIG = 1
_BOOTSTRAP = f"""\
CREATE ROLE {ROLE} LOGIN
CREATE DATABASE {DATABASE} OWNER {ROLE}
REVOKE ALL ON DATABASE {DATABASE} FROM PUBLIC
REVOKE ALL ON DATABASE postgres FROM PUBLIC
REVOKE ALL ON DATABASE template1 FROM PUBLIC
"""
_MAKE = "DO $$BEGIN IF to_regrole('{0}') IS NULL THEN CREATE ROLE {0} LOGIN; END IF; END$$\n"
# A line is a statement in single-user mode. A cluster of an earlier release has the owner alone.
_ROLES = f"""\
{_MAKE.format(SERVICE_ROLE)}{_MAKE.format(READER_ROLE)}\
GRANT CONNECT ON DATABASE {DATABASE} TO {SERVICE_ROLE}, {READER_ROLE}
"""
_MISSING = "SELECT count(*) < 2 FROM pg_roles WHERE rolname IN ($1, $2)"
_HBA = f"""\
# Written at every start.
{{unnamed}}local  all  {ROLE},{SERVICE_ROLE},{READER_ROLE}  peer map=helixflow
host   all  all  all  scram-sha-256
"""
_UNNAMED = f"local  all  {SERVICE_ROLE}  trust\n"
"""For a client whose account has no name: who may connect is what the folder of the socket says, whose group is the
client's, and which nobody else may pass but root and the account that owns the data anyway."""

logger = log.get("database")


class BoundedLog:
    """A log file that never takes more than twice `limit` bytes."""

    def __init__(self, path: Path, limit: int = LOG_BYTES) -> None:
        self._path = path
        self._limit = limit
        self._file = self._open()
        self.tail = b""
        """The last 2000 bytes."""

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)

    def write(self, data: bytes) -> None:
        """Appends; moves the file away when it is full."""
        self.tail = (self.tail + data)[-2000:]
        if os.fstat(self._file).st_size + len(data) > self._limit:
            os.close(self._file)
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._file = self._open()
        os.write(self._file, data)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)


class Embedded:
    """One server on one directory. Belongs to one event loop, which must run in the main thread.

    The kernel tells PostgreSQL about the end of the thread that started it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        user: str = "nobody",
        client: str = "",
        binaries: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        """`user`: account for root to switch to. `client`: that of the auth-service, when it is another one than ours.

        `binaries`: folder of `postgres` and `initdb`; None: the wheel's. `settings`: configuration parameters of
        PostgreSQL that win over ours.
        """
        # The root of relative paths must be the same for PostgreSQL, which changes its working directory.
        self.directory = directory.absolute()
        self._user = user
        self._client_name = client
        self._client: Client | None = None
        self._binaries = binaries
        self._settings = dict(settings or {})
        self._process: asyncio.subprocess.Process | None = None
        self._pump: asyncio.Task[None] | None = None
        self._owner: Lock | None = None
        self._ready = asyncio.Event()

    @property
    def target(self) -> Target:
        """How the owner connects, who migrates; no password is needed."""
        return Target(str(socket_path(self.directory)), int(self._settings.get("port", DEFAULT_PORT)), ROLE, DATABASE)

    @property
    def service_target(self) -> Target:
        """How the services connect."""
        return replace(self.target, user=SERVICE_ROLE)

    @property
    def dsn(self) -> str:
        """The same as a URL."""
        return self.target.dsn()

    @property
    def pid(self) -> int | None:
        """Process id of the server while it runs."""
        return self._process.pid if self._process and self._process.returncode is None else None

    async def start(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """Makes the cluster when there is none, starts it, and returns its URL once a connection has been served.

        Raises EmbeddedError, AlreadyRunningError when another process has it.
        """
        account = Account.find(self._user)
        self._client = Client.find(self._client_name)
        make_directory(self.directory, account)
        try:
            self._owner = owner_lock(self.directory)
            await self._start(account, timeout_s)
        except OSError as error:
            await self.stop()
            where = error.filename or self.directory
            raise EmbeddedError(f"the embedded PostgreSQL cannot start: {where}: {error.strerror or error}") from error
        except BaseException:
            await self.stop()
            raise
        return self.dsn

    async def _start(self, account: Account, timeout_s: float) -> None:
        binaries = self._binaries or find_binaries(account, self.directory)
        lock = Lock(self.directory / "server.lock")
        await self._wait_for_leftover(lock)
        try:
            await self._launch(account, binaries, lock, timeout_s)
            if await self._lacks_roles():
                await self._end(STOP_TIMEOUT_S)
                await self._single(account, binaries, self.directory / "data", _ROLES)
                await self._launch(account, binaries, lock, timeout_s)
        finally:
            lock.release()
        logger.info("PostgreSQL serves", directory=str(self.directory), pid=self.pid, account=account.name)

    async def _launch(self, account: Account, binaries: Path, lock: Lock, timeout_s: float) -> None:
        """Starts the server and waits until it serves."""
        sink = BoundedLog(self.directory / "postgres.log")
        try:
            data = await self._cluster(account, binaries, sink)
            sockets = socket_folder(self.directory, account, self._client)
            clear_stale_pid(data, sockets)
            self._write_access()
            self._ready.clear()
            self._process = await asyncio.create_subprocess_exec(
                str(binaries / "postgres"),
                *self._arguments(data, sockets),
                env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", "TZ": "UTC"},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                pass_fds=(lock.fileno(),),
                start_new_session=True,
                preexec_fn=becoming(account),
            )
        except BaseException:
            sink.close()
            raise
        self._pump = asyncio.create_task(self._write_log(self._process, sink))
        await self._until_served(self._process, sink, timeout_s)

    async def _lacks_roles(self) -> bool:
        connection = await connect(self.target)
        try:
            missing: bool = await connection.fetchval(_MISSING, SERVICE_ROLE, READER_ROLE)
        finally:
            await connection.close()
        return missing

    async def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Fast shutdown (SIGINT); immediate (SIGQUIT) after `timeout_s` seconds; SIGKILL in the end."""
        try:
            await self._end(timeout_s)
        finally:
            if self._owner is not None:
                self._owner.release()
                self._owner = None

    async def _end(self, timeout_s: float) -> None:
        try:
            process = self._process
            for number, wait_s in ((signal.SIGINT, timeout_s), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0)):
                if process is None or process.returncode is not None:
                    break
                process.send_signal(number)
                try:
                    async with asyncio.timeout(wait_s):
                        await process.wait()
                except TimeoutError:
                    logger.error("PostgreSQL did not stop", signal=number.name, timeout_s=wait_s)
            if self._pump is not None:
                await self._pump
        finally:
            self._process = self._pump = None

    async def wait(self) -> int:
        """Waits until the server ends by itself; its exit status."""
        if self._process is None:
            raise EmbeddedError("PostgreSQL does not run")
        return await self._process.wait()

    async def _wait_for_leftover(self, lock: Lock) -> None:
        """Waits for the processes of a server whose owner was killed."""
        try:
            async with asyncio.timeout(LEFTOVER_S):
                while not lock.take():  # noqa: ASYNC110 - as said below
                    # Nobody tells when a process that is not our child lets go of a lock.
                    await asyncio.sleep(LEFTOVER_POLL_S)
        except TimeoutError:
            raise EmbeddedError(
                f"processes of an earlier PostgreSQL still use {self.directory}, {LEFTOVER_S:g} s after its owner "
                f"ended; see who they are: fuser {self.directory}/server.lock"
            ) from None

    async def _cluster(self, account: Account, binaries: Path, sink: BoundedLog) -> Path:
        """The data directory, made when it is missing. What was interrupted while being made is made again."""
        data = self.directory / "data"
        version = await self._output(account, binaries / "postgres", "--version")
        major = version.split()[2].partition(".")[0]
        if not data.exists():
            fresh = self.directory / "data.new"
            if fresh.exists():
                shutil.rmtree(fresh)
            fresh.mkdir(mode=0o700)
            account.own(fresh)
            options = ["--encoding=UTF8", "--no-locale", "--data-checksums", f"--username={ADMIN}"]
            options += ["--auth-local=peer", "--auth-host=scram-sha-256"]
            # initdb tells on standard output which methods it set; nothing there is for the operator.
            sink.write((await self._output(account, binaries / "initdb", *options, "-D", str(fresh))).encode())
            await self._single(account, binaries, fresh, _BOOTSTRAP + _ROLES)
            fresh.rename(data)
        info = data.stat()
        if info.st_uid != account.uid:
            raise EmbeddedError(
                f"{data} belongs to uid {info.st_uid}, but PostgreSQL runs as {account.name} (uid {account.uid}): "
                f"set database.user, or run: chown -R {account.name} {data}"
            )
        try:
            made = (data / "PG_VERSION").read_text()[:8].strip()
        except OSError as error:
            raise EmbeddedError(f"{data} is not the data directory of a PostgreSQL: {error}") from None
        if made != major:
            raise EmbeddedError(
                f"{data} was made by PostgreSQL {made}, and the binaries are PostgreSQL {major}: install those of "
                f"{made}, run `helixflow db backup`, move the directory away, and restore with the new ones"
            )
        return data

    async def _single(self, account: Account, binaries: Path, data: Path, text: str) -> None:
        """Runs statements, a line each, as the superuser, in single-user mode."""
        options = ["--single", "-c", "exit_on_error=on", "-c", "log_min_messages=error", "-D", str(data)]
        await self._output(account, binaries / "postgres", *options, "template1", text=text)

    async def _output(self, account: Account, program: Path, *arguments: str, text: str = "") -> str:
        """Runs a program as the account; its output. Raises EmbeddedError with the end of it when it fails."""
        process = await asyncio.create_subprocess_exec(
            str(program),
            *arguments,
            env={"LC_ALL": "C", "PATH": "/usr/bin:/bin", "TZ": "UTC"},
            cwd="/",
            # Nothing to write: a program that ends at once would close the pipe before that was written.
            stdin=asyncio.subprocess.PIPE if text else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=becoming(account),
        )
        try:
            out, _ = await process.communicate(text.encode() or None)
        except BaseException:
            if process.returncode is None:
                process.kill()
            raise
        answer = out.decode(errors="replace")
        if process.returncode:
            raise EmbeddedError(f"{program.name} failed (status {process.returncode}): {answer[-1500:].strip()}")
        return answer

    def _write_access(self) -> None:
        """Who may connect. The folder is ours: what runs as the account cannot change it."""
        folder = self.directory / "conf"
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
        client, own = self._client, service_account()
        mapped = [(own, role) for role in (ROLE, SERVICE_ROLE, READER_ROLE)]
        if client and client.name and client.name != own:
            mapped.append((client.name, SERVICE_ROLE))
        ident = "# Written at every start.\n" + "".join(f'helixflow  "{name}"  {role}\n' for name, role in mapped)
        hba = _HBA.format(unnamed=_UNNAMED if client and not client.name else "")
        for name, text in (("pg_hba.conf", hba), ("pg_ident.conf", ident)):
            fresh = folder / f".{name}.new"
            fresh.write_text(text)
            fresh.chmod(0o644)
            fresh.replace(folder / name)

    def _arguments(self, data: Path, sockets: Path) -> list[str]:
        conf = self.directory / "conf"
        settings = {
            "cluster_name": "helixflow",
            "hba_file": str(conf / "pg_hba.conf"),
            "ident_file": str(conf / "pg_ident.conf"),
            "jit": "off",
            "lc_messages": "C",
            "listen_addresses": "",
            "log_destination": "stderr",
            "log_line_prefix": "%m [%p] ",
            "logging_collector": "off",
            "password_encryption": "scram-sha-256",
            "port": str(DEFAULT_PORT),
            "unix_socket_directories": str(sockets),
            **self._settings,
        }
        return ["-D", str(data), *(part for name, value in settings.items() for part in ("-c", f"{name}={value}"))]

    async def _write_log(self, process: asyncio.subprocess.Process, sink: BoundedLog) -> None:
        """Copies what the server says; sees it say that it is ready."""
        try:
            seen = b""
            while process.stderr is not None and (chunk := await process.stderr.read(1 << 16)):
                # A full disk must not stop the reading: PostgreSQL would wait for the pipe.
                with contextlib.suppress(OSError):
                    sink.write(chunk)
                if not self._ready.is_set():
                    seen = seen[-len(_READY) :] + chunk
                    if _READY in seen:
                        self._ready.set()
        finally:
            sink.close()

    async def _until_served(self, process: asyncio.subprocess.Process, sink: BoundedLog, timeout_s: float) -> None:
        ready, ended = asyncio.create_task(self._ready.wait()), asyncio.create_task(process.wait())
        try:
            await asyncio.wait({ready, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                if ended.done() and self._pump is not None:
                    await self._pump
                what = f"ended (status {process.returncode})" if ended.done() else f"was not ready in {timeout_s:g} s"
                raise EmbeddedError(f"PostgreSQL {what}; its log says: {sink.tail.decode(errors='replace').strip()}")
        finally:
            ready.cancel()
            ended.cancel()
        try:
            connection = await connect(self.target)
        except DatabaseError as error:
            raise EmbeddedError(f"PostgreSQL started, but {error}") from None
        await connection.close()


def becoming(account: Account) -> Callable[[], None]:
    """What a child does between fork and exec: gives up the uid, then ties its life to this process.

    The order matters: a change of the uid clears the signal of the parent's death.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def become() -> None:
        os.umask(0o077)
        if account.drop:
            os.setgroups([])
            os.setresgid(account.gid, account.gid, account.gid)
            os.setresuid(account.uid, account.uid, account.uid)
        # Immediate shutdown: it has a time limit, and the next start recovers.
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGQUIT, 0, 0, 0) != 0 or os.getppid() != parent:
            os._exit(70)

    return become
