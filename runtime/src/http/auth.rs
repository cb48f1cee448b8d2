//! API keys: compared as digests, in constant time.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http::{StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::{Choice, ConstantTimeEq};

use super::{
    App,
    access::{AccessInfo, Tenant},
    error::ApiError,
};

/// Keys that open the API. Only their digests are kept.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<[u8; 32]>);

impl ApiKeys {
    /// These keys; empty ones are left out.
    #[must_use]
    pub fn new<S: AsRef<str>>(keys: &[S]) -> Self {
        let keys = keys.iter().map(AsRef::as_ref);
        Self(
            keys.filter(|key| !key.is_empty())
                .map(|key| Sha256::digest(key).into())
                .collect(),
        )
    }

    /// No key is needed.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether `key` is one of them; takes the same time whatever the answer.
    #[must_use]
    pub fn accept(&self, key: &str) -> bool {
        let digest: [u8; 32] = Sha256::digest(key).into();
        let found = self.0.iter().fold(Choice::from(0), |found, known| {
            found | known.as_slice().ct_eq(digest.as_slice())
        });
        found.into()
    }
}

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({})", self.0.len())
    }
}

/// 401 for a request without a good key.
pub(super) async fn check(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let keys = &app.config.api_keys;
    let headers = request.headers();
    let bearer = headers
        .get(header::AUTHORIZATION)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
        .map(|(_, key)| key.trim());
    // Anthropic's clients send their key in a header of its own.
    let key = bearer.or_else(|| headers.get("x-api-key").and_then(|key| key.to_str().ok()));
    let named = app.config.tenant_header.as_ref();
    let who = named
        .and_then(|name| headers.get(name))
        .and_then(|value| value.to_str().ok())
        .or(key);
    if let (Some(who), Some(info)) = (who, request.extensions().get::<Arc<AccessInfo>>()) {
        // Set once, here.
        let _ = info
            .tenant
            .set(tenant(who, app.config.isolate_prefix_cache));
    }
    if !keys.is_open() && !key.is_some_and(|key| keys.accept(key)) {
        return ApiError::new(
            StatusCode::UNAUTHORIZED,
            "the API key is missing or wrong: send it as \"Authorization: Bearer KEY\"",
        )
        .into_response();
    }
    next.run(request).await
}

/// A name or key as a tenant; neither is kept.
fn tenant(who: &str, isolate: bool) -> Tenant {
    let digest: [u8; 32] = Sha256::digest(who).into();
    let mut id = [0; 8];
    id.copy_from_slice(&digest[..8]);
    Tenant {
        id: u64::from_le_bytes(id),
        salt: isolate.then(|| hex::encode(digest)),
    }
}
