"""Client certificates that stand for keys: whose they are, what they may, who may bind them."""

import hashlib
from typing import Any

import pytest

from helixflow.auth import api_keys, certificates, keys, principals
from helixflow.auth.api_keys import Changes, Wanted
from helixflow.core_rs import Conflict, InvalidApiKey, InvalidRequest, PermissionDenied
from helixflow.db.target import Target
from helixflow.pki.layout import Layout

from .support import OPERATOR, SECRET, World, run, world

BATCH = "spiffe://example.org/batch"
PRINT = "sha256:" + "ab" * 32


async def by_certificate(w: World, name: str) -> Any:
    digest = hashlib.sha256(certificates.presented(name)).digest()
    async with w.pool.acquire() as connection:
        return await principals.by_key(connection, SECRET, digest, development=False)


async def make(w: World, user: str, name: str, certificate: str, **values: Any) -> str:
    wanted = Wanted(name, certificate=certificate, **values)
    return str((await w.do(api_keys.create, OPERATOR, SECRET, user, wanted)).key.id)


def test_a_certificate_stands_for_its_key(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            await w.user("ann@example.com", "owner")
            key = await make(w, "ann@example.com", "batch", BATCH, admin=True)
            found = await by_certificate(w, BATCH)
            assert (str(found.key_id), found.key, found.administers) == (key, "batch", ""), "for inference alone"
            with pytest.raises(InvalidApiKey):
                await by_certificate(w, PRINT)
            with pytest.raises(Conflict, match="another key has this certificate"):
                await make(w, "ann@example.com", "other", BATCH)
            changed = await w.do(api_keys.update, OPERATOR, SECRET, key, Changes(certificate=PRINT.upper()))
            assert changed.certificate == PRINT
            assert (await by_certificate(w, PRINT)).key == "batch"
            with pytest.raises(InvalidApiKey):
                await by_certificate(w, BATCH)
            # The next key has it from now on; the old secret goes on for its overlap.
            rotated = await w.do(api_keys.rotate, OPERATOR, SECRET, key, None)
            found = await by_certificate(w, PRINT)
            assert str(found.key_id) == rotated.key.id
            await w.do(api_keys.revoke, OPERATOR, rotated.key.id)
            with pytest.raises(InvalidApiKey):
                await by_certificate(w, PRINT)
            again = await make(w, "ann@example.com", "again", PRINT)
            assert str((await by_certificate(w, PRINT)).key_id) == again
            await w.do(api_keys.update, OPERATOR, SECRET, again, Changes(certificate=""))
            with pytest.raises(InvalidApiKey):
                await by_certificate(w, PRINT)
            details = [row["detail"] for row in await w.rows("SELECT detail::text FROM audit_log ORDER BY id")]
            assert any(BATCH in detail for detail in details)
            assert not any("certificate_digest" in detail for detail in details)

    run(test())


def test_only_who_owns_the_installation_binds_one(target: Target, pki: Layout) -> None:
    """Whoever claims another's certificate would be sent what its holder asks."""

    async def test() -> None:
        async with world(target, pki) as w:
            admin = await w.acting(await w.user("admin@example.com", "admin"))
            with pytest.raises(PermissionDenied, match="owners of the first organisation"):
                await w.do(api_keys.create, admin, SECRET, "", Wanted("mine", certificate=BATCH))
            key = str((await w.do(api_keys.create, admin, SECRET, "", Wanted("mine"))).key.id)
            for value in (BATCH, ""):
                with pytest.raises(PermissionDenied):
                    await w.do(api_keys.update, admin, SECRET, key, Changes(certificate=value))
            owner = await w.acting(await w.user("owner@example.com", "owner"))
            assert (await w.do(api_keys.update, owner, SECRET, key, Changes(certificate=BATCH))).certificate == BATCH

    run(test())


@pytest.mark.parametrize(
    "name",
    ["", "batch", "https://example.org/batch", "spiffe://", "spiffe://example.org", "spiffe://a/b c", "spiffe://a/b?c",
     "SPIFFE://a/b", "sha256:abc", "sha256:" + "g" * 64, "sha1:" + "a" * 40, "spiffe://a/" + "b" * 2048],
)  # fmt: skip
def test_what_names_no_certificate(name: str) -> None:
    with pytest.raises(InvalidRequest, match="SPIFFE URI"):
        certificates.named(name)


def test_fingerprints_are_taken_as_tools_print_them() -> None:
    assert certificates.named("SHA256:" + ":".join(["AB"] * 32)) == PRINT
    assert certificates.named(f" {BATCH} ") == BATCH


def test_no_key_looks_like_one() -> None:
    assert not keys.make().encode().startswith(certificates.PREFIX)
