//! What every client of another service has: threads, certificates, and wake-ups of the event loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use helix_tls::{ClientTls, Files};
use helix_wire::client::Transport;
use helix_wire::error::{Code, CoreError};
use parking_lot::Mutex;
use tokio::runtime::{EnterGuard, Handle, Runtime};
use tokio::task::AbortHandle;

use crate::ready::{self, Ready, Ticket};
use crate::runtime;
use crate::tls::refused;

/// How often the certificate files are looked at.
const TLS_WATCH: Duration = Duration::from_secs(1);

/// `T` is what a call shares with Python.
pub(crate) struct Outgoing<T> {
    ready: Arc<Ready<Arc<T>>>,
    tls: Option<Arc<ClientTls>>,
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
    next_id: AtomicU64,
}

/// How a client reaches its servers.
pub(crate) struct Settings {
    pub(crate) addresses: Vec<String>,
    pub(crate) tls: Option<Files>,
    pub(crate) expect_service: String,
    pub(crate) connect_timeout: Duration,
    pub(crate) threads: usize,
}

impl<T: AsRef<Ticket> + Send + Sync + 'static> Outgoing<T> {
    /// Starts threads of this name.
    pub(crate) fn start(name: &str, settings: &Settings) -> Result<Self, CoreError> {
        let load = |files: &Files| {
            ClientTls::load(files.clone(), settings.expect_service.clone())
                .map(Arc::new)
                .map_err(|error| refused(&error))
        };
        let tls = settings.tls.as_ref().map(load).transpose()?;
        let runtime = runtime::build(name, settings.threads)?;
        let ready = Arc::new(Ready::new()?);
        let inside = runtime.enter();
        if let Some(tls) = &tls {
            tls.watch(TLS_WATCH);
        }
        runtime.spawn(ready::flush(Arc::clone(&ready)));
        drop(inside);
        Ok(Self {
            ready,
            tls,
            handle: runtime.handle().clone(),
            runtime: Mutex::new(Some(runtime)),
            next_id: AtomicU64::new(1),
        })
    }

    pub(crate) fn transport(&self) -> Transport {
        let tls = self.tls.as_ref();
        tls.map_or(Transport::Plain, |tls| Transport::Tls(Arc::clone(tls)))
    }

    /// While it lives, tokio's functions work on this thread.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }

    pub(crate) fn ready(&self) -> &Arc<Ready<Arc<T>>> {
        &self.ready
    }

    /// A number for a new call.
    pub(crate) fn ticket(&self) -> Result<Ticket, CoreError> {
        if self.runtime.lock().is_none() {
            return Err(CoreError::new(Code::Unavailable, "the client is closed"));
        }
        Ok(Ticket::new(self.next_id.fetch_add(1, Ordering::Relaxed)))
    }

    pub(crate) fn spawn(&self, work: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        self.handle.spawn(work).abort_handle()
    }

    /// Verifies the certificate files and swaps them in; the old ones stay when they are wrong.
    pub(crate) fn reload_tls(&self) -> Result<(), CoreError> {
        let tls = self.tls.as_ref();
        tls.map_or(Ok(()), |tls| tls.reload().map_err(|error| refused(&error)))
    }
}

impl<T> Outgoing<T> {
    /// Ends the threads and with them every call.
    pub(crate) fn close(&self) {
        let runtime = self.runtime.lock().take();
        if let Some(runtime) = runtime {
            self.ready.close();
            runtime.shutdown_background();
        }
    }
}

impl<T> Drop for Outgoing<T> {
    fn drop(&mut self) {
        // A runtime that is dropped waits for its threads; nobody may wait inside a garbage collection.
        self.close();
    }
}
