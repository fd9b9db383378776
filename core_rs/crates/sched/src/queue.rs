//! The queue of requests whose sequences have no slot.

use std::collections::VecDeque;

use crate::types::{Limits, NewSequence, Owner, Refusal, SeqId};

/// A sequence in the queue.
#[derive(Clone, Debug)]
pub(crate) struct Pending {
    /// Of a sequence that was interrupted, the prompt holds what it has generated.
    pub(crate) new: NewSequence,
    /// Tokens of the prompt that were computed before.
    pub(crate) paid: usize,
    /// How often it has lost its slot.
    pub(crate) interruptions: u32,
}

impl From<NewSequence> for Pending {
    fn from(new: NewSequence) -> Self {
        Self {
            new,
            paid: 0,
            interruptions: 0,
        }
    }
}

/// The waiting requests in order of arrival.
#[derive(Debug, Default)]
pub struct Waiting {
    requests: VecDeque<Request>,
    sequences: usize,
    tokens: usize,
    arrivals: u64,
    /// No waiting sequence has an earlier deadline. May be too early, never too late.
    earliest: Option<u64>,
}

/// Sequences that arrived together, those that still wait.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) arrival: u64,
    sequences: VecDeque<Pending>,
    /// Requests of one owner take turns; grows by one with each sequence that gets a slot.
    turn: u64,
    /// Not to be placed in this step: see [`WaitingRequest::held`].
    pub(crate) held: bool,
    /// Slot and name of the sequence of this request that was placed last.
    pub(crate) leader: Option<(usize, SeqId)>,
}

/// What a [`Policy`] sees of one waiting request.
#[derive(Clone, Copy, Debug)]
pub struct WaitingRequest<'a> {
    /// Position in the order of all arrivals; grows by one with each request.
    pub arrival: u64,
    /// The sequence that would be placed.
    pub first: &'a NewSequence,
    /// Sequences of the request that still wait.
    pub sequences: usize,
    /// Sequences that got a slot, counted from where the other requests of its owner stood when it came.
    pub turn: u64,
    /// Its next sequence waits in this step for the one before to compute the prompt that both have.
    pub held: bool,
}

impl Waiting {
    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Sequences that wait.
    pub fn sequences(&self) -> usize {
        self.sequences
    }

