#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn read(text: &str) -> Result<Option<(Head, usize)>, HeadError> {
    HeadReader::new(false).take(text.as_bytes())
}

fn head(fields: &str) -> Result<Head, HeadError> {
    let text = format!("HTTP/1.1 200 OK\r\n{fields}\r\n");
    let (head, used) = read(&text)?.unwrap();
    assert_eq!(used, text.len());
    Ok(head)
}

#[test]
fn a_head_says_how_the_body_is_framed() {
    use Framing::*;
    for (fields, framing, keep_alive) in [
        ("", UntilClose, false),
        ("content-length: 0\r\n", Length(0), true),
        ("Content-Length:  7 \r\n", Length(7), true),
        (
            "content-length: 7\r\nContent-Length: 7\r\n",
            Length(7),
            true,
        ),
        ("content-length: 7, 7\r\n", Length(7), true),
        ("transfer-encoding: Chunked\r\n", Chunked, true),
        (
            "content-length: 7\r\nconnection: keep-alive\r\n",
            Length(7),
            true,
        ),
        (
            "content-length: 7\r\nconnection: x, Close\r\n",
            Length(7),
            false,
        ),
        (
            "transfer-encoding: chunked\r\nconnection: close\r\n",
            Chunked,
            false,
        ),
    ] {
        let head = head(fields).unwrap();
        assert_eq!(
            (head.framing, head.keep_alive),
            (framing, keep_alive),
            "{fields}"
        );
        assert!(head.headers.get_all(CONTENT_LENGTH).iter().count() <= 1);
    }
}

#[test]
fn some_answers_have_no_body_whatever_they_say() {
    for (status, bodiless) in [(204, false), (304, false), (200, true)] {
        for fields in [
            "",
            "content-length: 7\r\n",
            "transfer-encoding: chunked\r\n",
        ] {
            let text = format!("HTTP/1.1 {status} x\r\n{fields}\r\n");
            let taken = HeadReader::new(bodiless).take(text.as_bytes());
            let (head, _) = taken.unwrap().unwrap();
            assert_eq!((head.framing, head.keep_alive), (Framing::Length(0), true));
        }
    }
}

#[test]
fn an_answer_of_http_1_0_is_the_last_on_its_connection() {
    let text = "HTTP/1.0 200 OK\r\ncontent-length: 7\r\nconnection: keep-alive\r\n\r\n";
    let (head, _) = read(text).unwrap().unwrap();
    assert_eq!((head.framing, head.keep_alive), (Framing::Length(7), false));
    let text = "HTTP/1.0 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
    assert_eq!(read(text).unwrap_err(), HeadError::Coding);
}

#[test]
fn what_others_might_read_differently_is_refused() {
    use HeadError::*;
    for (fields, error) in [
        ("content-length: 7\r\ncontent-length: 8\r\n", Length),
        ("content-length: 7, 8\r\n", Length),
        ("content-length: +7\r\n", Length),
        ("content-length: -7\r\n", Length),
        ("content-length: 0x7\r\n", Length),
        ("content-length:\r\n", Length),
        ("content-length: 7,\r\n", Length),
        ("content-length: 99999999999999999999\r\n", Length),
        (
            "content-length: 7\r\ntransfer-encoding: chunked\r\n",
            TwoLengths,
        ),
        (
            "transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
            Coding,
        ),
        ("transfer-encoding: chunked, chunked\r\n", Coding),
        ("transfer-encoding: gzip, chunked\r\n", Coding),
        ("transfer-encoding: identity\r\n", Coding),
        ("transfer-encoding: xchunked\r\n", Coding),
        (
            "transfer-encoding:\x0bchunked\r\n",
            Malformed(httparse::Error::HeaderValue),
        ),
        ("a: b\n", LineEnd),
        ("a: b\n\r\n", LineEnd),
        ("a: b\r\n c\r\n", Malformed(httparse::Error::HeaderName)),
        ("a: b\r\n\tc: d\r\n", Malformed(httparse::Error::HeaderName)),
        ("a : b\r\n", Malformed(httparse::Error::HeaderName)),
        (": b\r\n", Malformed(httparse::Error::HeaderName)),
        ("a: b\rc: d\r\n", Malformed(httparse::Error::HeaderValue)),
        ("a: \0\r\n", Malformed(httparse::Error::HeaderValue)),
    ] {
        assert_eq!(
            head(fields).map(|head| head.framing),
            Err(error),
            "{fields:?}"
        );
    }
    for text in [
        "\r\nHTTP/1.1 200 OK\r\n\r\n",
        "\nHTTP/1.1 200 OK\r\n\r\n",
        "HTTP/1.1 200 OK\n\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1 20 OK\r\n\r\n",
        "HTTP/1.1 099 OK\r\n\r\n",
        "HTTP/1.1 101 Switching\r\n\r\n",
        "200 OK\r\n\r\n",
    ] {
        assert!(read(text).is_err(), "{text:?}");
    }
}

