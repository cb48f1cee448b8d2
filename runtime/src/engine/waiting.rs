//! Who is admitted next: by priority, then fairly between tenants, then in order of arrival.
//!
//! Fairness is by service received: among tenants that wait at one priority, the one whose requests took the fewest
//! tokens goes first. A tenant that comes back starts level with the least served one that is there, so that nobody
//! saves up a claim while away.

use std::collections::{BTreeMap, HashMap, VecDeque};

use super::request::SeqId;

/// Whose request it is; requests without a key share one.
pub type TenantId = u64;

/// Weight of a generated token against a prompt token in what a tenant has been served.
const OUTPUT_WEIGHT: u64 = 2;

/// One tenant's share of the engine.
#[derive(Debug, Default)]
struct Tenant {
    /// Tokens served, weighted.
    served: u64,
    /// Sequences waiting or running.
    present: u32,
}

/// The waiting sequences.
#[derive(Debug, Default)]
pub struct WaitingQueue {
    /// By priority, lowest first; then by tenant. No list is empty.
    levels: BTreeMap<i32, HashMap<TenantId, VecDeque<SeqId>>>,
    tenants: HashMap<TenantId, Tenant>,
    len: usize,
}

impl WaitingQueue {
    /// Waiting sequences.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nobody waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// A tenant's sequence enters the engine.
    pub fn enter(&mut self, tenant: TenantId) {
        let level = self.tenants.values().map(|tenant| tenant.served).min();
        let entry = self.tenants.entry(tenant).or_insert_with(|| Tenant {
            served: level.unwrap_or(0),
            present: 0,
        });
        entry.present += 1;
    }

    /// A tenant's sequence has left the engine. Tenants without a sequence are forgotten.
    pub fn leave(&mut self, tenant: TenantId) {
        if let Some(entry) = self.tenants.get_mut(&tenant) {
            entry.present = entry.present.saturating_sub(1);
            if entry.present == 0 {
                self.tenants.remove(&tenant);
            }
        }
    }

    /// A tenant was served tokens.
    pub fn charge(&mut self, tenant: TenantId, prompt_tokens: u32, output_tokens: u32) {
        if let Some(entry) = self.tenants.get_mut(&tenant) {
            entry.served += u64::from(prompt_tokens) + OUTPUT_WEIGHT * u64::from(output_tokens);
        }
    }

    /// A sequence waits, behind its tenant's others of this priority.
    pub fn push_back(&mut self, seq: SeqId, priority: i32, tenant: TenantId) {
        self.list(priority, tenant).push_back(seq);
        self.len += 1;
    }

    /// A sequence waits again, before its tenant's others of this priority.
    pub fn push_front(&mut self, seq: SeqId, priority: i32, tenant: TenantId) {
        self.list(priority, tenant).push_front(seq);
        self.len += 1;
    }

    fn list(&mut self, priority: i32, tenant: TenantId) -> &mut VecDeque<SeqId> {
        let level = self.levels.entry(priority).or_default();
        level.entry(tenant).or_default()
    }

    /// The sequence to be admitted next.
    #[must_use]
    pub fn first(&self) -> Option<SeqId> {
        let (_, level) = self.levels.first_key_value()?;
        let served = |tenant: &TenantId| self.tenants.get(tenant).map_or(0, |t| t.served);
        level
            .iter()
            .filter_map(|(tenant, list)| Some((served(tenant), *list.front()?)))
            .min()
            .map(|(_, seq)| seq)
    }

    /// Takes a sequence out; false when it does not wait.
    pub fn remove(&mut self, seq: SeqId, priority: i32, tenant: TenantId) -> bool {
        let Some(level) = self.levels.get_mut(&priority) else {
            return false;
        };
        let Some(list) = level.get_mut(&tenant) else {
            return false;
        };
        let Some(at) = list.iter().position(|&other| other == seq) else {
            return false;
        };
        list.remove(at);
        if list.is_empty() {
            level.remove(&tenant);
        }
        if level.is_empty() {
            self.levels.remove(&priority);
        }
        self.len -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // Tests.

    use proptest::prelude::*;

    use super::*;

    fn drain(queue: &mut WaitingQueue, of: &[(u64, i32, u64)]) -> Vec<u64> {
        let mut order = Vec::new();
        while let Some(seq) = queue.first() {
            let &(_, priority, tenant) = of.iter().find(|(id, ..)| SeqId(*id) == seq).unwrap();
            assert!(queue.remove(seq, priority, tenant));
            queue.charge(tenant, 10, 0);
            order.push(seq.0);
        }
        order
    }

    fn fill(of: &[(u64, i32, u64)]) -> WaitingQueue {
        let mut queue = WaitingQueue::default();
        for &(seq, priority, tenant) in of {
            queue.enter(tenant);
            queue.push_back(SeqId(seq), priority, tenant);
        }
        queue
    }

    #[test]
    fn one_tenant_is_served_in_order_of_arrival() {
        let of = [(1, 0, 7), (2, 0, 7), (3, 0, 7)];
        assert_eq!(drain(&mut fill(&of), &of), [1, 2, 3]);
    }

    #[test]
    fn a_lower_number_is_served_first() {
        let of = [(1, 0, 7), (2, -1, 7), (3, 5, 7), (4, -1, 8)];
        assert_eq!(drain(&mut fill(&of), &of), [2, 4, 1, 3]);
    }

    #[test]
    fn a_tenant_with_many_requests_does_not_hold_up_another() {
        let of = [(1, 0, 7), (2, 0, 7), (3, 0, 7), (4, 0, 7), (5, 0, 8)];
        assert_eq!(drain(&mut fill(&of), &of), [1, 5, 2, 3, 4]);
    }

    #[test]
    fn who_comes_back_has_saved_up_nothing() {
        let mut queue = WaitingQueue::default();
        queue.enter(7);
        queue.charge(7, 1000, 0);
        queue.enter(8);
        queue.push_back(SeqId(1), 0, 7);
        queue.push_back(SeqId(2), 0, 8);
        // Level: the older one goes first.
        assert_eq!(queue.first(), Some(SeqId(1)));
    }

    proptest! {
        #[test]
        fn everyone_is_served_once(of in proptest::collection::vec((-2i32..3, 0u64..4), 0..40)) {
            let of: Vec<_> = of.into_iter().zip(1..).map(|((p, t), id)| (id, p, t)).collect();
            let mut queue = fill(&of);
            prop_assert_eq!(queue.len(), of.len());
            let mut order = drain(&mut queue, &of);
            prop_assert!(queue.is_empty());
            let priorities: Vec<i32> = order.iter().map(|id| of[*id as usize - 1].1).collect();
            prop_assert!(priorities.is_sorted());
            order.sort_unstable();
            prop_assert_eq!(order, (1..=of.len() as u64).collect::<Vec<_>>());
        }
    }
}
