//! The client of a service that is written in Python.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use helix_wire::error::{Code, CoreError};
use helix_wire::rpc::{self, Client, Options};
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::errors::to_py;
use crate::outgoing::{Outgoing, Settings};
use crate::ready::{Ready, Ticket};
use crate::tls::TlsFiles;

/// Bytes of one stream that wait for Python; then HTTP/2 holds the server back.
const UNREAD: usize = 1 << 20;

/// What the task of a call and Python share.
struct Shared {
    ticket: Ticket,
    ready: Arc<Ready<Arc<Shared>>>,
    state: Mutex<State>,
    drained: Notify,
}

#[derive(Default)]
struct State {
    messages: Vec<Bytes>,
    bytes: usize,
    done: bool,
    stalled: bool,
    failure: Option<CoreError>,
}

impl AsRef<Ticket> for Shared {
    fn as_ref(&self) -> &Ticket {
        &self.ticket
    }
}

impl Shared {
    /// Adds a message; true when the task has to wait until it is taken.
    fn push(&self, message: Bytes) -> bool {
        let mut state = self.state.lock();
        state.bytes += message.len();
        state.messages.push(message);
        state.stalled = state.bytes >= UNREAD;
        state.stalled
    }

    fn end(self: &Arc<Self>, failure: Option<CoreError>) {
        {
            let mut state = self.state.lock();
            if state.done {
                return;
            }
            state.done = true;
            state.failure = failure;
        }
        self.ready.mark(self);
    }
}

/// The task's end of a call. Dropping it unfinished fails the call, so that nobody waits for ever.
struct Running(Arc<Shared>);

impl Running {
    /// Reads a call to its end. Python is woken for each message of a stream, and once for any other answer.
    async fn read(self, mut call: rpc::Call, streaming: bool) {
        loop {
            match call.next().await {
                Ok(Some(message)) => {
                    let stalled = self.0.push(message);
                    if streaming {
                        self.0.ready.mark(&self.0);
                        if stalled {
                            self.0.drained.notified().await;
                        }
                    }
                }
                Ok(None) => return self.0.end(None),
                Err(error) => return self.0.end(Some(error)),
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.end(Some(CoreError::new(
            Code::Unavailable,
            "the call was cut: its client is closed",
        )));
    }
}

/// A call under way. Dropping it, or `cancel()`, cancels it at the server.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct RpcCall {
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[pymethods]
impl RpcCall {
    #[getter]
    fn id(&self) -> u64 {
        self.shared.ticket.id
    }

    #[getter]
    fn done(&self) -> bool {
        self.shared.state.lock().done
    }

    /// Messages since the last time. Raises the call's `CoreError` when it failed and none is left.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let (messages, failure, stalled) = {
            let mut state = self.shared.state.lock();
            state.bytes = 0;
            let failure = state.messages.is_empty().then(|| state.failure.clone());
            (
                std::mem::take(&mut state.messages),
                failure.flatten(),
                std::mem::take(&mut state.stalled),
            )
        };
        if stalled {
            self.shared.drained.notify_one();
        }
        match failure {
            Some(failure) => Err(to_py(failure)),
            None => PyList::new(py, messages.iter().map(|message| PyBytes::new(py, message))),
        }
    }

    /// Cancels the call at the server; it is done at once, as cancelled.
    fn cancel(&self) {
        let cancelled = CoreError::new(Code::Cancelled, "the call was cancelled");
        self.shared.end(Some(cancelled));
        self.task.abort();
    }
}

impl Drop for RpcCall {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Calls to one of several equal servers.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct RpcClient {
    client: Client,
    outgoing: Outgoing<Shared>,
}

impl RpcClient {
    fn start(settings: &Settings) -> Result<Self, CoreError> {
        let outgoing = Outgoing::start("helix-rpc", settings)?;
        let options = Options {
            connect_timeout: settings.connect_timeout,
            ..Options::default()
        };
        let inside = outgoing.enter();
        let client = Client::start(
            &settings.addresses,
            &settings.expect_service,
            &outgoing.transport(),
            &options,
        )?;
        drop(inside);
        Ok(Self { client, outgoing })
    }
}

#[pymethods]
impl RpcClient {
    #[new]
    #[pyo3(signature = (addresses, tls, *, expect_service, connect_timeout_ms=2000, threads=1))]
    fn new(
        py: Python<'_>,
        addresses: Vec<String>,
        tls: Option<&Bound<'_, TlsFiles>>,
        expect_service: &str,
        connect_timeout_ms: u64,
        threads: usize,
    ) -> PyResult<Self> {
        let settings = Settings {
            addresses,
            tls: tls.map(|tls| tls.get().files()),
            expect_service: expect_service.to_owned(),
            connect_timeout: Duration::from_millis(connect_timeout_ms),
            threads,
        };
        py.detach(|| Self::start(&settings)).map_err(to_py)
    }

    /// An eventfd that is readable while calls are ready.
    fn fileno(&self) -> i32 {
        self.outgoing.ready().fileno()
    }

    /// Ids of the calls that changed since the last time; resets the eventfd.
    fn ready(&self) -> Vec<u64> {
        self.outgoing.ready().drain_ids()
    }

    /// Starts a call. A time of 0 is no limit.
    #[pyo3(signature = (path, message, *, request_id, timeout_ms))]
    fn call(
        &self,
        path: &str,
        message: &[u8],
        request_id: String,
        timeout_ms: u64,
    ) -> PyResult<RpcCall> {
        let unknown = || CoreError::invalid("path", format!("no proto has a method {path:?}"));
        let method = rpc::method(path).ok_or_else(|| to_py(unknown()))?;
        let parsed = path.parse().map_err(|_| to_py(unknown()))?;
        let ticket = self.outgoing.ticket().map_err(to_py)?;
        let timeout = (timeout_ms > 0).then(|| Duration::from_millis(timeout_ms));
        let message = Bytes::copy_from_slice(message);
        let call = self.client.call(parsed, message, request_id, timeout);
        let shared = Arc::new(Shared {
            ticket,
            ready: Arc::clone(self.outgoing.ready()),
            state: Mutex::default(),
            drained: Notify::new(),
        });
        let work = Running(Arc::clone(&shared)).read(call, method.streaming);
        let task = self.outgoing.spawn(work);
        Ok(RpcCall { shared, task })
    }

    #[getter]
    fn server(&self) -> Option<String> {
        self.client.server().map(|address| address.to_string())
    }

    #[getter]
    fn last_error(&self) -> Option<String> {
        self.client.last_error()
    }

    /// Verifies the certificate files and swaps them in; keeps the old ones and raises `TlsError` otherwise.
    fn reload_tls(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| self.outgoing.reload_tls()).map_err(to_py)
    }

    /// Ends every call and the threads. Calls that were under way fail as unavailable.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.outgoing.close());
    }
}
