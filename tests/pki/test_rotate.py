"""Renewing and revoking."""

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from helixflow.pki import files, issue, keys, names, pairs, rotate
from helixflow.pki.errors import PkiError
from helixflow.pki.keys import KeyType
from helixflow.pki.layout import SERVICES, Layout, Role
from helixflow.pki.verify import verify


def serials(layout: Layout) -> dict[Path, int]:
    return {pair.cert: pairs.load_cert(pair).serial_number for name in layout.names() for pair in layout.pairs(name)}


def revoked(layout: Layout) -> set[int]:
    return {entry.serial_number for entry in rotate.load_crl(layout)}


def number(layout: Layout) -> int:
    return rotate.load_crl(layout).extensions.get_extension_for_class(x509.CRLNumber).value.crl_number


def test_one_service_gets_new_keys_and_certificates_and_others_keep_theirs(layout: Layout) -> None:
    before, key = serials(layout), layout.pair("monitoring", Role.SERVER).key.read_bytes()
    done = rotate.renew(layout, ["monitoring"])
    assert done == list(layout.pairs("monitoring"))
    after = serials(layout)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed == {"monitoring.crt", "monitoring-client.crt"}
    assert layout.pair("monitoring", Role.SERVER).key.read_bytes() != key
    assert layout.pair("monitoring", Role.SERVER).key.stat().st_mode & 0o777 == 0o600
    assert verify(layout).findings == []
    assert not layout.crl.exists()


def test_all_includes_services_that_were_added(layout: Layout) -> None:
    issue.issue(layout, "batch-runner")
    before = serials(layout)
    assert len(rotate.renew(layout)) == 2 * (len(SERVICES) + 1)
    after = serials(layout)
    assert all(before[path] != after[path] for path in before)


def test_only_what_ends_within_the_given_days(layout: Layout) -> None:
    rotate.renew(layout, ["auth-service"], days=10)
    before = serials(layout)
    assert rotate.renew(layout, within_days=9) == []
    assert rotate.renew(layout, within_days=10) == list(layout.pairs("auth-service"))
    after = serials(layout)
    assert {p.name for p in before if before[p] != after[p]} == {"auth-service.crt", "auth-service-client.crt"}
    assert len(rotate.renew(layout, within_days=365)) == 8


def test_extra_names_and_the_kind_of_key_stay_unless_told_otherwise(layout: Layout) -> None:
    rotate.permit(layout, ["example.com"])
    rotate.renew(layout, ["api-gateway"], san=["ai.example.com", "10.0.0.7"])
    rotate.renew(layout, ["api-gateway"], san=["10.0.0.8"])
    cert, _key = pairs.read(layout.pair("api-gateway", Role.SERVER))
    assert [names.text(name) for name in names.of(cert)][-3:] == ["DNS:ai.example.com", "IP:10.0.0.7", "IP:10.0.0.8"]
    assert keys.kind_of(cert.public_key()) is KeyType.ECDSA_P256
    rotate.renew(layout, ["monitoring"], key_type=KeyType.RSA_4096)
    cert, _key = pairs.read(layout.pair("monitoring", Role.CLIENT))
    assert keys.describe(cert.public_key()) == "RSA-4096"
    assert verify(layout).findings == []


def test_renewing_mends_damaged_and_mismatched_pairs(layout: Layout) -> None:
    layout.pair("api-gateway", Role.SERVER).cert.write_bytes(b"garbage")
    layout.pair("monitoring", Role.CLIENT).key.write_bytes(layout.pair("monitoring", Role.SERVER).key.read_bytes())
    rotate.renew(layout, ["api-gateway", "monitoring"])
    assert verify(layout).findings == []


def test_a_service_without_certificates_is_not_renewed(layout: Layout) -> None:
    with pytest.raises(PkiError, match="cannot be renewed"):
        rotate.renew(layout, ["unknown"])
    with pytest.raises(PkiError, match="cannot name a service"):
        rotate.renew(layout, ["../x"])


