//! Files that must not be used, each refused with its name and reason.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use helix_tls::{ClientTls, Files, ServerTls, TlsError};

use crate::support::{CLIENT, Ca, Home, SERVER, days, names, put, serial};

fn load(files: &Files) -> Result<(), TlsError> {
    ServerTls::load(files.clone(), names(&["api-gateway"])).map(drop)
}

fn refused(files: &Files, file: &Path, words: &str) {
    let error = load(files).unwrap_err();
    assert_eq!(error.file, file, "{error}");
    assert!(error.reason.contains(words), "{error}");
}

fn home(ca: &Ca) -> Home {
    Home::new(ca, &ca.server("inference-pool"))
}

#[test]
fn a_missing_file_is_named() {
    let ca = Ca::new("ca");
    for pick in [
        |f: &Files| f.ca.clone(),
        |f: &Files| f.cert.clone(),
        |f: &Files| f.key.clone(),
    ] {
        let home = home(&ca);
        let gone = pick(&home.files);
        fs::remove_file(&gone).unwrap();
        refused(&home.files, &gone, "does not exist");
    }
    // Only the revocation list may be absent.
    load(&home(&ca).files).unwrap();
}

#[test]
fn a_key_that_others_may_read_is_not_used() {
    let ca = Ca::new("ca");
    for mode in [0o644, 0o640, 0o604, 0o620, 0o601] {
        let home = home(&ca);
        fs::set_permissions(&home.files.key, fs::Permissions::from_mode(mode)).unwrap();
        refused(&home.files, &home.files.key, "chmod 600");
    }
    let home = home(&ca);
    fs::set_permissions(&home.files.key, fs::Permissions::from_mode(0o400)).unwrap();
    load(&home.files).unwrap();
}

#[test]
fn a_key_of_another_certificate_is_not_used() {
    let ca = Ca::new("ca");
    let home = home(&ca);
    put(&home.files.key, &ca.server("inference-pool").key, 0o600);
    refused(
        &home.files,
        &home.files.key,
        "does not belong to the certificate",
    );
}

#[test]
fn files_that_are_not_what_they_should_be() {
    let ca = Ca::new("ca");
    let leaf = ca.server("inference-pool");
    let at = |place: fn(&Files) -> &Path, text: &str, words: &str| {
        let home = home(&ca);
        let path = place(&home.files).to_owned();
        put(&path, text, 0o600);
        refused(&home.files, &path, words);
    };
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    at(|f| &f.ca, "", "holds no PEM certificate");
    at(|f| &f.ca, broken, "cannot be parsed");
    at(|f| &f.ca, &leaf.cert, "is not a CA certificate");
    at(|f| &f.ca, &"x".repeat(2 << 20), "larger than");
    at(
        |f| &f.ca,
        &Ca::with("old", |p| p.not_after = days(-1) + time::Duration::hours(1)).pem,
        "expired on",
    );
    at(|f| &f.cert, &leaf.key, "holds no PEM certificate");
    at(|f| &f.cert, broken, "cannot be parsed");
    at(
        |f| &f.cert,
        "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n",
        "not a PEM certificate",
    );
    at(|f| &f.cert, &ca.pem, "is a CA's");
    at(|f| &f.key, &leaf.cert, "PEM private key");
    at(
        |f| &f.key,
        "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        "not a usable private key",
    );
}

#[test]
fn our_own_certificate_is_verified_like_a_peers() {
    let ca = Ca::new("ca");
    let cases = [
        (
            "expired on",
            ca.issue("inference-pool", SERVER, |p| {
                p.not_after = days(-1) + time::Duration::hours(1);
            }),
        ),
        (
            "not valid before",
            ca.issue("inference-pool", SERVER, |p| p.not_before = days(1)),
        ),
        ("not a server certificate", ca.client("inference-pool")),
        (
            "not issued by our CA",
            Ca::new("other").server("inference-pool"),
        ),
        (
            "no SPIFFE identity",
            ca.issue("inference-pool", SERVER, |p| p.subject_alt_names.clear()),
        ),
    ];
    for (words, identity) in cases {
        let home = Home::new(&ca, &identity);
        refused(&home.files, &home.files.cert, words);
    }
    let home = Home::new(&ca, &ca.server("api-gateway"));
    let error = ClientTls::load(home.files.clone(), "inference-pool".into())
        .map(drop)
        .unwrap_err();
    assert!(error.reason.contains("not a client certificate"), "{error}");
}

#[test]
fn revocation_lists_that_cannot_be_trusted() {
    let ca = Ca::new("ca");
    for (words, pem) in [
        (
            "expired on",
            ca.crl_until(&[], days(-1) + time::Duration::hours(1)),
        ),
        ("was not issued by our CA", Ca::new("other").crl(&[])),
        ("holds no PEM revocation list", String::new()),
        (
            "cannot be parsed",
            "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n".into(),
        ),
    ] {
        let home = home(&ca);
        home.put_crl(&pem);
        refused(&home.files, &home.crl(), words);
    }
    // A list that somebody else signed in our CA's name: found when it is used on our own certificate.
    let home = home(&ca);
    home.put_crl(&Ca::new("ca").crl(&[]));
    refused(&home.files, &home.files.cert, "signature of our CA");

    let home = Home::new(&ca, &ca.issue("inference-pool", SERVER, serial(5)));
    home.put_crl(&ca.crl(&[5]));
    refused(&home.files, &home.files.cert, "is revoked");
}

#[test]
fn expected_services_must_be_service_names() {
    let ca = Ca::new("ca");
    let server = home(&ca);
    for wrong in ["", "*", "Inference-Pool", "a/b", "-a", "a.b", "späti"] {
        assert!(
            ServerTls::load(server.files.clone(), names(&[wrong])).is_err(),
            "{wrong}"
        );
        let client = Home::new(&ca, &ca.issue("api-gateway", CLIENT, |_| {}));
        assert!(
            ClientTls::load(client.files.clone(), wrong.into()).is_err(),
            "{wrong}"
        );
    }
}

#[test]
fn the_error_reads_as_file_and_reason() {
    let ca = Ca::new("ca");
    let home = home(&ca);
    fs::remove_file(&home.files.cert).unwrap();
    let error = load(&home.files).unwrap_err().to_string();
    let path = home.dir.path().join("own.crt");
    assert!(
        error.starts_with(&format!("{}: does not exist", path.display())),
        "{error}"
    );
}
