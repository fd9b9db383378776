//! How much of the queue each organisation fills: one that fills it all keeps nobody else out.

use std::collections::HashMap;

use helix_sched::Waiting;

/// A full queue still takes so much of an organisation that has little in it: this part of its limits.
const RESERVE: usize = 16;

/// By organisation: requests that wait, and their prompt tokens.
#[derive(Debug, Default)]
pub(crate) struct Backlog(HashMap<u128, (usize, usize)>);

impl Backlog {
    /// What waits in a scheduler.
    pub(crate) fn of(waiting: &Waiting) -> Self {
        let mut backlog = Self::default();
        for request in waiting.iter() {
            let tokens = request.sequences * request.first.prompt.len();
            backlog.add(request.first.owner.organisation, tokens);
        }
        backlog
    }

    /// One more request.
    pub(crate) fn add(&mut self, organisation: u128, tokens: usize) {
        let (requests, waiting) = self.0.entry(organisation).or_default();
        *requests += 1;
        *waiting += tokens;
    }

    /// Whether a full queue has room for one more request of this organisation: always for its first one, and for
    /// others within its reserve.
    pub(crate) fn reserves(
        &self,
        organisation: u128,
        tokens: usize,
        limits: (usize, usize),
    ) -> bool {
        let Some((requests, waiting)) = self.0.get(&organisation) else {
            return true;
        };
        *requests < limits.0 / RESERVE && waiting + tokens <= limits.1 / RESERVE
    }
}
