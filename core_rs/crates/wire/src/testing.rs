//! A certificate authority for tests.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use helix_tls::{Files, ServerTls};
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use tempfile::TempDir;

/// Certificates of one folder.
pub(crate) struct Ca {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    pub(crate) fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        fs::write(
            folder.path().join("ca.pem"),
            params.self_signed(&key).unwrap().pem(),
        )
        .unwrap();
        Self {
            folder,
            issuer: Issuer::new(params, key),
        }
    }

    pub(crate) fn issue(
        &self,
        file: &str,
        service: &str,
        purpose: ExtendedKeyUsagePurpose,
    ) -> Files {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        let uri = format!("spiffe://helixflow.local/{service}");
        params.subject_alt_names = vec![SanType::URI(uri.as_str().try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![purpose];
        let at = |name: String| self.folder.path().join(name);
        let files = Files {
            ca: at("ca.pem".into()),
            cert: at(format!("{file}.crt")),
            key: at(format!("{file}-key.pem")),
            crl: None,
        };
        fs::write(
            &files.cert,
            params.signed_by(&key, &self.issuer).unwrap().pem(),
        )
        .unwrap();
        secret(&files.key, &key.serialize_pem());
        files
    }

    pub(crate) fn server(&self, service: &str) -> Arc<ServerTls> {
        let files = self.issue(service, service, ExtendedKeyUsagePurpose::ServerAuth);
        Arc::new(ServerTls::load(files, vec!["api-gateway".into()]).unwrap())
    }

    pub(crate) fn client(&self) -> Files {
        self.issue("client", "api-gateway", ExtendedKeyUsagePurpose::ClientAuth)
    }
}

fn secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}
