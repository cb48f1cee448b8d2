//! Text at rest. Children of one kind differ little from service to service: each is kept deflated against the first one that
//! was seen, a tenth of what it was, and read again when its service is looked at.

use std::sync::{Arc, OnceLock};

use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress};

/// How far back deflate looks, as a power of two: over the longest of our children, and the one before it.
const WINDOW_BITS: u8 = 14;

/// Packs the texts of one kind. Clones share what it has learnt.
#[derive(Debug, Clone, Default)]
pub(super) struct Packer(Arc<OnceLock<Arc<[u8]>>>);

/// A text at rest. Two are equal when their texts are, if one packer made both.
#[derive(Debug, Clone)]
pub(super) struct Packed {
    dictionary: Arc<[u8]>,
    bytes: Arc<[u8]>,
}

impl PartialEq for Packed {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes && self.dictionary == other.dictionary
    }
}

impl Packer {
    /// Puts a text to rest.
    pub(super) fn pack(&self, text: &str) -> Packed {
        let dictionary = Arc::clone(self.0.get_or_init(|| text.as_bytes().into()));
        let mut deflate = Compress::new_with_window_bits(Compression::default(), true, WINDOW_BITS);
        let mut bytes = Vec::with_capacity(text.len() + 64);
        deflate
            .set_dictionary(&dictionary)
            .and_then(|_| deflate.compress_vec(text.as_bytes(), &mut bytes, FlushCompress::Finish))
            .expect("there is room for a text that does not get shorter: this is a bug");
        Packed {
            dictionary,
            bytes: bytes.into(),
        }
    }
}

impl Packed {
    /// The text.
    pub(super) fn unpack(&self) -> Vec<u8> {
        let mut inflate = Decompress::new_with_window_bits(true, WINDOW_BITS);
        let mut text = Vec::with_capacity(2 * self.dictionary.len());
        loop {
            let read = usize::try_from(inflate.total_in()).unwrap_or(usize::MAX);
            let rest = &self.bytes[read..];
            match inflate.decompress_vec(rest, &mut text, FlushDecompress::Finish) {
                Ok(flate2::Status::StreamEnd) => return text,
                Ok(_) => text.reserve(text.capacity().max(1024)),
                Err(error) => {
                    error
                        .needs_dictionary()
                        .expect("bytes that we packed: this is a bug");
                    inflate
                        .set_dictionary(&self.dictionary)
                        .expect("the dictionary that it was packed with: this is a bug");
                }
            }
        }
    }

    /// Bytes that this text takes.
    #[cfg(test)]
    pub(super) fn size(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_like_the_first_takes_little() {
        let packer = Packer::default();
        let text = |n: usize| {
            let fields: Vec<String> = (0..200)
                .map(|i| format!("\"field-{i}\":{}", i * i))
                .collect();
            format!("{{\"name\":\"service-{n}\",{}}}", fields.join(","))
        };
        packer.pack(&text(0));
        let other = packer.pack(&text(1));
        assert!(other.size() * 10 < text(1).len(), "{} bytes", other.size());
        assert_eq!(other.unpack(), text(1).as_bytes());
        assert_ne!(other, packer.pack(&text(2)));
    }

    proptest! {
        #[test]
        fn a_text_comes_back_as_it_was(texts in prop::collection::vec(".{0,3000}", 1..5)) {
            let packer = Packer::default();
            for text in &texts {
                let packed = packer.pack(text);
                prop_assert_eq!(packed.unpack(), text.as_bytes());
                prop_assert_eq!(&packed, &packer.pack(text));
            }
        }
    }
}