#[test]
fn interim_answers_are_passed_over_within_a_bound() {
    let interim = "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n";
    let last = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n";
    let text = format!("HTTP/1.1 100 Continue\r\n\r\n{interim}{last}ok");
    let (head, used) = read(&text).unwrap().unwrap();
    assert_eq!((head.status.as_u16(), used), (200, text.len() - 2));
    assert!(!head.headers.contains_key("link"));
    let text = interim.repeat(1 + usize::from(MAX_INTERIM)) + last;
    assert_eq!(read(&text).unwrap_err(), HeadError::Interim);
}

#[test]
fn a_head_is_bounded() {
    let field = "a: b\r\n";
    assert!(head(&field.repeat(MAX_FIELDS)).is_ok());
    assert_eq!(
        head(&field.repeat(MAX_FIELDS + 1)).unwrap_err(),
        HeadError::Malformed(httparse::Error::TooManyHeaders)
    );
    for ends in [true, false] {
        let mut reader = HeadReader::new(false);
        let text = format!(
            "HTTP/1.1 200 OK\r\na: {}{}",
            "x".repeat(MAX_BYTES),
            if ends { "\r\n\r\n" } else { "" }
        );
        let mut taken = Ok(None);
        for piece in text.as_bytes().chunks(1000) {
            taken = reader.take(piece);
            if taken.is_err() {
                break;
            }
        }
        assert_eq!(taken.map(|_| ()), Err(HeadError::TooLong));
    }
}

proptest! {
    #[test]
    fn however_it_is_cut_it_is_the_same(cuts in vec(1..60_usize, 1..30)) {
        let text = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 201 Created\r\ncontent-type: text/plain\r\nx-a: 1\r\nx-a: 2\r\nempty:\r\ncontent-length: 9\r\n\r\nthe rest!";
        let (whole, end) = read(text).unwrap().unwrap();
        let mut reader = HeadReader::new(false);
        let (mut at, mut cuts) = (0, cuts.iter().cycle());
        let cut = loop {
            let piece = (*cuts.next().unwrap()).min(text.len() - at);
            if let Some((head, used)) = reader.take(&text.as_bytes()[at..at + piece]).unwrap() {
                prop_assert_eq!(at + used, end);
                break head;
            }
            at += piece;
        };
        prop_assert_eq!(cut.headers, whole.headers);
        prop_assert_eq!((cut.status, cut.framing), (whole.status, whole.framing));
    }

    #[test]
    fn garbage_does_no_harm(
        start in prop_oneof![Just("HTTP/1.1 200 OK\r\n"), Just("HTTP/1.1 "), Just("")],
        pieces in vec(vec(prop_oneof![Just(b'\r'), Just(b'\n'), Just(b':'), Just(b' '), any::<u8>()], 0..40), 0..20),
    ) {
        let mut reader = HeadReader::new(false);
        let first = start.as_bytes().to_vec();
        for piece in std::iter::once(&first).chain(&pieces) {
            match reader.take(piece) {
                Ok(Some((_, used))) => {
                    prop_assert!(used <= piece.len());
                    break;
                }
                Ok(None) => {}
                Err(_) => break,
            }
        }
    }
}