    /// Prompt tokens that wait.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The request at an index; 0 came first.
    pub fn get(&self, index: usize) -> Option<WaitingRequest<'_>> {
        self.requests.get(index).and_then(Request::view)
    }

    /// All requests in order of arrival.
    pub fn iter(&self) -> impl Iterator<Item = WaitingRequest<'_>> {
        self.requests.iter().filter_map(Request::view)
    }

    /// Names of all waiting sequences, the longest wait first.
    pub fn ids(&self) -> impl Iterator<Item = SeqId> {
        self.requests
            .iter()
            .flat_map(|request| request.sequences.iter().map(|pending| pending.new.id))
    }

    /// A time before which nothing expires.
    pub(crate) fn earliest_deadline(&self) -> Option<u64> {
        self.earliest
    }

    /// Queues a request as a whole and returns its arrival number.
    pub(crate) fn submit(
        &mut self,
        request: Vec<NewSequence>,
        limits: &Limits,
    ) -> Result<u64, Refusal> {
        let tokens = request
            .iter()
            .map(|sequence| sequence.prompt.len())
            .sum::<usize>();
        if tokens > limits.queue_tokens {
            return Err(Refusal::TooLarge {
                tokens,
                limit: limits.queue_tokens,
            });
        }
        if self.requests.len() >= limits.queue_requests
            || self.tokens + tokens > limits.queue_tokens
        {
            return Err(Refusal::QueueFull {
                requests: self.requests.len(),
                tokens: self.tokens,
            });
        }
        let deadline = request
            .iter()
            .filter_map(|sequence| sequence.deadline)
            .min();
        self.earliest = self.earliest.into_iter().chain(deadline).min();
        self.sequences += request.len();
        self.tokens += tokens;
        self.arrivals += 1;
        let turn = request
            .first()
            .map_or(0, |first| self.turn_of(&first.owner));
        self.requests.push_back(Request {
            arrival: self.arrivals,
            sequences: request.into_iter().map(Pending::from).collect(),
            turn,
            held: false,
            leader: None,
        });
        Ok(self.arrivals)
    }

    pub(crate) fn request(&self, index: usize) -> Option<&Request> {
        self.requests.get(index)
    }

    /// Where the requests of an owner stand.
    fn turn_of(&self, owner: &Owner) -> u64 {
        let same = |request: &&Request| {
            request.first().is_some_and(|first| {
                (first.owner.organisation, first.owner.key) == (owner.organisation, owner.key)
            })
        };
        let turns = self
            .requests
            .iter()
            .filter(same)
            .map(|request| request.turn);
        turns.min().unwrap_or(0)
    }

    /// Takes the first sequence of a request out of the queue, to be placed in a slot; with it the request's
    /// arrival number.
    pub(crate) fn take(&mut self, index: usize, slot: usize) -> Option<(u64, Pending)> {
        let request = self.requests.get_mut(index)?;
        let pending = request.sequences.pop_front()?;
        request.leader = Some((slot, pending.new.id));
        request.turn += 1;
        let arrival = request.arrival;
        self.left(index, pending.new.prompt.len());
        Some((arrival, pending))
    }

    /// Takes back a sequence that has lost its slot; it is the first of its request again.
    pub(crate) fn put_back(&mut self, arrival: u64, pending: Pending) {
        self.sequences += 1;
        self.tokens += pending.new.prompt.len();
        match self.search(arrival) {
            Ok(index) => {
                let request = &mut self.requests[index];
                request.turn = request.turn.saturating_sub(1);
                request.sequences.push_front(pending);
            }
            Err(index) => {
                let turn = self.turn_of(&pending.new.owner);
                let request = Request {
                    arrival,
                    sequences: [pending].into(),
                    turn,
                    held: false,
                    leader: None,
                };
                self.requests.insert(index, request);
            }
        }
    }

    /// Removes one sequence of the request with this arrival number.
    pub(crate) fn remove(&mut self, arrival: u64, id: SeqId) -> bool {
        let Some(index) = self.find(arrival) else {
            return false;
        };
        let sequences = &mut self.requests[index].sequences;
        let Some(pending) = sequences
            .iter()
            .position(|pending| pending.new.id == id)
            .and_then(|at| sequences.remove(at))
        else {
            return false;
        };
        self.left(index, pending.new.prompt.len());
        true
    }

    /// Removes the sequences whose deadline has been reached.
    pub(crate) fn expire(&mut self, now: u64) -> Vec<SeqId> {
        if self.earliest.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        let (mut expired, mut sequences, mut tokens, mut earliest) =
            (Vec::new(), 0, 0, None::<u64>);
        self.requests.retain_mut(|request| {
            request
                .sequences
                .retain(|pending| match pending.new.deadline {
                    Some(deadline) if deadline <= now => {
                        expired.push(pending.new.id);
                        sequences += 1;
                        tokens += pending.new.prompt.len();
                        false
                    }
                    deadline => {
                        earliest = earliest.into_iter().chain(deadline).min();
                        true
                    }
                });
            !request.sequences.is_empty()
        });
        self.sequences -= sequences;
        self.tokens -= tokens;
        self.earliest = earliest;
        expired
    }

    /// A new step: nobody is held back by the last one.
    pub(crate) fn release(&mut self) {
        for request in &mut self.requests {
            request.held = false;
        }
    }

    pub(crate) fn hold(&mut self, index: usize) {
        if let Some(request) = self.requests.get_mut(index) {
            request.held = true;
        }
    }

    /// Index of the request with this arrival number.
    pub(crate) fn find(&self, arrival: u64) -> Option<usize> {
        self.search(arrival).ok()
    }

    fn search(&self, arrival: u64) -> Result<usize, usize> {
        self.requests
            .binary_search_by_key(&arrival, |request| request.arrival)
    }

    fn left(&mut self, index: usize, tokens: usize) {
        self.sequences -= 1;
        self.tokens -= tokens;
        if self.requests[index].sequences.is_empty() {
            self.requests.remove(index);
        }
        if self.requests.is_empty() {
            self.earliest = None;
        }
    }
}

impl Request {
    pub(crate) fn first(&self) -> Option<&NewSequence> {
        self.sequences.front().map(|pending| &pending.new)
    }

    fn view(&self) -> Option<WaitingRequest<'_>> {
        Some(WaitingRequest {
            arrival: self.arrival,
            first: self.first()?,
            sequences: self.sequences.len(),
            turn: self.turn,
            held: self.held,
        })
    }
}
