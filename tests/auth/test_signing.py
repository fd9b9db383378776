"""Access tokens and every way to forge one."""

import asyncio
import base64
import hashlib
import hmac
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc import jws, jwt
from joserfc.jwk import ECKey, OctKey, RSAKey

from helixflow.auth import signing
from helixflow.auth.errors import SigningKeyError
from helixflow.auth.signing import Signer
from helixflow.core_rs import CoreError, InvalidToken, Unavailable
from helixflow.db.target import Target
from helixflow.pki import keys
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import Layout

from .support import World, copy, rotate, run, world

USER, SESSION = UUID(int=1), UUID(int=2)


def encoded(value: object) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def claims(w: World, **changed: Any) -> dict[str, Any]:
    now = int(time.time())
    found = {
        "iss": w.options.issuer,
        "aud": "helixflow",
        "sub": str(USER),
        "sid": str(SESSION),
        "iat": now,
        "exp": now + 900,
        "jti": str(uuid4()),
        **changed,
    }
    return {name: value for name, value in found.items() if value is not None}


def signed(w: World, header: dict[str, Any] | None = None, key: Any = None, **changed: Any) -> str:
    current = w.signer._current
    head = {"alg": "RS256", "kid": current.kid, "typ": "JWT", **(header or {})}
    return jwt.encode(head, claims(w, **changed), key or current.key, algorithms=[head["alg"]])


async def check(w: World, token: str) -> Any:
    async with w.pool.acquire() as connection:
        return await w.signer.check(connection, token)


def refused(target: Target, pki: Layout, forge: Any, message: str) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            await check(w, signed(w))
            with pytest.raises(InvalidToken, match=message) as caught:
                await check(w, forge(w))
            assert caught.value.http_status == 401

    run(test())


