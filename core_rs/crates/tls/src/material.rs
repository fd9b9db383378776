//! Loading one identity: every file is checked before anything of it is used.

use std::path::Path;
use std::sync::Arc;

use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls::{CertificateError, Error};
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use webpki::{CertRevocationList, OwnedCertRevocationList, anchor_from_trusted_cert};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};

use crate::error::{TlsError, date, fault};
use crate::files::Files;
use crate::identity::Peer;
use crate::verify::{Purpose, Trust, Verifier};

/// A verified identity, ready to become a TLS configuration.
pub(crate) struct Material {
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) certified: Arc<CertifiedKey>,
    pub(crate) verifier: Arc<Verifier>,
    /// Ourselves.
    pub(crate) own: Peer,
    /// End of our certificate's validity, seconds since 1970.
    pub(crate) not_after: i64,
    pub(crate) has_crl: bool,
    /// Why our own certificate may not be used any more, when that is all there is against it: it was revoked.
    pub(crate) revoked: Option<TlsError>,
}

impl Material {
    /// Reads and checks everything. `purpose` is what our own certificate must be good for.
    ///
    /// That our own certificate is revoked is no error here: the list that says so may name others as well, who must
    /// not stay trusted for it.
    pub(crate) fn load(
        files: &Files,
        purpose: Purpose,
        allow: &Arc<[String]>,
    ) -> Result<Self, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let now = UnixTime::now();
        let roots = files.read_ca()?;
        let lists = files.read_crl()?;
        let has_crl = lists.is_some();
        let trust = Trust {
            anchors: anchors(&files.ca, &roots, now)?,
            crls: match (&files.crl, lists) {
                (Some(path), Some(lists)) => revocation_lists(path, &lists, &roots, now)?,
                _ => Vec::new(),
            },
            algorithms: provider.signature_verification_algorithms,
        };

        let chain = files.read_cert()?;
        let not_after = check_dates(&files.cert, &chain[0], now)?;
        let revoked = match trust.check(&chain[0], &chain[1..], now, purpose) {
            Ok(()) => None,
            Err(e) => {
                let error = TlsError::new(&files.cert, own_certificate(&e, purpose));
                if e != Error::InvalidCertificate(CertificateError::Revoked) {
                    return Err(error);
                }
                Some(error)
            }
        };
        let own = Peer::read(&chain).map_err(|reason| TlsError::new(&files.cert, own(&reason)))?;

        let key = provider
            .key_provider
            .load_private_key(files.read_key()?)
            .map_err(|e| TlsError::new(&files.key, format!("is not a usable private key: {e}")))?;
        let certified = CertifiedKey::new(chain, key);
        certified.keys_match().map_err(|_| {
            let reason = format!(
                "does not belong to the certificate in {}",
                files.cert.display()
            );
            TlsError::new(&files.key, reason)
        })?;
        Ok(Self {
            verifier: Arc::new(Verifier {
                trust,
                purpose: purpose.opposite(),
                allow: Arc::clone(allow),
            }),
            provider,
            certified: Arc::new(certified),
            own,
            not_after,
            has_crl,
            revoked,
        })
    }
}

/// `reason` is a sentence about a peer's certificate; here it is our own file.
fn own(reason: &str) -> String {
    reason
        .strip_prefix("its certificate ")
        .unwrap_or(reason)
        .to_owned()
}

fn own_certificate(error: &rustls::Error, purpose: Purpose) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::InvalidPurpose) => match purpose {
            Purpose::Server => "is not a server certificate (extended key usage serverAuth)".into(),
            Purpose::Client => "is not a client certificate (extended key usage clientAuth)".into(),
        },
        Error::InvalidCertificate(e) => own(&fault(e)),
        e => e.to_string(),
    }
}

fn date_of(seconds: i64) -> String {
    u64::try_from(seconds).map_or_else(|_| "a date before 1970".to_owned(), date)
}

fn seconds(now: UnixTime) -> i64 {
    i64::try_from(now.as_secs()).unwrap_or(i64::MAX)
}

/// Returns the end of validity.
fn check_dates(path: &Path, der: &CertificateDer<'_>, now: UnixTime) -> Result<i64, TlsError> {
    let (_, cert) = X509Certificate::from_der(der)
        .map_err(|e| TlsError::new(path, format!("cannot be parsed: {e}")))?;
    let (from, until) = (
        cert.validity().not_before.timestamp(),
        cert.validity().not_after.timestamp(),
    );
    let now = seconds(now);
    if now < from {
        let reason = format!(
            "is not valid before {} (is the clock right?)",
            date_of(from)
        );
        return Err(TlsError::new(path, reason));
    }
    if now > until {
        let reason = format!(
            "expired on {}; `helixflow pki renew` replaces it",
            date_of(until)
        );
        return Err(TlsError::new(path, reason));
    }
    Ok(until)
}

fn anchors(
    path: &Path,
    roots: &[CertificateDer<'static>],
    now: UnixTime,
) -> Result<Vec<rustls_pki_types::TrustAnchor<'static>>, TlsError> {
    roots
        .iter()
        .map(|der| {
            // webpki takes trust anchors as they are, so their dates and kind are checked here.
            check_dates(path, der, now)?;
            let is_ca = X509Certificate::from_der(der).is_ok_and(|(_, cert)| cert.is_ca());
            if !is_ca {
                return Err(TlsError::new(
                    path,
                    "is not a CA certificate (basic constraints CA)",
                ));
            }
            anchor_from_trusted_cert(der)
                .map(|anchor| anchor.to_owned())
                .map_err(|e| TlsError::new(path, format!("cannot be used as a CA: {e}")))
        })
        .collect()
}

fn revocation_lists(
    path: &Path,
    lists: &[CertificateRevocationListDer<'static>],
    roots: &[CertificateDer<'static>],
    now: UnixTime,
) -> Result<Vec<CertRevocationList<'static>>, TlsError> {
    let now = seconds(now);
    let renew = "`helixflow pki renew` signs a new one";
    lists
        .iter()
        .map(|der| {
            let (_, list) = CertificateRevocationList::from_der(der)
                .map_err(|e| TlsError::new(path, format!("cannot be parsed: {e}")))?;
            if now < list.last_update().timestamp() {
                let from = date_of(list.last_update().timestamp());
                return Err(TlsError::new(
                    path,
                    format!("is not valid before {from} (is the clock right?)"),
                ));
            }
            match list.next_update().map(|t| t.timestamp()) {
                None => return Err(TlsError::new(path, format!("says no next update; {renew}"))),
                Some(until) if now >= until => {
                    return Err(TlsError::new(
                        path,
                        format!("expired on {}; {renew}", date_of(until)),
                    ));
                }
                Some(_) => {}
            }
            let issued_by_a_root = roots.iter().any(|root| {
                X509Certificate::from_der(root)
                    .is_ok_and(|(_, ca)| ca.subject().as_raw() == list.issuer().as_raw())
            });
            if !issued_by_a_root {
                return Err(TlsError::new(path, "was not issued by our CA"));
            }
            OwnedCertRevocationList::from_der(der)
                .map(CertRevocationList::Owned)
                .map_err(|e| TlsError::new(path, format!("cannot be used: {e}")))
        })
        .collect()
}
