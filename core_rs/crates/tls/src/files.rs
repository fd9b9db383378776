//! The files of one identity, and how they are read.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};

use crate::error::TlsError;

/// No certificate file comes near this; a mistaken path to something huge must not be read whole.
const MAX_PEM_BYTES: u64 = 1 << 20;
/// About 400,000 revoked certificates.
const MAX_CRL_BYTES: u64 = 16 << 20;

/// Paths of one identity, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The CA certificate (or several, while one CA replaces another).
    pub ca: PathBuf,
    /// Our certificate, followed by intermediates when there are any.
    pub cert: PathBuf,
    /// Our private key. Refused when the group or others may read it.
    pub key: PathBuf,
    /// The revocation list. The file may be absent at first and appear later; once it has been
    /// loaded, its absence is an error.
    pub crl: Option<PathBuf>,
}

/// What tells that a file was replaced: modification time, length and inode of each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stamp([Option<(SystemTime, u64, u64)>; 4]);

impl Files {
    pub(crate) fn stamp(&self) -> Stamp {
        let of = |path: &Path| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.modified().ok()?, meta.len(), meta.ino()))
        };
        Stamp([
            of(&self.ca),
            of(&self.cert),
            of(&self.key),
            self.crl.as_deref().and_then(of),
        ])
    }

    pub(crate) fn read_ca(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.ca)
    }

    pub(crate) fn read_cert(&self) -> Result<Vec<CertificateDer<'static>>, TlsError> {
        certificates(&self.cert)
    }

    pub(crate) fn read_key(&self) -> Result<PrivateKeyDer<'static>, TlsError> {
        let (mut file, mode) = open(&self.key)?;
        if mode & 0o077 != 0 {
            let path = self.key.display();
            let reason = format!(
                "a private key that the group or others may read (mode {:04o}) is not used; run: chmod 600 {path}",
                mode & 0o7777
            );
            return Err(TlsError::new(&self.key, reason));
        }
        let pem = read(&self.key, &mut file, MAX_PEM_BYTES)?;
        PrivateKeyDer::from_pem_slice(&pem).map_err(|e| {
            TlsError::new(
                &self.key,
                format!("is not an unencrypted PEM private key: {e}"),
            )
        })
    }

    /// The revocation lists, or `None` when no file is configured or it does not exist.
    pub(crate) fn read_crl(
        &self,
    ) -> Result<Option<Vec<CertificateRevocationListDer<'static>>>, TlsError> {
        let Some(path) = &self.crl else {
            return Ok(None);
        };
        let mut file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(TlsError::new(path, format!("cannot be opened: {e}"))),
        };
        let pem = read(path, &mut file, MAX_CRL_BYTES)?;
        let lists = CertificateRevocationListDer::pem_slice_iter(&pem)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| TlsError::new(path, format!("is not a PEM revocation list: {e}")))?;
        if lists.is_empty() {
            return Err(TlsError::new(
                path,
                "holds no PEM revocation list (X509 CRL)",
            ));
        }
        Ok(Some(lists))
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let (mut file, _) = open(path)?;
    let pem = read(path, &mut file, MAX_PEM_BYTES)?;
    let found = CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| TlsError::new(path, format!("is not a PEM certificate: {e}")))?;
    if found.is_empty() {
        return Err(TlsError::new(path, "holds no PEM certificate"));
    }
    Ok(found)
}

/// The mode is taken from the open file, so that what was checked is what is read.
fn open(path: &Path) -> Result<(File, u32), TlsError> {
    let failed = |e: io::Error| {
        let what = if e.kind() == io::ErrorKind::NotFound {
            "does not exist; `helixflow pki init` creates what is missing".to_owned()
        } else {
            format!("cannot be opened: {e}")
        };
        TlsError::new(path, what)
    };
    let file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode();
    Ok((file, mode))
}

fn read(path: &Path, file: &mut File, limit: u64) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| TlsError::new(path, format!("cannot be read: {e}")))?;
    if bytes.len() as u64 > limit {
        return Err(TlsError::new(
            path,
            format!("is larger than {limit} bytes: not a file of this kind"),
        ));
    }
    Ok(bytes)
}
