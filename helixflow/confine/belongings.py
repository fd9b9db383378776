"""What a service owns on the disk, what it reads, and how it comes to own it."""

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from helixflow.config import PACKAGE, UNSET, Config, model_of
from helixflow.confine.account import SERVICES, Account, ConfinementError
from helixflow.confine.copies import NAMES
from helixflow.confine.probe import READ, WRITE
from helixflow.engine.manifest import MANIFEST
from helixflow.engine.store import SELFTEST, WORK, model_name

_SHARED = stat.S_ISVTX | stat.S_IRWXG

Needed = tuple[str, Path]
"""READ or WRITE, and where."""


def home_of(service: str, config: Config) -> Path:
    """The folder of one service: its certificates, and what it takes for its home."""
    return _absolute(config.home) / "run" / service


def software() -> list[Path]:
    """What any service runs from."""
    found = [Path(sys.prefix), Path(sys.base_prefix), PACKAGE]
    # The checkout around the package is not needed, and holds more than software.
    found += [Path(each) for each in sys.path if each and Path(each).resolve() != PACKAGE.parent]
    return [path for path in found if path.exists()]


def needed(service: str, config: Config) -> list[Needed]:
    """What a service reads and writes beside its own folder; all of it exists once `hand_over` has run."""
    file = log_file(service, config)
    found: list[Needed] = [] if file is None else [(WRITE, file if file.exists() else file.parent)]
    if service == "gateway" and config.gateway.accounts:
        found.append((WRITE, _absolute(config.ledger.spool)))
    if service == "auth":
        pepper = _absolute(config.auth.pepper)
        found.append((READ, pepper) if pepper.exists() else (WRITE, pepper.parent))
        files = (config.auth.oidc_ca, config.database.tls_ca, config.limits.redis_ca)
        found += [(READ, _absolute(path)) for path in files if path != UNSET]
    if service == "pool":
        model = _absolute(model_of(config))
        found += [(READ, model), *((READ, path) for path in model.iterdir() if path.is_file())]
        found += [(READ, _absolute(path)) for path in config.pool.shared_prefixes]
        if config.pool.engine != "scripted":
            found += [(WRITE, path) for path in (_engine_home(config), *_engines(config))]
    return found


def log_file(service: str, config: Config) -> Path | None:
    """Where a service writes its log, unless to standard error. Raises ConfinementError when all share one file."""
    if config.log.file == UNSET:
        return None
    if "{service}" not in str(config.log.file):
        raise ConfinementError("one log.file for all: write {service} in its name, so that each has its own")
    return _absolute(Path(str(config.log.file).replace("{service}", NAMES[service])))


def hand_over(service: str, config: Config, account: Account) -> None:
    """Makes the folders of a service and gives them to its account. Raises OSError."""
    mine = frozenset({0, account.uid, *range(config.supervise.first_uid, config.supervise.first_uid + len(SERVICES))})
    _folder(_absolute(config.home), 0o711)
    _folder(_absolute(config.home) / "run", 0o711)
    folder = home_of(service, config)
    _folder(folder, 0o750)
    os.chown(folder, 0, account.gid)
    _folder(folder / "home", 0o700)
    give(folder / "home", account, mine)
    file = log_file(service, config) if "{service}" in str(config.log.file) else None
    if file is not None:
        # A folder that we make is one in which each may have files, and remove its own alone.
        _folder(file.parent, 0o1777)
        if file.exists():
            give(file, account, mine)
    if service == "gateway" and config.gateway.accounts:
        _folder(_absolute(config.ledger.spool), 0o700)
        give(_absolute(config.ledger.spool), account, mine)
    if service == "auth":
        pepper = _absolute(config.auth.pepper)
        if pepper.is_relative_to(_absolute(config.home)):
            _folder(pepper.parent, 0o700)
            give(pepper.parent, account, mine)
        elif pepper.exists():
            give(pepper, account, mine)
    if service == "pool" and config.pool.engine != "scripted":
        _share(_engine_home(config), account)
        for path in _engines(config):
            _folder(path, 0o700)
            give(path, account, mine)


def give(path: Path, account: Account, mine: Iterable[int]) -> None:
    """Makes the account the owner of `path` and of all below it; never follows a link, and takes nothing from others.

    `mine`: owners that it may be taken from. A file with several names is left alone: one of them may lie elsewhere.
    """
    owners = frozenset(mine)

    def change(name: str, folder: int | None = None) -> None:
        info = os.stat(name, dir_fd=folder, follow_symlinks=False)
        several = stat.S_ISREG(info.st_mode) and info.st_nlink > 1
        if info.st_uid in owners and not several and (info.st_uid, info.st_gid) != (account.uid, account.gid):
            os.chown(name, account.uid, account.gid, dir_fd=folder, follow_symlinks=False)

    change(str(path))
    if path.is_dir():
        for _root, folders, files, folder in os.fwalk(path, follow_symlinks=False):
            for name in (*folders, *files):
                change(name, folder)


def _share(path: Path, account: Account) -> None:
    """Lets the account make files and folders in `path` and remove its own, but nobody else's."""
    _folder(path, 0o755)
    info = path.stat()
    if info.st_uid != account.uid and not (info.st_gid == account.gid and info.st_mode & _SHARED == _SHARED):
        os.chown(path, -1, account.gid)
        path.chmod(stat.S_IMODE(info.st_mode) | _SHARED)


def _engine_home(config: Config) -> Path:
    """Where the engines of the model are. The checkpoint may lie in the same folder, and is not the pool's."""
    return _absolute(config.engines) / model_name(model_of(config))


def _engines(config: Config) -> list[Path]:
    """The built engines of the model, and where they are worked on."""
    home = _engine_home(config)
    built = [path.parent for path in home.glob(f"*/{MANIFEST}")]
    return [home / WORK, *built, *([] if config.pool.engine == "onnx" else [home.parent / SELFTEST])]


def _folder(path: Path, mode: int) -> None:
    """Makes a folder when it is missing, whatever the umask, and the missing ones above it for all to pass."""
    if path.is_dir():
        return
    if not path.parent.is_dir():
        _folder(path.parent, 0o711)
    path.mkdir(exist_ok=True)
    path.chmod(mode)


def _absolute(path: Path) -> Path:
    return path.expanduser().absolute()
