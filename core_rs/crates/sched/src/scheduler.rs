//! The scheduler: takes requests, plans steps and takes their outcomes.

mod planning;

use std::collections::{HashMap, HashSet};

use crate::pace::Pace;
use crate::policy::Policy;
use crate::queue::Waiting;
use crate::slots::Slots;
use crate::types::{
    Counts, Ended, Finish, Item, Limits, NewSequence, Outcome, Owner, Plan, Refusal, Scope, SeqId,
};

/// Decides which tokens of which sequences the engine computes next.
pub struct Scheduler {
    limits: Limits,
    policy: Box<dyn Policy>,
    waiting: Waiting,
    slots: Slots,
    places: HashMap<SeqId, Place>,
    /// The plan that is with the engine; empty between steps.
    outstanding: Vec<Item>,
    /// Idle slots that the outstanding plan writes to.
    saved: Vec<usize>,
    placed: u64,
    /// Slot that decodes first when not all fit.
    turn: usize,
    /// Whether the last plan computed part of a prompt.
    prefilled: bool,
    pace: Pace,
    /// Slots whose prompts the plan that is being made goes on with.
    planned: Vec<usize>,
    /// Sequences that decode in the outstanding plan, and prompt tokens.
    shape: (usize, usize),
}

/// What is known of every living sequence.
#[derive(Clone, Copy, Debug)]
struct Place {
    at: Whereabouts,
    owner: Owner,
}

#[derive(Clone, Copy, Debug)]
enum Whereabouts {
    /// In the queue, in the request with this arrival number.
    Queue(u64),
    Slot(usize),
}

impl Scheduler {
    /// An empty scheduler; `policy` decides who gets the next slot.
    pub fn new(limits: Limits, policy: Box<dyn Policy>) -> Self {
        let limits = Limits {
            slots: limits.slots.max(1),
            max_len: limits.max_len.max(1),
            queue_requests: limits.queue_requests.max(1),
            step_tokens: limits.step_tokens.max(1),
            ..limits
        };
        Self {
            limits,
            policy,
            waiting: Waiting::default(),
            slots: Slots::new(limits.slots, limits.max_len),
            places: HashMap::new(),
            outstanding: Vec::new(),
            saved: Vec::new(),
            placed: 0,
            turn: 0,
            prefilled: false,
            pace: Pace::default(),
            planned: Vec::new(),
            shape: (0, 0),
        }
    }

    /// Queues the sequences of one request, all or none.
    ///
    /// # Errors
    /// A [`Refusal`] that says why; the scheduler is unchanged then.
    pub fn submit(&mut self, request: Vec<NewSequence>) -> Result<(), Refusal> {
        if request.is_empty() {
            return Ok(());
        }
        let owners: Vec<_> = request.iter().map(|new| (new.id, new.owner)).collect();
        let mut names = HashSet::with_capacity(request.len());
        for sequence in &request {
            self.check(sequence)?;
            if !names.insert(sequence.id) || self.places.contains_key(&sequence.id) {
                return Err(Refusal::DuplicateId { id: sequence.id });
            }
        }
        let arrival = self.waiting.submit(request, &self.limits)?;
        for (id, owner) in owners {
            let at = Whereabouts::Queue(arrival);
            self.places.insert(id, Place { at, owner });
            self.policy.joined(&owner);
        }
        Ok(())
    }

    /// Ends a sequence in whatever state, also while a plan that holds it is with the engine. False when
    /// there is no such sequence (any more).
    pub fn cancel(&mut self, id: SeqId) -> bool {
        let Some(&Place { at, owner }) = self.places.get(&id) else {
            return false;
        };
        match at {
            Whereabouts::Slot(slot) => self.end(slot).is_some(),
            Whereabouts::Queue(arrival) => {
                self.places.remove(&id);
                self.policy.left(&owner);
                self.waiting.remove(arrival, id)
            }
        }
    }

    /// Stops advancing a sequence that has a slot; it keeps the slot. False when it has none.
    pub fn park(&mut self, id: SeqId) -> bool {
        self.set_parked(id, true)
    }

    /// Lets a parked sequence go on. False when it has no slot.
    pub fn unpark(&mut self, id: SeqId) -> bool {
        self.set_parked(id, false)
    }

