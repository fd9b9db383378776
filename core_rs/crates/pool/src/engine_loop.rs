//! The engine thread: take commands, schedule, step, sample, commit, deliver.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use helix_sample::Sampler;
use helix_sched::{Counts, Fair, Limits, Outcome, Plan, Prices, Scheduler, Started};
use helix_wire::error::{Code, CoreError};

use crate::engine::{Batch, Candidates, Capacity, RunError, StepEngine};
use crate::inbox::{Command, Leave, Load, Phase, Wait};
use crate::outbox::micros;
use crate::pool::{Shared, Stats};
use crate::request::{Job, split};
use crate::running::Running;
use crate::sequence::{Rows, Tools};

/// The door has its own limits and refuses at once; the scheduler's never bind.
const UNLIMITED: usize = usize::MAX / 4;

pub(crate) struct EngineLoop<'p> {
    shared: &'p Shared,
    capacity: Capacity,
    scheduler: Scheduler,
    requests: HashMap<u64, Running>,
    sampler: Sampler,
    batch: Batch,
    outcomes: Vec<Outcome>,
    touched: Vec<u64>,
    /// Requests whose reader is behind; zero spares the search for stalled ones.
    parked: usize,
    stats: Stats,
}

impl<'p> EngineLoop<'p> {
    /// Opens the door of the pool.
    pub(crate) fn new(shared: &'p Shared, capacity: Capacity) -> Result<Self, CoreError> {
        let limits = Limits {
            slots: capacity.slots,
            max_len: capacity.max_len,
            queue_requests: UNLIMITED,
            queue_tokens: UNLIMITED,
            step_tokens: shared.options.step_tokens,
            step_micros: micros(shared.options.step_budget),
            prefix_reuse: shared.options.prefix_reuse,
        };
        let prices = Prices {
            prefill: 1.0,
            decode: shared.options.decode_price,
        };
        shared.inbox.open(capacity)?;
        let stats = shared.engine_stats();
        Ok(Self {
            shared,
            capacity,
            scheduler: Scheduler::new(limits, Box::new(Fair::new(prices))),
            requests: HashMap::new(),
            sampler: Sampler::new(),
            batch: Batch::for_engine(&capacity),
            outcomes: Vec::new(),
            touched: Vec::new(),
            parked: 0,
            stats: Stats {
                slots: capacity.slots,
                ..stats
            },
        })
    }

