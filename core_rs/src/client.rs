//! The gateway's client of the inference pools.

mod drive;
pub(crate) mod info;
mod ready;
pub(crate) mod request;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use helix_text::openai::{Head, Kind, Options as Shape, Renderer};
use helix_tls::ClientTls;
use helix_wire::client::{Options, PoolSet, Transport};
use helix_wire::error::{Code, CoreError};
use helix_wire::v1;
use parking_lot::Mutex;
use pyo3::prelude::*;
use tokio::runtime::{Handle, Runtime};

use crate::call::{Call, Shared};
use crate::errors::to_py;
use crate::tls::{TlsFiles, refused};
use crate::{call, runtime};
use info::{ModelInfo, PoolInfo};
pub(crate) use ready::Ready;
use request::{GenerateRequest, Prompt};

/// How often the certificate files are looked at.
const TLS_WATCH: Duration = Duration::from_secs(1);

/// Calls to a set of inference pools: least outstanding work first, failing ones ejected.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct PoolClient {
    set: PoolSet,
    tls: Option<Arc<ClientTls>>,
    ready: Arc<Ready>,
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
    next_id: AtomicU64,
    stream_buffer: usize,
}

struct Settings {
    addresses: Vec<String>,
    tls: Option<helix_tls::Files>,
    expect_service: String,
    connect_timeout: Duration,
    threads: usize,
    stream_buffer: usize,
}

impl PoolClient {
    fn start(settings: Settings) -> Result<Self, CoreError> {
        let tls = settings
            .tls
            .map(|files| ClientTls::load(files, settings.expect_service).map(Arc::new))
            .transpose()
            .map_err(|error| refused(&error))?;
        let runtime = runtime::build("helix-client", settings.threads)?;
        let ready = Arc::new(Ready::new()?);
        let transport = tls
            .as_ref()
            .map_or(Transport::Plain, |tls| Transport::Tls(Arc::clone(tls)));
        let options = Options {
            connect_timeout: settings.connect_timeout,
            ..Options::default()
        };
        let inside = runtime.enter();
        let set = PoolSet::start(&settings.addresses, &transport, &options)?;
        if let Some(tls) = &tls {
            tls.watch(TLS_WATCH);
        }
        runtime.spawn(ready::flush(Arc::clone(&ready)));
        drop(inside);
        Ok(Self {
            set,
            tls,
            ready,
            handle: runtime.handle().clone(),
            runtime: Mutex::new(Some(runtime)),
            next_id: AtomicU64::new(1),
            stream_buffer: settings.stream_buffer.max(1),
        })
    }

