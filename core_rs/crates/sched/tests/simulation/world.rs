//! The scheduler, the engine it drives, and the truth about every sequence.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex};

use helix_sched::{
    Ended, Fair, Fcfs, Finish, Holder, Limits, NewSequence, Outcome, Owner, Plan, Policy, Prices,
    Refusal, Scheduler, Scope, SeqId, Service, Waiting,
};

const GARBAGE: u32 = u32::MAX;
/// What everybody may know.
const SHARED: [u32; 3] = [1, 0, 1];

const PRICES: Prices = Prices {
    prefill: 1.0,
    decode: 2.0,
};

/// What a policy was told.
#[derive(Default)]
pub(crate) struct Heard {
    /// By organisation and key: sequences that wait.
    pub(crate) waiting: HashMap<(u128, u128), usize>,
    pub(crate) prefill: usize,
    pub(crate) decode: usize,
}

pub(crate) type Told = Arc<Mutex<Heard>>;

/// A policy, and what it was told.
struct Watched<P> {
    policy: P,
    told: Told,
}

impl<P: Policy + 'static> Watched<P> {
    fn boxed(policy: P, told: &Told) -> Box<dyn Policy> {
        let told = Arc::clone(told);
        Box::new(Self { policy, told })
    }
}

impl<P: Policy> Policy for Watched<P> {
    fn next(&mut self, waiting: &Waiting) -> Option<usize> {
        self.policy.next(waiting)
    }
    fn precedes(&self, left: &Owner, right: &Owner) -> bool {
        self.policy.precedes(left, right)
    }
    fn yields(&self, claimant: &Owner, holders: &[Holder]) -> Option<usize> {
        self.policy.yields(claimant, holders)
    }
    fn joined(&mut self, owner: &Owner) {
        let name = (owner.organisation, owner.key);
        *self.told.lock().unwrap().waiting.entry(name).or_default() += 1;
        self.policy.joined(owner);
    }
    fn left(&mut self, owner: &Owner) {
        let mut told = self.told.lock().unwrap();
        let waiting = told.waiting.get_mut(&(owner.organisation, owner.key));
        let waiting = waiting.expect("never joined");
        *waiting = waiting.checked_sub(1).expect("left twice");
        drop(told);
        self.policy.left(owner);
    }
    fn served(&mut self, owner: &Owner, service: Service) {
        let mut told = self.told.lock().unwrap();
        told.prefill += service.prefill;
        told.decode += service.decode;
        drop(told);
        self.policy.served(owner, service);
    }
}

/// Something that happens.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Submit {
        prompts: Vec<Vec<u32>>,
        copies: usize,
        max_new: u32,
        patience: Option<u64>,
        logits: bool,
        owner: u8,
    },
    Cancel(usize),
    Park(usize),
    Unpark(usize),
    Expire(u64),
    Step {
        cancel: Option<usize>,
        finish: Option<usize>,
        withhold: Option<usize>,
        shuffle: bool,
    },
    Fail,
    Reset,
}

/// What a sequence is in truth.
#[derive(Debug)]
pub(crate) struct Truth {
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt: usize,
    /// Tokens to compute before one is sampled: the prompt, and what had been generated before an interruption.
    pub(crate) target: usize,
    pub(crate) max_new: usize,
    pub(crate) logits: bool,
    pub(crate) scope: Scope,
    pub(crate) shared: usize,
    pub(crate) deadline: Option<u64>,
    pub(crate) slot: Option<usize>,
    pub(crate) parked: bool,
    pub(crate) cached: usize,
    pub(crate) idle_steps: usize,
    pub(crate) interruptions: u32,
    /// Positions that were computed before an interruption.
    pub(crate) paid: usize,
}

/// Tokens that a slot holds, and who may start from them.
pub(crate) type Held = (Vec<u32>, Option<Scope>);

