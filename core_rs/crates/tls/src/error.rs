//! What can go wrong: with a file when it is loaded, or with a peer when it connects.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustls::CertificateError;

/// A file of an identity that cannot be used: which one, and why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: {reason}", .file.display())]
pub struct TlsError {
    /// The file that is wrong.
    pub file: PathBuf,
    /// What is wrong with it and what to do.
    pub reason: String,
}

impl TlsError {
    pub(crate) fn new(file: &Path, reason: impl Into<String>) -> Self {
        Self {
            file: file.to_owned(),
            reason: reason.into(),
        }
    }
}

/// Why a connection did not come about.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The TCP connection failed.
    #[error("cannot connect to {address}: {source}")]
    Connect {
        /// `host:port` as it was asked for.
        address: String,
        /// What the operating system said.
        source: io::Error,
    },
    /// Connecting, or the handshake, took too long.
    #[error("no TLS connection within {} ms", .after.as_millis())]
    Timeout {
        /// The limit that was exceeded.
        after: Duration,
    },
    /// The peer's certificate is not acceptable here.
    #[error("peer refused: {reason}")]
    Refused {
        /// What is wrong with the peer's certificate.
        reason: String,
    },
    /// The handshake broke, or the peer refused us.
    #[error("TLS handshake failed: {reason}")]
    Failed {
        /// What TLS or the operating system said.
        reason: String,
    },
}

impl HandshakeError {
    pub(crate) fn from_io(error: &io::Error) -> Self {
        match error
            .get_ref()
            .and_then(|e| e.downcast_ref::<rustls::Error>())
        {
            Some(e) => Self::from_tls(e),
            None => Self::Failed {
                reason: error.to_string(),
            },
        }
    }

    pub(crate) fn from_tls(error: &rustls::Error) -> Self {
        use rustls::Error;
        match error {
            Error::InvalidCertificate(e) => Self::Refused { reason: fault(e) },
            Error::NoCertificatesPresented => Self::Refused {
                reason: "it sent no certificate".into(),
            },
            e => Self::Failed {
                reason: e.to_string(),
            },
        }
    }
}

/// One sentence about a certificate, of which the caller knows whose it is.
pub(crate) fn fault(error: &CertificateError) -> String {
    use CertificateError as C;
    match error {
        // `Other` carries a sentence of ours; its Display would wrap it in debug output.
        C::Other(other) => other.0.to_string(),
        C::Revoked => "its certificate is revoked".into(),
        C::UnknownIssuer => "its certificate was not issued by our CA".into(),
        C::BadSignature => {
            "its certificate, or the revocation list, does not carry the signature of our CA".into()
        }
        C::BadEncoding => "its certificate cannot be parsed".into(),
        C::InvalidPurpose => {
            "its certificate is not for this side of a connection (extended key usage)".into()
        }
        C::ExpiredContext { not_after, .. } => {
            format!("its certificate expired on {}", date(not_after.as_secs()))
        }
        C::NotValidYetContext { not_before, .. } => {
            format!(
                "its certificate is not valid before {}",
                date(not_before.as_secs())
            )
        }
        C::UnknownRevocationStatus => {
            "its certificate is covered by no revocation list, although there is one".into()
        }
        C::ExpiredRevocationListContext { next_update, .. } => format!(
            "the revocation list expired on {}, so nobody can be trusted; `helixflow pki renew` signs a new one",
            date(next_update.as_secs())
        ),
        other => other.to_string(),
    }
}

/// A date for people, from seconds since 1970.
pub(crate) fn date(seconds: u64) -> String {
    i64::try_from(seconds)
        .ok()
        .and_then(|s| x509_parser::prelude::ASN1Time::from_timestamp(s).ok())
        .map_or_else(|| format!("{seconds} s"), |time| time.to_string())
}
