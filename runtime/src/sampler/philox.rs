//! Philox4x32-10: random numbers as a pure function of (key, counter), so that a request's draws do not depend on what
//! ran beside it, before it, or how often it was preempted.

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// One block of four random words.
#[must_use]
pub fn philox4x32(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
        }
        let (low0, high0) = MULTIPLIERS[0].widening(counter[0]);
        let (low1, high1) = MULTIPLIERS[1].widening(counter[2]);
        counter = [
            high1 ^ counter[1] ^ key[0],
            low1,
            high0 ^ counter[3] ^ key[1],
            low0,
        ];
    }
    counter
}

trait Widening {
    fn widening(self, other: Self) -> (u32, u32);
}

impl Widening for u32 {
    /// The product's low and high word.
    fn widening(self, other: Self) -> (u32, u32) {
        let product = u64::from(self) * u64::from(other);
        #[expect(clippy::cast_possible_truncation, reason = "the low word is wanted")]
        let low = product as u32;
        (low, (product >> 32) as u32)
    }
}

/// The uniform number in `[0, 1)`, 53 bits, for the token at `position` of a choice of a seeded request.
///
/// The seed fills the key; the choice index is the counter's third word, the position its first.
#[must_use]
pub fn uniform(seed: u64, choice_index: u32, position: u32) -> f64 {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of the seed"
    )]
    let key = [seed as u32, (seed >> 32) as u32];
    let words = philox4x32([position, 0, choice_index, 0], key);
    let bits = (u64::from(words[0]) << 21) ^ (u64::from(words[1]) >> 11);
    #[expect(clippy::cast_precision_loss, reason = "53 bits fit a double exactly")]
    let uniform = bits as f64 * (1.0 / 9_007_199_254_740_992.0);
    uniform
}
