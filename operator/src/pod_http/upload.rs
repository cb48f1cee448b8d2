//! A request on its way to a pod: its head, and its body as it comes (RFC 9112, sections 3, 6 and 7.1).

use std::io::{self, IoSlice, Write as _};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{Buf as _, Bytes};
use http::header::{CONNECTION, CONTENT_LENGTH, HOST, TRANSFER_ENCODING};
use http::{Method, Request};
use hyper::body::Body;

use super::stream::PodStream;
use super::{BoxError, Error};

/// Chunks of the body up to this size are copied, so that they go with what is before them.
const SMALL: usize = 4 << 10;
/// So much is gathered before it is written.
const GATHERED: usize = 16 << 10;

/// Why a request was not sent.
pub(super) enum UploadError {
    /// Its body failed.
    Body(BoxError),
    /// The connection did.
    Write(io::Error),
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// The connection takes no more for now.
    Writing,
    /// All there is has gone to the kernel, and more will come.
    Waiting,
    /// All of it has gone to the kernel.
    Done,
}

/// The request's body is not as long as announced.
#[derive(Debug, thiserror::Error)]
#[error("the request's body is not as long as its Content-Length says")]
struct WrongLength;

enum Framing {
    /// So many more bytes.
    Length(u64),
    Chunked,
}

/// A request on its way.
pub(super) struct Upload<B> {
    /// To be written from `written` on, and then `data`.
    front: Vec<u8>,
    written: usize,
    data: Bytes,
    body: B,
    framing: Framing,
    /// There is no more of the body.
    ended: bool,
    begun: bool,
    done: bool,
}

impl<B> Upload<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    /// A request to `address`, which is also the `Host` of one that names none. Its body is framed by its own size; what its
    /// head says of that does not matter.
    pub(super) fn new(request: Request<B>, address: SocketAddr) -> Result<Self, Error> {
        let (parts, body) = request.into_parts();
        if parts.method == Method::CONNECT {
            return Err(Error::Request("CONNECT is not for pods".into()));
        }
        let ended = body.is_end_stream();
        let framing = match body.size_hint().exact() {
            _ if ended => Framing::Length(0),
            Some(length) => Framing::Length(length),
            None => Framing::Chunked,
        };
        let front = head(&parts, &framing, address);
        Ok(Self {
            front: front.map_err(|error| Error::Request(error.into()))?,
            written: 0,
            data: Bytes::new(),
            body,
            ended: ended || matches!(framing, Framing::Length(0)),
            framing,
            begun: false,
            done: false,
        })
    }

    /// Sends as much as can be sent now.
    pub(super) fn poll(
        &mut self,
        stream: &mut PodStream,
        cx: &mut Context<'_>,
    ) -> Result<Progress, UploadError> {
        loop {
            self.gather(cx).map_err(UploadError::Body)?;
            let front = &self.front[self.written..];
            if front.is_empty() && self.data.is_empty() {
                break;
            }
            let parts = [IoSlice::new(front), IoSlice::new(&self.data)];
            let parts = &parts[..if self.data.is_empty() { 1 } else { 2 }];
            match stream.poll_write(cx, parts) {
                Poll::Pending => return Ok(Progress::Writing),
                Poll::Ready(Ok(0)) => {
                    return Err(UploadError::Write(io::ErrorKind::WriteZero.into()));
                }
                Poll::Ready(written) => self.wrote(written.map_err(UploadError::Write)?),
            }
        }
        match stream.poll_flush(cx) {
            Poll::Pending => return Ok(Progress::Writing),
            Poll::Ready(flushed) => flushed.map_err(UploadError::Write)?,
        }
        self.done = self.ended;
        Ok(if self.done {
            Progress::Done
        } else {
            Progress::Waiting
        })
    }

    fn wrote(&mut self, bytes: usize) {
        self.begun = true;
        let front = bytes.min(self.front.len() - self.written);
        self.written += front;
        self.data.advance(bytes - front);
        if self.written == self.front.len() {
            self.front.clear();
            self.written = 0;
        }
    }

    /// Takes what there is of the body, as far as it goes in one write.
    fn gather(&mut self, cx: &mut Context<'_>) -> Result<(), BoxError> {
        while !self.ended && self.data.is_empty() && self.front.len() < GATHERED {
            match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Pending => return Ok(()),
                Poll::Ready(None) => self.end()?,
                Poll::Ready(Some(frame)) => {
                    // Trailers are nobody's here.
                    if let Ok(data) = frame.map_err(Into::into)?.into_data() {
                        self.add(data)?;
                    }
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, data: Bytes) -> Result<(), BoxError> {
        if data.is_empty() {
            return Ok(());
        }
        match &mut self.framing {
            Framing::Length(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(WrongLength)?;
                self.ended = *left == 0;
            }
            Framing::Chunked => write!(self.front, "{:x}\r\n", data.len())?,
        }
        let chunked = matches!(self.framing, Framing::Chunked);
        if chunked || data.len() <= SMALL {
            self.front.extend_from_slice(&data);
        } else {
            self.data = data;
        }
        if chunked {
            self.front.extend_from_slice(b"\r\n");
        }
        Ok(())
    }

    fn end(&mut self) -> Result<(), BoxError> {
        match self.framing {
            Framing::Length(0) => {}
            Framing::Length(_) => return Err(WrongLength.into()),
            Framing::Chunked => self.front.extend_from_slice(b"0\r\n\r\n"),
        }
        self.ended = true;
        Ok(())
    }
}

impl<B> Upload<B> {
    /// Something of it has gone out.
    pub(super) fn has_begun(&self) -> bool {
        self.begun
    }

    /// All of it has gone out.
    pub(super) fn is_done(&self) -> bool {
        self.done
    }
}

/// The request's head. Names and values have no line ends: their types see to that.
fn head(
    parts: &http::request::Parts,
    framing: &Framing,
    address: SocketAddr,
) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(1024);
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    write!(head, "{} {path} HTTP/1.1\r\n", parts.method)?;
    if !parts.headers.contains_key(HOST) {
        write!(head, "host: {address}\r\n")?;
    }
    for (name, value) in &parts.headers {
        if [CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING].contains(name) {
            continue;
        }
        head.extend_from_slice(name.as_str().as_bytes());
        head.extend_from_slice(b": ");
        head.extend_from_slice(value.as_bytes());
        head.extend_from_slice(b"\r\n");
    }
    match framing {
        // RFC 9110, section 8.6: for methods that give a body a meaning, also its absence is said.
        Framing::Length(0) if !says_length(parts) => {}
        Framing::Length(length) => write!(head, "content-length: {length}\r\n")?,
        Framing::Chunked => head.extend_from_slice(b"transfer-encoding: chunked\r\n"),
    }
    head.extend_from_slice(b"\r\n");
    Ok(head)
}

fn says_length(parts: &http::request::Parts) -> bool {
    let of_method = [Method::POST, Method::PUT, Method::PATCH].contains(&parts.method);
    of_method || parts.headers.contains_key(CONTENT_LENGTH)
}

#[cfg(test)]
#[path = "tests/upload.rs"]
mod tests;
