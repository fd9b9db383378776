//! The gRPC server of a service that is written in Python.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use helix_tls::ServerTls;
use helix_wire::error::{Code, CoreError};
use helix_wire::rpc::{Desk, Incoming, Raw};
use helix_wire::server::{Health, Limits, Listener, Server, Services};
use parking_lot::Mutex;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tokio::runtime::Runtime;

use crate::errors::to_py;
use crate::ready::{self, Ready};
use crate::runtime;
use crate::tls::{TlsFiles, refused};

/// How often the certificate files are looked at.
const WATCH_FILES: Duration = Duration::from_secs(1);

/// One call to a service; Python answers it.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct RpcIncoming(Incoming);

#[pymethods]
impl RpcIncoming {
    #[getter]
    fn id(&self) -> u64 {
        self.0.id
    }

    #[getter]
    fn method(&self) -> &'static str {
        &self.0.method.name
    }

    #[getter]
    fn message<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        PyBytes::new(py, &self.0.message)
    }

    #[getter]
    fn service(&self) -> Option<&str> {
        self.0.caller.as_ref()?.service.as_deref()
    }

    #[getter]
    fn address(&self) -> String {
        let caller = self.0.caller.as_ref();
        caller.map_or_else(String::new, |caller| caller.address.to_string())
    }

    #[getter]
    fn request_id(&self) -> &str {
        &self.0.request_id
    }

    #[getter]
    fn cancelled(&self) -> bool {
        self.0.reply.is_cancelled()
    }

    /// Queues one message of the answer; false when there is no room or no reader.
    fn send(&self, message: &[u8]) -> bool {
        self.0.reply.send(Bytes::copy_from_slice(message))
    }

    /// Ends the answer, behind one more message if there is one.
    #[pyo3(signature = (message=None))]
    fn finish(&self, message: Option<&[u8]>) {
        self.0.reply.finish(message.map(Bytes::copy_from_slice));
    }

    /// Ends the answer with an error. Raises `ValueError` for a code that the error table has not.
    #[pyo3(signature = (code, message, param=None, retry_after_s=None))]
    fn fail(
        &self,
        code: &str,
        message: String,
        param: Option<String>,
        retry_after_s: Option<u32>,
    ) -> PyResult<()> {
        let code = Code::from_name(code)
            .ok_or_else(|| PyValueError::new_err(format!("no error has the code {code:?}")))?;
        self.0.reply.fail(CoreError {
            code,
            message,
            param,
            retry_after_s,
        });
        Ok(())
    }
}

enum Event {
    Call(Incoming),
    Changed(u64),
}

/// Hands calls to the event loop of Python.
struct ToPython(Arc<Ready<Event>>);

impl Desk for ToPython {
    fn call(&self, call: Incoming) {
        self.0.push(Event::Call(call));
    }

    fn changed(&self, id: u64) {
        self.0.push(Event::Changed(id));
    }
}

/// A gRPC server whose methods are handled in Python.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct RpcServer {
    ready: Arc<Ready<Event>>,
    changed: Mutex<Vec<u64>>,
    stage: Mutex<Stage>,
}

enum Stage {
    Idle(Box<Raw>),
    Serving(Box<Serving>),
    Stopped,
}

struct Serving {
    runtime: Runtime,
    server: Server,
    health: Health,
    tls: Option<Arc<ServerTls>>,
}

impl RpcServer {
    fn start(
        &self,
        listen: &str,
        tls: Option<Arc<ServerTls>>,
        threads: usize,
    ) -> Result<String, CoreError> {
        let mut stage = self.stage.lock();
        let raw = match std::mem::replace(&mut *stage, Stage::Stopped) {
            Stage::Idle(raw) => raw,
            other => {
                *stage = other;
                let again = "a server serves once; make another one";
                return Err(CoreError::new(Code::Internal, again));
            }
        };
        let runtime = runtime::build("helix-server", threads)?;
        let services = Services::default().with_raw(*raw);
        let health = services.health();
        let server = runtime.block_on(async {
            let listener = Listener::bind(listen, tls.clone()).await?;
            if let Some(tls) = &tls {
                // The task ends with the TLS configuration that it watches.
                drop(tls.watch(WATCH_FILES));
            }
            tokio::spawn(ready::flush(Arc::clone(&self.ready)));
            Server::start(listener, services, Limits::default()).await
        })?;
        let address = server.address().to_string();
        *stage = Stage::Serving(Box::new(Serving {
            runtime,
            server,
            health,
            tls,
        }));
        Ok(address)
    }