    /// Removes the waiting sequences whose deadline is `now` or earlier and returns their names, the
    /// longest wait first. A sequence that has a slot does not expire.
    pub fn expire(&mut self, now: u64) -> Vec<SeqId> {
        let expired = self.waiting.expire(now);
        for id in &expired {
            if let Some(place) = self.places.remove(id) {
                self.policy.left(&place.owner);
            }
        }
        expired
    }

    /// A time before which [`Scheduler::expire`] removes nothing; `None` while no waiting sequence has a
    /// deadline.
    pub fn next_deadline(&self) -> Option<u64> {
        self.waiting.earliest_deadline()
    }

    /// Plans the next step. Empty when nothing can advance, and while a plan is outstanding.
    ///
    /// A sequence is not placed while the one of its request before it is computing the same prompt, so
    /// that `n` choices cost one prefill and `n - 1` copies. This lasts as long as that one prefill, and parking or
    /// ending the first one lifts it.
    ///
    /// A sequence may lose its slot to one with a better claim ([`Policy::yields`]): [`Plan::interrupted`].
    pub fn schedule(&mut self) -> Plan {
        let mut plan = Plan::default();
        if !self.outstanding.is_empty() {
            return plan;
        }
        self.waiting.release();
        self.planned.clear();
        let budget = self.prefill_budget(self.decoding());
        let (chunks, chunk_tokens) = self.plan_prefill(&mut plan, budget);
        self.prefilled = !chunks.is_empty();
        self.plan_decode(&mut plan, self.limits.step_tokens - chunk_tokens.len());
        self.shape = (plan.items.len(), chunk_tokens.len());
        plan.items.extend(chunks);
        plan.tokens.extend(chunk_tokens);
        self.outstanding.clone_from(&plan.items);
        plan
    }

    /// Says how long the engine has computed the outstanding plan (microseconds). Optional; it comes before
    /// [`Scheduler::commit`].
    pub fn took(&mut self, micros: u64) {
        if !self.outstanding.is_empty() {
            #[allow(clippy::cast_precision_loss)]
            self.pace.observe(self.shape.0, self.shape.1, micros as f64);
        }
    }

    /// What a prompt token adds to a step, as far as it is learnt (nanoseconds; 0: not yet).
    pub fn prompt_token_nanos(&self) -> u64 {
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let nanos = (self.pace.token_micros() * 1e3) as u64;
        nanos
    }

    /// Takes the outcomes of the outstanding plan and returns the sequences that ended by themselves, in
    /// the order of the plan.
    ///
    /// Outcomes are matched by name and best stand in the order of the items; names that are not in the
    /// plan, or whose sequence was cancelled meanwhile, are ignored. A prompt chunk that samples nothing
    /// needs no outcome. An item with [`Item::sample`] that comes back without a token, and not finished,
    /// is planned again.
    pub fn commit(&mut self, outcomes: &[Outcome]) -> Vec<Ended> {
        let mut ended = Vec::new();
        let mut rest = outcomes;
        self.saved.clear();
        for item in std::mem::take(&mut self.outstanding) {
            let outcome = match rest {
                [first, others @ ..] if first.id == item.id => {
                    rest = others;
                    Some(first)
                }
                _ => outcomes.iter().find(|outcome| outcome.id == item.id),
            };
            let token = outcome.and_then(|outcome| outcome.token);
            let finished = outcome.is_some_and(|outcome| outcome.finished);
            let finish = self.advance(&item, token, finished);
            if finished {
                self.end_if(&item);
            } else if let Some(finish) = finish {
                self.end_if(&item);
                ended.push(Ended {
                    id: item.id,
                    finish,
                });
            }
        }
        ended
    }

    /// The engine failed on the outstanding plan: ends its sequences, forgets what their slots held, and
    /// returns the names of those that were still alive.
    pub fn abort_step(&mut self) -> Vec<SeqId> {
        let mut failed = Vec::new();
        for item in std::mem::take(&mut self.outstanding) {
            if self.end_if(&item) {
                failed.push(item.id);
            }
            self.slots.forget(item.slot);
        }
        for slot in std::mem::take(&mut self.saved) {
            self.slots.forget(slot);
        }
        failed
    }