def test_an_issued_token(each: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(each, pki) as w:
            token = w.signer.issue(USER, SESSION)
            access = await check(w, token)
            assert (access.user_id, access.session_id) == (USER, SESSION)
            assert access.expires_at - time.time() == pytest.approx(900, abs=2)
            head, body, _signature = token.split(".")
            padded = [base64.urlsafe_b64decode(part + "==") for part in (head, body)]
            assert json.loads(padded[0]) == {"alg": "RS256", "kid": w.signer.kid, "typ": "JWT"}
            assert set(json.loads(padded[1])) == {"iss", "aud", "sub", "sid", "iat", "exp", "jti"}
            assert len(token) < signing.LONGEST_TOKEN
            assert token != w.signer.issue(USER, SESSION)

    run(test())


def test_the_key_set_is_public_and_named_by_thumbprint(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            async with w.pool.acquire() as connection:
                document = json.loads(await w.signer.jwks(connection))
            (key,) = document["keys"]
            assert set(key) == {"kty", "n", "e", "kid", "use", "alg"}
            # RFC 7638, 3.1: the required members in order, without spaces.
            text = json.dumps({"e": key["e"], "kty": "RSA", "n": key["n"]}, separators=(",", ":"))
            digest = hashlib.sha256(text.encode()).digest()
            assert key["kid"] == base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
            jwt.decode(w.signer.issue(USER, SESSION), RSAKey.import_key(key), algorithms=["RS256"])

    run(test())


# --- forgeries -------------------------------------------------------------------


def test_alg_none(shared: Target, pki: Layout) -> None:
    for alg in ("none", "None", "NONE"):
        for tail in ("", encoded(b"x")):
            refused(
                shared,
                pki,
                lambda w, alg=alg, tail=tail: ".".join(
                    (encoded({"alg": alg, "kid": w.signer.kid, "typ": "JWT"}), encoded(claims(w)), tail)
                ),
                "not one of ours",
            )


def test_the_public_key_is_no_secret_for_hmac(shared: Target, pki: Layout) -> None:
    def forge(w: World) -> str:
        public = pki.jwt_public.read_bytes()
        body = encoded({"alg": "HS256", "kid": w.signer.kid, "typ": "JWT"}) + "." + encoded(claims(w))
        return body + "." + encoded(hmac.digest(public, body.encode(), "sha256"))

    refused(shared, pki, forge, "not one of ours")


def test_other_algorithms_of_the_same_key(shared: Target, pki: Layout) -> None:
    for alg in ("RS512", "PS256"):
        refused(shared, pki, lambda w, alg=alg: signed(w, {"alg": alg}), "not one of ours")


def test_another_key_under_our_key_id(shared: Target, pki: Layout) -> None:
    other = RSAKey.generate_key(2048)
    refused(shared, pki, lambda w: signed(w, key=other), "signature is wrong")


def test_another_key_under_its_own_id(shared: Target, pki: Layout) -> None:
    other = RSAKey.generate_key(2048)
    refused(shared, pki, lambda w: signed(w, {"kid": other.thumbprint()}, key=other), "its key is unknown")


def test_a_key_in_the_token_itself_is_not_used(shared: Target, pki: Layout) -> None:
    other = RSAKey.generate_key(2048)
    header = {"jwk": other.as_dict(private=False)}
    refused(shared, pki, lambda w: signed(w, header, key=other), "not one of ours|signature is wrong")
    head = {"alg": "ES256"}
    elliptic = ECKey.import_key(ec.generate_private_key(ec.SECP256R1()))
    refused(shared, pki, lambda w: signed(w, head, key=elliptic), "not one of ours")
    secret = OctKey.import_key(b"x" * 32)
    refused(shared, pki, lambda w: signed(w, {"alg": "HS256"}, key=secret), "not one of ours")


def test_the_key_id_of_another_registered_key(target: Target, pki: Layout, rotated: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            async with w.pool.acquire() as connection:
                other = await Signer.open(connection, rotated.jwt_private, w.options)
            # Both keys are known; each signature fits its own only.
            await check(w, other.issue(USER, SESSION))
            with pytest.raises(InvalidToken, match="signature is wrong"):
                await check(w, signed(w, {"kid": other.kid}))

    run(test())


def test_an_altered_payload(shared: Target, pki: Layout) -> None:
    def forge(w: World) -> str:
        head, _body, signature = signed(w).split(".")
        return ".".join((head, encoded(claims(w, sub=str(UUID(int=9)))), signature))

    refused(shared, pki, forge, "signature is wrong")


def test_an_altered_signature(shared: Target, pki: Layout) -> None:
    def forge(w: World) -> str:
        token = signed(w)
        middle = len(token) - 100
        return token[:middle] + ("A" if token[middle] != "A" else "B") + token[middle + 1 :]

    refused(shared, pki, forge, "signature is wrong")


def test_a_critical_extension_that_we_do_not_know(shared: Target, pki: Layout) -> None:
    def forge(w: World) -> str:
        head = encoded({"alg": "RS256", "kid": w.signer.kid, "typ": "JWT", "crit": ["exp2"], "exp2": 1})
        body = head + "." + encoded(claims(w))
        return body + "." + encoded(b"x" * 512)

    refused(shared, pki, forge, "not valid")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"iss": "https://elsewhere.example"}, "another issuer"),
        ({"iss": "https://helixflow.local/"}, "another issuer"),
        ({"aud": "other"}, "another audience"),
        ({"aud": ["helixflow", "other"]}, "another audience"),
        ({"exp": int(time.time()) - 1}, "has expired"),
        ({"exp": int(time.time())}, "has expired"),
        ({"iat": int(time.time()) + 3600, "exp": int(time.time()) + 7200}, "from the future"),
        ({"exp": "9999999999"}, "no whole numbers"),
        ({"exp": 9999999999.5}, "no whole numbers"),
        ({"exp": True}, "no whole numbers"),
        ({"iat": "now"}, "no whole numbers"),
        ({"sub": "ann"}, "names are wrong"),
        ({"sub": 5}, "names are wrong"),
        ({"sid": "'; DROP TABLE users; --"}, "names are wrong"),
        ({"jti": 5}, "names are wrong"),
        *(({name: None}, f"it lacks {name}") for name in ("iss", "aud", "sub", "sid", "iat", "exp", "jti")),
    ],
)
def test_wrong_claims_under_a_right_signature(
    shared: Target, pki: Layout, changed: dict[str, Any], message: str
) -> None:
    refused(shared, pki, lambda w: signed(w, **changed), message)


def test_headers_that_are_not_ours(shared: Target, pki: Layout) -> None:
    for header in ({"typ": "at+jwt"}, {"kid": "x' OR '1'='1"}, {"kid": "\x00"}):
        refused(shared, pki, lambda w, header=header: signed(w, header), "not one of ours|unknown")
    head = {"alg": "RS256", "kid": None, "typ": "JWT"}
    refused(shared, pki, lambda w: ".".join((encoded(head), encoded(claims(w)), encoded(b"x"))), "not one of ours")


@pytest.mark.parametrize(
    "token",
    ["", ".", "..", "a.b.c", "a.b", "é.b.c", "x" * 5000, "eyJhbGciOiJSUzI1NiJ9..", encoded([]) + ".e30.eA", "hf-key"],
)
def test_what_is_no_token_at_all(shared: Target, pki: Layout, token: str) -> None:
    refused(shared, pki, lambda _w: token, "not one of ours")


