//! A store on loopback that speaks S3's protocol as `pull` uses it: it refuses what is not signed right, lists in small pages,
//! tags objects that were written in parts, and fails when told to.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, Response, StatusCode},
};
use base64::Engine as _;
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use hmac::{Hmac, KeyInit as _, Mac as _};
use md5::Md5;
use sha2::{Digest as _, Sha256};

pub const KEY: &str = "AKIDEXAMPLE";
pub const SECRET: &str = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
pub const REGION: &str = "eu-test-1";
pub const BUCKET: &str = "models";
/// Objects of one page of a listing.
const PAGE: usize = 2;
/// Size of the pieces in which a body is sent.
const PIECE: usize = 50_000;

/// What an object can be checked against.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Tag {
    /// Entity tag is the MD5.
    Md5,
    /// Written in parts of so many bytes.
    Parts(usize),
    /// Encrypted by the store: a tag without meaning, and a SHA-256.
    Encrypted,
    /// A tag without meaning.
    Opaque,
}

#[derive(Clone)]
struct Object {
    content: Bytes,
    tag: Tag,
}

impl Object {
    fn etag(&self) -> String {
        let tag = match self.tag {
            Tag::Md5 => hex::encode(Md5::digest(&self.content)),
            Tag::Parts(size) => {
                let parts: Vec<_> = self.content.chunks(size).map(Md5::digest).collect();
                let all: Vec<u8> = parts.iter().flatten().copied().collect();
                format!("{}-{}", hex::encode(Md5::digest(all)), parts.len())
            }
            Tag::Encrypted | Tag::Opaque => {
                format!(
                    "opaque{}",
                    &hex::encode(Sha256::digest(&self.content))[..12]
                )
            }
        };
        format!("\"{tag}\"")
    }
}

#[derive(Default)]
struct Inner {
    objects: BTreeMap<String, Object>,
    public: bool,
    break_after: BTreeMap<String, usize>,
    corrupt: BTreeMap<String, u32>,
    busy: u32,
    /// Method, key and first byte of each answered request for an object.
    seen: Vec<(Method, String, u64)>,
}

pub struct S3Server {
    inner: Arc<Mutex<Inner>>,
    address: std::net::SocketAddr,
    // Dropping the runtime closes the server's socket.
    _runtime: tokio::runtime::Runtime,
}

