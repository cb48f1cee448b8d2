//! The body of an answer on its way in (RFC 9112, sections 6.3 and 9.3).

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};

use super::chunked::{ChunkError, Chunked};
use super::head::Framing;
use super::pool::Pool;
use super::stream::PodStream;
use super::upload::{Upload, UploadError};
use super::{BoxError, Error};

/// Takes a body out of its framing.
#[derive(Debug)]
pub(super) enum Decoder {
    /// So many more bytes.
    Length(u64),
    Chunked(Chunked),
    UntilClose,
}

/// Of some bytes: how many are the body's, at their front now, and how many belong to the answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decoded {
    pub(super) payload: usize,
    pub(super) used: usize,
}

impl Decoder {
    pub(super) fn new(framing: Framing) -> Self {
        match framing {
            Framing::Length(length) => Self::Length(length),
            Framing::Chunked => Self::Chunked(Chunked::new()),
            Framing::UntilClose => Self::UntilClose,
        }
    }

    pub(super) fn decode(&mut self, bytes: &mut [u8]) -> Result<Decoded, ChunkError> {
        let (payload, used) = match self {
            Self::Length(left) => {
                let here = usize::try_from(*left).map_or(bytes.len(), |left| left.min(bytes.len()));
                *left -= here as u64;
                (here, here)
            }
            Self::Chunked(chunked) => chunked.decode(bytes)?,
            Self::UntilClose => (bytes.len(), bytes.len()),
        };
        Ok(Decoded { payload, used })
    }

    /// Nothing more belongs to the answer.
    pub(super) fn is_done(&self) -> bool {
        match self {
            Self::Length(left) => *left == 0,
            Self::Chunked(chunked) => chunked.is_done(),
            Self::UntilClose => false,
        }
    }
}

/// A connection that an answer comes on, and where it waits for the next request.
pub(super) struct Link {
    pub(super) stream: PodStream,
    pub(super) pool: Arc<Pool>,
    pub(super) address: SocketAddr,
    /// Nothing is known against using it again.
    pub(super) reusable: bool,
}

impl Link {
    fn end(self) {
        if self.reusable {
            self.pool.put(self.address, self.stream);
        }
    }
}

/// The body of a pod's answer. Dropped before its end, it closes the connection.
pub struct PodBody<B> {
    /// None when the body has ended.
    link: Option<Link>,
    decoder: Decoder,
    /// What came with the head.
    first: Bytes,
    /// What has not gone out yet of the request; it goes on as long as somebody waits for the answer.
    upload: Option<Box<Upload<B>>>,
}

impl<B> PodBody<B> {
    pub(super) fn new(
        mut link: Link,
        decoder: Decoder,
        first: Bytes,
        upload: Option<Box<Upload<B>>>,
    ) -> Self {
        // The pod may still wait for the rest of the request, or take it for the next one.
        link.reusable &= upload.is_none();
        let mut body = Self {
            link: Some(link),
            decoder,
            first,
            upload,
        };
        body.end_if_done();
        body
    }

    fn end_if_done(&mut self) {
        if self.decoder.is_done() {
            self.upload = None;
            if let Some(link) = self.link.take() {
                link.end();
            }
        }
    }
}

impl<B> PodBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    fn poll_rest_of_request(&mut self, cx: &mut Context<'_>) -> Result<(), Error> {
        if let (Some(upload), Some(link)) = (&mut self.upload, &mut self.link) {
            match upload.poll(&mut link.stream, cx) {
                Err(UploadError::Body(error)) => return Err(Error::Request(error)),
                // A pod that has read enough may close its side: its answer counts.
                Err(UploadError::Write(_)) => self.upload = None,
                Ok(_) if upload.is_done() => self.upload = None,
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// The next bytes of the body; none at its end.
    fn poll_bytes(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Error>> {
        if !self.first.is_empty() {
            return Poll::Ready(Ok(Some(std::mem::take(&mut self.first))));
        }
        self.poll_rest_of_request(cx)?;
        let Some(link) = &mut self.link else {
            return Poll::Ready(Ok(None));
        };
        loop {
            let decoder = &mut self.decoder;
            let take = |bytes: &mut [u8]| {
                let Decoded { payload, used } = decoder.decode(bytes)?;
                Ok((
                    Bytes::copy_from_slice(&bytes[..payload]),
                    used == bytes.len(),
                ))
            };
            let read = ready!(link.stream.poll_take(cx, take)).map_err(Error::Read)?;
            let Some(read) = read else {
                let complete = matches!(self.decoder, Decoder::UntilClose);
                self.link = None;
                return Poll::Ready(complete.then_some(None).ok_or(Error::Truncated));
            };
            let (payload, nothing_follows) = read.map_err(Error::Chunk)?;
            link.reusable &= nothing_follows;
            if self.decoder.is_done() {
                self.end_if_done();
                return Poll::Ready(Ok((!payload.is_empty()).then_some(payload)));
            }
            if !payload.is_empty() {
                return Poll::Ready(Ok(Some(payload)));
            }
        }
    }
}

impl<B> Body for PodBody<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let this = self.get_mut();
        let bytes = ready!(this.poll_bytes(cx));
        if bytes.is_err() {
            (this.link, this.upload) = (None, None);
        }
        Poll::Ready(bytes.map(|bytes| bytes.map(Frame::data)).transpose())
    }

    fn is_end_stream(&self) -> bool {
        self.link.is_none() && self.first.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.len() as u64;
        match self.decoder {
            _ if self.link.is_none() => SizeHint::with_exact(first),
            Decoder::Length(left) => left
                .checked_add(first)
                .map_or_else(SizeHint::default, SizeHint::with_exact),
            Decoder::Chunked(_) | Decoder::UntilClose => SizeHint::default(),
        }
    }
}
