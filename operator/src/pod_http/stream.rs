//! One connection to a pod, plain or with TLS.

use std::cell::RefCell;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::{Error, Peer};
use crate::model_tls::Trust;

/// Read at once: some dozens of events, and not much where it waits for a client that reads slowly.
const READ_BYTES: usize = 8 << 10;
/// A pod's node that is gone is noticed in about `KEEPALIVE + 3 × KEEPALIVE_INTERVAL`.
const KEEPALIVE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

thread_local! {
    /// What a read comes into. A connection that waits has no buffer.
    static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; READ_BYTES].into());
}

/// A connection to a pod.
pub(super) enum PodStream {
    /// Without TLS.
    Plain(TcpStream),
    /// With it. Apart, so that connections without keep no room for it.
    Tls(Box<Secured>),
}

/// A connection with TLS, and the name that the pod's certificate is for.
pub(super) struct Secured {
    name: String,
    stream: TlsStream<TcpStream>,
}

impl PodStream {
    /// Connects, and agrees on TLS if the peer speaks it.
    pub(super) async fn open(
        peer: Peer<'_>,
        trust: &Trust,
        timeout: Duration,
    ) -> Result<Self, Error> {
        let connected = tokio::time::timeout(timeout, TcpStream::connect(peer.address)).await;
        let stream = connected
            .map_err(|_| Error::ConnectTimeout(timeout))?
            .map_err(Error::Connect)?;
        stream.set_nodelay(true).map_err(Error::Connect)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(3);
        let kept = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        kept.map_err(Error::Connect)?;
        let Some(name) = peer.tls else {
            return Ok(Self::Plain(stream));
        };
        // Apart, so that connections without TLS keep no room for it.
        let secured = Box::pin(tokio::time::timeout(timeout, trust.secure(stream, name))).await;
        let stream = secured
            .map_err(|_| Error::TlsTimeout)?
            .map_err(Error::Tls)?;
        Ok(Self::Tls(Box::new(Secured {
            name: name.to_owned(),
            stream,
        })))
    }

    /// The name that the pod's certificate is for; none without TLS.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::Plain(_) => None,
            Self::Tls(secured) => Some(&secured.name),
        }
    }

    /// Gives what has come to `take`; none when the pod has closed its side.
    pub(super) fn poll_take<T>(
        &mut self,
        cx: &mut Context<'_>,
        take: impl FnOnce(&mut [u8]) -> T,
    ) -> Poll<io::Result<Option<T>>> {
        BUFFER.with_borrow_mut(|buffer| {
            let mut buffer = ReadBuf::new(buffer);
            ready!(self.poll_read(cx, &mut buffer))?;
            let came = buffer.filled_mut();
            Poll::Ready(Ok((!came.is_empty()).then(|| take(came))))
        })
    }

    /// Open, and nothing has come. That anything came between two requests, be it the end, means that no more may be sent. The
    /// kernel is asked: the runtime may not have heard of it yet.
    pub(super) fn is_quiet(&mut self) -> bool {
        let socket = match self {
            Self::Plain(stream) => SockRef::from(&*stream),
            Self::Tls(secured) => {
                let mut cx = Context::from_waker(Waker::noop());
                let mut byte = [0];
                let read =
                    Pin::new(&mut secured.stream).poll_read(&mut cx, &mut ReadBuf::new(&mut byte));
                if read.is_ready() {
                    return false;
                }
                SockRef::from(secured.stream.get_ref().0)
            }
        };
        let peeked = socket.peek(&mut [MaybeUninit::uninit()]);
        peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(secured) => Pin::new(&mut secured.stream).poll_read(cx, buffer),
        }
    }

    /// Writes a part of what `parts` hold.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, parts),
            Self::Tls(secured) => Pin::new(&mut secured.stream).poll_write_vectored(cx, parts),
        }
    }

    /// Ready when all that was written has gone to the kernel.
    pub(super) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) => Poll::Ready(Ok(())),
            Self::Tls(secured) => Pin::new(&mut secured.stream).poll_flush(cx),
        }
    }
}