def test_without_the_ca_key_nothing_changes(layout: Layout) -> None:
    before = serials(layout)
    layout.ca_key.unlink()
    with pytest.raises(PkiError, match="nothing can be signed"):
        rotate.renew(layout)
    assert serials(layout) == before


def test_a_disk_that_fails_changes_nothing(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in layout.directory.iterdir()}
    original = files.Change.__init__

    def full(self: files.Change, path: Path, content: bytes, *, private: bool) -> None:
        if path.name == "monitoring-client.crt":
            raise PkiError(path, "cannot be written: No space left on device")
        original(self, path, content, private=private)

    monkeypatch.setattr(files.Change, "__init__", full)
    with pytest.raises(PkiError, match="No space left"):
        rotate.renew(layout)
    monkeypatch.undo()
    with files.locked(layout.directory):
        pass
    assert {path: path.read_bytes() for path in layout.directory.iterdir()} == before


def test_a_reader_never_gets_a_key_without_its_certificate(layout: Layout) -> None:
    pair = layout.pair("inference-pool", Role.SERVER)
    stop = threading.Event()
    seen: set[int] = set()
    failures: list[PkiError] = []

    def read() -> None:
        while not stop.is_set():
            try:
                cert, key = pairs.read(pair)
            except PkiError as error:
                failures.append(error)
                return
            assert keys.public_der(cert.public_key()) == keys.public_der(key.public_key())
            seen.add(cert.serial_number)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(40):
            rotate.renew(layout, ["inference-pool"])
    finally:
        stop.set()
        reader.join()
    assert failures == []
    assert len(seen) > 1


def test_a_pair_that_stays_mismatched_is_an_error(layout: Layout) -> None:
    pair = layout.pair("inference-pool", Role.SERVER)
    pair.key.write_bytes(keys.to_pem(keys.generate(KeyType.ECDSA_P256)))
    with pytest.raises(PkiError, match="renew inference-pool"):
        pairs.read(pair)


# --- revocation ---------------------------------------------------------------


def test_revoking_adds_to_the_list_and_keeps_what_was_in_it(layout: Layout) -> None:
    assert rotate.revoke(layout, [5]) == [5]
    first = rotate.load_crl(layout)
    assert rotate.revoke(layout, [6, 5]) == [6]
    assert revoked(layout) == {5, 6}
    assert number(layout) == 2
    then, now = first.get_revoked_certificate_by_serial_number(5), rotate.load_crl(layout)
    kept = now.get_revoked_certificate_by_serial_number(5)
    assert then is not None
    assert kept is not None
    assert kept.revocation_date_utc == then.revocation_date_utc
    assert now.next_update_utc is not None
    assert timedelta(days=29) < now.next_update_utc - datetime.now(UTC) <= timedelta(days=30)
    assert layout.crl.stat().st_mode & 0o777 == 0o644


def test_a_revoked_service_fails_until_it_is_renewed(layout: Layout) -> None:
    rotate.revoke(layout, rotate.serials_of(layout, "monitoring"))
    assert {f.file.name for f in verify(layout).findings} == {"monitoring.crt", "monitoring-client.crt"}
    rotate.renew(layout, ["monitoring"])
    assert verify(layout).findings == []
    assert len(revoked(layout)) == 2


def test_renew_signs_the_list_anew_even_when_nothing_else_is_due(layout: Layout) -> None:
    rotate.revoke(layout, [5])
    old = rotate.load_crl(layout).next_update_utc
    assert rotate.renew(layout, within_days=30, now=datetime.now(UTC) + timedelta(days=20)) == []
    new = rotate.load_crl(layout).next_update_utc
    assert old is not None
    assert new is not None
    assert (new - old).days in {19, 20}
    assert revoked(layout) == {5}
    assert number(layout) == 2


def test_a_damaged_or_foreign_list_is_not_replaced(layout: Layout) -> None:
    layout.crl.write_bytes(b"garbage")
    with pytest.raises(PkiError, match="is not a PEM revocation list"):
        rotate.revoke(layout, [5])
    with pytest.raises(PkiError, match="is not a PEM revocation list"):
        rotate.renew(layout, within_days=0)
    assert layout.crl.read_bytes() == b"garbage"
