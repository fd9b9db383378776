//! The door to the engine thread: commands in, refusals out.
//!
//! A request is admitted or refused here, at once, against what waits in the scheduler plus what the engine
//! thread has not picked up yet; otherwise a full queue would be noticed only after the running step.

use std::time::Instant;

use helix_sched::{Counts, Waiting};
use helix_wire::error::{Code, CoreError};
use parking_lot::{Condvar, Mutex};

use crate::backlog::Backlog;
use crate::engine::Capacity;
use crate::rate::Rate;
use crate::request::Job;

pub(crate) enum Command {
    Submit(Box<Job>),
    /// Nobody waits for the answer any more. `waiting`: what the request had in the queue.
    Leave {
        number: u64,
        waiting: Option<Load>,
        why: Leave,
    },
    /// The caller asks for an end, and for the counts.
    Stop(u64),
    /// The client has read what filled its outbox.
    Unpark(u64),
}

/// Why a request leaves from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leave {
    /// The client is gone.
    Cancelled,
    /// Its deadline has passed.
    Late,
}

/// What waits for slots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Load {
    pub(crate) requests: usize,
    pub(crate) sequences: usize,
    /// Prompt tokens.
    pub(crate) tokens: usize,
}

impl Load {
    pub(crate) fn of(job: &Job) -> Self {
        Self {
            requests: 1,
            sequences: job.choices(),
            tokens: job.tokens(),
        }
    }

    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.sequences += other.sequences;
        self.tokens += other.tokens;
    }

    fn sub(&mut self, other: Self) {
        self.requests = self.requests.saturating_sub(other.requests);
        self.sequences = self.sequences.saturating_sub(other.sequences);
        self.tokens = self.tokens.saturating_sub(other.tokens);
    }
}

/// Where the engine stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    Loading,
    Running(Capacity),
    Failed,
    /// The engine thread stands still; only a new process helps.
    Stuck,
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
    /// What waits: in the scheduler as of the latest report, plus what was submitted since, less what has left.
    waiting: Load,
    /// Who fills how much of it; exact once the queue is half full.
    backlog: Backlog,
    rate: Rate,
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
            waiting: Load::default(),
            backlog: Backlog::default(),
            rate: Rate::default(),
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

    /// What waits now.
    pub(crate) fn waiting(&self) -> Load {
        self.state.lock().waiting
    }

    /// Seconds after which whoever was refused, or has waited in vain, may try again: the queue will have moved on.
    pub(crate) fn retry_after(&self) -> u32 {
        let state = self.state.lock();
        state.rate.seconds(Instant::now(), state.waiting)
    }

    /// Queues a request, or refuses it.
    pub(crate) fn submit(&self, job: Job) -> Result<(), CoreError> {
        let load = Load::of(&job);
        let tokens = load.tokens;
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
        let Load {
            requests,
            tokens: waiting,
            ..
        } = state.waiting;
        let most = self.queue_requests + state.free;
        let full =
            |times: usize| requests >= times * most || waiting + tokens > times * self.queue_tokens;
        let organisation = job.owner.organisation;
        let limits = (self.queue_requests, self.queue_tokens);
        if full(2) || (full(1) && !state.backlog.reserves(organisation, tokens, limits)) {
            let message = format!(
                "the queue is full: {requests} requests with {waiting} prompt tokens wait; try again later"
            );
            let seconds = state.rate.seconds(Instant::now(), state.waiting);
            return Err(CoreError::new(Code::QueueFull, message).with_retry_after(seconds));
        }
        state.waiting.add(load);
        state.backlog.add(organisation, tokens);
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

    /// Takes a request out that nobody waits for any more. What it had in the queue leaves the counts at once, whatever
    /// the engine thread does meanwhile. True when that thread has not even heard of it.
    pub(crate) fn leave(&self, number: u64, waiting: Option<Load>, why: Leave) -> bool {
        let mut state = self.state.lock();
        if let Some(load) = waiting {
            state.waiting.sub(load);
        }
        let submitted =
            |command: &Command| matches!(command, Command::Submit(job) if job.number == number);
        if let Some(at) = state.commands.iter().rposition(submitted) {
            state.commands.remove(at);
            return true;
        }
        if matches!(state.phase, Phase::Running(_)) {
            state.commands.push(Command::Leave {
                number,
                waiting,
                why,
            });
            drop(state);
            self.arrived.notify_one();
        }
        false
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

    /// Reports what waits after a step was planned, and what got a slot in it. Nothing that arrived since the last
    /// `take` is in `counts` and `queue`.
    pub(crate) fn report(&self, now: Instant, counts: &Counts, started: Load, queue: &Waiting) {
        let mut state = self.state.lock();
        let Phase::Running(capacity) = state.phase else {
            return;
        };
        let mut waiting = Load {
            requests: counts.waiting_requests,
            sequences: counts.waiting,
            tokens: counts.waiting_tokens,
        };
        let crowded =
            2 * waiting.requests >= self.queue_requests || 2 * waiting.tokens >= self.queue_tokens;
        let mut backlog = Backlog::default();
        if crowded {
            backlog = Backlog::of(queue);
        }
        state.rate.note(now, started, counts.waiting > 0);
        for command in &state.commands {
            match command {
                Command::Submit(job) => {
                    waiting.add(Load::of(job));
                    backlog.add(job.owner.organisation, job.tokens());
                }
                Command::Leave {
                    waiting: Some(load),
                    ..
                } => waiting.sub(*load),
                Command::Leave { .. } | Command::Stop(_) | Command::Unpark(_) => {}
            }
        }
        state.backlog = backlog;
        state.waiting = waiting;
        state.free = capacity.slots.saturating_sub(counts.slots_used);
    }

    /// Opens the door. Refused while another engine runs, and after the end.
    pub(crate) fn open(&self, capacity: Capacity) -> Result<(), CoreError> {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Loading | Phase::Failed => {
                state.phase = Phase::Running(capacity);
                state.free = capacity.slots;
                state.waiting = Load::default();
                Ok(())
            }
            Phase::Running(_) => Err(CoreError::new(
                Code::Internal,
                "the pool already runs an engine",
            )),
            Phase::Stuck => Err(CoreError::new(
                Code::Internal,
                "the engine thread of the pool stands still",
            )),
            Phase::Stopped => Err(CoreError::new(Code::Draining, "the pool was stopped")),
        }
    }

    /// The engine is lost; requests are refused as unavailable until another one opens the door.
    pub(crate) fn fail(&self) {
        let mut state = self.state.lock();
        if !matches!(state.phase, Phase::Stopped | Phase::Stuck) {
            state.phase = Phase::Failed;
        }
    }

    /// The engine thread stands still. False when it has ended meanwhile.
    pub(crate) fn stick(&self) -> bool {
        let mut state = self.state.lock();
        match state.phase {
            Phase::Running(_) => {
                state.phase = Phase::Stuck;
                state.waiting = Load::default();
                true
            }
            phase => phase == Phase::Stopped,
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
            Phase::Failed | Phase::Stuck => Err(CoreError::new(
                Code::Unavailable,
                "the engine has failed and is being restarted",
            )),
        }
    }
}