    /// The shared part of a new call.
    fn open(&self) -> PyResult<Arc<Shared>> {
        if self.runtime.lock().is_none() {
            return Err(to_py(CoreError::new(
                Code::Unavailable,
                "the pool client is closed",
            )));
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        Ok(Shared::new(id, Arc::clone(&self.ready), self.stream_buffer))
    }

    fn generate(
        &self,
        request: &GenerateRequest,
        head: &Head,
        kind: Kind,
        answer: Answer,
    ) -> PyResult<Call> {
        let shared = self.open()?;
        let message = v1::GenerateRequest {
            stream: answer.stream,
            ..request.0.clone()
        };
        let choices = u32::try_from(message.inputs.len())
            .unwrap_or(u32::MAX)
            .saturating_mul(message.n);
        let shape = Shape {
            kind,
            stream: answer.stream,
            choices,
            logprobs: message.logprobs.is_some(),
            include_usage: answer.include_usage,
        };
        let work = drive::generate(
            call::Running::new(Arc::clone(&shared)),
            self.set.generate(message),
            Renderer::new(head, shape),
            answer.stream,
        );
        Ok(Call::new(shared, self.handle.spawn(work).abort_handle()))
    }
}

#[derive(Clone, Copy)]
struct Answer {
    stream: bool,
    include_usage: bool,
}

#[pymethods]
impl PoolClient {
    #[new]
    #[pyo3(signature = (
        addresses, tls, *, expect_service="inference-pool", connect_timeout_ms=2000, threads=1,
        stream_buffer_bytes=65536
    ))]
    fn new(
        py: Python<'_>,
        addresses: Vec<String>,
        tls: Option<&Bound<'_, TlsFiles>>,
        expect_service: &str,
        connect_timeout_ms: u64,
        threads: usize,
        stream_buffer_bytes: usize,
    ) -> PyResult<Self> {
        let settings = Settings {
            addresses,
            tls: tls.map(|tls| tls.get().files()),
            expect_service: expect_service.to_owned(),
            connect_timeout: Duration::from_millis(connect_timeout_ms),
            threads,
            stream_buffer: stream_buffer_bytes,
        };
        py.detach(|| Self::start(settings)).map_err(to_py)
    }

    /// An eventfd that is readable while calls are ready.
    fn fileno(&self) -> i32 {
        self.ready.fileno()
    }

    /// Ids of the calls that changed since the last `ready()`; resets the eventfd.
    fn ready(&self) -> Vec<u64> {
        self.ready.drain()
    }

    /// Starts a chat completion.
    #[pyo3(signature = (request, *, completion_id, created, stream, include_usage=false))]
    fn chat(
        &self,
        request: &GenerateRequest,
        completion_id: String,
        created: u64,
        stream: bool,
        include_usage: bool,
    ) -> PyResult<Call> {
        let head = request.head(completion_id, created);
        self.generate(
            request,
            &head,
            Kind::Chat,
            Answer {
                stream,
                include_usage,
            },
        )
    }

    /// Starts a text completion.
    #[pyo3(signature = (request, *, completion_id, created, stream, include_usage=false))]
    fn complete(
        &self,
        request: &GenerateRequest,
        completion_id: String,
        created: u64,
        stream: bool,
        include_usage: bool,
    ) -> PyResult<Call> {
        let head = request.head(completion_id, created);
        self.generate(
            request,
            &head,
            Kind::Completion,
            Answer {
                stream,
                include_usage,
            },
        )
    }

    /// Text or chat to token ids.
    #[pyo3(signature = (model, prompt, *, request_id, add_special_tokens=true))]
    fn tokenize(
        &self,
        model: String,
        prompt: &Prompt,
        request_id: String,
        add_special_tokens: bool,
    ) -> PyResult<Call> {
        let shared = self.open()?;
        let message = v1::TokenizeRequest {
            model,
            input: Some(prompt.0.clone()),
            add_special_tokens,
        };
        let work = drive::tokenize(
            call::Running::new(Arc::clone(&shared)),
            self.set.caller(),
            message,
            request_id,
        );
        Ok(Call::new(shared, self.handle.spawn(work).abort_handle()))
    }

    /// Token ids to text.
    #[pyo3(signature = (model, ids, *, request_id))]
    fn detokenize(&self, model: String, ids: Vec<u32>, request_id: String) -> PyResult<Call> {
        let shared = self.open()?;
        let message = v1::DetokenizeRequest { model, tokens: ids };
        let work = drive::detokenize(
            call::Running::new(Arc::clone(&shared)),
            self.set.caller(),
            message,
            request_id,
        );
        Ok(Call::new(shared, self.handle.spawn(work).abort_handle()))
    }

    /// Models of the pools that are ready now, each once.
    fn models(&self) -> Vec<ModelInfo> {
        self.set.models().into_iter().map(ModelInfo::from).collect()
    }

    /// What is known of every pool, in the order of the addresses.
    fn pools(&self) -> Vec<PoolInfo> {
        self.set.pools().into_iter().map(PoolInfo::from).collect()
    }

    /// Verifies the certificate files and swaps them in; keeps the old ones and raises `TlsError` otherwise.
    fn reload_tls(&self, py: Python<'_>) -> PyResult<()> {
        let Some(tls) = &self.tls else { return Ok(()) };
        py.detach(|| tls.reload())
            .map_err(|error| to_py(refused(&error)))
    }

    /// Ends every call and the threads. Calls that were under way fail as unavailable.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.shut());
    }
}

impl PoolClient {
    fn shut(&self) {
        let runtime = self.runtime.lock().take();
        if let Some(runtime) = runtime {
            self.ready.close();
            runtime.shutdown_background();
        }
    }
}

impl Drop for PoolClient {
    fn drop(&mut self) {
        // A runtime that is dropped waits for its threads; nobody may wait inside a garbage collection.
        self.shut();
    }
}
