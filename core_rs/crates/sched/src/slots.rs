//! The slots of the engine: who is in them and what their caches hold.

use crate::types::{CopyPrefix, NewSequence, Scope, SeqId};

/// Tokens that a copy of an idle slot's content must save to be worth making.
const WORTH_SAVING: usize = 8;

/// A sequence that has a slot.
#[derive(Debug)]
pub(crate) struct Active {
    pub(crate) new: NewSequence,
    /// Number of its request in the order of arrivals.
    pub(crate) arrival: u64,
    /// Order of placement.
    pub(crate) order: u64,
    /// Tokens of the prompt that were computed before, and are not to be charged again.
    pub(crate) paid: usize,
    /// How often it has lost its slot.
    pub(crate) interruptions: u32,
    /// Sampled last and not fed yet; meaningful once the prompt is computed.
    pub(crate) next: u32,
    pub(crate) generated: usize,
    pub(crate) parked: bool,
}

/// One slot.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    pub(crate) active: Option<Active>,
    /// Ids of the tokens at the positions that the cache is known to hold, from position 0.
    pub(crate) cached: Vec<u32>,
    /// Who may start from what it holds.
    pub(crate) scope: Option<Scope>,
    /// When what it holds was last in use, in sequences ended; 0 is never.
    last_used: u64,
}

/// Where a sequence begins.
pub(crate) struct Place {
    pub(crate) slot: usize,
    /// Prefix that the slot holds once `copy` has run.
    pub(crate) cached: usize,
    /// Runs first: moves what the slot held to a slot that holds older things.
    pub(crate) save: Option<CopyPrefix>,
    pub(crate) copy: Option<CopyPrefix>,
}

#[derive(Debug)]
pub(crate) struct Slots {
    all: Vec<Slot>,
    used: usize,
    max_len: usize,
    ended: u64,
}

impl Active {
    /// Whether a step may advance the sequence.
    pub(crate) fn runnable(&self) -> bool {
        !self.parked
    }
}

impl Slot {
    /// Smaller is older; a slot that holds nothing is the oldest.
    fn age(&self) -> u64 {
        if self.cached.is_empty() {
            0
        } else {
            self.last_used
        }
    }

    /// Tokens of the slot that a sequence may start from, `wanted` of its prompt at most.
    fn offers(&self, new: &NewSequence, wanted: usize) -> usize {
        let prompt = &new.prompt[..wanted.min(new.prompt.len())];
        if self.scope == Some(new.scope) {
            return common_prefix(prompt, &self.cached);
        }
        // Nothing behind the shared part is looked at: even that would take time that tells.
        let shared = &new.prompt[..new.shared.min(new.prompt.len())];
        if self.cached.starts_with(shared) {
            shared.len().min(prompt.len())
        } else {
            0
        }
    }

    /// The sequence, when its prompt is not computed yet.
    pub(crate) fn prefilling(&self) -> Option<&Active> {
        self.active
            .as_ref()
            .filter(|active| self.cached.len() < active.new.prompt.len())
    }

    /// The sequence, when it decodes.
    pub(crate) fn decoding(&self) -> Option<&Active> {
        self.active
            .as_ref()
            .filter(|active| self.cached.len() >= active.new.prompt.len())
    }
}

impl Slots {
    pub(crate) fn new(slots: usize, max_len: usize) -> Self {
        Self {
            all: (0..slots).map(|_| Slot::default()).collect(),
            used: 0,
            max_len,
            ended: 0,
        }
    }

    pub(crate) fn used(&self) -> usize {
        self.used
    }

    pub(crate) fn has_free(&self) -> bool {
        self.used < self.all.len()
    }

