//! What a plan, and the scheduler after it, must look like.

use std::collections::HashSet;

use helix_sched::{Plan, SeqId};

use crate::world::{Held, Truth, World};

impl World {
    pub(crate) fn check_started(&mut self, plan: &Plan, before: &[Held]) {
        for (index, started) in plan.started.iter().enumerate() {
            assert_eq!(
                self.queue.remove(0),
                started.id,
                "not first come, first served"
            );
            let truth = self.alive.get_mut(&started.id).unwrap();
            let reuse = if truth.logits || !self.limits.prefix_reuse {
                0
            } else {
                truth.prompt - 1
            };
            let shared = &truth.tokens[..truth.shared];
            let held = |(cache, scope): &Held| {
                if *scope == Some(truth.scope) {
                    common(cache, &truth.tokens[..reuse])
                } else if cache.starts_with(shared) {
                    shared.len().min(reuse)
                } else {
                    0
                }
            };
            if index == 0 {
                assert_eq!(
                    started.cached,
                    before.iter().map(held).max().unwrap(),
                    "not the longest prefix of its own"
                );
            }
            assert!(started.cached <= reuse);
            truth.slot = Some(started.slot);
            truth.cached = started.cached;
            assert!(
                plan.items
                    .iter()
                    .any(|item| item.id == started.id && item.past == started.cached)
            );
        }
    }

    pub(crate) fn check_items(&self, plan: &Plan) {
        let mut slots = HashSet::new();
        for item in &plan.items {
            let truth = &self.alive[&item.id];
            assert!(slots.insert(item.slot), "slot {} twice", item.slot);
            assert!(truth.runnable() && truth.slot == Some(item.slot) && truth.cached == item.past);
            assert!(item.len > 0);
            let end = item.past + item.len;
            let last = if truth.prefilling() {
                end == truth.prompt
            } else {
                true
            };
            assert_eq!(item.sample, last && truth.max_new > 0);
            let prompt_rows = truth.logits && truth.prefilling();
            assert_eq!(
                item.wanted,
                if prompt_rows {
                    item.len
                } else {
                    usize::from(item.sample)
                }
            );
        }
        let owners: HashSet<usize> = self.alive.values().filter_map(|truth| truth.slot).collect();
        assert_eq!(
            owners.len(),
            self.alive
                .values()
                .filter(|truth| truth.slot.is_some())
                .count()
        );
    }

    pub(crate) fn check_shares(&mut self, plan: &Plan, decoding: &[SeqId], prefilling: &[SeqId]) {
        let budget = self.limits.step_tokens;
        let planned: HashSet<SeqId> = plan.items.iter().map(|item| item.id).collect();
        let decodes = decoding.iter().filter(|id| planned.contains(id)).count();
        if budget > 1 {
            let share = budget - (budget / 4).max(1);
            assert!(decodes >= decoding.len().min(share), "decoding starves");
            let oldest = prefilling.iter().min();
            assert!(
                oldest.is_none_or(|id| planned.contains(id)),
                "the oldest prefill starves"
            );
        }
        for id in decoding {
            let truth = self.alive.get_mut(id).unwrap();
            truth.idle_steps = if planned.contains(id) {
                0
            } else {
                truth.idle_steps + 1
            };
            assert!(
                truth.idle_steps <= 2 * self.limits.slots,
                "{id} decodes too rarely"
            );
        }
    }

    pub(crate) fn check_counts(&self) {
        let counts = self.scheduler.counts();
        let count =
            |test: fn(&Truth) -> bool| self.alive.values().filter(|truth| test(truth)).count();
        assert_eq!(counts.waiting, self.queue.len());
        assert_eq!(counts.waiting, count(|truth| truth.slot.is_none()));
        assert_eq!(
            counts.waiting_tokens,
            self.queue
                .iter()
                .map(|id| self.alive[id].prompt)
                .sum::<usize>()
        );
        assert_eq!(
            counts.prefilling,
            count(|truth| truth.slot.is_some() && truth.prefilling())
        );
        assert_eq!(
            counts.running,
            count(|truth| truth.slot.is_some() && !truth.prefilling())
        );
        assert_eq!(counts.parked, count(|truth| truth.parked));
        assert_eq!(counts.slots_used, counts.prefilling + counts.running);
        assert_eq!(
            self.scheduler.waiting().ids().collect::<Vec<_>>(),
            self.queue
        );
        assert_eq!(self.scheduler.is_idle(), self.alive.is_empty());
        assert_eq!(self.ended.len() + self.alive.len(), self.accepted);
    }
}

fn common(left: &[u32], right: &[u32]) -> usize {
    left.iter()
        .zip(right)
        .take_while(|(left, right)| left == right)
        .count()
}
