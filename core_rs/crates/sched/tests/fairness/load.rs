//! Tenants with clients that send one request after another, and an engine that computes every plan in one step.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use helix_sched::{
    Fair, Limits, NewSequence, Outcome, Owner, Policy, Prices, Scheduler, Scope, SeqId,
};

const PRICES: Prices = Prices {
    prefill: 1.0,
    decode: 2.0,
};

pub(crate) fn fair() -> Box<dyn Policy> {
    Box::new(Fair::new(PRICES))
}

/// What a client asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    /// Tokens.
    pub(crate) prompt: usize,
    /// Tokens.
    pub(crate) answer: usize,
    pub(crate) choices: usize,
}

/// Clients of one owner, each of which sends its next request when the last one is answered.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tenant {
    owner: Owner,
    shape: Shape,
    clients: usize,
    /// Clients that wait for an answer, or pause.
    running: usize,
    /// Steps between an answer and the next request.
    pause: usize,
}

impl Tenant {
    pub(crate) fn closed(owner: Owner, shape: Shape, clients: usize) -> Self {
        Self {
            owner,
            shape,
            clients,
            running: 0,
            pause: 0,
        }
    }

    pub(crate) fn pausing(self, steps: usize) -> Self {
        Self {
            pause: steps,
            ..self
        }
    }
}

struct Request {
    tenant: usize,
    arrived: usize,
    left: usize,
    answered: bool,
}

pub(crate) struct Run {
    pub(crate) scheduler: Scheduler,
    pub(crate) tenants: Vec<Tenant>,
    /// By tenant: prompt tokens, and twice the generated ones. What is computed again does not count.
    pub(crate) service: Vec<f64>,
    /// By tenant: steps from the arrival of a request to its first token.
    pub(crate) waits: Vec<Vec<usize>>,
    pub(crate) interruptions: usize,
    /// Tokens computed, and those of them that had been computed before.
    pub(crate) computed: usize,
    pub(crate) again: usize,
    requests: HashMap<u64, Request>,
    /// By tenant: when its pauses end.
    pauses: Vec<VecDeque<usize>>,
    /// By sequence: positions computed so far, at most.
    reached: HashMap<SeqId, usize>,
    now: usize,
    next: u64,
    refill: bool,
}

impl Run {
    pub(crate) fn new(slots: usize, policy: Box<dyn Policy>) -> Self {
        let limits = Limits {
            slots,
            max_len: 2048,
            queue_requests: usize::MAX / 4,
            queue_tokens: usize::MAX / 4,
            step_tokens: 256,
            step_micros: 0,
            prefix_reuse: true,
        };
        Self {
            scheduler: Scheduler::new(limits, policy),
            tenants: Vec::new(),
            service: Vec::new(),
            waits: Vec::new(),
            interruptions: 0,
            computed: 0,
            again: 0,
            requests: HashMap::new(),
            pauses: Vec::new(),
            reached: HashMap::new(),
            now: 0,
            next: 0,
            refill: true,
        }
    }

    pub(crate) fn steps(&mut self, count: usize) {
        self.service.resize(self.tenants.len(), 0.0);
        self.pauses.resize(self.tenants.len(), VecDeque::new());
        self.waits.resize(self.tenants.len(), Vec::new());
        for _ in 0..count {
            self.step();
        }
    }

    /// Lets what was sent come to its end.
    pub(crate) fn drain(&mut self) {
        self.refill = false;
        for _ in 0..200_000 {
            if self.scheduler.is_idle() {
                return;
            }
            self.step();
        }
    }

    fn step(&mut self) {
        if self.refill {
            self.send();
        }
        let plan = self.scheduler.schedule();
        self.now += 1;
        self.interruptions += plan.interrupted.len();
        let mut outcomes = Vec::new();
        for item in &plan.items {
            let tenant = self.requests[&(item.id >> 16)].tenant;
            let end = item.past + item.len;
            let reached = self.reached.entry(item.id).or_insert(item.past);
            let new = end.saturating_sub((*reached).max(item.past));
            *reached = end.max(*reached);
            self.computed += item.len;
            self.again += item.len - new;
            let prompt = self.tenants[tenant].shape.prompt;
            let price = if item.past < prompt {
                PRICES.prefill
            } else {
                PRICES.decode
            };
            self.service[tenant] += new as f64 * price;
            outcomes.push(Outcome {
                id: item.id,
                token: item.sample.then_some(1),
                finished: false,
            });
        }
        for outcome in outcomes.iter().filter(|outcome| outcome.token.is_some()) {
            let request = self.requests.get_mut(&(outcome.id >> 16)).unwrap();
            if !std::mem::replace(&mut request.answered, true) {
                self.waits[request.tenant].push(self.now - request.arrived);
            }
        }
        for ended in self.scheduler.commit(&outcomes) {
            self.reached.remove(&ended.id);
            let number = ended.id >> 16;
            let request = self.requests.get_mut(&number).unwrap();
            request.left -= 1;
            if request.left == 0 {
                let ends = self.now + self.tenants[request.tenant].pause;
                self.pauses[request.tenant].push_back(ends);
                self.requests.remove(&number);
            }
        }
    }

    /// Every idle client sends its next request; no two prompts begin alike.
    fn send(&mut self) {
        for tenant in 0..self.tenants.len() {
            while self.pauses[tenant]
                .front()
                .is_some_and(|ends| *ends <= self.now)
            {
                self.pauses[tenant].pop_front();
                self.tenants[tenant].running -= 1;
            }
            while self.tenants[tenant].running < self.tenants[tenant].clients {
                self.tenants[tenant].running += 1;
                let Tenant { owner, shape, .. } = self.tenants[tenant];
                self.next += 1;
                let number = self.next;
                let first = u32::try_from(number).unwrap();
                let prompt: Arc<[u32]> = std::iter::once(first)
                    .chain(1..)
                    .take(shape.prompt)
                    .collect();
                let sequence = |choice: usize| NewSequence {
                    id: (number << 16) | choice as u64,
                    prompt: Arc::clone(&prompt),
                    max_new: u32::try_from(shape.answer).unwrap(),
                    deadline: None,
                    prompt_logits: false,
                    scope: Scope::Owner(owner.organisation),
                    shared: 0,
                    owner,
                };
                let request = Request {
                    tenant,
                    arrived: self.now,
                    left: shape.choices,
                    answered: false,
                };
                self.requests.insert(number, request);
                self.scheduler
                    .submit((0..shape.choices).map(sequence).collect())
                    .unwrap();
            }
        }
    }
}

/// Jain's index: 1 when all are equal, 1/n when one has everything.
pub(crate) fn jain(shares: &[f64]) -> f64 {
    let sum: f64 = shares.iter().sum();
    let squares: f64 = shares.iter().map(|share| share * share).sum();
    sum * sum / (shares.len() as f64 * squares)
}