    /// The server, if it serves, and never again.
    fn take(&self) -> Option<Serving> {
        match std::mem::replace(&mut *self.stage.lock(), Stage::Stopped) {
            Stage::Serving(serving) => {
                // The task that signals ends with the runtime.
                self.ready.close();
                Some(*serving)
            }
            Stage::Idle(_) | Stage::Stopped => None,
        }
    }
}

#[pymethods]
impl RpcServer {
    #[new]
    #[pyo3(signature = (services, *, max_calls=8192))]
    fn new(services: Vec<String>, max_calls: usize) -> PyResult<Self> {
        let build = || {
            let ready = Arc::new(Ready::new()?);
            let desk = Arc::new(ToPython(Arc::clone(&ready)));
            let raw = Raw::new(services, desk, max_calls)?;
            Ok(Self {
                ready,
                changed: Mutex::default(),
                stage: Mutex::new(Stage::Idle(Box::new(raw))),
            })
        };
        build().map_err(to_py)
    }

    /// Starts the server and returns the bound `host:port`.
    #[pyo3(signature = (listen, tls, allow, threads=1))]
    fn serve(
        &self,
        py: Python<'_>,
        listen: &str,
        tls: Option<&TlsFiles>,
        allow: Vec<String>,
        threads: usize,
    ) -> PyResult<String> {
        let files = tls.map(TlsFiles::files);
        py.detach(|| {
            let load = |files| {
                ServerTls::load(files, allow)
                    .map(Arc::new)
                    .map_err(|error| refused(&error))
            };
            self.start(listen, files.map(load).transpose()?, threads)
        })
        .map_err(to_py)
    }

    /// An eventfd that is readable while there are calls or changes.
    fn fileno(&self) -> i32 {
        self.ready.fileno()
    }

    /// New calls since the last time; resets the eventfd.
    fn calls(&self) -> Vec<RpcIncoming> {
        let mut calls = Vec::new();
        let mut changed = self.changed.lock();
        for event in self.ready.drain() {
            match event {
                Event::Call(call) => calls.push(RpcIncoming(call)),
                Event::Changed(id) => changed.push(id),
            }
        }
        calls
    }

    /// Ids of earlier calls that were cancelled or take messages again, as of the last `calls()`.
    fn changed(&self) -> Vec<u64> {
        std::mem::take(&mut *self.changed.lock())
    }

    /// What the health service says. Not serving at first.
    fn set_serving(&self, py: Python<'_>, serving: bool) {
        py.detach(|| {
            if let Stage::Serving(running) = &*self.stage.lock() {
                running.runtime.block_on(running.health.set(serving));
            }
        });
    }

    /// Verifies the certificate files and swaps them in; the old ones stay when they are wrong.
    fn reload_tls(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let tls = match &*self.stage.lock() {
                Stage::Serving(running) => running.tls.clone(),
                Stage::Idle(_) | Stage::Stopped => None,
            };
            tls.map_or(Ok(()), |tls| tls.reload().map_err(|error| refused(&error)))
        })
        .map_err(to_py)
    }

    /// Takes no more connections, lets calls end within the time, cuts the others.
    fn stop(&self, py: Python<'_>, grace_ms: u64) {
        py.detach(|| {
            let Some(serving) = self.take() else { return };
            let grace = Duration::from_millis(grace_ms);
            serving.runtime.block_on(serving.server.stop(grace));
            serving.runtime.shutdown_background();
        });
    }
}

impl Drop for RpcServer {
    fn drop(&mut self) {
        if let Some(serving) = self.take() {
            drop(serving.server);
            // Waiting for the threads here would hold the GIL.
            serving.runtime.shutdown_background();
        }
    }
}