pub(crate) struct World {
    pub(crate) limits: Limits,
    /// Whether the policy is the fair one, which may interrupt, or the order of arrival.
    pub(crate) fair: bool,
    /// Sequences of each owner that the policy has been told to wait.
    pub(crate) told: Told,
    pub(crate) scheduler: Scheduler,
    caches: Vec<Vec<u32>>,
    /// For whom each cached position was computed; `None`: everybody.
    tags: Vec<Vec<Option<Scope>>>,
    pub(crate) alive: BTreeMap<SeqId, Truth>,
    pub(crate) queue: Vec<SeqId>,
    pub(crate) ended: HashMap<SeqId, &'static str>,
    pub(crate) accepted: usize,
    next_id: SeqId,
    now: u64,
}

impl Truth {
    pub(crate) fn prefilling(&self) -> bool {
        self.cached < self.target
    }
    pub(crate) fn runnable(&self) -> bool {
        self.slot.is_some() && !self.parked
    }
}

impl World {
    pub(crate) fn new(limits: Limits, fair: bool) -> Self {
        let told = Told::default();
        let policy = if fair {
            Watched::boxed(Fair::new(PRICES), &told)
        } else {
            Watched::boxed(Fcfs, &told)
        };
        Self {
            limits,
            fair,
            told,
            scheduler: Scheduler::new(limits, policy),
            caches: vec![vec![GARBAGE; limits.max_len]; limits.slots],
            tags: vec![vec![None; limits.max_len]; limits.slots],
            alive: BTreeMap::new(),
            queue: Vec::new(),
            ended: HashMap::new(),
            accepted: 0,
            next_id: 100,
            now: 0,
        }
    }

    pub(crate) fn apply(&mut self, op: &Op) {
        match op {
            Op::Submit {
                prompts,
                copies,
                max_new,
                patience,
                logits,
                owner,
            } => {
                let scope = match owner {
                    0 => Scope::Request(self.next_id),
                    owner => Scope::Owner(u128::from(*owner)),
                };
                let owner = Owner {
                    organisation: u128::from(*owner % 2),
                    key: u128::from(*owner),
                    organisation_weight: f64::from(*owner % 2 * 2 + 1),
                    ..Owner::default()
                };
                self.submit(
                    prompts,
                    *copies,
                    *max_new,
                    *patience,
                    *logits,
                    (scope, owner),
                );
            }
            Op::Cancel(which) => self.cancel(*which),
            Op::Park(which) => self.park(*which, true),
            Op::Unpark(which) => self.park(*which, false),
            Op::Expire(ticks) => self.expire(*ticks),
            Op::Step {
                cancel,
                finish,
                withhold,
                shuffle,
            } => {
                self.step(*cancel, *finish, *withhold, *shuffle);
            }
            Op::Fail => self.fail(),
            Op::Reset => self.reset(),
        }
        self.check_counts();
    }

    fn end(&mut self, id: SeqId, why: &'static str) {
        assert!(
            self.alive.remove(&id).is_some(),
            "{id} ended ({why}) but was not alive"
        );
        assert_eq!(self.ended.insert(id, why), None, "{id} ended twice");
        self.queue.retain(|&waiting| waiting != id);
    }

    fn pick(&self, which: usize) -> Option<SeqId> {
        self.alive
            .keys()
            .nth(which % self.alive.len().max(1))
            .copied()
    }

