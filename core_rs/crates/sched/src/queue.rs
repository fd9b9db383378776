//! The queue of requests whose sequences have no slot yet, and who goes next.

use std::collections::VecDeque;

use crate::types::{Limits, NewSequence, Refusal, SeqId};

/// Who goes next. The seam for fairness between clients.
pub trait Policy: Send {
    /// The index (in arrival order) of the request whose first waiting sequence gets the next free slot;
    /// `None` places nothing more in this step. Called once per placement, and never with an empty queue.
    fn next(&mut self, waiting: &Waiting) -> Option<usize>;
}

/// First come, first served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fcfs;

impl Policy for Fcfs {
    fn next(&mut self, _waiting: &Waiting) -> Option<usize> {
        Some(0)
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
    arrival: u64,
    sequences: VecDeque<NewSequence>,
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
            .flat_map(|request| request.sequences.iter().map(|sequence| sequence.id))
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
        self.requests.push_back(Request {
            arrival: self.arrivals,
            sequences: request.into(),
            leader: None,
        });
        Ok(self.arrivals)
    }

    pub(crate) fn request(&self, index: usize) -> Option<&Request> {
        self.requests.get(index)
    }

    /// Takes the first sequence of a request out of the queue, to be placed in a slot.
    pub(crate) fn take(&mut self, index: usize, slot: usize) -> Option<NewSequence> {
        let request = self.requests.get_mut(index)?;
        let sequence = request.sequences.pop_front()?;
        request.leader = Some((slot, sequence.id));
        self.left(index, &sequence);
        Some(sequence)
    }

    /// Removes one sequence of the request with this arrival number.
    pub(crate) fn remove(&mut self, arrival: u64, id: SeqId) -> bool {
        let Ok(index) = self
            .requests
            .binary_search_by_key(&arrival, |request| request.arrival)
        else {
            return false;
        };
        let sequences = &mut self.requests[index].sequences;
        let Some(sequence) = sequences
            .iter()
            .position(|sequence| sequence.id == id)
            .and_then(|at| sequences.remove(at))
        else {
            return false;
        };
        self.left(index, &sequence);
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
                .retain(|sequence| match sequence.deadline {
                    Some(deadline) if deadline <= now => {
                        expired.push(sequence.id);
                        sequences += 1;
                        tokens += sequence.prompt.len();
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

    fn left(&mut self, index: usize, sequence: &NewSequence) {
        self.sequences -= 1;
        self.tokens -= sequence.prompt.len();
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
        self.sequences.front()
    }

    fn view(&self) -> Option<WaitingRequest<'_>> {
        let first = self.sequences.front()?;
        Some(WaitingRequest {
            arrival: self.arrival,
            first,
            sequences: self.sequences.len(),
        })
    }
}