    /// Runs until the pool is stopped or the engine fails.
    pub(crate) fn run<E: StepEngine>(&mut self, engine: &mut E) -> Result<(), RunError<E::Error>> {
        let mut commands = Vec::new();
        let mut busy = false;
        self.publish();
        loop {
            let wait = if busy {
                Wait::Not
            } else {
                Wait::Until(self.wake_at())
            };
            let go_on = self.shared.inbox.take(&mut commands, wait);
            self.shared.pulse.begin(Instant::now());
            for command in commands.drain(..) {
                self.obey(command);
            }
            if !go_on {
                let message = "the pool was stopped while the request ran; send it again";
                self.fail_all(&CoreError::new(Code::Draining, message));
                return Ok(());
            }
            let now = Instant::now();
            self.expire(now);
            self.cut_stalled(now);
            let plan = self.scheduler.schedule();
            self.report(now, &plan);
            busy = !plan.is_empty();
            if busy {
                self.shared.pulse.plan(plan.tokens.len());
                self.step(engine, &plan)?;
            }
            self.shared.pulse.end();
        }
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(job) => self.submit(*job),
            Command::Leave { number, why, .. } => {
                if let Some(request) = self.remove(number) {
                    match why {
                        Leave::Cancelled => self.stats.requests_cancelled += 1,
                        Leave::Late => self.stats.requests_failed += 1,
                    }
                    drop(request);
                }
            }
            Command::Stop(number) => {
                if let Some(request) = self.remove(number) {
                    self.stats.requests_cancelled += 1;
                    let stopped = CoreError::new(Code::Cancelled, "the caller ended the request");
                    request.fail(Instant::now(), stopped);
                }
            }
            Command::Unpark(number) => {
                let Some(request) = self.requests.get_mut(&number) else {
                    return;
                };
                if request.parked().is_some() {
                    request.resume();
                    self.parked -= 1;
                }
                for id in request.alive() {
                    self.scheduler.unpark(id);
                }
            }
        }
    }

    fn submit(&mut self, job: Job) {
        let deadline = self.shared.ticks(job.deadline);
        let number = job.number;
        let request = Running::new(job);
        match self.scheduler.submit(request.sequences(deadline)) {
            Ok(()) => {
                self.requests.insert(number, request);
            }
            // The door has checked all of this; a refusal here is a bug, and still ends the request.
            Err(refusal) => {
                self.stats.requests_failed += 1;
                request.fail(
                    Instant::now(),
                    CoreError::new(Code::Internal, refusal.to_string()),
                );
            }
        }
    }

    /// Takes a request out, with everything the scheduler has of it.
    fn remove(&mut self, number: u64) -> Option<Running> {
        let request = self.requests.remove(&number)?;
        self.parked -= usize::from(request.parked().is_some());
        for id in request.alive() {
            self.scheduler.cancel(id);
        }
        Some(request)
    }

    fn fail(&mut self, number: u64, error: CoreError) {
        if let Some(request) = self.remove(number) {
            self.stats.requests_failed += 1;
            request.fail(Instant::now(), error);
        }
    }

    fn fail_all(&mut self, error: &CoreError) {
        let numbers: Vec<u64> = self.requests.keys().copied().collect();
        for number in numbers {
            self.fail(number, error.clone());
        }
        self.publish();
    }

    fn expire(&mut self, now: Instant) {
        for id in self.scheduler.expire(self.shared.ticks(now)) {
            self.fail(split(id).0, self.shared.late());
        }
    }

    /// Sequences that could start if others gave their slots up.
    fn crowd(&self) -> usize {
        let counts = self.scheduler.counts();
        if counts.slots_used < self.capacity.slots {
            0
        } else {
            counts.waiting
        }
    }

    /// Ends requests whose reader has not read for too long: their slots are worth more. The longest wait first, and
    /// before their time no more than others wait for.
    fn cut_stalled(&mut self, now: Instant) {
        if self.parked == 0 {
            return;
        }
        let mut crowd = self.crowd();
        let parked = |(number, request): (&u64, &Running)| Some((request.parked()?, *number));
        let mut behind: Vec<(Instant, u64)> = self.requests.iter().filter_map(parked).collect();
        behind.sort_unstable();
        for (since, number) in behind {
            if now - since < self.patience(crowd) {
                return;
            }
            let slots = self.requests.get(&number).map_or(0, Running::slots);
            crowd = crowd.saturating_sub(slots);
            let message = format!(
                "the answer was not read for {} ms, so it was cut",
                (now - since).as_millis()
            );
            self.fail(number, CoreError::new(Code::DeadlineExceeded, message));
        }
    }

    /// How long a request may stay parked while so many sequences wait for its slots.
    fn patience(&self, crowd: usize) -> Duration {
        let options = &self.shared.options;
        if crowd == 0 {
            options.stall_timeout
        } else {
            options.stall_yield.min(options.stall_timeout)
        }
    }

    /// When the next deadline passes; `None` waits for a command.
    fn wake_at(&self) -> Option<Instant> {
        let deadline = self
            .scheduler
            .next_deadline()
            .map(|ticks| self.shared.instant(ticks));
        if self.parked == 0 {
            return deadline;
        }
        let patience = self.patience(self.crowd());
        let stall = self
            .requests
            .values()
            .filter_map(Running::parked)
            .min()
            .map(|since| since + patience);
        deadline.into_iter().chain(stall).min()
    }

    fn step<E: StepEngine>(
        &mut self,
        engine: &mut E,
        plan: &Plan,
    ) -> Result<(), RunError<E::Error>> {
        self.begin(&plan.started);
        self.fill(plan);
        let began = Instant::now();
        let copied = plan
            .copies
            .iter()
            .try_for_each(|copy| engine.copy_prefix(copy.src, copy.dst, copy.len));
        let outcome = copied
            .and_then(|()| engine.step(&self.batch))
            .map_err(RunError::Engine);
        let checked = outcome.and_then(|candidates| {
            candidates.check(&self.batch, self.capacity.vocab_size)?;
            Ok(candidates)
        });
        match checked {
            Ok(candidates) => {
                self.scheduler.took(micros(began.elapsed()));
                self.count(plan);
                self.take(plan, candidates);
                Ok(())
            }
            Err(error) => {
                self.abort();
                Err(error)
            }
        }
    }

    fn fill(&mut self, plan: &Plan) {
        self.batch.fill(plan);
        let Some(sampling) = &mut self.batch.sampling else {
            return;
        };
        for item in &plan.items {
            let (number, choice) = split(item.id);
            let end = item.past + item.len;
            for position in end - item.wanted + 1..=end {
                let sequence = self
                    .requests
                    .get(&number)
                    .filter(|_| item.sample && position == end)
                    .and_then(|request| request.working(choice));
                match sequence {
                    Some(sequence) => sequence.ask(sampling, &self.capacity),
                    None => sampling.push_seen(position, &self.capacity),
                }
            }
        }
    }

    fn begin(&mut self, started: &[Started]) {
        let now = Instant::now();
        for start in started.iter().filter(|start| !start.resumed) {
            self.stats.cached_tokens += start.cached as u64;
            if let Some(request) = self.requests.get_mut(&split(start.id).0) {
                request.start(start, &self.shared.text, now);
            }
        }
    }

    fn count(&mut self, plan: &Plan) {
        self.stats.steps += 1;
        self.stats.interrupted += plan.interrupted.len() as u64;
        let decode = plan
            .items
            .iter()
            .filter(|item| item.len == 1 && item.sample && item.past > 0)
            .count();
        self.stats.decode_tokens += decode as u64;
        self.stats.prefill_tokens += (plan.tokens.len() - decode) as u64;
    }

    /// Samples every row, commits, and sends each request what the step gave it.
    fn take(&mut self, plan: &Plan, mut rest: Candidates<'_>) {
        let now = Instant::now();
        let mut failed = Vec::new();
        let vocab = self.capacity.vocab_size;
        self.outcomes.clear();
        for item in &plan.items {
            let rows = Rows {
                own: rest.split_off(item.wanted, vocab),
                vocab,
            };
            let (number, _) = split(item.id);
            let Some(request) = self.requests.get_mut(&number) else {
                continue;
            };
            let mut tools = Tools {
                text: &self.shared.text,
                sampler: &mut self.sampler,
            };
            let outcome = match request.take(item, rows, &mut tools, now) {
                Ok(sampled) => Outcome {
                    id: item.id,
                    token: sampled.map(|sampled| sampled.token),
                    finished: sampled.is_some_and(|sampled| sampled.stopped),
                },
                Err(error) => {
                    failed.push((
                        number,
                        CoreError::new(Code::EngineFailed, error.to_string()),
                    ));
                    Outcome {
                        id: item.id,
                        token: None,
                        finished: true,
                    }
                }
            };
            self.outcomes.push(outcome);
            if !std::mem::replace(&mut request.touched, true) {
                self.touched.push(number);
            }
        }
        for ended in self.scheduler.commit(&self.outcomes) {
            let (number, choice) = split(ended.id);
            if let Some(request) = self.requests.get_mut(&number) {
                request.finish(choice);
            }
        }
        for (number, error) in failed {
            self.fail(number, error);
        }
        self.deliver(now);
        self.park_latecomers(&plan.started);
    }

    fn deliver(&mut self, now: Instant) {
        let mut touched = std::mem::take(&mut self.touched);
        for number in touched.drain(..) {
            let Some(request) = self.requests.get_mut(&number) else {
                continue;
            };
            request.touched = false;
            if request.is_over() {
                if let Some(request) = self.requests.remove(&number) {
                    self.parked -= usize::from(request.parked().is_some());
                    self.stats.requests_finished += 1;
                    request.complete(now);
                }
            } else if request.deliver(now) {
                self.parked += 1;
                for id in request.alive() {
                    self.scheduler.park(id);
                }
            }
        }
        self.touched = touched;
    }

    /// Choices that got a slot while their request was parked are parked after their first step.
    fn park_latecomers(&mut self, started: &[Started]) {
        if self.parked == 0 {
            return;
        }
        for start in started {
            if self
                .requests
                .get(&split(start.id).0)
                .is_some_and(|request| request.parked().is_some())
            {
                self.scheduler.park(start.id);
            }
        }
    }

    /// The engine failed: the requests of the step end as failed, the others can be tried elsewhere.
    fn abort(&mut self) {
        self.shared.inbox.fail();
        for id in self.scheduler.abort_step() {
            let message = "the engine failed while it computed this request; try again";
            self.fail(split(id).0, CoreError::new(Code::EngineFailed, message));
        }
        let message = "the engine failed before this request was done; try again";
        self.fail_all(&CoreError::new(Code::Unavailable, message));
    }

    /// Tells the gRPC side how full the scheduler is, and what has got a slot.
    fn report(&mut self, now: Instant, plan: &Plan) {
        let counts = self.scheduler.counts();
        let prompt = |start: &Started| {
            let (number, choice) = split(start.id);
            let request = self.requests.get(&number);
            request.map_or(0, |request| request.prompt_tokens(choice))
        };
        let started = Load {
            requests: 0,
            sequences: plan.started.len(),
            tokens: plan.started.iter().map(prompt).sum(),
        };
        let waiting = self.scheduler.waiting();
        self.shared.inbox.report(now, &counts, started, waiting);
        self.publish_counts(&counts);
    }

    fn publish(&mut self) {
        let counts = self.scheduler.counts();
        let now = Instant::now();
        let waiting = self.scheduler.waiting();
        self.shared
            .inbox
            .report(now, &counts, Load::default(), waiting);
        self.publish_counts(&counts);
    }

    fn publish_counts(&mut self, counts: &Counts) {
        self.stats.running = counts.slots_used;
        self.stats.parked = counts.parked;
        self.stats.prompt_token_nanos = self.scheduler.prompt_token_nanos();
        self.shared.publish(&self.stats);
    }
}

impl Drop for EngineLoop<'_> {
    fn drop(&mut self) {
        self.shared.pulse.end();
        // Normally nothing is left. After a panic of the engine this is what ends the requests.
        self.shared.inbox.fail();
        let mut commands = Vec::new();
        self.shared.inbox.take(&mut commands, Wait::Not);
        for command in commands {
            self.obey(command);
        }
        self.fail_all(&CoreError::new(
            Code::Unavailable,
            "the engine stopped before this request was done; try again",
        ));
        debug_assert!(!matches!(self.shared.inbox.phase().0, Phase::Running(_)));
    }
}

/// Milliseconds between two instants, rounded down.
pub(crate) fn ticks(since: Instant, now: Instant) -> u64 {
    u64::try_from(now.saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX)
}

/// The first instant at which [`ticks`] gives this value.
pub(crate) fn instant(since: Instant, ticks: u64) -> Instant {
    since + Duration::from_millis(ticks)
}
