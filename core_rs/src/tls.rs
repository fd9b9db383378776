//! Paths of one TLS identity.

use std::path::PathBuf;

use helix_tls::{Files, TlsError};
use helix_wire::error::{Code, CoreError};
use pyo3::prelude::*;

/// Paths of one identity: PEM files, key PKCS#8.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct TlsFiles(Files);

#[pymethods]
impl TlsFiles {
    #[new]
    #[pyo3(signature = (ca, cert, key, crl=None))]
    fn new(ca: PathBuf, cert: PathBuf, key: PathBuf, crl: Option<PathBuf>) -> Self {
        Self(Files { ca, cert, key, crl })
    }
}

impl TlsFiles {
    pub(crate) fn files(&self) -> Files {
        self.0.clone()
    }
}

/// A bad file of an identity in terms of the error table.
pub(crate) fn refused(error: &TlsError) -> CoreError {
    CoreError::new(Code::TlsError, error.to_string())
}
