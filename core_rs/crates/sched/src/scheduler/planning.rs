//! What a step consists of: who gets a slot, which prompts go on, who decodes.

use std::sync::Arc;

use super::{Place, Scheduler, Whereabouts};
use crate::policy::{Holder, Service};
use crate::queue::{Pending, Request};
use crate::slots::{Active, Slot};
use crate::types::{Item, NewSequence, Owner, Plan, SeqId, Started};

impl Scheduler {
    /// Sequences that want one token each.
    pub(super) fn decoding(&self) -> usize {
        let decoding = |slot: &Slot| slot.decoding().is_some_and(Active::runnable);
        self.slots.iter().filter(|(_, slot)| decoding(slot)).count()
    }

    /// Tokens that prompts may take when `decoding` sequences want one each.
    pub(super) fn prefill_budget(&self, decoding: usize) -> usize {
        let budget = self.limits.step_tokens;
        let kept = match budget {
            1 => usize::from(decoding == 0 || !self.prefilled),
            _ => (budget / 4).max(1),
        };
        #[allow(clippy::cast_precision_loss)]
        let fitting = self
            .pace
            .prompt_tokens(decoding, self.limits.step_micros as f64);
        (budget - decoding.min(budget - kept)).min(fitting)
    }

    /// Chunks of the prompts in work and of new sequences, the best claim first, while budget and slots last.
    pub(super) fn plan_prefill(
        &mut self,
        plan: &mut Plan,
        mut budget: usize,
    ) -> (Vec<Item>, Vec<u32>) {
        let runnable = |slot: &Slot| {
            let active = slot.prefilling().filter(|active| active.runnable())?;
            Some((active.order, active.new.owner))
        };
        let prompts = self.slots.iter();
        let mut in_work: Vec<_> = prompts
            .filter_map(|(index, slot)| runnable(slot).map(|(order, owner)| (order, owner, index)))
            .collect();
        in_work.sort_unstable_by_key(|(order, ..)| *order);
        let (mut items, mut tokens) = (Vec::new(), Vec::new());
        while budget > 0 {
            let Some(slot) = self.next_prompt(&mut in_work, plan) else {
                break;
            };
            let Some(item) = self.chunk(slot, budget, &mut tokens) else {
                break;
            };
            self.charge_prompt(&item);
            self.planned.push(slot);
            budget -= item.len;
            items.push(item);
        }
        (items, tokens)
    }

    /// The slot whose prompt is computed next: the best claim among those in work, or somebody with a better one.
    fn next_prompt(
        &mut self,
        in_work: &mut Vec<(u64, Owner, usize)>,
        plan: &mut Plan,
    ) -> Option<usize> {
        let mut best = 0;
        for (at, (_, owner, _)) in in_work.iter().enumerate() {
            if self.policy.precedes(owner, &in_work[best].1) {
                best = at;
            }
        }
        let rival = in_work.get(best).map(|(_, owner, _)| *owner);
        match self.place_next(in_work, rival, plan) {
            Some(slot) => Some(slot),
            // Placing may have interrupted one of them.
            None if best < in_work.len() => Some(in_work.remove(best).2),
            None => None,
        }
    }

    fn charge_prompt(&mut self, item: &Item) {
        let Some(active) = self
            .slots
            .get(item.slot)
            .and_then(|slot| slot.active.as_ref())
        else {
            return;
        };
        let again = active.paid.saturating_sub(item.past).min(item.len);
        let service = Service {
            prefill: item.len - again,
            decode: 0,
        };
        self.policy.served(&active.new.owner, service);
    }

    fn chunk(&self, index: usize, budget: usize, tokens: &mut Vec<u32>) -> Option<Item> {
        let slot = self.slots.get(index)?;
        let NewSequence {
            id,
            ref prompt,
            max_new,
            prompt_logits,
            ..
        } = slot.prefilling()?.new;
        let past = slot.cached.len();
        let len = budget.min(prompt.len() - past);
        let sample = past + len == prompt.len() && max_new > 0;
        let wanted = if prompt_logits {
            len
        } else {
            usize::from(sample)
        };
        tokens.extend_from_slice(&prompt[past..past + len]);
        Some(Item {
            id,
            slot: index,
            past,
            len,
            wanted,
            sample,
        })
    }

    /// Gives the next waiting sequence a slot and returns it, when its claim is better than that of `rival`.
    fn place_next(
        &mut self,
        in_work: &mut Vec<(u64, Owner, usize)>,
        rival: Option<Owner>,
        plan: &mut Plan,
    ) -> Option<usize> {
        let index = self.next_waiting()?;
        let request = self.waiting.request(index)?;
        let (arrival, owner) = (request.arrival, request.first()?.owner);
        if rival.is_some_and(|rival| !self.policy.precedes(&owner, &rival)) {
            return None;
        }
        if !self.slots.has_free() {
            let slot = self.yielding(&owner)?;
            in_work.retain(|(_, _, other)| *other != slot);
            plan.interrupted.extend(self.interrupt(slot));
        }
        // An interrupted sequence has moved the others in the queue.
        self.place(self.waiting.find(arrival)?, plan)
    }

    /// The request whose first sequence is to be placed: the policy's choice among those that can be.
    fn next_waiting(&mut self) -> Option<usize> {
        while !self.waiting.is_empty() {
            let index = self.policy.next(&self.waiting)?;
            let request = self.waiting.request(index)?;
            if request.held || !self.awaits_sibling(request, request.first()?) {
                return (!request.held).then_some(index);
            }
            self.waiting.hold(index);
        }
        None
    }

