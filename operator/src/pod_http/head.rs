//! The head of an answer, and how its body is framed (RFC 9112, sections 4 to 6). Pure.
//!
//! Strict where lenience lets two readers see two different answers: a line ends in CR LF, no field is folded, and the length
//! of the body is said in one way.

use std::mem::MaybeUninit;

use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_LENGTH, HeaderName, HeaderValue, TRANSFER_ENCODING};
use http::{HeaderMap, StatusCode};
use httparse::{Header, ParserConfig};

/// Most bytes of a head.
const MAX_BYTES: usize = 64 << 10;
/// Most fields of a head.
const MAX_FIELDS: usize = 100;
/// Most interim answers (RFC 9110, section 15.2) before the final one.
const MAX_INTERIM: u8 = 8;

/// What is wrong with a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// The head is too long.
    #[error("the head is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// A line does not end in CR LF.
    #[error("a line does not end in CR LF")]
    LineEnd,
    /// The status line or a field cannot be read.
    #[error("the head cannot be read: {0}")]
    Malformed(#[from] httparse::Error),
    /// A field has bytes that no field may have.
    #[error("a field has a name or a value that is not allowed")]
    Field,
    /// Interim answers do not end.
    #[error("more than {MAX_INTERIM} interim answers")]
    Interim,
    /// A protocol was changed to that nobody asked for.
    #[error("the protocol changes, unasked")]
    Upgrade,
    /// `Content-Length` is no number, or several.
    #[error("Content-Length is not one number")]
    Length,
    /// `Transfer-Encoding` is not `chunked`, or the answer is of HTTP/1.0.
    #[error("Transfer-Encoding is not `chunked` of HTTP/1.1")]
    Coding,
    /// The length is said in two ways.
    #[error("both Content-Length and Transfer-Encoding")]
    TwoLengths,
}

/// How the body is framed (RFC 9112, section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// So many bytes.
    Length(u64),
    /// In chunks.
    Chunked,
    /// Whatever comes until the connection ends.
    UntilClose,
}

/// The head of a final answer.
#[derive(Debug)]
pub(super) struct Head {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) framing: Framing,
    /// The connection can be used again, when the body has ended.
    pub(super) keep_alive: bool,
}

/// Reads a head from whatever pieces it comes in.
pub(super) struct HeadReader {
    /// What has come of it.
    kept: Vec<u8>,
    end: EndOfHead,
    interim: u8,
    /// The answer has no body, whatever its head says: it is that to a HEAD request.
    bodiless: bool,
}

impl HeadReader {
    pub(super) fn new(bodiless: bool) -> Self {
        Self {
            kept: Vec::new(),
            end: EndOfHead::default(),
            interim: 0,
            bodiless,
        }
    }

    /// Takes the next bytes. When the head is whole, returns it and how many of these bytes belong to it.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Result<Option<(Head, usize)>, HeadError> {
        let mut used = 0;
        loop {
            let before = self.kept.len();
            let new = &bytes[used..];
            if before > 0 {
                self.kept.extend_from_slice(new);
            }
            let all = if before > 0 { &self.kept } else { new };
            let Some(end) = self.end.find(all)? else {
                if before == 0 {
                    self.kept.extend_from_slice(new);
                }
                return Ok(None);
            };
            let head = parse(&all[..end], self.bodiless)?;
            used += end - before;
            if let Some(head) = head {
                self.kept = Vec::new();
                return Ok(Some((head, used)));
            }
            self.interim += 1;
            if self.interim > MAX_INTERIM {
                return Err(HeadError::Interim);
            }
            self.kept.clear();
            self.end = EndOfHead::default();
        }
    }
}

/// Looks for the empty line.
#[derive(Default)]
struct EndOfHead {
    /// Bytes seen, and where the line that they end in begins.
    seen: usize,
    line: usize,
}

impl EndOfHead {
    /// How many of `bytes`, which begin with those seen before, the head has.
    fn find(&mut self, bytes: &[u8]) -> Result<Option<usize>, HeadError> {
        while let Some(at) = bytes[self.seen..].iter().position(|byte| *byte == b'\n') {
            let line = self.line;
            let end = self.seen + at;
            (self.seen, self.line) = (end + 1, end + 1);
            if end >= MAX_BYTES {
                return Err(HeadError::TooLong);
            }
            if end == line || bytes[end - 1] != b'\r' {
                return Err(HeadError::LineEnd);
            }
            if end == line + 1 {
                return Ok(Some(self.seen));
            }
        }
        self.seen = bytes.len();
        if self.seen > MAX_BYTES {
            return Err(HeadError::TooLong);
        }
        Ok(None)
    }
}