impl S3Server {
    pub fn start() -> Self {
        let inner = Arc::new(Mutex::new(Inner::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let listener = runtime
            .block_on(tokio::net::TcpListener::bind("127.0.0.1:0"))
            .unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(inner.clone());
        runtime.spawn(async move { axum::serve(listener, router).await });
        Self {
            inner,
            address,
            _runtime: runtime,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub fn put(&self, key: &str, content: &[u8], tag: Tag) {
        let content = Bytes::copy_from_slice(content);
        self.lock()
            .objects
            .insert(key.into(), Object { content, tag });
    }

    pub fn make_public(&self) {
        self.lock().public = true;
    }

    /// The next answer with this object's bytes ends after so many.
    pub fn break_after(&self, key: &str, bytes: usize) {
        self.lock().break_after.insert(key.into(), bytes);
    }

    /// One byte of the next answers is wrong.
    pub fn corrupt(&self, key: &str, times: u32) {
        self.lock().corrupt.insert(key.into(), times);
    }

    /// So many answers are 503.
    pub fn busy(&self, times: u32) {
        self.lock().busy = times;
    }

    /// First bytes of the requests for an object's content.
    pub fn gets(&self, key: &str) -> Vec<u64> {
        let seen = &self.lock().seen;
        let gets = seen
            .iter()
            .filter(|(method, of, _)| method == Method::GET && of == key);
        gets.map(|(_, _, from)| *from).collect()
    }
}

fn refused(status: StatusCode, code: &str) -> Response<Body> {
    let text =
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>no</Message></Error>");
    Response::builder()
        .status(status)
        .body(Body::from(text))
        .unwrap()
}

async fn answer(State(inner): State<Arc<Mutex<Inner>>>, request: Request) -> Response<Body> {
    let (parts, _) = request.into_parts();
    let mut inner = inner.lock().unwrap();
    if inner.busy > 0 {
        inner.busy -= 1;
        return refused(StatusCode::SERVICE_UNAVAILABLE, "SlowDown");
    }
    let query = parts.uri.query().unwrap_or_default();
    let pairs: BTreeMap<&str, String> = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(name, value)| (name, decoded(value)))
        .collect();
    if !inner.public
        && let Err(code) = check_signature(&parts, &pairs)
    {
        return refused(StatusCode::FORBIDDEN, code);
    }
    let path = decoded(parts.uri.path());
    let Some(rest) = path.strip_prefix(&format!("/{BUCKET}")) else {
        return refused(StatusCode::NOT_FOUND, "NoSuchBucket");
    };
    let key = rest.trim_start_matches('/');
    if key.is_empty() {
        return list(&inner, &pairs);
    }
    object(&mut inner, &parts.method, key, &pairs, &parts.headers)
}

fn list(inner: &Inner, query: &BTreeMap<&str, String>) -> Response<Body> {
    let prefix = query.get("prefix").map_or("", String::as_str);
    let after = query.get("continuation-token").map_or("", String::as_str);
    let found: Vec<_> = inner
        .objects
        .iter()
        .filter(|(key, _)| key.starts_with(prefix) && key.as_str() > after)
        .collect();
    let page = &found[..found.len().min(PAGE)];
    let truncated = found.len() > page.len();
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?><ListBucketResult xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\"><IsTruncated>{truncated}</IsTruncated>"
    );
    for (key, object) in page {
        let etag = object.etag().replace('"', "&quot;");
        let size = object.content.len();
        xml.push_str(&format!(
            "<Contents><Key>{key}</Key><ETag>{etag}</ETag><Size>{size}</Size></Contents>"
        ));
    }
    if truncated {
        let last = page[page.len() - 1].0;
        xml.push_str(&format!(
            "<NextContinuationToken>{last}</NextContinuationToken>"
        ));
    }
    xml.push_str("</ListBucketResult>");
    Response::new(Body::from(xml))
}

fn object(
    inner: &mut Inner,
    method: &Method,
    key: &str,
    query: &BTreeMap<&str, String>,
    headers: &HeaderMap,
) -> Response<Body> {
    let Some(object) = inner.objects.get(key).cloned() else {
        return refused(StatusCode::NOT_FOUND, "NoSuchKey");
    };
    let text = |name: &str| {
        headers
            .get(name)
            .map(|value| value.to_str().unwrap().to_owned())
    };
    let etag = object.etag();
    if text("if-match").is_some_and(|wanted| wanted != etag) {
        return refused(StatusCode::PRECONDITION_FAILED, "PreconditionFailed");
    }
    let range = text("range");
    let from = range
        .as_deref()
        .and_then(|r| r.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    inner
        .seen
        .push((method.clone(), key.to_owned(), from.unwrap_or(0)));
    let size = object.content.len();
    let mut response = Response::builder().header("etag", etag);
    if object.tag == Tag::Encrypted {
        response = response.header("x-amz-server-side-encryption", "aws:kms");
        if text("x-amz-checksum-mode").as_deref() == Some("ENABLED") {
            let sum = Sha256::digest(&object.content);
            let sum = base64::engine::general_purpose::STANDARD.encode(sum);
            response = response.header("x-amz-checksum-sha256", sum);
        }
    }
    if method == Method::HEAD {
        let length = match (object.tag, query.get("partNumber")) {
            (Tag::Parts(part), Some(_)) => part.min(size),
            _ => size,
        };
        return response
            .header("content-length", length)
            .body(Body::empty())
            .unwrap();
    }
    let from = usize::try_from(from.unwrap_or(0)).unwrap();
    let mut content = object.content.slice(from..).to_vec();
    if let Some(times) = inner.corrupt.get_mut(key).filter(|times| **times > 0) {
        *times -= 1;
        content[0] ^= 1;
    }
    let length = content.len();
    let cut = inner.break_after.remove(key);
    if from > 0 {
        response = response
            .status(StatusCode::PARTIAL_CONTENT)
            .header("content-range", format!("bytes {from}-{}/{size}", size - 1));
    }
    let sent = cut.map_or(length, |bytes| bytes.min(length));
    let pieces: Vec<std::io::Result<Bytes>> = content[..sent]
        .chunks(PIECE)
        .map(|piece| Ok(Bytes::copy_from_slice(piece)))
        .chain(cut.map(|_| Err(std::io::Error::other("told to break"))))
        .collect();
    let body = Body::from_stream(stream::iter(pieces).then(|piece| async {
        // Apart, so that what was sent before a break has arrived.
        tokio::task::yield_now().await;
        piece
    }));
    response
        .header("content-length", length)
        .body(body)
        .unwrap()
}

/// Signature Version 4 in the query, computed here from the specification alone.
fn check_signature(
    parts: &axum::http::request::Parts,
    query: &BTreeMap<&str, String>,
) -> Result<(), &'static str> {
    let of = |name: &str| query.get(name).map(String::as_str).ok_or("AccessDenied");
    if of("X-Amz-Algorithm")? != "AWS4-HMAC-SHA256" {
        return Err("AccessDenied");
    }
    let credential: Vec<&str> = of("X-Amz-Credential")?.split('/').collect();
    let [key, day, region, "s3", "aws4_request"] = credential[..] else {
        return Err("AuthorizationQueryParametersError");
    };
    if key != KEY {
        return Err("InvalidAccessKeyId");
    }
    if region != REGION {
        return Err("AuthorizationHeaderMalformed");
    }
    let mut pairs: Vec<&str> = parts.uri.query().unwrap_or_default().split('&').collect();
    pairs.retain(|pair| !pair.starts_with("X-Amz-Signature="));
    pairs.sort_unstable();
    let signed = of("X-Amz-SignedHeaders")?;
    let mut headers = String::new();
    for name in signed.split(';') {
        let value = parts.headers.get(name).ok_or("AccessDenied")?;
        headers.push_str(&format!("{name}:{}\n", value.to_str().unwrap().trim()));
    }
    let canonical = format!(
        "{}\n{}\n{}\n{headers}\n{signed}\nUNSIGNED-PAYLOAD",
        parts.method,
        parts.uri.path(),
        pairs.join("&")
    );
    let scope = format!("{day}/{region}/s3/aws4_request");
    let text = format!(
        "AWS4-HMAC-SHA256\n{}\n{scope}\n{}",
        of("X-Amz-Date")?,
        hex::encode(Sha256::digest(canonical))
    );
    let mut signing = hmac(format!("AWS4{SECRET}").as_bytes(), day);
    for part in [region, "s3", "aws4_request", &text] {
        signing = hmac(&signing, part);
    }
    if hex::encode(signing) == of("X-Amz-Signature")? {
        Ok(())
    } else {
        Err("SignatureDoesNotMatch")
    }
}

fn hmac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn decoded(text: &str) -> String {
    let bytes = text.as_bytes();
    let (mut out, mut at) = (Vec::new(), 0);
    while at < bytes.len() {
        if bytes[at] == b'%' {
            out.push(u8::from_str_radix(&text[at + 1..at + 3], 16).unwrap());
            at += 3;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    String::from_utf8(out).unwrap()
}
