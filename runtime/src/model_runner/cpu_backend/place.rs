//! One of several ranks: what all need is summed or gathered in the memory they share.

use super::CpuBuf;
use crate::{
    model_runner::ranks::{Member, RankError},
    weights::cut::Span,
};

/// One of several ranks.
pub(super) struct Place {
    pub(super) member: Member,
    /// Its rows of the embedding and the head.
    pub(super) vocabulary: Span,
    /// What all ranks' results add up to.
    pub(super) sum: Vec<f32>,
    /// Its part of the logits.
    pub(super) logits: CpuBuf,
    /// Why the step is not to be used: the first failure.
    pub(super) error: Option<RankError>,
}

impl Place {
    /// Notes a failure: operations have no result to return it in.
    fn note(&mut self, result: Result<(), RankError>) {
        if let Err(error) = result {
            self.error.get_or_insert(error);
        }
    }

    /// The sum of all ranks' `values`.
    pub(super) fn sum(&mut self, values: &[f32]) -> &[f32] {
        self.sum.resize(values.len(), 0.0);
        let summed = self.member.sum(values, &mut self.sum);
        self.note(summed);
        &self.sum
    }

    /// Puts the ranks' columns of the logits side by side.
    pub(super) fn gather(&mut self, out: &mut CpuBuf) {
        let (rows, padded) = (self.logits.rows, self.logits.width);
        let width = out.width;
        let all = out.with_rows(rows);
        let ranks = self.member.ranks();
        let gathered = self.member.share(self.logits.values(), |rank, share| {
            let columns = Span::of_rank(width, (rank, ranks), padded);
            let pairs = all.chunks_exact_mut(width).zip(share.chunks_exact(padded));
            for (row, part) in pairs {
                row[columns.start..][..columns.len].copy_from_slice(&part[..columns.len]);
            }
        });
        self.note(gathered);
    }
}
