"""The client over mutual TLS."""

import shutil
from pathlib import Path

import pytest

from helixflow.core_rs import PoolClient, TlsError
from helixflow.pki.layout import Layout, Role

from .harness import Harness, events, files, run, serving, text_of


def test_calls_over_mutual_tls_and_reload(pki: Layout, tmp_path: Path) -> None:
    own = Layout(tmp_path / "certs")
    shutil.copytree(pki.directory, own.directory)
    pair = own.pair("api-gateway", Role.CLIENT)

    async def test(harness: Harness) -> None:
        await harness.ready()
        assert text_of(events(await harness.finish(harness.chat())))
        good = pair.cert.read_bytes()
        pair.cert.write_text("no certificate")
        with pytest.raises(TlsError, match=r"api-gateway-client\.crt"):
            harness.client.reload_tls()
        assert text_of(events(await harness.finish(harness.chat())))
        pair.cert.write_bytes(good)
        harness.client.reload_tls()
        assert text_of(events(await harness.finish(harness.chat())))

    with serving(tls=files(pki, pki.pair("inference-pool", Role.SERVER))) as served:
        run(test, [served.address], files(own, pair))


def test_another_service_is_refused(pki: Layout) -> None:
    async def test(harness: Harness) -> None:
        (pool,) = await harness.pools(lambda pools: pools[0].last_error is not None)
        assert "monitoring" in (pool.last_error or "")
        assert (await harness.failure(harness.chat())).code == "unavailable"

    with serving(tls=files(pki, pki.pair("monitoring", Role.SERVER))) as served:
        run(test, [served.address], files(pki, pki.pair("api-gateway", Role.CLIENT)))


def test_bad_files_are_named(pki: Layout) -> None:
    pair = pki.pair("api-gateway", Role.CLIENT)
    missing = pki.directory / "nowhere.crt"
    with pytest.raises(TlsError, match=r"nowhere\.crt"):
        PoolClient(["localhost:1"], files(pki, type(pair)(pair.name, pair.role, missing, pair.key)))
