//! Each rule of the scheduler, shown once.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod flow;
mod pace;
mod prefix;

use helix_sched::{
    Ended, Fcfs, Limits, NewSequence, Outcome, Owner, Plan, Scheduler, Scope, SeqId,
};

pub(crate) const LIMITS: Limits = Limits {
    slots: 4,
    max_len: 64,
    queue_requests: 8,
    queue_tokens: 256,
    step_tokens: 32,
    step_micros: 0,
    prefix_reuse: true,
};

pub(crate) fn scheduler(limits: Limits) -> Scheduler {
    Scheduler::new(limits, Box::new(Fcfs))
}

pub(crate) fn sequence(id: SeqId, prompt: &[u32], max_new: u32) -> NewSequence {
    NewSequence {
        id,
        prompt: prompt.into(),
        max_new,
        deadline: None,
        prompt_logits: false,
        scope: Scope::Owner(0),
        shared: 0,
        owner: Owner::default(),
    }
}

pub(crate) fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|at| seed * 1000 + at).collect()
}

/// Commits token 7 wherever one is expected.
pub(crate) fn finish_step(scheduler: &mut Scheduler, plan: &Plan) -> Vec<Ended> {
    let outcomes: Vec<Outcome> = plan
        .items
        .iter()
        .map(|item| Outcome {
            id: item.id,
            token: item.sample.then_some(7),
            finished: false,
        })
        .collect();
    scheduler.commit(&outcomes)
}

pub(crate) fn step(scheduler: &mut Scheduler) -> Plan {
    let plan = scheduler.schedule();
    finish_step(scheduler, &plan);
    plan
}

pub(crate) fn run_alone(scheduler: &mut Scheduler, new: NewSequence) {
    scheduler.submit(vec![new]).unwrap();
    while !scheduler.is_idle() {
        assert!(!step(scheduler).is_empty());
    }
}

pub(crate) fn ids(plan: &Plan) -> Vec<SeqId> {
    plan.items.iter().map(|item| item.id).collect()
}
