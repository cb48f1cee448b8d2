use proptest::prelude::*;

use super::*;
use crate::tokenizer::tests::tiny;

fn chunks(tokenizer: &Arc<Tokenizer>, ids: &[TokenId], skip: bool) -> Vec<String> {
    let mut detokenizer = Detokenizer::new(Arc::clone(tokenizer), skip);
    let mut chunks: Vec<String> = ids
        .iter()
        .map(|&id| {
            let mut text = String::new();
            detokenizer.push(id, &mut text);
            text
        })
        .collect();
    let mut last = String::new();
    detokenizer.finish(&mut last);
    chunks.push(last);
    chunks
}

#[test]
fn an_unfinished_character_waits() {
    let tokenizer = tiny();
    // 日 = E6 97 A5.
    assert_eq!(
        chunks(&tokenizer, &[0xE6, 0x97, 0xA5, 33], true),
        ["", "", "日", "!", ""]
    );
    // A sequence that can never be completed is replaced as soon as that is known.
    assert_eq!(
        chunks(&tokenizer, &[0xE6, 33, 0xFF, 0xE6], true),
        ["", "\u{FFFD}!", "\u{FFFD}", "", "\u{FFFD}"]
    );
}

proptest! {
    #[test]
    fn chunks_are_together_what_the_whole_decodes_to(
        ids in proptest::collection::vec(prop_oneof![0u32..261, 0x80u32..0x100], 0..64),
        skip in any::<bool>(),
    ) {
        let tokenizer = tiny();
        let together = chunks(&tokenizer, &ids, skip).concat();
        prop_assert_eq!(together, tokenizer.decode(&ids, skip).unwrap_or_default());
    }
}
