"""The file behind all digests."""

import asyncio
from pathlib import Path

import pytest

from helixflow.auth.errors import PepperError
from helixflow.auth.pepper import Pepper, forget, open_pepper
from helixflow.config import DatabaseConfig
from helixflow.db.pool import Pool
from helixflow.db.target import Target, connect
from helixflow.pki.layout import Layout

from .support import run, world


async def _open(target: Target, *paths: Path) -> list[Pepper | BaseException]:
    pool = await Pool.open(DatabaseConfig(), target, name="test")

    async def one(path: Path) -> Pepper:
        async with pool.acquire() as connection, connection.transaction():
            return await open_pepper(connection, path)

    try:
        return await asyncio.gather(*(one(path) for path in paths), return_exceptions=True)
    finally:
        await pool.close()


def start(target: Target, *paths: Path) -> list[Pepper | BaseException]:
    return asyncio.run(_open(target, *paths))


def failure(target: Target, path: Path) -> str:
    found = start(target, path)[0]
    assert isinstance(found, PepperError)
    return str(found)


def test_the_first_start_makes_it_and_the_next_finds_it(each: Target, tmp_path: Path) -> None:
    path = tmp_path / "secrets" / "pepper"
    first = start(each, path)[0]
    assert isinstance(first, Pepper)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert len(path.read_bytes()) == 32
    assert first.key_digest(b"x") == Pepper(path.read_bytes()).key_digest(b"x")
    again = start(each, path)[0]
    assert isinstance(again, Pepper)
    assert again.check() == first.check()


def test_several_first_starts_at_once_agree(target: Target, tmp_path: Path) -> None:
    found = start(target, *[tmp_path / "pepper"] * 6)
    assert all(isinstance(each, Pepper) for each in found)
    assert len({each.check() for each in found if isinstance(each, Pepper)}) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["pepper"]


def test_of_two_machines_the_second_is_refused(target: Target, pki: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            async with w.begin() as connection:
                await open_pepper(connection, tmp_path / "a" / "pepper")
                second = asyncio.create_task(w.do(open_pepper, tmp_path / "b" / "pepper"))
                await w.blocked()
            with pytest.raises(PepperError, match="copy it from the machine of another auth-service"):
                await second
            assert not (tmp_path / "b").exists()

    run(test())


def test_a_missing_file_is_not_made_anew(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    start(target, path)
    path.unlink()
    assert "is missing, but the database has keys made with it" in failure(target, path)
    assert not path.exists()


def test_another_file_is_refused(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    start(target, path)
    path.write_bytes(bytes(32))
    assert "is not the file that the keys of this database were made with" in failure(target, path)


@pytest.mark.parametrize("content", [b"", b"short", bytes(33)])
def test_a_damaged_file_is_refused(target: Target, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pepper"
    path.write_bytes(content)
    path.chmod(0o600)
    assert f"has {len(content)} bytes, not 32" in failure(target, path)


def test_a_file_that_others_may_read_is_refused(target: Target, tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    path.write_bytes(bytes(32))
    path.chmod(0o640)
    assert "chmod 600" in failure(target, path)


def test_a_place_that_cannot_be_written_is_refused(target: Target, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "cannot be used" in failure(target, tmp_path / "file" / "pepper")


async def _forget(target: Target, path: Path) -> tuple[int, int]:
    connection = await connect(target, application_name="helixflow db")
    try:
        async with connection.transaction():
            return await forget(connection, path)
    finally:
        await connection.close()


KEY = """
WITH o AS (INSERT INTO helixflow.organisations (name) VALUES ('o') RETURNING id),
u AS (INSERT INTO helixflow.users (organisation_id, email, role) SELECT id, 'a@b', 'owner' FROM o RETURNING id),
s AS (INSERT INTO helixflow.sessions (user_id, method, address, expires_at)
    SELECT id, 'password', '127.0.0.1', '2999-01-01' FROM u)
INSERT INTO helixflow.api_keys (user_id, digest, prefix, name) SELECT id, sha256('x'), 'hf-x', 'ci' FROM u
"""


def test_a_lost_pepper_is_given_up_by_a_command(each: Target, tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    start(each, path)
    lost = path.read_bytes()

    async def issue() -> None:
        connection = await connect(each)
        await connection.execute(KEY)
        await connection.close()

    asyncio.run(issue())
    with pytest.raises(PepperError, match="nothing is lost"):
        asyncio.run(_forget(each, path))
    path.write_bytes(b"short")
    with pytest.raises(PepperError, match="move it out of the way first"):
        asyncio.run(_forget(each, path))
    path.unlink()
    assert "helixflow db forget-pepper --revoke-all-keys" in failure(each, path)
    assert asyncio.run(_forget(each, path)) == (1, 1)
    with pytest.raises(PepperError, match="no pepper to forget"):
        asyncio.run(_forget(each, path))
    again = start(each, path)[0]
    assert isinstance(again, Pepper)
    assert path.read_bytes() != lost


def test_a_pepper_that_a_service_still_has_is_not_given_up(each: Target, tmp_path: Path) -> None:
    path = tmp_path / "pepper"
    start(each, path)
    path.unlink()

    async def attempt() -> None:
        pool = await Pool.open(DatabaseConfig(), each, name="helixflow auth-service")
        try:
            with pytest.raises(PepperError, match="stop it first"):
                await _forget(each, path)
        finally:
            await pool.close()

    asyncio.run(attempt())


def test_derived_keys_differ_by_purpose_and_secret() -> None:
    one, other = Pepper(bytes(32)), Pepper(b"\1" * 32)
    found = {
        one.derive("ledger"),
        one.derive("refresh-token"),
        other.derive("ledger"),
        one.key_digest(b"x"),
        other.key_digest(b"x"),
        one.refresh_digest("x"),
        one.state_secret("nonce", "x"),
        one.state_secret("verifier", "x"),
        one.check(),
        other.check(),
    }
    assert len(found) == 10
    assert all(len(each) == 32 for each in found)
    assert one.derive("ledger") == Pepper(bytes(32)).derive("ledger")
    assert "\\x00" not in repr(one)
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        Pepper(bytes(31))