    /// The engine lost every cache: ends all sequences that have a slot, forgets what all slots held, and
    /// returns the names. Waiting sequences stay.
    pub fn reset(&mut self) -> Vec<SeqId> {
        self.outstanding.clear();
        self.saved.clear();
        let mut failed = Vec::new();
        for slot in 0..self.limits.slots {
            if let Some(id) = self.end(slot) {
                failed.push(id);
            }
            self.slots.forget(slot);
        }
        failed
    }

    /// The limits in force.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The queue.
    pub fn waiting(&self) -> &Waiting {
        &self.waiting
    }

    /// Whether no sequence is alive.
    pub fn is_idle(&self) -> bool {
        self.places.is_empty()
    }

    /// Whether a plan is with the engine.
    pub fn is_stepping(&self) -> bool {
        !self.outstanding.is_empty()
    }

    /// How full it is.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts {
            waiting_requests: self.waiting.len(),
            waiting: self.waiting.sequences(),
            waiting_tokens: self.waiting.tokens(),
            slots_used: self.slots.used(),
            ..Counts::default()
        };
        for (_, slot) in self.slots.iter() {
            let Some(active) = &slot.active else { continue };
            counts.prefilling += usize::from(slot.prefilling().is_some());
            counts.running += usize::from(slot.decoding().is_some());
            counts.parked += usize::from(active.parked);
            counts.cached_tokens += slot.cached.len();
        }
        counts
    }

    /// Ids of the tokens that a slot's cache is known to hold, from position 0; empty for an unknown slot.
    pub fn remembered(&self, slot: usize) -> &[u32] {
        self.slots.get(slot).map_or(&[], |slot| &slot.cached)
    }

    /// Who may start from what a slot holds; `None` for one that was never used.
    pub fn scope(&self, slot: usize) -> Option<Scope> {
        self.slots.get(slot).and_then(|slot| slot.scope)
    }

    fn check(&self, sequence: &NewSequence) -> Result<(), Refusal> {
        let (id, prompt, max_len) = (sequence.id, sequence.prompt.len(), self.limits.max_len);
        if prompt == 0 {
            return Err(Refusal::EmptyPrompt { id });
        }
        if prompt + usize::from(sequence.max_new > 0) > max_len {
            return Err(Refusal::TooLong {
                id,
                prompt,
                max_len,
            });
        }
        Ok(())
    }

    fn set_parked(&mut self, id: SeqId, parked: bool) -> bool {
        let Some(&Place {
            at: Whereabouts::Slot(slot),
            ..
        }) = self.places.get(&id)
        else {
            return false;
        };
        let active = self
            .slots
            .of(slot, id)
            .and_then(|slot| slot.active.as_mut());
        active.map(|active| active.parked = parked).is_some()
    }

    /// Records that an item was computed and says whether its sequence has reached a limit.
    fn advance(&mut self, item: &Item, token: Option<u32>, finished: bool) -> Option<Finish> {
        let max_len = self.limits.max_len;
        let slot = self.slots.of(item.slot, item.id)?;
        let active = slot.active.as_mut()?;
        if item.sample && token.is_none() && !finished {
            return None;
        }
        let prompt = &active.new.prompt;
        match prompt.get(item.past..item.past + item.len) {
            Some(chunk) => slot.cached.extend_from_slice(chunk),
            None => slot.cached.push(active.next),
        }
        if let Some(token) = token.filter(|_| item.sample) {
            active.next = token;
            active.generated += 1;
        }
        if slot.cached.len() < prompt.len() {
            return None;
        }
        if active.generated >= active.new.max_new as usize {
            return Some(Finish::Length);
        }
        (prompt.len() + active.generated >= max_len).then_some(Finish::Context)
    }

    /// Ends the sequence of an item unless it is gone already.
    fn end_if(&mut self, item: &Item) -> bool {
        self.slots.of(item.slot, item.id).is_some() && self.end(item.slot).is_some()
    }

    fn end(&mut self, slot: usize) -> Option<SeqId> {
        let id = self.slots.free(slot)?.new.id;
        self.places.remove(&id);
        Some(id)
    }
}
