//! Which service a request is for. Pure.
//!
//! The order is Host, then path, then the body's `model`:
//!
//! 1. Host: the alias `NAME.NAMESPACE[.svc[.CLUSTER_DOMAIN]]`, then `endpoint.hosts`. The path goes on unchanged.
//! 2. Path: `/NAMESPACE/NAME/rest`; the prefix is cut off. A first segment that is a route of the runtime is never
//!    a namespace.
//! 3. `model`: `NAMESPACE/NAME` names a service; a bare name is looked up only among services whose keys accept the
//!    request, so that one tenant neither reaches nor learns of another's models.
//!
//! Only the runtime's public routes are ever forwarded.

use std::sync::Arc;

use ashlar_crds::names::RESERVED_PATH_SEGMENTS;
use http::uri::PathAndQuery;
use http::{Method, Uri};

use super::snapshot::{Service, Snapshot, normalize_host};

/// Where a request goes, as far as Host and path tell.
#[derive(Debug)]
pub enum Target {
    /// To this service, with this path.
    Service {
        /// The service.
        service: Arc<Service>,
        /// What the runtime sees.
        path: PathAndQuery,
    },
    /// The body's `model` decides; the path goes on unchanged.
    Model,
    /// `GET /v1/models` across services: the gateway answers.
    ModelList,
    /// `GET /v1/models/ID` across services: the gateway answers.
    ModelCard {
        /// The decoded id.
        id: String,
    },
}

/// Why no service was found; the text is for the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unresolved {
    /// The path is neither a route of the API nor `/NAMESPACE/NAME/…`.
    #[error(
        "no service at {path}: address one by /NAMESPACE/NAME/v1/…, by its own host name, or by `model` at /v1/…"
    )]
    NoSuchPath {
        /// The path asked for.
        path: String,
    },
    /// `/NAMESPACE/NAME/…` names no service.
    #[error("no InferenceService {namespace}/{name}")]
    NoSuchService {
        /// First segment.
        namespace: String,
        /// Second segment.
        name: String,
    },
    /// The service is known, but the runtime has no such public route.
    #[error("no route {path} in this API: try /v1/chat/completions, /v1/completions or /v1/models")]
    NoSuchRoute {
        /// The path that the runtime would have seen.
        path: String,
    },
}

/// Resolves by Host and path. `host` is the Host header or the request target's authority, not yet normalised.
///
/// # Errors
/// [`Unresolved`] when neither leads to a service and the path is not one that `model` could resolve.
pub fn resolve(
    snapshot: &Snapshot,
    host: Option<&str>,
    method: &Method,
    uri: &Uri,
) -> Result<Target, Unresolved> {
    let path = uri.path();
    if let Some(service) = host.and_then(|host| by_host(snapshot, &normalize_host(host))) {
        return forwarded(service, path, uri.query());
    }
    let first = first_segment(path);
    if !RESERVED_PATH_SEGMENTS.contains(&first) {
        return by_path(snapshot, uri);
    }
    match path.strip_prefix("/v1/models") {
        Some("" | "/") if method == Method::GET || method == Method::HEAD => Ok(Target::ModelList),
        Some(rest)
            if rest.starts_with('/') && (method == Method::GET || method == Method::HEAD) =>
        {
            let id = percent_decode(&rest[1..]);
            Ok(Target::ModelCard { id })
        }
        _ if method == Method::POST => Ok(Target::Model),
        _ => Err(Unresolved::NoSuchPath {
            path: path.to_owned(),
        }),
    }
}

fn by_host<'a>(snapshot: &'a Snapshot, host: &str) -> Option<&'a Arc<Service>> {
    by_alias(snapshot, host).or_else(|| snapshot.by_host(host))
}

/// `NAME.NAMESPACE`, with or without `.svc` and the cluster's domain.
fn by_alias<'a>(snapshot: &'a Snapshot, host: &str) -> Option<&'a Arc<Service>> {
    let names = &snapshot.names;
    let short = host
        .strip_suffix(names.cluster_domain.as_str())
        .and_then(|rest| rest.strip_suffix('.'))
        .map_or(Some(host), |rest| {
            rest.ends_with(".svc").then_some(rest) // `a.b.cluster.local` is no Service's name
        })?;
    let short = short.strip_suffix(".svc").unwrap_or(short);
    let (name, namespace) = short.split_once('.')?;
    if namespace.contains('.') || (name == names.service && namespace == names.namespace) {
        return None;
    }
    snapshot
        .service(namespace, name)
        .filter(|service| service.spec.alias)
}

fn by_path(snapshot: &Snapshot, uri: &Uri) -> Result<Target, Unresolved> {
    let path = uri.path();
    let no_such_path = || Unresolved::NoSuchPath {
        path: path.to_owned(),
    };
    let (namespace, rest) = path[1.min(path.len())..]
        .split_once('/')
        .ok_or_else(no_such_path)?;
    let (name, rest) = rest.split_once('/').unwrap_or((rest, ""));
    if namespace.is_empty() || name.is_empty() {
        return Err(no_such_path());
    }
    let service = snapshot
        .service(namespace, name)
        .ok_or_else(|| Unresolved::NoSuchService {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })?;
    forwarded(service, &format!("/{rest}"), uri.query())
}

fn forwarded(
    service: &Arc<Service>,
    path: &str,
    query: Option<&str>,
) -> Result<Target, Unresolved> {
    let no_such_route = || Unresolved::NoSuchRoute {
        path: path.to_owned(),
    };
    if !RESERVED_PATH_SEGMENTS.contains(&first_segment(path)) {
        return Err(no_such_route());
    }
    let full = match query {
        Some(query) => format!("{path}?{query}"),
        None => path.to_owned(),
    };
    Ok(Target::Service {
        service: Arc::clone(service),
        path: PathAndQuery::try_from(full).map_err(|_| no_such_route())?,
    })
}

fn first_segment(path: &str) -> &str {
    let path = path.strip_prefix('/').unwrap_or(path);
    path.split_once('/').map_or(path, |(first, _)| first)
}

/// Decodes `%2F` and its like; what is not valid stays as it is. Ids are compared, never used as paths.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut i = 0;
    while i < bytes.len() {
        let hex = bytes
            .get(i + 1..i + 3)
            .filter(|_| bytes[i] == b'%')
            .and_then(|pair| std::str::from_utf8(pair).ok())
            .filter(|pair| pair.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|pair| u8::from_str_radix(pair, 16).ok());
        match hex {
            Some(byte) => {
                out.push(byte);
                i += 3;
            }
            None => {
                out.push(bytes[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// What a `model` value can mean.
#[derive(Debug)]
pub enum ModelMatch<'a> {
    /// `NAMESPACE/NAME`: this service, whose runtime knows the model by `service.spec.model`.
    Direct(&'a Arc<Service>),
    /// A bare name: those of these services whose keys accept the request.
    Among(&'a [Arc<Service>]),
}

/// Looks a `model` value up; a model may itself be called `org/name`, which a service of that path shadows.
#[must_use]
pub fn by_model<'a>(snapshot: &'a Snapshot, model: &str) -> ModelMatch<'a> {
    model
        .split_once('/')
        .and_then(|(namespace, name)| snapshot.service(namespace, name))
        .map_or_else(
            || ModelMatch::Among(snapshot.by_model(model)),
            ModelMatch::Direct,
        )
}

#[cfg(test)]
#[path = "tests/resolve.rs"]
mod tests;
