//! A server on loopback that speaks the part of the hub's protocol that `pull` uses, and fails when told to.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
};

use axum::{
    Json, Router,
    body::Body,
    extract::{Request, State},
    http::{HeaderMap, Method, Response, StatusCode, header},
    response::IntoResponse,
};
use bytes::Bytes;
use futures::{StreamExt, stream};
use serde_json::json;
use sha1::Sha1;
use sha2::{Digest, Sha256};

/// The commit that `main` means at first.
pub const COMMIT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
/// Size of the pieces in which a body is sent.
const PIECE: usize = 100_000;

#[derive(Clone)]
struct Entry {
    content: Bytes,
    lfs: bool,
}

/// What the hub holds.
#[derive(Default, Clone)]
pub struct Repository(BTreeMap<String, Entry>);

impl Repository {
    pub fn file(mut self, path: &str, content: &[u8]) -> Self {
        self.0.insert(
            path.into(),
            Entry {
                content: Bytes::copy_from_slice(content),
                lfs: false,
            },
        );
        self
    }

    pub fn lfs(mut self, path: &str, content: &[u8]) -> Self {
        self.0.insert(
            path.into(),
            Entry {
                content: Bytes::copy_from_slice(content),
                lfs: true,
            },
        );
        self
    }
}

/// What goes wrong with one file's bytes; several faults of one file happen one after another.
#[derive(Clone)]
pub enum Fault {
    /// The connection breaks after so many bytes.
    BreakAfter { bytes: usize, times: u32 },
    /// No more bytes come after so many.
    StallAfter { bytes: usize, times: u32 },
    /// One byte is wrong.
    Corrupt { times: u32 },
    /// An error status.
    Status { status: u16, times: u32 },
}

impl Fault {
    fn times(&mut self) -> &mut u32 {
        match self {
            Self::BreakAfter { times, .. }
            | Self::StallAfter { times, .. }
            | Self::Corrupt { times }
            | Self::Status { times, .. } => times,
        }
    }
}

/// A request as it arrived.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: Method,
    pub path: String,
    pub range_start: u64,
    pub authorization: Option<String>,
}

impl Seen {
    pub fn is_get_of(&self, file: &str) -> bool {
        self.method == Method::GET && self.path.ends_with(&format!("/{file}"))
    }
}

#[derive(Default)]
struct Inner {
    repository: Repository,
    commit: String,
    faults: BTreeMap<String, VecDeque<Fault>>,
    seen: Vec<Seen>,
    refuse_listing: Option<(u16, String)>,
    token: Option<String>,
    storage: Option<String>,
    bare_listing: bool,
    ignore_ranges: bool,
}

pub struct HubServer {
    inner: Arc<Mutex<Inner>>,
    address: std::net::SocketAddr,
    // Dropping the runtime closes the server's socket.
    _runtime: tokio::runtime::Runtime,
}

