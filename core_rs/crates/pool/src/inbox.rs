//! The door to the engine thread: commands in, refusals out.
//!
//! A request is admitted or refused here, at once, against what waits in the scheduler plus what the engine
//! thread has not picked up yet; otherwise a full queue would be noticed only after the running step.

use std::time::Instant;

use helix_sched::Counts;
use helix_wire::error::{Code, CoreError};
use parking_lot::{Condvar, Mutex};

use crate::engine::Capacity;
use crate::request::Job;

/// Seconds after which a client may try again; the queue moves with every finished request.
const RETRY_AFTER_S: u32 = 1;

pub(crate) enum Command {
    Submit(Box<Job>),
    /// The client is gone.
    Cancel(u64),
    /// The client has read what filled its outbox.
    Unpark(u64),
}

/// Where the engine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Loading,
    Running(Capacity),
    Failed,
    Stopped,
}

pub(crate) struct Inbox {
    state: Mutex<State>,
    arrived: Condvar,
    queue_requests: usize,
    queue_tokens: usize,
}

struct State {
    phase: Phase,
    draining: bool,
    commands: Vec<Command>,
    /// What waits: in the scheduler as of the latest report, plus what was submitted since.
    requests: usize,
    tokens: usize,
    /// Slots that were free at the latest report.
    free: usize,
}

/// How long [`Inbox::take`] waits when there is nothing.
#[derive(Clone, Copy)]
pub(crate) enum Wait {
    Not,
    Until(Option<Instant>),
}

impl Inbox {
    pub(crate) fn new(queue_requests: usize, queue_tokens: usize) -> Self {
        let state = State {
            phase: Phase::Loading,
            draining: false,
            commands: Vec::new(),
            requests: 0,
            tokens: 0,
            free: 0,
        };
        Self {
            state: Mutex::new(state),
            arrived: Condvar::new(),
            queue_requests,
            queue_tokens,
        }
    }

    pub(crate) fn phase(&self) -> (Phase, bool) {
        let state = self.state.lock();
        (state.phase, state.draining)
    }

    /// The engine of a pool that takes requests now.
    pub(crate) fn capacity(&self) -> Result<Capacity, CoreError> {
        self.state.lock().capacity()
    }

    /// Queues a request with that many prompt tokens (every choice counted), or refuses it.
    pub(crate) fn submit(&self, job: Job, tokens: usize) -> Result<(), CoreError> {
        let mut state = self.state.lock();
        state.capacity()?;
        if tokens > self.queue_tokens {
            let limit = self.queue_tokens;
            return Err(CoreError::new(
                Code::PayloadTooLarge,
                format!(
                    "the request has {tokens} prompt tokens (every choice counted); at most {limit} may wait; \
                     split it"
                ),
            ));
        }
        // Free slots take a burst that arrives between two steps; it never waits.
        let full = state.requests >= self.queue_requests + state.free
            || state.tokens + tokens > self.queue_tokens;
        if full {
            let (requests, waiting) = (state.requests, state.tokens);
            let message = format!(
                "the queue is full: {requests} requests with {waiting} prompt tokens wait; try again later"
            );
            return Err(CoreError::new(Code::QueueFull, message).with_retry_after(RETRY_AFTER_S));
        }
        state.requests += 1;
        state.tokens += tokens;
        state.commands.push(Command::Submit(Box::new(job)));
        drop(state);
        self.arrived.notify_one();
        Ok(())
    }

    pub(crate) fn send(&self, command: Command) {
        let mut state = self.state.lock();
        if matches!(state.phase, Phase::Running(_)) {
            state.commands.push(command);
            drop(state);
            self.arrived.notify_one();
        }
    }

    /// Moves everything that arrived into `commands`, waiting when there is nothing. False when the pool is
    /// to stop.
    pub(crate) fn take(&self, commands: &mut Vec<Command>, wait: Wait) -> bool {
        let mut state = self.state.lock();
        if let Wait::Until(deadline) = wait {
            while state.commands.is_empty() && matches!(state.phase, Phase::Running(_)) {
                match deadline {
                    None => self.arrived.wait(&mut state),
                    Some(deadline) => {
                        if self.arrived.wait_until(&mut state, deadline).timed_out() {
                            break;
                        }
                    }
                }
            }
        }
        commands.append(&mut state.commands);
        matches!(state.phase, Phase::Running(_))
    }

    /// Reports what waits after a step was planned. Nothing that arrived since the last `take` is in `counts`.
    pub(crate) fn report(&self, counts: &Counts) {
        let mut state = self.state.lock();
        let Phase::Running(capacity) = state.phase else {
            return;
        };
        let (mut requests, mut tokens) = (counts.waiting_requests, counts.waiting_tokens);
        for command in &state.commands {
            if let Command::Submit(job) = command {
                requests += 1;
                tokens += job.tokens();
            }
        }
        state.requests = requests;
        state.tokens = tokens;
        state.free = capacity.slots.saturating_sub(counts.slots_used);
    }

    /// Opens the door. Refused while another engine runs, and after the end.
    pub(crate) fn open(&self, capacity: Capacity) -> Result<(), CoreError> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Loading | Phase::Failed => {
                state.phase = Phase::Running(capacity);
                state.free = capacity.slots;
                (state.requests, state.tokens) = (0, 0);
                Ok(())
            }
            Phase::Running(_) => Err(CoreError::new(
                Code::Internal,
                "the pool already runs an engine",
            )),
            Phase::Stopped => Err(CoreError::new(Code::Draining, "the pool was stopped")),
        }
    }

    /// The engine is lost; requests are refused as unavailable until another one opens the door.
    pub(crate) fn fail(&self) {
        let mut state = self.state.lock();
        if state.phase != Phase::Stopped {
            state.phase = Phase::Failed;
        }
    }

    pub(crate) fn drain(&self) {
        self.state.lock().draining = true;
    }

    pub(crate) fn stop(&self) {
        self.state.lock().phase = Phase::Stopped;
        self.arrived.notify_one();
    }
}

impl State {
    fn capacity(&self) -> Result<Capacity, CoreError> {
        match self.phase {
            Phase::Stopped => Err(CoreError::new(
                Code::Draining,
                "this pool is stopping; send the request elsewhere",
            )),
            _ if self.draining => Err(CoreError::new(
                Code::Draining,
                "this pool is draining; send the request elsewhere",
            )),
            Phase::Running(capacity) => Ok(capacity),
            Phase::Loading => Err(CoreError::new(
                Code::Unavailable,
                "the engine is still being loaded; try again",
            )),
            Phase::Failed => Err(CoreError::new(
                Code::Unavailable,
                "the engine has failed and is being restarted",
            )),
        }
    }
}