    fn place(&mut self, index: usize, plan: &mut Plan) -> Option<usize> {
        let first = self.waiting.request(index)?.first()?;
        let reuse = if self.reuses(first) {
            first.prompt.len() - 1
        } else {
            0
        };
        let mut place = self.slots.find(first, reuse)?;
        if self.limits.prefix_reuse {
            place.save = self.slots.save(&place);
        }
        let (arrival, pending) = self.waiting.take(index, place.slot)?;
        let Pending {
            new,
            paid,
            interruptions,
        } = pending;
        let (id, owner) = (new.id, new.owner);
        let at = Whereabouts::Slot(place.slot);
        self.places.insert(id, Place { at, owner });
        self.policy.left(&owner);
        plan.started.push(Started {
            id,
            slot: place.slot,
            cached: place.cached,
            resumed: interruptions > 0,
        });
        plan.copies.extend(place.save.into_iter().chain(place.copy));
        self.saved.extend(place.save.map(|save| save.dst));
        self.placed += 1;
        self.slots.place(
            &place,
            Active {
                new,
                arrival,
                order: self.placed,
                paid,
                interruptions,
                next: 0,
                generated: 0,
                parked: false,
            },
        );
        Some(place.slot)
    }

    /// The slot that is taken from its sequence for one of this owner.
    fn yielding(&self, owner: &Owner) -> Option<usize> {
        let holders: Vec<(usize, Holder)> = self
            .slots
            .iter()
            .filter_map(|(index, slot)| Some((index, holder(slot)?)))
            .map(|(index, mut holder)| {
                // Whom this plan serves stays.
                if self.planned.contains(&index) {
                    holder.price = None;
                }
                (index, holder)
            })
            .collect();
        let all: Vec<Holder> = holders.iter().map(|(_, holder)| *holder).collect();
        let chosen = self.policy.yields(owner, &all)?;
        let (slot, holder) = holders.get(chosen)?;
        holder.price.map(|_| *slot)
    }

    /// Takes the slot from a sequence, which goes back to the queue with what it has generated.
    fn interrupt(&mut self, slot: usize) -> Option<SeqId> {
        let tokens = {
            let slot = self.slots.get(slot)?;
            let active = slot.active.as_ref()?;
            if slot.prefilling().is_some() {
                Arc::clone(&active.new.prompt)
            } else {
                let mut tokens = slot.cached.clone();
                tokens.push(active.next);
                tokens.into()
            }
        };
        let computed = self.slots.get(slot)?.cached.len();
        let active = self.slots.free(slot)?;
        let generated = u32::try_from(active.generated).unwrap_or(u32::MAX);
        let new = NewSequence {
            prompt: tokens,
            max_new: active.new.max_new.saturating_sub(generated),
            // It has had its turn; only waiting for the first one has an end.
            deadline: None,
            prompt_logits: false,
            ..active.new
        };
        let (id, owner) = (new.id, new.owner);
        let at = Whereabouts::Queue(active.arrival);
        self.places.insert(id, Place { at, owner });
        self.policy.joined(&owner);
        let pending = Pending {
            new,
            paid: active.paid.max(computed),
            interruptions: active.interruptions.saturating_add(1),
        };
        self.waiting.put_back(active.arrival, pending);
        Some(id)
    }

    fn reuses(&self, sequence: &NewSequence) -> bool {
        self.limits.prefix_reuse && !sequence.prompt_logits
    }

    /// Whether the sequence placed before it is still computing a prefix that it could copy.
    fn awaits_sibling(&self, request: &Request, first: &NewSequence) -> bool {
        let Some((index, leader)) = request.leader else {
            return false;
        };
        let Some(slot) = self.slots.get(index) else {
            return false;
        };
        self.reuses(first)
            && slot.cached.len() + 1 < first.prompt.len()
            && slot.prefilling().is_some_and(|active| {
                let (mine, its) = (&first.prompt, &active.new.prompt);
                let same = Arc::ptr_eq(mine, its) || mine == its;
                same && active.new.id == leader && active.runnable()
            })
    }

    /// One token for each decoding sequence, by turns when they do not all fit.
    pub(super) fn plan_decode(&mut self, plan: &mut Plan, budget: usize) {
        let slots = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.decoding().is_some_and(Active::runnable));
        let mut chosen: Vec<_> = slots.map(|(index, _)| index).collect();
        if chosen.len() > budget {
            let first = chosen.partition_point(|&slot| slot < self.turn);
            chosen.rotate_left(first);
            self.turn = chosen[budget];
            chosen.truncate(budget);
            chosen.sort_unstable();
        }
        for index in chosen {
            let Some(slot) = self.slots.get(index) else {
                continue;
            };
            let Some(active) = &slot.active else { continue };
            let past = slot.cached.len();
            plan.items.push(Item {
                id: active.new.id,
                slot: index,
                past,
                len: 1,
                wanted: 1,
                sample: true,
            });
            plan.tokens.push(active.next);
            let service = Service {
                prefill: 0,
                decode: 1,
            };
            self.policy.served(&active.new.owner, service);
        }
    }
}

/// The sequence of a slot as a policy sees it. One whose prompt is echoed cannot be interrupted before that is done.
fn holder(slot: &Slot) -> Option<Holder> {
    let active = slot.active.as_ref()?;
    let echoes = active.new.prompt_logits && slot.prefilling().is_some();
    Some(Holder {
        owner: active.new.owner,
        // What was computed before an interruption, and is not yet again, would be lost once more.
        price: (!echoes).then_some(slot.cached.len().max(active.paid)),
        interruptions: active.interruptions,
    })
}
