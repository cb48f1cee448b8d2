//! What the gateway changes in the heads of requests and responses. Pure.
//!
//! Towards the replica: hop-by-hop fields, the user's key and anything that only the gateway may say are removed;
//! the client's name, a request id and the forwarding fields are set. `traceparent` and the rest pass as they are.

use std::net::IpAddr;
use std::time::Duration;

use http::header::{
    AUTHORIZATION, CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderName, HeaderValue,
    PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};
use http::{HeaderMap, Uri};

/// Names the client whose key was accepted, for the runtime's logs; set by the gateway only.
pub const CLIENT: HeaderName = HeaderName::from_static("x-ashlar-client");
/// `1` on a 503 of a replica that drains: the request was not begun and may go elsewhere.
pub const DRAINING: HeaderName = HeaderName::from_static("x-ashlar-draining");
/// Identifies a request in all logs.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Seconds that a client gives its request until the answer begins.
pub const REQUEST_TIMEOUT: HeaderName = HeaderName::from_static("x-request-timeout");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Longest request id taken from a client.
const MAX_REQUEST_ID: usize = 128;

const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    KEEP_ALIVE,
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    PROXY_CONNECTION,
    TE,
    TRAILER,
    TRANSFER_ENCODING,
    UPGRADE,
];

/// The host that the client asked for: the target's authority, or the one Host field.
#[must_use]
pub fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    uri.authority()
        .map(http::uri::Authority::as_str)
        .or_else(|| headers.get(HOST)?.to_str().ok())
}

/// The request's id: the client's if it is short and plain, otherwise a new one.
#[must_use]
pub fn request_id(headers: &HeaderMap) -> HeaderValue {
    headers
        .get(REQUEST_ID)
        .filter(|id| {
            let id = id.as_bytes();
            !id.is_empty() && id.len() <= MAX_REQUEST_ID && id.iter().all(u8::is_ascii_graphic)
        })
        .cloned()
        .unwrap_or_else(|| {
            HeaderValue::from_str(&format!("{:032x}", rand::random::<u128>()))
                .expect("hex is a valid header value: this is a bug")
        })
}

/// The time that the client gives the request; what is not a number of seconds above 0 is passed over.
#[must_use]
pub fn request_timeout(headers: &HeaderMap) -> Option<Duration> {
    let seconds: f64 = headers
        .get(REQUEST_TIMEOUT)?
        .to_str()
        .ok()?
        .trim()
        .parse()
        .ok()?;
    (seconds > 0.0).then(|| Duration::try_from_secs_f64(seconds).ok())?
}

/// The announced length of the body, if it is a number.
#[must_use]
pub fn content_length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Removes what concerns one connection only, including the fields that `Connection` names.
pub fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
}

/// Turns a client's head into the replica's.
pub fn to_replica(
    headers: &mut HeaderMap,
    host: Option<&str>,
    peer: IpAddr,
    request_id: &HeaderValue,
    client: Option<&str>,
) {
    remove_hop_by_hop(headers);
    for name in [AUTHORIZATION, EXPECT, HOST] {
        headers.remove(name);
    }
    remove_own(headers);
    if let Some(client) = client.and_then(|client| HeaderValue::from_str(client).ok()) {
        headers.insert(CLIENT, client);
    }
    headers.insert(REQUEST_ID, request_id.clone());
    let hops = match headers.get(FORWARDED_FOR).and_then(|v| v.to_str().ok()) {
        Some(earlier) => format!("{earlier}, {peer}"),
        None => peer.to_string(),
    };
    if let Ok(hops) = HeaderValue::from_str(&hops) {
        headers.insert(FORWARDED_FOR, hops);
    }
    // Something in front that ended TLS knows better; without it the client spoke to us.
    if !headers.contains_key(FORWARDED_HOST)
        && let Some(host) = host.and_then(|host| HeaderValue::from_str(host).ok())
    {
        headers.insert(FORWARDED_HOST, host);
    }
    headers
        .entry(FORWARDED_PROTO)
        .or_insert(HeaderValue::from_static("http"));
}

/// Turns a replica's head into the client's.
pub fn to_client(headers: &mut HeaderMap, request_id: &HeaderValue) {
    remove_hop_by_hop(headers);
    remove_own(headers);
    headers
        .entry(REQUEST_ID)
        .or_insert_with(|| request_id.clone());
}

/// Removes `x-ashlar-*`, which means something only between gateway and replica.
fn remove_own(headers: &mut HeaderMap) {
    let own: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with("x-ashlar-"))
        .cloned()
        .collect();
    for name in own {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;

    fn map(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_static(value));
        }
        headers
    }

    fn names(headers: &HeaderMap) -> Vec<&str> {
        let mut names: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn the_replica_sees_the_request_but_not_the_key() {
        let mut headers = map(&[
            ("host", "chat.example.com"),
            ("authorization", "Bearer secret"),
            ("connection", "keep-alive, X-Once"),
            ("x-once", "1"),
            ("transfer-encoding", "chunked"),
            ("expect", "100-continue"),
            ("x-ashlar-client", "root"),
            ("x-ashlar-draining", "1"),
            ("x-forwarded-for", "192.0.2.1"),
            ("traceparent", "00-aa-bb-01"),
            ("content-type", "application/json"),
        ]);
        let id = request_id(&headers);
        let peer = "10.0.0.9".parse().unwrap();
        to_replica(
            &mut headers,
            Some("chat.example.com"),
            peer,
            &id,
            Some("alice"),
        );
        assert_eq!(
            names(&headers),
            [
                "content-type",
                "traceparent",
                "x-ashlar-client",
                "x-forwarded-for",
                "x-forwarded-host",
                "x-forwarded-proto",
                "x-request-id"
            ]
        );
        assert_eq!(headers["x-ashlar-client"], "alice");
        assert_eq!(headers["x-forwarded-for"], "192.0.2.1, 10.0.0.9");
        assert_eq!(headers["x-forwarded-host"], "chat.example.com");
    }

    #[test]
    fn a_client_cannot_name_itself_at_an_open_service() {
        let mut headers = map(&[("x-ashlar-client", "root")]);
        let id = request_id(&headers);
        to_replica(&mut headers, None, "::1".parse().unwrap(), &id, None);
        assert!(!headers.contains_key(CLIENT));
    }

    #[test]
    fn a_client_may_set_a_time() {
        let time = |value| request_timeout(&map(&[("x-request-timeout", value)]));
        assert_eq!(time("30"), Some(Duration::from_secs(30)));
        assert_eq!(time("0.5"), Some(Duration::from_millis(500)));
        for bad in ["", "0", "-1", "NaN", "1e300", "soon"] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }

    #[test]
    fn request_ids_are_kept_if_plain_and_made_if_not() {
        assert_eq!(request_id(&map(&[("x-request-id", "abc-1")])), "abc-1");
        let made = request_id(&map(&[("x-request-id", "two words")]));
        assert_eq!(made.len(), 32);
        assert_ne!(made, request_id(&HeaderMap::new()));
        let mut response = map(&[("connection", "close"), ("content-type", "text/plain")]);
        to_client(&mut response, &made);
        assert_eq!(names(&response), ["content-type", "x-request-id"]);
    }
}