    fn submit(
        &mut self,
        prompts: &[Vec<u32>],
        copies: usize,
        max_new: u32,
        patience: Option<u64>,
        logits: bool,
        (scope, owner): (Scope, Owner),
    ) {
        let mut request = Vec::new();
        for prompt in prompts {
            let prompt: Arc<[u32]> = prompt.as_slice().into();
            for _ in 0..copies {
                self.next_id += 1;
                let deadline = patience.map(|ticks| self.now + ticks);
                request.push(NewSequence {
                    id: self.next_id,
                    prompt: prompt.clone(),
                    max_new,
                    deadline,
                    prompt_logits: logits,
                    scope,
                    shared: if prompt.starts_with(&SHARED) {
                        SHARED.len()
                    } else {
                        0
                    },
                    owner,
                });
            }
        }
        let total: usize = request.iter().map(|sequence| sequence.prompt.len()).sum();
        let longest = request
            .iter()
            .map(|sequence| sequence.prompt.len())
            .max()
            .unwrap();
        let before = self.scheduler.counts();
        let verdict = self.scheduler.submit(request.clone());
        if longest + usize::from(max_new > 0) > self.limits.max_len {
            assert!(matches!(verdict, Err(Refusal::TooLong { .. })));
        } else if total > self.limits.queue_tokens {
            assert_eq!(
                verdict,
                Err(Refusal::TooLarge {
                    tokens: total,
                    limit: self.limits.queue_tokens
                })
            );
        } else if before.waiting_requests >= self.limits.queue_requests
            || before.waiting_tokens + total > self.limits.queue_tokens
        {
            let (requests, tokens) = (before.waiting_requests, before.waiting_tokens);
            assert_eq!(verdict, Err(Refusal::QueueFull { requests, tokens }));
        } else {
            assert_eq!(verdict, Ok(()));
            self.accepted += request.len();
            for sequence in request {
                self.queue.push(sequence.id);
                self.alive.insert(sequence.id, truth_of(&sequence));
            }
        }
    }

    fn cancel(&mut self, which: usize) {
        let Some(id) = self.pick(which) else { return };
        assert!(self.scheduler.cancel(id));
        assert!(!self.scheduler.cancel(id), "cancelled twice");
        self.end(id, "cancelled");
    }

    fn park(&mut self, which: usize, parked: bool) {
        let Some(id) = self.pick(which) else { return };
        let done = if parked {
            self.scheduler.park(id)
        } else {
            self.scheduler.unpark(id)
        };
        let truth = self.alive.get_mut(&id).unwrap();
        assert_eq!(done, truth.slot.is_some());
        truth.parked = parked && done;
        truth.idle_steps = 0;
    }

    fn expire(&mut self, ticks: u64) {
        self.now += ticks;
        let due = |id: &&SeqId| {
            self.alive[*id]
                .deadline
                .is_some_and(|deadline| deadline <= self.now)
        };
        let expected: Vec<SeqId> = self.queue.iter().filter(due).copied().collect();
        let next = self.scheduler.next_deadline();
        assert!(expected.is_empty() || next.is_some_and(|next| next <= self.now));
        assert_eq!(self.scheduler.expire(self.now), expected);
        for id in expected {
            self.end(id, "expired");
        }
    }

    fn step(
        &mut self,
        cancel: Option<usize>,
        finish: Option<usize>,
        withhold: Option<usize>,
        shuffle: bool,
    ) {
        let plan = self.plan();
        self.execute(&plan);
        assert!(
            self.scheduler.schedule().is_empty(),
            "a second plan while one is outstanding"
        );
        if let Some(which) = cancel {
            self.cancel(which);
        }
        let mut outcomes = vec![Outcome {
            id: 1,
            token: Some(1),
            finished: true,
        }];
        let (mut stopped, mut limited) = (Vec::new(), Vec::new());
        for (index, item) in plan.items.iter().enumerate() {
            let outcome = Outcome {
                id: item.id,
                token: (item.sample && withhold != Some(index))
                    .then(|| token_after(item.id, item.past + item.len)),
                finished: finish == Some(index),
            };
            if item.sample || outcome.finished || index % 2 == 0 {
                outcomes.push(outcome);
            }
            let Some(truth) = self.alive.get_mut(&item.id) else {
                continue;
            };
            if outcome.token.is_none() && item.sample && !outcome.finished {
                continue;
            }
            truth.cached += item.len;
            truth.tokens.extend(outcome.token);
            let generated = truth.tokens.len() - truth.prompt;
            if outcome.finished {
                stopped.push(item.id);
            } else if truth.cached >= truth.target && generated >= truth.max_new {
                limited.push(Ended {
                    id: item.id,
                    finish: Finish::Length,
                });
            } else if truth.cached >= truth.target && truth.tokens.len() >= self.limits.max_len {
                limited.push(Ended {
                    id: item.id,
                    finish: Finish::Context,
                });
            }
        }
        if shuffle {
            outcomes.reverse();
        }
        self.scheduler
            .took(100 * plan.tokens.len() as u64 + self.now % 7 * 300);
        assert_eq!(self.scheduler.commit(&outcomes), limited);
        assert!(
            self.scheduler.commit(&outcomes).is_empty(),
            "a second commit does something"
        );
        for id in stopped {
            assert!(
                !self.scheduler.cancel(id),
                "{id} was finished by the caller and lives on"
            );
            self.end(id, "stopped");
        }
        for Ended { id, .. } in limited {
            self.end(id, "limit");
        }
    }

