"""The owner's first password: in a file for one pair of eyes, for a while."""

import io
import stat
from pathlib import Path

import pytest

from helixflow.auth import first_start, service
from helixflow.auth.first_start import FirstLogin, discard, left_over
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import OWNER, run, world

NEW = "another horse battery"


def test_the_first_start_leaves_a_file_that_a_later_one_finds(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki, first_password_ttl_s=3600) as w:
            assert stat.S_IMODE(w.first_file.stat().st_mode) == 0o600
            found = FirstLogin.of(w.first_file)
            assert found is not None
            assert (found.owner, found.password) == (OWNER, w.first_password)
            # A start that failed after it has lost nothing: the next one tells of it.
            assert await w.do(left_over, w.first_file) == found
            now = await w.value("SELECT extract(epoch FROM now())::bigint")
            assert 3500 < found.expires_at - now <= 3600
            # Somebody else's new password is none of its business, the owner's ends it.
            discard(w.first_file, "ann@example.com")
            assert w.first_file.exists()
            await w.login.login(OWNER, found.password, NEW, "192.0.2.1")
            assert not w.first_file.exists()
            assert await w.do(left_over, w.first_file) is None

    run(test())


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE users SET password_expires_at = now() - interval '1 s'",
        "UPDATE users SET password_expires_at = password_expires_at + interval '1 h'",  # another one-time password
        "UPDATE users SET must_change_password = false",
        "UPDATE users SET deleted_at = now()",
    ],
)
def test_a_file_that_opens_nothing_is_removed(target: Target, pki: Layout, change: str) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await w.value(change)
            assert await w.do(left_over, w.first_file) is None
            assert not w.first_file.exists()

    run(test())


def test_what_is_no_such_file_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / first_start.FILE
    assert FirstLogin.of(path) is None
    for text in ("", "owner: x\n", "owner: x\npassword: y\nexpires: soon\n", "\x00\xff"):
        path.write_bytes(text.encode("latin-1"))
        path.chmod(0o600)
        assert FirstLogin.of(path) is None
    path.chmod(0o644)
    discard(path, OWNER)
    assert path.exists(), "others may read it: it is not ours to act upon"


def test_a_terminal_shows_it_and_a_log_says_where_it_stands(tmp_path: Path) -> None:
    first = FirstLogin(OWNER, "the-one-time-password", 1_800_000_000, tmp_path / first_start.FILE)
    shown = service.first_words(first, terminal=True)
    assert "    the-one-time-password\n" in shown
    assert "valid until 2027-01-15 08:00 UTC" in shown
    logged = service.first_words(first, terminal=False)
    assert "the-one-time-password" not in logged
    assert str(first.path) in logged
    assert not io.StringIO(logged).isatty()
