//! The inference pool, as Python drives it.

mod engine;
mod options;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use helix_pool::RunError;
use helix_tls::ServerTls;
use helix_wire::error::{Code, CoreError};
use helix_wire::server::{Listener, Server};
use helix_wire::service::{GATEWAY, MONITORING};
use parking_lot::Mutex;
use pyo3::prelude::*;
use tokio::runtime::Runtime;

pub(crate) use engine::{Batch, Sampling};
pub(crate) use options::{PoolOptions, PoolStats, Stuck};

use crate::errors::to_py;
use crate::runtime;
use crate::tls::{TlsFiles, refused};

/// How often the certificate files are looked at.
const WATCH_FILES: Duration = Duration::from_secs(1);
/// The I/O threads say this often that they go on.
const PULSE: Duration = Duration::from_millis(250);
/// Time for the last frames to leave when the pool stops.
const LAST_FRAMES: Duration = Duration::from_secs(2);

/// Time for Python to hear that its engine thread stands still. It does not when that thread holds the GIL.
const GIL_WAIT: Duration = Duration::from_secs(2);
/// Time for the interpreter to dump its stacks.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Exit status of a process whose engine has failed (`EX_SOFTWARE`).
const FAILED: i32 = 70;

/// Text, scheduler and gRPC server of one model; the engine is a Python object.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct Pool {
    inner: helix_pool::Pool,
    serving: Mutex<Option<Serving>>,
    pulse: Arc<AtomicU64>,
}

struct Serving {
    runtime: Runtime,
    server: Server,
    tls: Option<Arc<ServerTls>>,
}

#[pymethods]
impl Pool {
    #[new]
    fn new(py: Python<'_>, model_dir: PathBuf, options: &PoolOptions) -> PyResult<Self> {
        let options = options.options();
        let loaded = py.detach(move || helix_pool::Pool::load(&model_dir, options));
        let pool = loaded
            .map_err(|error| to_py(CoreError::new(Code::ModelFileError, error.to_string())))?;
        Ok(Self {
            inner: pool,
            serving: Mutex::new(None),
            pulse: Arc::default(),
        })
    }

    /// Starts the gRPC server and returns the bound `host:port`.
    #[pyo3(signature = (listen, tls, *, allow=None, threads=1))]
    fn serve(
        &self,
        py: Python<'_>,
        listen: &str,
        tls: Option<&TlsFiles>,
        allow: Option<Vec<String>>,
        threads: usize,
    ) -> PyResult<String> {
        let files = tls.map(TlsFiles::files);
        let allow = allow.unwrap_or_else(|| vec![GATEWAY.to_owned(), MONITORING.to_owned()]);
        py.detach(|| {
            let mut serving = self.serving.lock();
            if serving.is_some() {
                return Err(CoreError::new(Code::Internal, "the pool serves already"));
            }
            let load = |files| {
                ServerTls::load(files, allow)
                    .map(Arc::new)
                    .map_err(|error| refused(&error))
            };
            let tls = files.map(load).transpose()?;
            let runtime = runtime::build("helix-pool", threads)?;
            let server = runtime.block_on(async {
                let listener = Listener::bind(listen, tls.clone()).await?;
                if let Some(tls) = &tls {
                    // The task ends with the TLS configuration that it watches.
                    drop(tls.watch(WATCH_FILES));
                }
                self.inner.serve(listener).await
            })?;
            // The task ends with its runtime.
            drop(runtime.spawn(count(Arc::clone(&self.pulse))));
            let address = server.address().to_string();
            *serving = Some(Serving {
                runtime,
                server,
                tls,
            });
            Ok(address)
        })
        .map_err(to_py)
    }

    /// The engine loop: blocks until `stop()`. The GIL is held inside the engine only.
    fn run(&self, py: Python<'_>, engine: Py<PyAny>) -> PyResult<()> {
        let mut engine = engine::PyEngine::new(engine);
        py.detach(|| self.inner.run(&mut engine))
            .map_err(|error| match error {
                RunError::Engine(raised) => raised,
                RunError::Pool(error) => to_py(error),
            })
    }

    /// Blocks until the pool is stopped, or until the engine thread stands still.
    fn watch(&self, py: Python<'_>, step_timeout_ms: u64) -> Option<Stuck> {
        let heard = Arc::new(AtomicBool::new(false));
        let stuck = py.detach(|| {
            let stuck = self.inner.watch(Duration::from_millis(step_timeout_ms));
            if stuck.is_some() {
                let heard = Arc::clone(&heard);
                std::thread::spawn(move || unless_heard(&heard));
            }
            stuck
        });
        heard.store(true, Ordering::Release);
        stuck.map(Stuck::from)
    }

    fn drain(&self) {
        self.inner.drain();
    }

    fn idle(&self) -> bool {
        self.inner.is_idle()
    }

    /// Cuts what still runs with an error frame and ends `run()` and the server.
    fn stop(&self, py: Python<'_>) {
        py.detach(|| {
            self.inner.stop();
            let serving = self.serving.lock().take();
            if let Some(Serving {
                runtime, server, ..
            }) = serving
            {
                runtime.block_on(server.stop(LAST_FRAMES));
                runtime.shutdown_background();
            }
        });
    }

    fn stats(&self) -> PoolStats {
        self.inner.stats().into()
    }

    /// Grows as long as the server's I/O threads go on.
    fn pulse(&self) -> u64 {
        self.pulse.load(Ordering::Relaxed)
    }

    /// Verifies the certificate files and swaps them in; the old ones stay when they are wrong.
    fn reload_tls(&self, py: Python<'_>) -> PyResult<()> {
        py.detach(|| {
            let tls = self
                .serving
                .lock()
                .as_ref()
                .and_then(|serving| serving.tls.clone());
            tls.map_or(Ok(()), |tls| tls.reload().map_err(|error| refused(&error)))
        })
        .map_err(to_py)
    }
}

async fn count(pulse: Arc<AtomicU64>) {
    let mut ticks = tokio::time::interval(PULSE);
    loop {
        ticks.tick().await;
        pulse.fetch_add(1, Ordering::Relaxed);
    }
}

/// Ends the process when Python has not heard in time that it must: SIGABRT lets faulthandler dump every stack.
fn unless_heard(heard: &AtomicBool) {
    std::thread::sleep(GIL_WAIT);
    if heard.load(Ordering::Acquire) {
        return;
    }
    // Words that nobody reads would hold the process up.
    std::thread::spawn(|| {
        std::thread::sleep(LAST_WORDS);
        exit_now();
    });
    tracing::error!("the engine stands still and holds the interpreter; the process ends");
    std::process::abort();
}

/// Ends the process without waiting for anybody.
#[allow(
    unsafe_code,
    reason = "the standard library runs exit handlers, which may wait"
)]
fn exit_now() -> ! {
    // SAFETY: it takes no pointers and does not return.
    unsafe { libc::_exit(FAILED) }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.inner.stop();
        if let Some(Serving {
            runtime, server, ..
        }) = self.serving.get_mut().take()
        {
            drop(server);
            // Waiting for the threads here would hold the GIL.
            runtime.shutdown_background();
        }
    }
}
