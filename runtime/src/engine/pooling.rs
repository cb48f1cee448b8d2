//! Embeddings of prompts, added up piece by piece as their rows are computed.

use std::collections::HashMap;

use super::request::{Pooling, SeqId};

/// Sums of sequences whose prompt is not through.
#[derive(Default)]
pub(super) struct PooledPrompts {
    of: HashMap<SeqId, Vec<f64>>,
}

impl PooledPrompts {
    /// Takes the sum of a piece that starts at position `start`; after a preemption the first one starts over.
    pub(super) fn add(&mut self, seq: SeqId, start: u32, sum: Vec<f64>) {
        match self.of.get_mut(&seq).filter(|_| start > 0) {
            Some(so_far) => so_far.iter_mut().zip(&sum).for_each(|(a, b)| *a += b),
            None => {
                self.of.insert(seq, sum);
            }
        }
    }

    /// The embedding of a prompt of so many tokens that is through; `None` when it is not finite.
    pub(super) fn finish(
        &mut self,
        seq: SeqId,
        pooling: Pooling,
        num_tokens: u32,
    ) -> Option<Vec<f32>> {
        let rows = match pooling {
            Pooling::Last => 1.0,
            Pooling::Mean => f64::from(num_tokens),
        };
        let sum = self.of.remove(&seq)?;
        let values: Vec<f32> = sum.iter().map(|sum| (sum / rows) as f32).collect();
        values
            .iter()
            .all(|value| value.is_finite())
            .then_some(values)
    }

    /// Forgets a sequence that has left.
    pub(super) fn forget(&mut self, seq: SeqId) {
        self.of.remove(&seq);
    }
}

#[cfg(test)]
mod tests {
    use super::{PooledPrompts, Pooling, SeqId};

    #[test]
    fn a_mean_is_over_all_pieces_and_a_piece_from_the_start_begins_anew() {
        let mut pooled = PooledPrompts::default();
        let seq = SeqId(1);
        pooled.add(seq, 0, vec![100.0, 100.0]);
        pooled.add(seq, 0, vec![3.0, 5.0]);
        pooled.add(seq, 2, vec![1.0, -1.0]);
        assert_eq!(pooled.finish(seq, Pooling::Mean, 4), Some(vec![1.0, 1.0]));
        assert_eq!(pooled.finish(seq, Pooling::Mean, 4), None);
        pooled.add(seq, 7, vec![f64::NAN]);
        assert_eq!(pooled.finish(seq, Pooling::Last, 8), None);
    }
}