impl HubServer {
    pub fn start(repository: Repository) -> Self {
        let inner = Arc::new(Mutex::new(Inner {
            repository,
            commit: COMMIT.into(),
            ..Inner::default()
        }));
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

    pub fn content(&self, file: &str) -> Vec<u8> {
        self.lock().repository.0[file].content.to_vec()
    }

    pub fn requests(&self) -> Vec<Seen> {
        self.lock().seen.clone()
    }

    pub fn fault(&self, file: &str, fault: Fault) {
        self.lock()
            .faults
            .entry(file.into())
            .or_default()
            .push_back(fault);
    }

    pub fn clear_faults(&self) {
        self.lock().faults.clear();
    }

    pub fn refuse_listing(&self, status: u16, code: &str) {
        self.lock().refuse_listing = Some((status, code.into()));
    }

    pub fn require_token(&self, token: &str) {
        self.lock().token = Some(token.into());
    }

    /// Large files are answered by a redirect to another host.
    pub fn redirect_large_files_to(&self, storage: &HubServer) {
        // Another name for loopback: to a client it is another host.
        self.lock().storage = Some(format!("http://localhost:{}", storage.address.port()));
    }

    /// A listing of names only, as some mirrors give.
    pub fn bare_listing(&self) {
        self.lock().bare_listing = true;
    }

    pub fn ignore_ranges(&self) {
        self.lock().ignore_ranges = true;
    }

    pub fn replace(&self, repository: Repository, commit: &str) {
        let mut inner = self.lock();
        (inner.repository, inner.commit) = (repository, commit.into());
    }
}

async fn answer(State(inner): State<Arc<Mutex<Inner>>>, request: Request) -> Response<Body> {
    let mut inner = inner.lock().unwrap();
    let header = |name: &str| {
        request
            .headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
            .map(str::to_owned)
    };
    let range = header("range")
        .and_then(|text| text.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
    let path = request.uri().path().to_owned();
    let authorization = header("authorization");
    inner.seen.push(Seen {
        method: request.method().clone(),
        path: path.clone(),
        range_start: range.unwrap_or(0) as u64,
        authorization: authorization.clone(),
    });
    if inner
        .token
        .as_ref()
        .is_some_and(|token| authorization != Some(format!("Bearer {token}")))
    {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    if let Some(revision) = path.strip_prefix("/api/models/owner/model/revision/") {
        return listing(&inner, revision);
    }
    match path
        .strip_prefix("/owner/model/resolve/")
        .and_then(|rest| rest.split_once('/'))
    {
        Some((commit, file)) if commit == inner.commit => {
            file_answer(&mut inner, file, request.method(), &path, range)
        }
        _ => StatusCode::NOT_FOUND.into_response(),
    }
}

fn listing(inner: &Inner, revision: &str) -> Response<Body> {
    if let Some((status, code)) = &inner.refuse_listing {
        let status = StatusCode::from_u16(*status).unwrap();
        return (status, [("x-error-code", code.clone())], "refused").into_response();
    }
    if revision != "main" && revision != inner.commit {
        return (
            StatusCode::NOT_FOUND,
            [("x-error-code", "RevisionNotFound")],
        )
            .into_response();
    }
    let sibling = |(path, entry): (&String, &Entry)| {
        let size = entry.content.len();
        if inner.bare_listing {
            json!({"rfilename": path})
        } else if entry.lfs {
            json!({"rfilename": path, "size": size, "blobId": "0".repeat(40), "lfs": {"sha256": sha256(entry), "size": size, "pointerSize": 134}})
        } else {
            json!({"rfilename": path, "size": size, "blobId": git_id(entry)})
        }
    };
    let siblings: Vec<_> = inner.repository.0.iter().map(sibling).collect();
    Json(json!({"id": "owner/model", "sha": inner.commit, "siblings": siblings})).into_response()
}

fn file_answer(
    inner: &mut Inner,
    file: &str,
    method: &Method,
    path: &str,
    range: Option<usize>,
) -> Response<Body> {
    let Some(entry) = inner.repository.0.get(file).cloned() else {
        return (StatusCode::NOT_FOUND, [("x-error-code", "EntryNotFound")]).into_response();
    };
    let mut headers = HeaderMap::new();
    headers.insert("x-repo-commit", inner.commit.parse().unwrap());
    let etag = format!(
        "\"{}\"",
        if entry.lfs {
            sha256(&entry)
        } else {
            git_id(&entry)
        }
    );
    if entry.lfs {
        headers.insert("x-linked-etag", etag.parse().unwrap());
        headers.insert("x-linked-size", entry.content.len().into());
    } else {
        headers.insert(header::ETAG, etag.parse().unwrap());
    }
    if let (true, Some(storage)) = (entry.lfs, &inner.storage) {
        headers.insert(
            header::LOCATION,
            format!("{storage}{path}").parse().unwrap(),
        );
        return (StatusCode::FOUND, headers).into_response();
    }
    if method == Method::HEAD {
        headers.insert(header::CONTENT_LENGTH, entry.content.len().into());
        return (headers, Body::empty()).into_response();
    }
    let fault = next_fault(inner, file);
    if let Some(Fault::Status { status, .. }) = fault {
        return StatusCode::from_u16(status).unwrap().into_response();
    }
    let size = entry.content.len();
    let start = if inner.ignore_ranges { None } else { range };
    let status = match start {
        Some(start) if start >= size => return StatusCode::RANGE_NOT_SATISFIABLE.into_response(),
        Some(start) => {
            headers.insert(
                header::CONTENT_RANGE,
                format!("bytes {start}-{}/{size}", size - 1)
                    .parse()
                    .unwrap(),
            );
            StatusCode::PARTIAL_CONTENT
        }
        None => StatusCode::OK,
    };
    headers.insert(header::CONTENT_LENGTH, (size - start.unwrap_or(0)).into());
    (
        status,
        headers,
        body(entry.content.slice(start.unwrap_or(0)..), fault),
    )
        .into_response()
}

fn next_fault(inner: &mut Inner, file: &str) -> Option<Fault> {
    let queue = inner.faults.get_mut(file)?;
    let fault = queue.front_mut()?;
    *fault.times() -= 1;
    let now = fault.clone();
    if *fault.times() == 0 {
        queue.pop_front();
    }
    Some(now)
}

fn body(content: Bytes, fault: Option<Fault>) -> Body {
    let pieces = |content: Bytes| {
        let starts = (0..content.len()).step_by(PIECE);
        stream::iter(
            starts
                .map(move |at| {
                    Ok::<_, std::io::Error>(content.slice(at..content.len().min(at + PIECE)))
                })
                .collect::<Vec<_>>(),
        )
    };
    match fault {
        Some(Fault::BreakAfter { bytes, .. }) => {
            let broken = stream::once(async { Err(std::io::Error::other("broken on purpose")) });
            Body::from_stream(pieces(content.slice(..bytes.min(content.len()))).chain(broken))
        }
        Some(Fault::StallAfter { bytes, .. }) => Body::from_stream(
            pieces(content.slice(..bytes.min(content.len()))).chain(stream::pending()),
        ),
        Some(Fault::Corrupt { .. }) => {
            let mut wrong = content.to_vec();
            let middle = wrong.len() / 2;
            wrong[middle] ^= 0x40;
            Body::from(wrong)
        }
        _ => Body::from_stream(pieces(content)),
    }
}

fn sha256(entry: &Entry) -> String {
    hex::encode(Sha256::digest(&entry.content))
}

fn git_id(entry: &Entry) -> String {
    let mut hasher = Sha1::new();
    hasher.update(format!("blob {}\0", entry.content.len()));
    hasher.update(&entry.content);
    hex::encode(hasher.finalize())
}