    pub(crate) fn get(&self, slot: usize) -> Option<&Slot> {
        self.all.get(slot)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (usize, &Slot)> {
        self.all.iter().enumerate()
    }

    /// The slot, when the named sequence is in it.
    pub(crate) fn of(&mut self, slot: usize, id: SeqId) -> Option<&mut Slot> {
        let slot = self.all.get_mut(slot)?;
        slot.active
            .as_ref()
            .is_some_and(|active| active.new.id == id)
            .then_some(slot)
    }

    /// Chooses a slot for a sequence, at most `reuse` prompt tokens of which may come from a cache.
    ///
    /// The longest prefix that any slot holds for it decides. It is used in place when its slot is free and
    /// taking it keeps the slots dense (it lies below the highest slot in use, or is the lowest free one);
    /// otherwise it is copied to the lowest free slot. Equal lengths prefer no copy, then the lower slot.
    pub(crate) fn find(&self, new: &NewSequence, reuse: usize) -> Option<Place> {
        let lowest = self.all.iter().position(|slot| slot.active.is_none())?;
        let dense = self
            .all
            .iter()
            .rposition(|slot| slot.active.is_some())
            .unwrap_or(0)
            .max(lowest);
        let (mut best, mut length, mut in_place) = (lowest, 0, true);
        for (index, slot) in self.all.iter().enumerate() {
            let common = slot.offers(new, reuse);
            let here = slot.active.is_none() && index <= dense;
            if common > length || (common == length && length > 0 && here && !in_place) {
                (best, length, in_place) = (index, common, here);
            }
        }
        if in_place {
            return Some(Place {
                slot: best,
                cached: length,
                save: None,
                copy: None,
            });
        }
        let copy = CopyPrefix {
            src: best,
            dst: lowest,
            len: length,
        };
        Some(Place {
            slot: lowest,
            cached: length,
            save: None,
            copy: Some(copy),
        })
    }

    /// How to keep what placing there would overwrite: dense slots are taken again and again, and without
    /// this the next turn of one chat would be lost to the first turn of another while other slots stand
    /// empty. The least recently used idle slot takes it over, when its own content is older.
    pub(crate) fn save(&self, place: &Place) -> Option<CopyPrefix> {
        let slot = self.all.get(place.slot)?;
        let kept = if place.copy.is_some() {
            0
        } else {
            place.cached
        };
        if slot.cached.len() < kept + WORTH_SAVING {
            return None;
        }
        let source = place.copy.map(|copy| copy.src);
        let idle = self.all.iter().enumerate().filter(|(index, other)| {
            other.active.is_none() && *index != place.slot && Some(*index) != source
        });
        let (dst, victim) = idle.min_by_key(|(_, other)| other.age())?;
        (victim.age() < slot.age()).then_some(CopyPrefix {
            src: place.slot,
            dst,
            len: slot.cached.len(),
        })
    }

    /// Puts a sequence where [`Slots::find`] said; the record shows at once what the cache will hold.
    pub(crate) fn place(&mut self, place: &Place, active: Active) {
        if let Some(save) = place.save {
            self.all[save.dst].cached = std::mem::take(&mut self.all[save.src].cached);
            self.all[save.dst].last_used = self.all[save.src].last_used;
            self.all[save.dst].scope = self.all[save.src].scope;
        }
        let slot = &mut self.all[place.slot];
        slot.cached.clear();
        slot.cached
            .extend_from_slice(&active.new.prompt[..place.cached]);
        slot.scope = Some(active.new.scope);
        slot.active = Some(active);
        self.used += 1;
    }

    /// Ends the sequence of a slot; the slot remembers its tokens.
    pub(crate) fn free(&mut self, slot: usize) -> Option<Active> {
        let slot = self.all.get_mut(slot)?;
        let active = slot.active.take()?;
        slot.cached.truncate(self.max_len - 1);
        self.ended += 1;
        slot.last_used = self.ended;
        self.used -= 1;
        Some(active)
    }

    /// Drops the record of a slot whose cache can no longer be trusted.
    pub(crate) fn forget(&mut self, slot: usize) {
        if let Some(slot) = self.all.get_mut(slot) {
            slot.cached.clear();
        }
    }
}

fn common_prefix(left: &[u32], right: &[u32]) -> usize {
    left.iter()
        .zip(right)
        .take_while(|(left, right)| left == right)
        .count()
}
