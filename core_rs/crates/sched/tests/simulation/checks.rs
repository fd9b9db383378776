//! What a plan, and the scheduler after it, must look like.

use std::collections::HashSet;

use helix_sched::{Plan, SeqId};

use crate::world::{Held, Truth, World};

impl World {
    pub(crate) fn check_started(&mut self, plan: &Plan, before: &[Held]) {
        for (index, started) in plan.started.iter().enumerate() {
            let place = self.queue.iter().position(|id| *id == started.id);
            assert!(
                place == Some(0) || self.fair,
                "not first come, first served"
            );
            self.queue.remove(place.expect("it did not wait"));
            let truth = self.alive.get_mut(&started.id).unwrap();
            let reuse = if truth.logits || !self.limits.prefix_reuse {
                0
            } else {
                truth.target - 1
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
            assert_eq!(started.resumed, truth.interruptions > 0);
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
                end == truth.target
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
                self.fair || oldest.is_none_or(|id| planned.contains(id)),
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

    /// What is computed once more is not charged again.
    pub(crate) fn check_charges(&self, plan: &Plan) {
        let (mut prefill, mut decode) = (0, 0);
        for item in &plan.items {
            let truth = &self.alive[&item.id];
            if truth.prefilling() {
                prefill += item.len - truth.paid.saturating_sub(item.past).min(item.len);
            } else {
                decode += item.len;
            }
        }
        let mut told = self.told.lock().unwrap();
        assert_eq!(
            (
                std::mem::take(&mut told.prefill),
                std::mem::take(&mut told.decode)
            ),
            (prefill, decode)
        );
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
                .map(|id| self.alive[id].target)
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
        let mut waiting: Vec<SeqId> = self.scheduler.waiting().ids().collect();
        let mut queue = self.queue.clone();
        if self.fair {
            waiting.sort_unstable();
            queue.sort_unstable();
        }
        assert_eq!(waiting, queue);
        assert_eq!(
            self.told.lock().unwrap().waiting.values().sum::<usize>(),
            queue.len()
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
