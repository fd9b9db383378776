//! The one verifier of both directions: chain, dates, purpose, revocation, identity.

use std::fmt;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertRevocationListError, CertificateError, DigitallySignedStruct, DistinguishedName, Error,
    OtherError, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RevocationOptionsBuilder,
};

use crate::identity::Peer;

/// The certificate's purpose (extended key usage), which must be present: webpki's own
/// `server_auth()` would take a certificate without any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Server,
    Client,
}

impl Purpose {
    fn usage(self) -> KeyUsage {
        // id-kp-serverAuth, id-kp-clientAuth (RFC 5280 §4.2.1.12), DER without tag and length.
        KeyUsage::required(match self {
            Self::Server => &[0x2b, 6, 1, 5, 5, 7, 3, 1],
            Self::Client => &[0x2b, 6, 1, 5, 5, 7, 3, 2],
        })
    }

    pub(crate) fn opposite(self) -> Self {
        match self {
            Self::Server => Self::Client,
            Self::Client => Self::Server,
        }
    }
}

/// What is trusted: our CA, less what it revoked.
pub(crate) struct Trust {
    pub(crate) anchors: Vec<TrustAnchor<'static>>,
    /// Empty: nothing is revoked. Otherwise every certificate must be covered by a current list.
    pub(crate) crls: Vec<CertRevocationList<'static>>,
    pub(crate) algorithms: WebPkiSupportedAlgorithms,
}

impl Trust {
    pub(crate) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        purpose: Purpose,
    ) -> Result<(), Error> {
        let cert = EndEntityCert::try_from(leaf).map_err(refusal)?;
        let crls: Vec<&CertRevocationList<'_>> = self.crls.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&crls).ok().map(|options| {
            options
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        cert.verify_for_usage(
            self.algorithms.all,
            &self.anchors,
            intermediates,
            now,
            purpose.usage(),
            revocation,
            None,
        )
        .map(|_| ())
        .map_err(refusal)
    }
}

/// Verifies a peer during the handshake, and again later through [`Verifier::check`].
pub(crate) struct Verifier {
    pub(crate) trust: Trust,
    /// Purpose that the peer's certificate must have.
    pub(crate) purpose: Purpose,
    /// Services that the peer may be.
    pub(crate) allow: Arc<[String]>,
}

impl Verifier {
    pub(crate) fn check(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), Error> {
        self.trust.check(leaf, intermediates, now, self.purpose)?;
        let peer = Peer::read(std::slice::from_ref(leaf)).map_err(|reason| stranger(&reason))?;
        if self.allow.contains(&peer.service) {
            Ok(())
        } else {
            Err(stranger(&format!(
                "it is `{}`, and only {} may be here",
                peer.service,
                self.allow
                    .iter()
                    .map(|s| format!("`{s}`"))
                    .collect::<Vec<_>>()
                    .join(", ")
            )))
        }
    }
}

fn stranger(reason: &str) -> Error {
    CertificateError::Other(OtherError(Arc::from(Box::<
        dyn std::error::Error + Send + Sync,
    >::from(reason))))
    .into()
}

/// Keeps the TLS alert right: each kind of refusal has its own.
fn refusal(error: webpki::Error) -> Error {
    use webpki::Error as W;
    match error {
        W::BadDer | W::BadDerTime | W::TrailingData(_) => CertificateError::BadEncoding.into(),
        W::CertNotValidYet { time, not_before } => {
            CertificateError::NotValidYetContext { time, not_before }.into()
        }
        W::CertExpired { time, not_after } => {
            CertificateError::ExpiredContext { time, not_after }.into()
        }
        W::InvalidCertValidity => CertificateError::Expired.into(),
        W::UnknownIssuer => CertificateError::UnknownIssuer.into(),
        W::CertRevoked => CertificateError::Revoked.into(),
        W::UnknownRevocationStatus => CertificateError::UnknownRevocationStatus.into(),
        W::CrlExpired { time, next_update } => {
            CertificateError::ExpiredRevocationListContext { time, next_update }.into()
        }
        W::IssuerNotCrlSigner => CertRevocationListError::IssuerInvalidForCrl.into(),
        W::InvalidSignatureForPublicKey | W::InvalidCrlSignatureForPublicKey => {
            CertificateError::BadSignature.into()
        }
        W::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose.into(),
        W::CaUsedAsEndEntity => stranger("its certificate is a CA's, not a service's"),
        other => CertificateError::Other(OtherError(Arc::new(other))).into(),
    }
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier")
            .field("purpose", &self.purpose)
            .field("allow", &self.allow)
            .field("crls", &self.trust.crls.len())
            .finish_non_exhaustive()
    }
}

fn only_tls13() -> Error {
    Error::General("a TLS 1.2 signature in a configuration that speaks TLS 1.3 only".into())
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Clients here have one certificate to offer; naming the CA would only tell strangers about it.
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates, now)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(only_tls13())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.trust.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.trust.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::time::Duration;

    use rcgen::{
        BasicConstraints, CertificateParams, CertificateRevocationListParams,
        ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, SanType,
        SerialNumber,
    };
    use time::OffsetDateTime;
    use webpki::{OwnedCertRevocationList, anchor_from_trusted_cert};

    use super::*;

    #[test]
    fn a_list_that_expires_in_service_fails_closed() {
        let start = OffsetDateTime::now_utc();
        let mut ca = CertificateParams::default();
        ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        ca.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer_key = KeyPair::generate().unwrap();
        let root = ca.self_signed(&issuer_key).unwrap();
        let issuer = Issuer::new(ca, issuer_key);
        let mut leaf = CertificateParams::default();
        leaf.subject_alt_names = vec![SanType::URI(
            "spiffe://helixflow.local/api-gateway".try_into().unwrap(),
        )];
        leaf.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let cert = leaf
            .signed_by(&KeyPair::generate().unwrap(), &issuer)
            .unwrap();
        let list = CertificateRevocationListParams {
            this_update: start - time::Duration::minutes(1),
            next_update: start + time::Duration::minutes(1),
            crl_number: SerialNumber::from(1_u64),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: KeyIdMethod::Sha256,
        }
        .signed_by(&issuer)
        .unwrap();
        let verifier = Verifier {
            trust: Trust {
                anchors: vec![anchor_from_trusted_cert(root.der()).unwrap().to_owned()],
                crls: vec![
                    OwnedCertRevocationList::from_der(list.der())
                        .unwrap()
                        .into(),
                ],
                algorithms: rustls::crypto::ring::default_provider()
                    .signature_verification_algorithms,
            },
            purpose: Purpose::Client,
            allow: vec!["api-gateway".to_owned()].into(),
        };

        let now = UnixTime::now();
        verifier.check(cert.der(), &[], now).unwrap();
        let later = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + 120));
        assert!(matches!(
            verifier.check(cert.der(), &[], later),
            Err(Error::InvalidCertificate(
                CertificateError::ExpiredRevocationListContext { .. }
            ))
        ));
    }
}
