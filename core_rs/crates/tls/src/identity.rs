//! Who a certificate says its holder is.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use rustls_pki_types::CertificateDer;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Trust domain of every service identity.
pub const TRUST_DOMAIN: &str = "helixflow.local";

/// The verified holder of a certificate.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// The service, from the SPIFFE URI: `spiffe://helixflow.local/<service>`.
    pub service: String,
    /// Serial number of the certificate, lower-case hex without leading zeros.
    pub serial: String,
    /// SHA-256 of the certificate (DER), lower-case hex.
    pub fingerprint: String,
    pub(crate) chain: Arc<[CertificateDer<'static>]>,
}

impl fmt::Debug for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Kilobytes of certificate are of no use in a log line.
        f.debug_struct("Peer")
            .field("service", &self.service)
            .field("serial", &self.serial)
            .field("fingerprint", &self.fingerprint)
            .finish_non_exhaustive()
    }
}

impl Peer {
    /// Reads the identity out of the first certificate of `chain`. Does not verify it.
    pub(crate) fn read(chain: &[CertificateDer<'_>]) -> Result<Self, String> {
        let leaf = chain.first().ok_or("no certificate was presented")?;
        let (_, cert) = X509Certificate::from_der(leaf)
            .map_err(|e| format!("its certificate cannot be parsed: {e}"))?;
        Ok(Self {
            service: service_of(&cert)?,
            serial: hex(cert.raw_serial()).trim_start_matches('0').to_owned(),
            fingerprint: hex(ring::digest::digest(&ring::digest::SHA256, leaf).as_ref()),
            chain: chain.iter().map(|c| c.clone().into_owned()).collect(),
        })
    }
}

/// The service in the certificate's one URI name (X.509-SVID §2: exactly one).
pub(crate) fn service_of(cert: &X509Certificate<'_>) -> Result<String, String> {
    let san = cert
        .subject_alternative_name()
        .map_err(|e| {
            format!("its certificate has subject alternative names that cannot be parsed: {e}")
        })?
        .ok_or("its certificate has no subject alternative names, so no SPIFFE identity")?;
    let mut uris = san
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        });
    let uri = uris
        .next()
        .ok_or("its certificate names no SPIFFE identity (URI)")?;
    if uris.next().is_some() {
        return Err("its certificate names more than one URI; an identity is exactly one".into());
    }
    parse(uri).ok_or_else(|| {
        format!("its certificate names `{uri}`, which is not an identity of the form spiffe://{TRUST_DOMAIN}/<service>")
    })
}

fn parse(uri: &str) -> Option<String> {
    let service = uri
        .strip_prefix("spiffe://")?
        .strip_prefix(TRUST_DOMAIN)?
        .strip_prefix('/')?;
    is_service_name(service).then(|| service.to_owned())
}

/// A service name is one DNS label: it is used as one in SNI and in the names of its files.
pub(crate) fn is_service_name(name: &str) -> bool {
    (1..=63).contains(&name.len())
        && name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !name.starts_with('-')
        && !name.ends_with('-')
}

fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, b| {
            // Writing to a String cannot fail.
            let _ = write!(text, "{b:02x}");
            text
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    #[test]
    fn only_the_exact_form_is_an_identity() {
        assert_eq!(
            parse("spiffe://helixflow.local/inference-pool").as_deref(),
            Some("inference-pool")
        );
        for wrong in [
            "",
            "spiffe://helixflow.local",
            "spiffe://helixflow.local/",
            "spiffe://helixflow.local/a/b",
            "spiffe://helixflow.local/inference-pool/",
            "spiffe://helixflow.local.evil/inference-pool",
            "spiffe://evil/helixflow.local/inference-pool",
            "spiffe://helixflow.local//inference-pool",
            "spiffe://helixflow.local/Inference-Pool",
            "spiffe://helixflow.local/inference-pool?x",
            "spiffe://helixflow.local/../inference-pool",
            "SPIFFE://helixflow.local/inference-pool",
            "https://helixflow.local/inference-pool",
            "spiffe://helixflow.local/-a",
            "spiffe://helixflow.local/a\0",
        ] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn hex_is_lower_case_and_padded() {
        assert_eq!(hex(&[0x00, 0x0a, 0xff]), "000aff");
    }
}