    fn fail(&mut self) {
        let plan = self.plan();
        let expected: Vec<SeqId> = plan.items.iter().map(|item| item.id).collect();
        assert_eq!(self.scheduler.abort_step(), expected);
        for item in &plan.items {
            assert!(self.scheduler.remembered(item.slot).is_empty());
            self.caches[item.slot].fill(GARBAGE);
            self.end(item.id, "failed");
        }
        assert!(self.scheduler.commit(&[]).is_empty());
    }

    fn reset(&mut self) {
        let expected: HashSet<SeqId> = self
            .alive
            .iter()
            .filter(|(_, truth)| truth.slot.is_some())
            .map(|(&id, _)| id)
            .collect();
        assert_eq!(
            self.scheduler.reset().into_iter().collect::<HashSet<_>>(),
            expected
        );
        for id in expected {
            self.end(id, "reset");
        }
        for cache in &mut self.caches {
            cache.fill(GARBAGE);
        }
    }

    /// Plans a step and checks everything that a plan promises.
    fn plan(&mut self) -> Plan {
        let before: Vec<Held> = (0..self.limits.slots)
            .map(|slot| {
                let tokens = self.scheduler.remembered(slot).to_vec();
                (tokens, self.scheduler.scope(slot))
            })
            .collect();
        let runnable: Vec<SeqId> = self
            .alive
            .iter()
            .filter(|(_, truth)| truth.runnable())
            .map(|(&id, _)| id)
            .collect();
        let (decoding, prefilling): (Vec<SeqId>, Vec<SeqId>) =
            runnable.iter().partition(|id| !self.alive[id].prefilling());
        let free = self.limits.slots - self.scheduler.counts().slots_used;
        let plan = self.scheduler.schedule();
        let kept = |ids: Vec<SeqId>| -> Vec<SeqId> {
            ids.into_iter()
                .filter(|id| !plan.interrupted.contains(id))
                .collect()
        };
        let (decoding, prefilling) = (kept(decoding), kept(prefilling));
        self.interrupt(&plan, free);

        let can_start = free > 0 && !self.queue.is_empty();
        let idle = runnable.is_empty() && !can_start && plan.interrupted.is_empty();
        assert_eq!(plan.is_empty(), idle, "work is left lying");
        assert_eq!(
            plan.items.iter().map(|item| item.len).sum::<usize>(),
            plan.tokens.len()
        );
        assert!(
            plan.tokens.len() <= self.limits.step_tokens,
            "over the budget"
        );
        self.check_started(&plan, &before);
        self.check_items(&plan);
        self.check_shares(&plan, &decoding, &prefilling);
        self.check_charges(&plan);
        plan
    }