def test_a_payload_that_is_no_object(shared: Target, pki: Layout) -> None:
    def forge(w: World) -> str:
        current = w.signer._current
        head = {"alg": "RS256", "kid": current.kid, "typ": "JWT"}
        return jws.serialize_compact(head, b"[1]", current.key, algorithms=["RS256"])

    refused(shared, pki, forge, "signature is wrong")


# --- rotation --------------------------------------------------------------------


def test_a_rotated_key_logs_nobody_out(each: Target, pki: Layout, rotated: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        layout = copy(pki, tmp_path)
        async with world(each, layout) as w:
            first, old = w.signer.kid, w.signer.issue(USER, SESSION)
            await w.signer.look(w.pool)
            assert w.signer.kid == first
            rotate(layout, rotated)
            await w.signer.look(w.pool)
            assert w.signer.kid != first
            for token in (old, w.signer.issue(USER, SESSION)):
                await check(w, token)
            # So does another auth-service, and one that starts later.
            async with w.pool.acquire() as connection:
                later = await Signer.open(connection, layout.jwt_private, w.options)
                assert (await later.check(connection, old)).user_id == USER
                kids = {key["kid"] for key in json.loads(await later.jwks(connection))["keys"]}
                assert kids == {first, w.signer.kid}
                # A key leaves the set when its last token has ended.
                await connection.execute("UPDATE signing_keys SET expires_at = now() WHERE kid = $1", first)
                kids = {key["kid"] for key in json.loads(await later.jwks(connection))["keys"]}
                assert kids == {w.signer.kid}

    run(test())


def test_a_changed_file_is_noticed_while_the_service_runs(
    target: Target, pki: Layout, rotated: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signing, "WATCH_S", 0.01)

    async def test() -> None:
        layout = copy(pki, tmp_path)
        async with world(target, layout) as w:
            first, looked = w.signer.kid, asyncio.Event()
            look = w.signer.look

            async def noted(pool: Any) -> None:
                try:
                    await look(pool)
                finally:
                    looked.set()

            async def rounds() -> None:
                for _ in range(2):
                    looked.clear()
                    await looked.wait()

            w.signer.look = noted  # type: ignore[method-assign]
            watching = asyncio.create_task(w.signer.watch(w.pool))
            content = layout.jwt_private.read_bytes()
            layout.jwt_private.write_bytes(b"garbage")
            await rounds()
            layout.jwt_private.unlink()
            await rounds()
            assert w.signer.kid == first
            layout.jwt_private.write_bytes(content)
            layout.jwt_private.chmod(0o600)
            rotate(layout, rotated)
            await rounds()
            assert w.signer.kid != first
            watching.cancel()
            await asyncio.wait({watching})

    run(test())


def test_no_token_outlives_the_registration_of_its_key(target: Target, pki: Layout) -> None:
    async def test() -> None:
        async with world(target, pki) as w:
            left = await w.value("SELECT extract(epoch FROM expires_at - now())::float8 FROM signing_keys")
            assert left >= w.options.access_ttl_s + signing.REGISTERED_S - 5
            w.signer._registered_until = time.time() + w.options.access_ttl_s - 1
            with pytest.raises(Unavailable, match="no access token can be signed"):
                w.signer.issue(USER, SESSION)
            await w.signer.look(w.pool)
            w.signer.issue(USER, SESSION)

    run(test())


def test_without_a_database_the_old_key_goes_on(target: Target, pki: Layout, rotated: Layout, tmp_path: Path) -> None:
    async def test() -> None:
        layout = copy(pki, tmp_path)
        async with world(target, layout) as w:
            first = w.signer.kid
            rotate(layout, rotated)
            await w.pool.close()
            with pytest.raises(CoreError):
                await w.signer.look(w.pool)
            assert w.signer.kid == first

    run(test())


@pytest.mark.parametrize("kind", ["ecdsa", "short", "garbage", "missing", "readable"])
def test_a_key_that_cannot_be_used_ends_the_start(shared: Target, pki: Layout, tmp_path: Path, kind: str) -> None:
    layout = copy(pki, tmp_path)
    path = layout.jwt_private
    if kind == "ecdsa":
        path.write_bytes(keys.to_pem(keys.generate(KeyType.ECDSA_P256)))
    elif kind == "short":
        path.write_bytes(keys.to_pem(rsa.generate_private_key(65537, 2048)))
    elif kind == "garbage":
        path.write_bytes(b"garbage")
    elif kind == "missing":
        path.unlink()
    else:
        path.chmod(0o644)

    async def test() -> None:
        async with world(shared, pki) as w, w.pool.acquire() as connection:
            with pytest.raises(SigningKeyError, match="jwt-private"):
                await Signer.open(connection, path, replace(w.options))

    run(test())
