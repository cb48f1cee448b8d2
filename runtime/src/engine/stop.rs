//! When a sequence ends by itself: EOS, a stop id, or its length. Stop strings are the detokeniser's to judge.

use super::request::{FinishReason, SamplingParams, TokenId};

/// Whether generating `token` as number `num_generated` (from 1) ends the sequence; with the stop token if one did.
#[must_use]
pub(super) fn judge(
    params: &SamplingParams,
    eos_token_ids: &[TokenId],
    num_generated: u32,
    token: TokenId,
) -> Option<(FinishReason, Option<TokenId>)> {
    let may_stop = num_generated > params.min_tokens;
    if may_stop && is_stop_token(params, eos_token_ids, token) {
        return Some((FinishReason::Stop, Some(token)));
    }
    (num_generated >= params.max_tokens).then_some((FinishReason::Length, None))
}

/// Whether a token ends a sequence with these parameters.
#[must_use]
pub(super) fn is_stop_token(
    params: &SamplingParams,
    eos_token_ids: &[TokenId],
    token: TokenId,
) -> bool {
    params.stop_token_ids.contains(&token) || (!params.ignore_eos && eos_token_ids.contains(&token))
}
