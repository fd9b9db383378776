//! The gateway's client of the inference pools.

mod drive;
pub(crate) mod info;
pub(crate) mod request;
mod variables;

use std::sync::Arc;
use std::time::Duration;

use helix_text::openai::{Head, Kind, Options as Shape, Renderer};
use helix_wire::client::{Options, PoolSet};
use helix_wire::error::CoreError;
use helix_wire::v1;
use pyo3::prelude::*;

use crate::call;
use crate::call::{Call, Shared};
use crate::errors::to_py;
use crate::outgoing::{Outgoing, Settings};
use crate::tls::TlsFiles;
use info::{ModelInfo, PoolInfo};
use request::{GenerateRequest, Prompt};

/// Unread bytes of one call that a pool may send ahead. A streamed token is a message of some 16 bytes, so these are
/// about 250 tokens; larger messages pass in several pieces.
const STREAM_WINDOW: u32 = 4096;

/// Calls to a set of inference pools: least outstanding work first, failing ones ejected.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct PoolClient {
    set: PoolSet,
    outgoing: Outgoing<Shared>,
    stream_buffer: usize,
}

impl PoolClient {
    fn start(settings: &Settings, stream_buffer: usize) -> Result<Self, CoreError> {
        let outgoing = Outgoing::start("helix-client", settings)?;
        let options = Options {
            connect_timeout: settings.connect_timeout,
            stream_window: STREAM_WINDOW,
            ..Options::default()
        };
        let inside = outgoing.enter();
        let set = PoolSet::start(&settings.addresses, &outgoing.transport(), &options)?;
        drop(inside);
        Ok(Self {
            set,
            outgoing,
            stream_buffer: stream_buffer.max(1),
        })
    }

    /// The shared part of a new call.
    fn open(&self) -> PyResult<Arc<Shared>> {
        let ticket = self.outgoing.ticket().map_err(to_py)?;
        let ready = Arc::clone(self.outgoing.ready());
        Ok(Shared::new(ticket, ready, self.stream_buffer))
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
            answer.stream || answer.wake_accepted,
        );
        Ok(Call::new(shared, self.outgoing.spawn(work)))
    }
}

#[derive(Clone, Copy)]
struct Answer {
    stream: bool,
    include_usage: bool,
    wake_accepted: bool,
}

#[pymethods]
impl PoolClient {
    #[new]
    #[pyo3(signature = (
        addresses, tls, *, expect_service="inference-pool", connect_timeout_ms=2000, threads=1,
        stream_buffer_bytes=16384
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
        };
        py.detach(|| Self::start(&settings, stream_buffer_bytes))
            .map_err(to_py)
    }

    /// An eventfd that is readable while calls are ready.
    fn fileno(&self) -> i32 {
        self.outgoing.ready().fileno()
    }

    /// Ids of the calls that changed since the last `ready()`; resets the eventfd.
    fn ready(&self) -> Vec<u64> {
        self.outgoing.ready().drain_ids()
    }

    /// Starts a chat completion.
    #[pyo3(signature = (
        request, *, completion_id, created, stream, include_usage=false, wake_accepted=false
    ))]
    #[allow(
        clippy::fn_params_excessive_bools,
        reason = "keyword arguments of Python"
    )]
    fn chat(
        &self,
        request: &GenerateRequest,
        completion_id: String,
        created: u64,
        stream: bool,
        include_usage: bool,
        wake_accepted: bool,
    ) -> PyResult<Call> {
        let head = request.head(completion_id, created);
        self.generate(
            request,
            &head,
            Kind::Chat,
            Answer {
                stream,
                include_usage,
                wake_accepted,
            },
        )
    }

    /// Starts a text completion.
    #[pyo3(signature = (
        request, *, completion_id, created, stream, include_usage=false, wake_accepted=false
    ))]
    #[allow(
        clippy::fn_params_excessive_bools,
        reason = "keyword arguments of Python"
    )]
    fn complete(
        &self,
        request: &GenerateRequest,
        completion_id: String,
        created: u64,
        stream: bool,
        include_usage: bool,
        wake_accepted: bool,
    ) -> PyResult<Call> {
        let head = request.head(completion_id, created);
        self.generate(
            request,
            &head,
            Kind::Completion,
            Answer {
                stream,
                include_usage,
                wake_accepted,
            },
        )
    }

    /// Text or chat to token ids.
    #[pyo3(signature = (model, prompt, *, request_id, add_special_tokens=true, timeout_ms=30_000))]
    fn tokenize(
        &self,
        model: String,
        prompt: &Prompt,
        request_id: String,
        add_special_tokens: bool,
        timeout_ms: u64,
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
            (request_id, Duration::from_millis(timeout_ms)),
        );
        Ok(Call::new(shared, self.outgoing.spawn(work)))
    }

    /// Token ids to text.
    #[pyo3(signature = (model, ids, *, request_id, timeout_ms=30_000))]
    fn detokenize(
        &self,
        model: String,
        ids: Vec<u32>,
        request_id: String,
        timeout_ms: u64,
    ) -> PyResult<Call> {
        let shared = self.open()?;
        let message = v1::DetokenizeRequest { model, tokens: ids };
        let work = drive::detokenize(
            call::Running::new(Arc::clone(&shared)),
            self.set.caller(),
            message,
            (request_id, Duration::from_millis(timeout_ms)),
        );
        Ok(Call::new(shared, self.outgoing.spawn(work)))
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
        py.detach(|| self.outgoing.reload_tls()).map_err(to_py)
    }

    /// Ends every call and the threads. Calls that were under way fail as unavailable.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.outgoing.close());
    }
}
