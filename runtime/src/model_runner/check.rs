//! Checks a step against the limits, once for every runner.

use super::{ModelInput, RunnerError, RunnerLimits, TOKEN_FROM_SLOT};

pub(super) fn refused(message: String) -> RunnerError {
    RunnerError {
        message,
        fatal: false,
    }
}

/// Checks a step against the limits: whatever passes cannot make a kernel read or write outside its buffers.
pub(crate) fn check(input: &ModelInput, limits: &RunnerLimits) -> Result<(), RunnerError> {
    check_rows(input, limits)?;
    check_wanted_rows(input, limits)?;
    check_sequences(input, limits)
}

fn need(holds: bool, what: &str) -> Result<(), RunnerError> {
    if holds {
        Ok(())
    } else {
        Err(refused(format!("invalid step: {what}")))
    }
}

fn check_rows(input: &ModelInput, limits: &RunnerLimits) -> Result<(), RunnerError> {
    let rows = input.token_ids.len();
    need(
        rows > 0 && rows <= limits.max_num_batched_tokens as usize,
        "number of rows",
    )?;
    need(
        input.positions.len() == rows && input.slot_mapping.len() == rows,
        "lengths of the row arrays",
    )?;
    need(
        input
            .token_ids
            .iter()
            .all(|token| *token < limits.vocab_size || *token == TOKEN_FROM_SLOT),
        "a token is outside the vocabulary",
    )?;
    need(
        input
            .positions
            .iter()
            .all(|position| *position < limits.max_model_len),
        "a position is too large",
    )?;
    let pool = i64::from(limits.num_blocks) * i64::from(limits.block_size);
    need(
        input
            .slot_mapping
            .iter()
            .all(|slot| (-1..pool).contains(slot)),
        "a cache slot is outside the pool",
    )
}

/// Rows whose logits or hidden states are wanted.
fn check_wanted_rows(input: &ModelInput, limits: &RunnerLimits) -> Result<(), RunnerError> {
    let rows = input.token_ids.len();
    need(
        input.logit_rows.len() <= limits.max_logit_rows as usize,
        "number of logit rows",
    )?;
    need(
        input.logit_rows.is_sorted_by(|a, b| a < b),
        "logit rows do not ascend",
    )?;
    need(
        input
            .logit_rows
            .last()
            .is_none_or(|row| (*row as usize) < rows),
        "a logit row is outside the step",
    )?;
    need(
        input.hidden_rows.is_sorted_by(|a, b| a < b),
        "hidden rows do not ascend",
    )?;
    need(
        input
            .hidden_rows
            .iter()
            .all(|row| (*row as usize) < rows && input.logit_rows.binary_search(row).is_err()),
        "a hidden row is outside the step or wants logits",
    )
}

fn check_sequences(input: &ModelInput, limits: &RunnerLimits) -> Result<(), RunnerError> {
    let mut next_row = 0;
    for seq in &input.seqs {
        need(
            seq.query_start == next_row && seq.query_len > 0,
            "sequences do not cover the rows in order",
        )?;
        next_row = seq.query_start.saturating_add(seq.query_len);
        need(
            seq.slot.0 < limits.max_num_seqs,
            "a slot is outside the limits",
        )?;
        need(
            (seq.query_len..=limits.max_model_len).contains(&seq.context_len),
            "a context is too long or too short",
        )?;
        let blocks = seq.context_len.div_ceil(limits.block_size) as usize;
        need(
            seq.block_table.len() >= blocks,
            "a block table is too short",
        )?;
        need(
            seq.block_table
                .iter()
                .all(|block| block.0 < limits.num_blocks),
            "a block is outside the pool",
        )?;
    }
    let rows = input.token_ids.len();
    need(next_row as usize == rows, "sequences do not cover the rows")?;
    need(
        input
            .init_slots
            .iter()
            .all(|init| init.slot.0 < limits.max_num_seqs),
        "a bound slot is outside the limits",
    )
}
