//! One running call: the task fills it, Python empties it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use helix_wire::error::{Code, CoreError};
use helix_wire::v1;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use tokio::sync::Notify;
use tokio::task::AbortHandle;

use crate::client::info::Usage;
use crate::errors::to_py;
use crate::ready::{Ready, Ticket};

/// What the task and Python share. The lock is held for moves and copies of bytes only.
pub(crate) struct Shared {
    ticket: Ticket,
    ready: Arc<Ready<Arc<Shared>>>,
    state: Mutex<State>,
    drained: Notify,
    cancelled: Notify,
    /// Unread bytes at which the task stops reading from the pool.
    limit: usize,
    started: Instant,
}

#[derive(Default)]
struct State {
    buffer: Vec<u8>,
    accepted: bool,
    life: Life,
    /// The task waits until the buffer is taken.
    stalled: bool,
    pool: Option<Arc<str>>,
    progress: Progress,
    finish: Finish,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Life {
    #[default]
    Runs,
    /// Nobody wants the rest; the task fetches the counts.
    WindsUp,
    Done,
}

/// What has arrived of a call; all that is known of one that does not reach its usage frame.
#[derive(Clone, Copy, Default)]
struct Progress {
    /// Of all inputs together, once accepted.
    prompt_tokens: Option<u32>,
    completion_tokens: u32,
    first_token: Option<Duration>,
    total: Duration,
}

impl Progress {
    fn usage(self) -> Option<v1::Usage> {
        let micros = |time: Duration| u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        Some(v1::Usage {
            prompt_tokens: self.prompt_tokens?,
            cached_tokens: 0,
            completion_tokens: self.completion_tokens,
            queue_us: 0,
            first_token_us: self.first_token.map_or(0, micros),
            total_us: micros(self.total),
        })
    }
}

/// How a call ended.
#[derive(Default)]
pub(crate) struct Finish {
    /// Of the first choice.
    pub(crate) reason: Option<&'static str>,
    pub(crate) usage: Option<v1::Usage>,
    pub(crate) code: Option<Code>,
    /// Raised by `take`.
    pub(crate) failure: Option<CoreError>,
    /// A choice failed: the status of the call says why.
    pub(crate) failing: bool,
}

impl Finish {
    /// A regular end.
    pub(crate) fn stop() -> Self {
        Self {
            reason: Some("stop"),
            ..Self::default()
        }
    }

    /// The caller has ended it.
    pub(crate) fn cancelled() -> Self {
        Self {
            reason: Some("cancelled"),
            code: Some(Code::Cancelled),
            ..Self::default()
        }
    }

    /// An error before any byte.
    pub(crate) fn failed(error: CoreError) -> Self {
        let reason = if error.code == Code::Cancelled {
            "cancelled"
        } else {
            "error"
        };
        Self {
            reason: Some(reason),
            code: Some(error.code),
            failure: Some(error),
            ..Self::default()
        }
    }
}

impl AsRef<Ticket> for Shared {
    fn as_ref(&self) -> &Ticket {
        &self.ticket
    }
}

impl Shared {
    pub(crate) fn new(ticket: Ticket, ready: Arc<Ready<Arc<Self>>>, limit: usize) -> Arc<Self> {
        Arc::new(Self {
            ticket,
            ready,
            state: Mutex::default(),
            drained: Notify::new(),
            cancelled: Notify::new(),
            limit,
            started: Instant::now(),
        })
    }

    /// Ends the call unless it has ended; true when this did it.
    fn end(&self, finish: Finish, out: Vec<u8>) -> bool {
        let mut state = self.state.lock();
        if state.life == Life::Done {
            return false;
        }
        state.life = Life::Done;
        state.progress.total = self.started.elapsed();
        state.finish = finish;
        append(&mut state.buffer, out);
        true
    }
}

fn append(buffer: &mut Vec<u8>, bytes: Vec<u8>) {
    if buffer.is_empty() {
        *buffer = bytes;
    } else {
        buffer.extend_from_slice(&bytes);
    }
}

/// The task's end of a call. Dropping it unfinished fails the call, so that nobody waits for ever.
pub(crate) struct Running(Arc<Shared>);

impl Running {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The pool has taken the call. `wake`: tell Python at once.
    pub(crate) fn accepted(&self, pool: Option<Arc<str>>, accepted: &v1::Accepted, wake: bool) {
        let counts = accepted.prompt_tokens.iter();
        let prompt_tokens = counts.fold(0, |sum: u32, count| sum.saturating_add(*count));
        let mut state = self.0.state.lock();
        state.accepted = true;
        state.progress.prompt_tokens = Some(prompt_tokens);
        state.pool = pool;
        drop(state);
        if wake {
            self.0.ready.mark(&self.0);
        }
    }

    /// Counts generated tokens that have arrived.
    pub(crate) fn generated(&self, tokens: u32) {
        if tokens > 0 {
            let mut state = self.0.state.lock();
            let first = || self.0.started.elapsed();
            state.progress.first_token.get_or_insert_with(first);
            let counted = &mut state.progress.completion_tokens;
            *counted = counted.saturating_add(tokens);
        }
    }

