//! Host before path before model, and no way from one tenant to another.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use super::super::snapshot::testing::{service, snapshot};
use super::super::snapshot::{Access, Snapshot};
use super::*;
use proptest::prelude::*;

fn world() -> Snapshot {
    let mut hosted = service("chat", "mistral", "mistral");
    hosted.hosts = vec!["chat.example.com".to_owned()];
    let mut no_alias = service("chat", "quiet", "quiet");
    no_alias.alias = false;
    let mut open = service("lab", "open", "smollm");
    open.access = Access::Open;
    // Names made to confuse: a namespace called like a route, and one that looks like a domain.
    let route_like = service("v1", "models", "trap");
    let domain_like = service("com", "example", "dotcom");
    let own_name = service("ashlar-system", "ashlar-gateway", "self");
    snapshot(
        [hosted, no_alias, open, route_like, domain_like, own_name],
        [],
    )
}

fn ask(host: &str, method: Method, uri: &str) -> String {
    match resolve(&world(), Some(host), &method, &uri.parse().unwrap()) {
        Ok(Target::Service { service, path }) => format!("{} {path}", service.spec.id),
        Ok(Target::Model) => "model".to_owned(),
        Ok(Target::ModelList) => "list".to_owned(),
        Ok(Target::ModelCard { id }) => format!("card {id}"),
        Err(Unresolved::NoSuchPath { .. }) => "no path".to_owned(),
        Err(Unresolved::NoSuchService { .. }) => "no service".to_owned(),
        Err(Unresolved::NoSuchRoute { .. }) => "no route".to_owned(),
    }
}

#[test]
fn the_order_is_host_then_path_then_model() {
    const GATEWAY: &str = "ashlar-gateway.ashlar-system.svc";
    const CHAT: &str = "/v1/chat/completions";
    for (host, method, uri, expected) in [
        // Host: the alias in each of its forms, then endpoint.hosts.
        (
            "mistral.chat.svc",
            "POST",
            CHAT,
            "chat/mistral /v1/chat/completions",
        ),
        (
            "mistral.chat.svc.cluster.local:80",
            "POST",
            CHAT,
            "chat/mistral /v1/chat/completions",
        ),
        (
            "Mistral.Chat",
            "POST",
            CHAT,
            "chat/mistral /v1/chat/completions",
        ),
        (
            "chat.example.com:443",
            "GET",
            "/v1/models?x=1",
            "chat/mistral /v1/models?x=1",
        ),
        (
            "mistral.chat.svc",
            "GET",
            "/v1/models",
            "chat/mistral /v1/models",
        ),
        (
            "mistral.chat.svc",
            "GET",
            "/chat/mistral/v1/models",
            "no route",
        ),
        ("mistral.chat.svc", "GET", "/admin", "no route"),
        ("mistral.chat.cluster.local", "POST", CHAT, "model"),
        ("quiet.chat.svc", "POST", CHAT, "model"),
        (
            "example.com",
            "POST",
            CHAT,
            "com/example /v1/chat/completions",
        ),
        // The gateway's own name never means a service that happens to be called so.
        ("ashlar-gateway.ashlar-system", "POST", CHAT, "model"),
        (GATEWAY, "GET", "/lab/open/health", "lab/open /health"),
        // Path.
        (
            GATEWAY,
            "POST",
            "/chat/mistral/v1/chat/completions?a=b",
            "chat/mistral /v1/chat/completions?a=b",
        ),
        (
            "localhost:8080",
            "GET",
            "/lab/open/stream?prompt=hi",
            "lab/open /stream?prompt=hi",
        ),
        ("", "POST", "/lab/open/generate", "lab/open /generate"),
        (
            GATEWAY,
            "GET",
            "/chat/quiet/v1/models",
            "chat/quiet /v1/models",
        ),
        (GATEWAY, "GET", "/chat/mistral", "no route"),
        (GATEWAY, "GET", "/chat/mistral/", "no route"),
        (GATEWAY, "GET", "/chat/mistral/sleep", "no route"),
        (GATEWAY, "GET", "/chat/mistral//v1/models", "no route"),
        (GATEWAY, "GET", "/chat/nobody/v1/models", "no service"),
        (GATEWAY, "GET", "/chat", "no path"),
        (GATEWAY, "GET", "/", "no path"),
        (GATEWAY, "GET", "//mistral/v1/models", "no path"),
        // Reserved first segments are never namespaces.
        (GATEWAY, "GET", "/v1/models", "list"),
        (GATEWAY, "GET", "/v1/models/", "list"),
        (
            GATEWAY,
            "GET",
            "/v1/models/chat%2Fmistral",
            "card chat/mistral",
        ),
        (
            GATEWAY,
            "GET",
            "/v1/models/chat/mistral",
            "card chat/mistral",
        ),
        // Model.
        (GATEWAY, "POST", CHAT, "model"),
        (GATEWAY, "POST", "/generate", "model"),
        (GATEWAY, "GET", "/stream?prompt=hi", "no path"),
        (GATEWAY, "GET", "/metrics", "no path"),
        (GATEWAY, "GET", "/health", "no path"),
    ] {
        assert_eq!(
            ask(host, method.parse().unwrap(), uri),
            expected,
            "{method} {uri} at {host:?}"
        );
    }
}

#[test]
fn a_model_is_a_service_or_a_name_among_keyed_services() {
    let world = world();
    assert!(
        matches!(by_model(&world, "lab/open"), ModelMatch::Direct(s) if s.spec.model == "smollm")
    );
    assert!(
        matches!(by_model(&world, "mistral"), ModelMatch::Among([s]) if s.spec.id.name == "mistral")
    );
    assert!(matches!(by_model(&world, "smollm"), ModelMatch::Among([])));
    assert!(matches!(
        by_model(&world, "lab/nobody"),
        ModelMatch::Among([])
    ));
}

proptest! {
    /// Whatever the request looks like, a service is reached only by its own names and with a public route.
    #[test]
    fn no_request_strays(
        host in "(mistral|open|quiet|x)?\\.?(chat|lab|y)?(\\.svc)?(\\.cluster\\.local)?(:80)?",
        first in "(v1|chat|lab|metrics|%2e%2e|\\.\\.|)",
        second in "(mistral|open|models|quiet|)",
        rest in "(/v1/models|/health|/secret|/|//v1|)",
    ) {
        let world = world();
        let Ok(uri) = format!("/{first}/{second}{rest}").parse::<Uri>() else { return Ok(()); };
        if let Ok(Target::Service { service, path }) = resolve(&world, Some(&host), &Method::GET, &uri) {
            let id = &service.spec.id;
            let by_host = host.starts_with(&format!("{}.{}", id.name, id.namespace));
            let by_path = first == id.namespace && second == id.name;
            prop_assert!(by_host || by_path, "{host} {uri} -> {id}");
            prop_assert!(RESERVED_PATH_SEGMENTS.contains(&first_segment(path.path())));
        }
    }

    #[test]
    fn decoding_never_panics_and_keeps_plain_text(text in "[ -~]{0,40}") {
        let decoded = percent_decode(&text);
        if !text.contains('%') {
            prop_assert_eq!(decoded, text);
        }
    }
}