    /// Sequences that had to give their slots up wait again, with all they have generated.
    fn interrupt(&mut self, plan: &Plan, free: usize) {
        assert!(plan.interrupted.is_empty() || (self.fair && free < plan.started.len()));
        assert!(plan.interrupted.len() <= plan.started.len(), "for nobody");
        for id in &plan.interrupted {
            let truth = self.alive.get_mut(id).unwrap();
            assert!(truth.slot.take().is_some(), "it had no slot");
            assert!(!(truth.logits && truth.prefilling()), "an echo is cut");
            if !truth.prefilling() {
                truth.target = truth.tokens.len();
            }
            truth.logits = false;
            truth.parked = false;
            truth.deadline = None;
            truth.idle_steps = 0;
            truth.paid = truth.paid.max(truth.cached);
            truth.cached = 0;
            truth.interruptions += 1;
            self.queue.push(*id);
        }
    }

    /// Runs a plan as an engine does, and writes garbage just behind what every slot holds.
    fn execute(&mut self, plan: &Plan) {
        for copy in &plan.copies {
            assert_ne!(copy.src, copy.dst);
            let prefix = self.caches[copy.src][..copy.len].to_vec();
            self.caches[copy.dst][..copy.len].copy_from_slice(&prefix);
            let tags = self.tags[copy.src][..copy.len].to_vec();
            self.tags[copy.dst][..copy.len].copy_from_slice(&tags);
        }
        for (item, tokens) in plan.iter() {
            let truth = &self.alive[&item.id];
            let end = item.past + item.len;
            assert_eq!(
                self.caches[item.slot][..item.past],
                truth.tokens[..item.past],
                "wrong cache"
            );
            assert_eq!(*tokens, truth.tokens[item.past..end], "wrong tokens");
            let tags = &mut self.tags[item.slot];
            assert!(
                tags[..item.past]
                    .iter()
                    .all(|tag| tag.is_none_or(|tag| tag == truth.scope)),
                "computed for somebody else"
            );
            tags[item.past..end].fill(Some(truth.scope));
            if truth.tokens[..end].starts_with(&SHARED) {
                tags[..SHARED.len()].fill(None);
            }
            self.caches[item.slot][item.past..end].copy_from_slice(tokens);
            if let Some(behind) = self.caches[item.slot].get_mut(end) {
                *behind = GARBAGE;
            }
        }
        let busy: HashSet<usize> = plan.items.iter().map(|item| item.slot).collect();
        for slot in (0..self.limits.slots).filter(|slot| !busy.contains(slot)) {
            let held = self.scheduler.remembered(slot).len();
            assert!(
                held < self.limits.max_len,
                "no room for the stray position of an idle slot"
            );
            self.caches[slot][held] = GARBAGE;
        }
    }

    /// Lets everything end by itself.
    pub(crate) fn drain(&mut self) {
        let live: Vec<SeqId> = self.alive.keys().copied().collect();
        for id in live {
            self.scheduler.unpark(id);
            self.alive.get_mut(&id).unwrap().parked = false;
        }
        let work: usize = self
            .alive
            .values()
            .map(|truth| truth.prompt + truth.max_new)
            .sum();
        for _ in 0..=4 * work {
            if self.alive.is_empty() {
                return;
            }
            self.step(None, None, None, false);
            self.check_counts();
        }
        panic!("{} sequences never end", self.alive.len());
    }
}

fn truth_of(sequence: &NewSequence) -> Truth {
    Truth {
        tokens: sequence.prompt.to_vec(),
        prompt: sequence.prompt.len(),
        target: sequence.prompt.len(),
        max_new: sequence.max_new as usize,
        logits: sequence.prompt_logits,
        scope: sequence.scope,
        shared: sequence.shared,
        deadline: sequence.deadline,
        slot: None,
        parked: false,
        cached: 0,
        idle_steps: 0,
        interruptions: 0,
        paid: 0,
    }
}

/// From a small alphabet, so that different sequences share long prefixes; depends on the sequence.
fn token_after(id: SeqId, position: usize) -> u32 {
    u32::from((usize::try_from(id).unwrap() * 7 + position * 3) % 5 < 2)
}
