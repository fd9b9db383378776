//! Who goes next: the seam for fairness, and the order of arrival.

use crate::queue::Waiting;
use crate::types::Owner;

/// Tokens that the engine is to compute for somebody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Of prompts. What is computed once more after an interruption is not counted.
    pub prefill: usize,
    /// One at a time.
    pub decode: usize,
}

/// A sequence that has a slot.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Holder {
    /// For whom it runs.
    pub owner: Owner,
    /// Tokens that would have to be computed again if it were interrupted now; `None`: it cannot be.
    pub price: Option<usize>,
    /// How often it was interrupted before.
    pub interruptions: u32,
}

/// Who goes next. The seam for fairness between clients.
///
/// The scheduler says who waits and what each is served; the policy answers three questions with it.
pub trait Policy: Send {
    /// The index (in arrival order) of the request whose first waiting sequence gets the next free slot;
    /// `None` places nothing more in this step. Never called with an empty queue. A request that is
    /// [held](crate::WaitingRequest::held) cannot be placed now.
    fn next(&mut self, waiting: &Waiting) -> Option<usize>;

    /// Whether `left` has a better claim to the next tokens of a step than `right`. Equal claims go by the order
    /// in which sequences got their slots.
    fn precedes(&self, left: &Owner, right: &Owner) -> bool {
        let _ = (left, right);
        false
    }

    /// All slots are taken: the holder that gives its slot to a sequence of `claimant`. `None`: nobody.
    fn yields(&self, claimant: &Owner, holders: &[Holder]) -> Option<usize> {
        let _ = (claimant, holders);
        None
    }

    /// A sequence of this owner has entered the queue.
    fn joined(&mut self, owner: &Owner) {
        let _ = owner;
    }

    /// A sequence of this owner has left the queue, for a slot or for good.
    fn left(&mut self, owner: &Owner) {
        let _ = owner;
    }

    /// The step that is being planned serves this owner.
    fn served(&mut self, owner: &Owner, service: Service) {
        let _ = (owner, service);
    }
}

/// First come, first served.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fcfs;

impl Policy for Fcfs {
    fn next(&mut self, waiting: &Waiting) -> Option<usize> {
        waiting.get(0).filter(|first| !first.held).map(|_| 0)
    }
}
