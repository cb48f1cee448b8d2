//! Draws on the GPU: tokens stay there for the next step, and only they (and wanted log-probabilities) come back.

use super::{
    CudaError, Device, View,
    modules::{Shape, arguments},
    need,
};

/// In the tokens that come back: the row's logits were NaN or infinite.
pub const NO_TOKEN_NON_FINITE: u32 = u32::MAX;
/// In the tokens that come back: the mask forbids every token.
pub const NO_TOKEN_FORBIDDEN: u32 = u32::MAX - 1;
/// Most likely tokens that a row may report.
pub const MAX_LOGPROBS: usize = 20;

/// One row to draw for, as `sampling.cu` reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
#[allow(
    missing_docs,
    reason = "the names are those of the sampling parameters"
)]
pub struct SampleRow {
    pub slot: u32,
    pub logit_row: u32,
    pub position: u32,
    pub choice: u32,
    pub seed: u64,
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub repetition: f32,
    pub presence: f32,
    pub frequency: f32,
    pub top_k: u32,
    /// 0 for none, n + 1 for n most likely tokens.
    pub num_logprobs: u32,
    /// Words of `extra`: (token, bits of the bias) pairs.
    pub bias: i32,
    pub num_bias: i32,
    /// Words of `extra`: tokens that must not come.
    pub forbidden: i32,
    pub num_forbidden: i32,
    /// Words of `extra`: bitmap of allowed tokens; −1 for none.
    pub mask: i32,
    /// The slot's counts are up to date and its penalties apply.
    pub has_counts: i32,
}

impl SampleRow {
    /// Bytes of a row.
    pub const BYTES: usize = size_of::<Self>();

    /// The row's bytes, as the GPU reads them.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        // SAFETY: a plain C struct of 4- and 8-byte numbers whose size is a multiple of 8: no padding, any bytes are valid.
        unsafe { std::mem::transmute_copy(self) }
    }
}

const _: () = assert!(size_of::<SampleRow>() == 4 * 4 + 8 + 6 * 4 + 2 * 4 + 6 * 4);

/// One launch for all rows of a step.
#[derive(Clone, Copy)]
pub struct Sample<'a> {
    /// `[logit_rows, vocab]` f32; overwritten by penalties and masks.
    pub logits: View<'a>,
    /// `[rows]` [`SampleRow`].
    pub rows: View<'a>,
    /// Biases, forbidden tokens and masks, u32.
    pub extra: View<'a>,
    /// `[slots, vocab]` u16, for rows with counts.
    pub counts: Option<View<'a>>,
    /// `[slots]` u32.
    pub last_tokens: View<'a>,
    /// `[rows]` u32.
    pub tokens: View<'a>,
    /// `[rows, MAX_LOGPROBS + 1]` f32: the drawn token's, then the most likely ones'.
    pub logprobs: View<'a>,
    /// `[rows, MAX_LOGPROBS]` u32.
    pub logprob_ids: View<'a>,
    /// Rows.
    pub count: usize,
    /// Width of the logits.
    pub vocab: usize,
}

#[repr(C)]
struct Parameters {
    logits: u64,
    rows: u64,
    extra: u64,
    counts: u64,
    last_tokens: u64,
    tokens: u64,
    logprobs: u64,
    logprob_ids: u64,
    vocab: i32,
    max_logprobs: i32,
}

impl Sample<'_> {
    /// Queues it.
    ///
    /// # Errors
    /// [`CudaError`] when sizes do not fit or the driver refuses.
    pub fn launch(&self, device: &Device) -> Result<(), CudaError> {
        let count = self.count;
        need(
            self.rows.bytes >= count * SampleRow::BYTES
                && self.tokens.bytes >= count * 4
                && self.logprobs.bytes >= count * (MAX_LOGPROBS + 1) * 4
                && self.logprob_ids.bytes >= count * MAX_LOGPROBS * 4
                && self.vocab > 0
                && self.vocab < 1 << 30,
            "sample",
            || format!("{count} rows of {} logits do not fit", self.vocab),
        )?;
        let parameters = Parameters {
            logits: self.logits.address(),
            rows: self.rows.address(),
            extra: self.extra.address(),
            counts: self.counts.map_or(0, View::address),
            last_tokens: self.last_tokens.address(),
            tokens: self.tokens.address(),
            logprobs: self.logprobs.address(),
            logprob_ids: self.logprob_ids.address(),
            vocab: self.vocab as i32,
            max_logprobs: MAX_LOGPROBS as i32,
        };
        let shape = Shape {
            grid: (count, 1),
            threads: 1024,
            shared: 0,
        };
        // SAFETY: the parameter is the kernel's own struct; results fit (checked above); slots, logit rows and offsets in
        // `extra` are in range by the uploader's check.
        unsafe { device.launch("sample", shape, arguments![parameters]) }
    }
}

/// Counts a slot's tokens from nothing: `tokens` holds its prompt, then its output, u32.
///
/// # Errors
/// [`CudaError`] when sizes do not fit or the driver refuses.
pub fn init_counts(
    device: &Device,
    counts: View<'_>,
    slot: usize,
    vocab: usize,
    tokens: View<'_>,
    (num_prompt, num_output): (usize, usize),
) -> Result<(), CudaError> {
    need(
        counts.bytes >= (slot + 1) * vocab * 2 && tokens.bytes >= (num_prompt + num_output) * 4,
        "init_counts",
        || format!("slot {slot} or {num_prompt} + {num_output} tokens do not fit"),
    )?;
    let (table, list) = (counts.address(), tokens.address());
    let (slot, vocab) = (slot as i32, vocab as i32);
    let (prompt, output) = (num_prompt as i32, num_output as i32);
    let shape = Shape {
        grid: (1, 1),
        threads: 1024,
        shared: 0,
    };
    // SAFETY: parameters as in `sampling.cu`; the slot's row and the tokens are inside (checked above).
    unsafe {
        device.launch(
            "init_counts",
            shape,
            arguments![table, slot, vocab, list, prompt, output],
        )
    }
}
