#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

/// Decodes pieces one after another; the payload, and how many bytes belong to the body if it has ended.
fn decode<'a>(
    pieces: impl IntoIterator<Item = &'a [u8]>,
) -> Result<(Vec<u8>, Option<usize>), ChunkError> {
    let (mut body, mut payload, mut used) = (Chunked::new(), Vec::new(), 0);
    for piece in pieces {
        let mut piece = piece.to_vec();
        let (length, taken) = body.decode(&mut piece)?;
        assert!(length <= taken && taken <= piece.len());
        assert!(taken == piece.len() || body.is_done());
        payload.extend_from_slice(&piece[..length]);
        used += taken;
        if body.is_done() {
            return Ok((payload, Some(used)));
        }
    }
    Ok((payload, None))
}

#[test]
fn payload_comes_out_of_its_chunks() {
    for (text, payload, rest) in [
        ("0\r\n\r\n", "", 0),
        ("5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n", "hello world", 0),
        (
            "A\r\n0123456789\r\n0\r\n\r\nHTTP/1.1 200 OK",
            "0123456789",
            15,
        ),
        ("00a\r\n0123456789\r\n000\r\n\r\n", "0123456789", 0),
        ("3;a=b;c=\"d\"\r\nabc\r\n0;x\r\n\r\n", "abc", 0),
        (
            "3 ;a\r\nabc\r\n0\r\nTrailer: 1\r\nOther: 2\r\n\r\nX",
            "abc",
            1,
        ),
    ] {
        let (out, used) = decode([text.as_bytes()]).unwrap();
        assert_eq!(
            (out.as_slice(), used),
            (payload.as_bytes(), Some(text.len() - rest))
        );
    }
}

#[test]
fn what_others_might_read_differently_is_refused() {
    use ChunkError::*;
    for (text, error) in [
        ("\r\n", Size),
        ("-1\r\n", Size),
        ("+1\r\n", Size),
        ("0x1\r\n", Size),
        (" 1\r\n", Size),
        (";a\r\n", Size),
        ("5\nhello", Size),
        ("5;a\nhello", LineEnd),
        ("5\rhello", LineEnd),
        ("5;a\rb\r\n", LineEnd),
        ("1000000000000000\r\n", TooLarge),
        ("ffffffffffffffffff\r\n", TooLarge),
        ("3\r\nabcd\r\n", ChunkEnd),
        ("3\r\nabc\n0\r\n", ChunkEnd),
        ("3\r\nabc\r0\r\n", ChunkEnd),
        ("0\r\n\n", LineEnd),
        ("0\r\n\rx", LineEnd),
        ("0\r\na: b\n\r\n", LineEnd),
        ("0\r\na: b\rc\r\n", LineEnd),
    ] {
        assert_eq!(decode([text.as_bytes()]), Err(error), "{text:?}");
    }
    let endless =
        |start: &str, more: &str| decode([start.as_bytes(), more.repeat(20_000).as_bytes()]);
    assert_eq!(endless("1;", "x"), Err(Extension));
    assert_eq!(endless("0\r\n", "a: b\r\n"), Err(Trailers));
    assert_eq!(endless("", "0"), Err(TooLarge));
}

proptest! {
    #[test]
    fn however_it_is_cut_it_is_the_same(
        chunks in vec(vec(any::<u8>(), 1..40), 0..8),
        cuts in vec(1..9_usize, 1..40),
    ) {
        let mut whole = Vec::new();
        for chunk in &chunks {
            whole.extend_from_slice(format!("{:X};x=1\r\n", chunk.len()).as_bytes());
            whole.extend_from_slice(chunk);
            whole.extend_from_slice(b"\r\n");
        }
        whole.extend_from_slice(b"0\r\nt: 1\r\n\r\n");
        let length = whole.len();
        whole.extend_from_slice(b"what follows");
        let mut pieces = Vec::new();
        let (mut rest, mut cuts) = (whole.as_slice(), cuts.iter().cycle());
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        prop_assert_eq!(decode(pieces), Ok((chunks.concat(), Some(length))));
    }

    #[test]
    fn garbage_does_no_harm(pieces in vec(vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b'0'), Just(b'3'), Just(b';'), any::<u8>()], 0..20), 0..20)) {
        let total: usize = pieces.iter().map(Vec::len).sum();
        if let Ok((payload, _)) = decode(pieces.iter().map(Vec::as_slice)) {
            prop_assert!(payload.len() <= total);
        }
    }
}