    /// Notes the pool that answered.
    pub(crate) fn pool(&self, pool: Option<Arc<str>>) {
        if pool.is_some() {
            self.0.state.lock().pool = pool;
        }
    }

    /// Hands bytes to Python and leaves `out` empty; waits while too many are unread.
    pub(crate) async fn publish(&self, out: &mut Vec<u8>) {
        let stalled = {
            let mut state = self.0.state.lock();
            if state.life != Life::Runs {
                out.clear();
                return;
            }
            if state.buffer.is_empty() {
                // The buffer that Python has emptied comes back for the next frame.
                std::mem::swap(&mut state.buffer, out);
            } else {
                state.buffer.extend_from_slice(out);
            }
            out.clear();
            state.stalled = state.buffer.len() >= self.0.limit;
            state.stalled
        };
        self.0.ready.mark(&self.0);
        if stalled {
            // One permit for one take: `stalled` is reset before it is given.
            self.0.drained.notified().await;
        }
    }

    /// Completes when nobody wants the rest any more.
    pub(crate) async fn cancelled(&self) {
        self.0.cancelled.notified().await;
    }

    /// The call has ended; `out` holds its last bytes.
    pub(crate) fn finish(self, finish: Finish, out: Vec<u8>) {
        if self.0.end(finish, out) {
            self.0.ready.mark(&self.0);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let gone = CoreError::new(Code::Unavailable, "the call was cut: its client is closed");
        if self.0.end(Finish::failed(gone), Vec::new()) {
            self.0.ready.mark(&self.0);
        }
    }
}

/// A running call. Dropping it, or `cancel()`, ends the work at the pool.
#[pyclass(frozen, module = "helixflow.core_rs")]
pub(crate) struct Call {
    shared: Arc<Shared>,
    task: AbortHandle,
    /// Swapped with the buffer by `take`, so that neither grows anew for every frame.
    spare: Mutex<Vec<u8>>,
}

impl Call {
    pub(crate) fn new(shared: Arc<Shared>, task: AbortHandle) -> Self {
        Self {
            shared,
            task,
            spare: Mutex::default(),
        }
    }

    fn stop(&self) -> bool {
        let ended = self.shared.end(Finish::cancelled(), Vec::new());
        self.task.abort();
        ended
    }

    /// Lets the task end a call that has a slot: the pool knows what it has generated.
    fn wind_up(&self) -> bool {
        let mut state = self.shared.state.lock();
        if !state.accepted || state.life != Life::Runs {
            return state.life == Life::WindsUp;
        }
        state.life = Life::WindsUp;
        state.buffer = Vec::new();
        let stalled = std::mem::take(&mut state.stalled);
        drop(state);
        self.shared.cancelled.notify_one();
        if stalled {
            self.shared.drained.notify_one();
        }
        true
    }
}

#[pymethods]
impl Call {
    #[getter]
    fn id(&self) -> u64 {
        self.shared.ticket.id
    }

    #[getter]
    fn accepted(&self) -> bool {
        self.shared.state.lock().accepted
    }

    #[getter]
    fn done(&self) -> bool {
        self.shared.state.lock().life == Life::Done
    }

    #[getter]
    fn usage(&self) -> Option<Usage> {
        let state = self.shared.state.lock();
        let done = state.life == Life::Done;
        let arrived = || done.then(|| state.progress.usage()).flatten();
        state.finish.usage.or_else(arrived).map(Usage::from)
    }

    #[getter]
    fn prompt_tokens(&self) -> Option<u32> {
        self.shared.state.lock().progress.prompt_tokens
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        self.shared.state.lock().finish.reason
    }

    #[getter]
    fn error_code(&self) -> Option<&'static str> {
        self.shared.state.lock().finish.code.map(Code::as_str)
    }

    #[getter]
    fn pool(&self) -> Option<String> {
        let pool = self.shared.state.lock().pool.clone();
        pool.map(|pool| pool.to_string())
    }

    /// Everything rendered since the last call: SSE events, or the JSON body once done.
    ///
    /// Raises the call's `CoreError` when it failed before anything was rendered.
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let mut taken = std::mem::take(&mut *self.spare.lock());
        let (failure, stalled) = {
            let mut state = self.shared.state.lock();
            std::mem::swap(&mut state.buffer, &mut taken);
            (
                state.finish.failure.clone(),
                std::mem::take(&mut state.stalled),
            )
        };
        if stalled {
            self.shared.drained.notify_one();
        }
        if let Some(failure) = failure {
            return Err(to_py(failure));
        }
        let bytes = PyBytes::new(py, &taken);
        taken.clear();
        *self.spare.lock() = taken;
        Ok(bytes)
    }

    /// Ends the work at the pool.
    fn cancel(&self) {
        if !self.wind_up() && self.stop() {
            self.shared.ready.mark(&self.shared);
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.stop();
    }
}