/// A whole head; none for an interim answer.
fn parse(bytes: &[u8], bodiless: bool) -> Result<Option<Head>, HeadError> {
    // The values of the fields share one piece of memory.
    let bytes = Bytes::copy_from_slice(bytes);
    let mut fields = [const { MaybeUninit::<Header<'_>>::uninit() }; MAX_FIELDS];
    let mut response = httparse::Response::new(&mut []);
    let read = ParserConfig::default().parse_response_with_uninit_headers(
        &mut response,
        &bytes,
        &mut fields,
    )?;
    if read != httparse::Status::Complete(bytes.len()) {
        return Err(HeadError::LineEnd);
    }
    let status = StatusCode::from_u16(response.code.unwrap_or_default());
    let status = status.map_err(|_| HeadError::Malformed(httparse::Error::Status))?;
    if status == StatusCode::SWITCHING_PROTOCOLS {
        return Err(HeadError::Upgrade);
    }
    if status.is_informational() {
        return Ok(None);
    }
    let is_newest = response.version == Some(1);
    let mut headers = headers(&bytes, response.headers)?;
    let bodiless = bodiless || matches!(status.as_u16(), 204 | 304);
    let framing = framing(&mut headers, is_newest)?;
    let framing = if bodiless {
        Framing::Length(0)
    } else {
        framing
    };
    let closes = headers.get_all(CONNECTION).iter().any(|value| {
        let options = value.as_bytes().split(|byte| *byte == b',');
        options.into_iter().any(is("close"))
    });
    Ok(Some(Head {
        keep_alive: is_newest && !closes && framing != Framing::UntilClose,
        status,
        headers,
        framing,
    }))
}

/// Whether an element of a list is this word.
fn is(word: &str) -> impl Fn(&[u8]) -> bool {
    move |element| element.trim_ascii().eq_ignore_ascii_case(word.as_bytes())
}

fn headers(head: &Bytes, fields: &[Header<'_>]) -> Result<HeaderMap, HeadError> {
    let mut headers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes());
        let value = HeaderValue::from_maybe_shared(head.slice_ref(field.value));
        let name = name.map_err(|_| HeadError::Field)?;
        headers.append(name, value.map_err(|_| HeadError::Field)?);
    }
    Ok(headers)
}

/// How the body is framed; of a length that is said several times alike, one stays.
fn framing(headers: &mut HeaderMap, is_newest: bool) -> Result<Framing, HeadError> {
    let length = length(headers)?;
    let mut codings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(coding) = codings.next() {
        if length.is_some() {
            return Err(HeadError::TwoLengths);
        }
        // We ask for no other coding (RFC 9112, section 7), and HTTP/1.0 has none (section 6.1).
        if codings.next().is_some() || !is("chunked")(coding.as_bytes()) || !is_newest {
            return Err(HeadError::Coding);
        }
        return Ok(Framing::Chunked);
    }
    Ok(length.map_or(Framing::UntilClose, Framing::Length))
}

fn length(headers: &mut HeaderMap) -> Result<Option<u64>, HeadError> {
    let (mut length, mut times) = (None, 0);
    for value in headers.get_all(CONTENT_LENGTH) {
        for element in value.as_bytes().split(|byte| *byte == b',') {
            let digits = element.trim_ascii();
            let number = std::str::from_utf8(digits).ok();
            let number = number.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
            let number: u64 = number
                .and_then(|text| text.parse().ok())
                .ok_or(HeadError::Length)?;
            if length.is_some_and(|length| length != number) {
                return Err(HeadError::Length);
            }
            (length, times) = (Some(number), times + 1);
        }
    }
    if let Some(number) = length.filter(|_| times > 1) {
        headers.insert(CONTENT_LENGTH, HeaderValue::from(number));
    }
    Ok(length)
}

#[cfg(test)]
#[path = "tests/head.rs"]
mod tests;
