//! The front door, for the gateway's main process.

use std::collections::HashMap;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use helix_front::{FileError, Front as Inner, Network, Options, Pair, Tls, TlsFiles, Workers};
use helix_wire::error::{Code, CoreError};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use tokio::runtime::Runtime;

use crate::errors::to_py;
use crate::runtime;

/// Limits of the endpoint.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct FrontOptions(Options);

#[pymethods]
impl FrontOptions {
    #[new]
    #[pyo3(signature = (
        *, handshake_s, first_byte_s, head_s, body_rate, body_grace_s, idle_s, write_stall_s, connections,
        connections_per_client, handshakes, strangers_per_client, streams, resets, head_bytes, unfolded_bytes,
        trusted, proxy_protocol, worker_wait_s
    ))]
    #[allow(
        clippy::too_many_arguments,
        clippy::similar_names,
        clippy::needless_pass_by_value
    )] // keyword arguments
    fn new(
        handshake_s: f64,
        first_byte_s: f64,
        head_s: f64,
        body_rate: u64,
        body_grace_s: f64,
        idle_s: f64,
        write_stall_s: f64,
        connections: usize,
        connections_per_client: usize,
        handshakes: usize,
        strangers_per_client: usize,
        streams: u32,
        resets: usize,
        head_bytes: usize,
        unfolded_bytes: u64,
        trusted: Vec<String>,
        proxy_protocol: bool,
        worker_wait_s: f64,
    ) -> PyResult<Self> {
        let wrong = |error: &dyn std::fmt::Display| PyValueError::new_err(error.to_string());
        let seconds = |value| Duration::try_from_secs_f64(value).map_err(|error| wrong(&error));
        let networks = trusted.iter().map(|text| text.parse::<Network>());
        Ok(Self(Options {
            handshake: seconds(handshake_s)?,
            first_byte: seconds(first_byte_s)?,
            head: seconds(head_s)?,
            body_rate,
            body_grace: seconds(body_grace_s)?,
            idle: seconds(idle_s)?,
            park: Options::default().park,
            write_stall: seconds(write_stall_s)?,
            connections,
            connections_per_client,
            handshakes,
            strangers_per_client,
            streams,
            resets,
            head_bytes,
            unfolded_bytes,
            trusted: networks
                .collect::<Result<_, _>>()
                .map_err(|error| wrong(&error))?,
            proxy_protocol,
            worker_wait: seconds(worker_wait_s)?,
        }))
    }
}

/// Accepts connections, ends TLS, and forwards requests to workers on Unix sockets.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct Front {
    runtime: Mutex<Option<Runtime>>,
    inner: Inner,
    workers: Arc<Workers>,
    tls: Option<Arc<Tls>>,
}

fn refused(error: &FileError) -> PyErr {
    to_py(CoreError::new(Code::TlsError, error.to_string()))
}

#[pymethods]
impl Front {
    /// Serves at once. `listener`: descriptor of a listening TCP socket, which is the front's from now on. `pairs`:
    /// certificate and key files, the preferred first; none: plain HTTP. Raises `TlsError`.
    #[new]
    #[pyo3(signature = (listener, options, *, pairs, client_ca=None, client_crl=None, threads=1))]
    fn new(
        py: Python<'_>,
        listener: i32,
        options: &FrontOptions,
        pairs: Vec<(PathBuf, PathBuf)>,
        client_ca: Option<PathBuf>,
        client_crl: Option<PathBuf>,
        threads: usize,
    ) -> PyResult<Self> {
        // SAFETY: the caller gives the descriptor away, as the signature says.
        #[allow(unsafe_code)]
        let listener = unsafe { OwnedFd::from_raw_fd(listener) };
        let files = TlsFiles {
            pairs: pairs
                .into_iter()
                .map(|(cert, key)| Pair { cert, key })
                .collect(),
            client_ca,
            client_crl,
        };
        let tls = (!files.pairs.is_empty())
            .then(|| Tls::load(files))
            .transpose();
        let tls = tls.map_err(|error| refused(&error))?.map(Arc::new);
        let workers = Arc::new(Workers::default());
        let options = options.0.clone();
        py.detach(|| {
            let runtime = runtime::build("helix-front", threads)?;
            let inner = {
                let _inside = runtime.enter();
                Inner::start(listener.into(), options, tls.clone(), Arc::clone(&workers))
            };
            let inner = inner.map_err(|error| {
                CoreError::new(Code::Internal, format!("the endpoint: {error}"))
            })?;
            Ok(Self {
                runtime: Mutex::new(Some(runtime)),
                inner,
                workers,
                tls,
            })
        })
        .map_err(to_py)
    }

    /// From now on requests go to the workers on these sockets; what runs in others goes on.
    #[allow(clippy::needless_pass_by_value)] // PyO3 makes a list of its own
    fn set_workers(&self, paths: Vec<PathBuf>) {
        self.workers.set(&paths);
    }

    /// Reads the certificate files again, for new connections. Raises `TlsError`; then the old ones stay.
    fn reload(&self, py: Python<'_>) -> PyResult<()> {
        let Some(tls) = &self.tls else {
            return Ok(());
        };
        py.detach(|| tls.reload())
            .map_err(|error| refused(&error))?;
        self.inner.stats().swaps.add();
        Ok(())
    }

    /// Accepts nothing more; connections end when their requests are answered.
    fn drain(&self) {
        self.inner.drain();
    }

    /// Connections that are open.
    fn connections(&self) -> usize {
        self.inner.connections()
    }

    /// Counts since the start, by name.
    fn stats(&self) -> HashMap<&'static str, u64> {
        self.inner.stats().all().into_iter().collect()
    }

    /// Ends everything at once.
    fn close(&self) {
        if let Some(runtime) = self.runtime.lock().take() {
            runtime.shutdown_background();
        }
    }
}
