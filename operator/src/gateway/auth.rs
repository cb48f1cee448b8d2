//! Users' keys: how a request carries one, how a Secret lists them, how one is checked. Pure.
//!
//! A Secret holds `CLIENT: sha256:HEX`, the digest of a key and never the key. A presented key is hashed once and
//! its digest compared with every entry in constant time, without stopping at the first match, so the answer's
//! timing tells nothing about which entries exist.

use std::collections::BTreeMap;
use std::fmt;

use http::HeaderMap;
use http::header::AUTHORIZATION;
use sha2::{Digest as _, Sha256};
use subtle::{Choice, ConditionallySelectable as _, ConstantTimeEq as _};

/// SHA-256 of a presented key.
#[derive(Clone, Copy)]
pub struct KeyDigest([u8; 32]);

impl KeyDigest {
    /// Hashes a key.
    #[must_use]
    pub fn of(key: &str) -> Self {
        Self(Sha256::digest(key.as_bytes()).into())
    }
}

impl fmt::Debug for KeyDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyDigest(…)") // even a digest stays out of the logs
    }
}

/// The digest of the one bearer key of a request; `None` without one, or with several.
#[must_use]
pub fn presented(headers: &HeaderMap) -> Option<KeyDigest> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next()?.to_str().ok()?;
    if values.next().is_some() {
        return None;
    }
    let (scheme, key) = value.split_once(' ')?;
    let key = key.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then(|| KeyDigest::of(key))
}

/// The digests of one Secret.
#[derive(Default, Clone)]
pub struct KeyRing {
    clients: Vec<String>,
    entries: Vec<(u32, [u8; 32])>,
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing")
            .field("clients", &self.clients)
            .finish_non_exhaustive()
    }
}

impl KeyRing {
    /// Reads a Secret's data; an entry may list several digests, one a line, while a key is rotated.
    ///
    /// Also returns the names of the entries that are not digests: they let nobody in.
    #[must_use]
    pub fn parse(data: &BTreeMap<String, Vec<u8>>) -> (Self, Vec<String>) {
        let mut ring = Self::default();
        let mut malformed = Vec::new();
        for (client, value) in data {
            match digests(value) {
                Some(digests) => {
                    let index = u32::try_from(ring.clients.len())
                        .expect("a Secret of 1 MiB has fewer entries: this is a bug");
                    ring.clients.push(client.clone());
                    ring.entries.extend(digests.into_iter().map(|d| (index, d)));
                }
                None => malformed.push(client.clone()),
            }
        }
        (ring, malformed)
    }

    /// The client whose key this is. Takes the same time for every digest.
    #[must_use]
    pub fn client(&self, key: &KeyDigest) -> Option<&str> {
        let mut found = Choice::from(0);
        let mut client = 0u32;
        for (index, digest) in &self.entries {
            let equal = key.0.ct_eq(digest);
            client.conditional_assign(index, equal);
            found |= equal;
        }
        bool::from(found).then(|| self.clients[client as usize].as_str())
    }
}

/// The `sha256:HEX` lines of a value; `None` if there is none or one is malformed.
fn digests(value: &[u8]) -> Option<Vec<[u8; 32]>> {
    let text = std::str::from_utf8(value).ok()?;
    let digests: Option<Vec<[u8; 32]>> = text
        .split_whitespace()
        .map(|line| {
            let mut digest = [0u8; 32];
            hex::decode_to_slice(line.strip_prefix("sha256:")?, &mut digest).ok()?;
            Some(digest)
        })
        .collect();
    digests.filter(|digests| !digests.is_empty())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;

    fn entry(key: &str) -> Vec<u8> {
        format!("sha256:{}", hex::encode(Sha256::digest(key.as_bytes()))).into_bytes()
    }

    fn ring(entries: &[(&str, Vec<u8>)]) -> (KeyRing, Vec<String>) {
        KeyRing::parse(
            &entries
                .iter()
                .map(|(c, v)| ((*c).to_owned(), v.clone()))
                .collect(),
        )
    }

    #[test]
    fn the_digest_format_is_fixed() {
        // `printf secret | sha256sum`
        let value = b"sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b\n";
        let (ring, malformed) = ring(&[("alice", value.to_vec())]);
        assert!(malformed.is_empty());
        assert_eq!(ring.client(&KeyDigest::of("secret")), Some("alice"));
        assert_eq!(ring.client(&KeyDigest::of("secret ")), None);
    }

    #[test]
    fn two_digests_serve_while_a_key_is_rotated() {
        let mut both = entry("old");
        both.push(b'\n');
        both.extend(entry("new"));
        let (ring, _) = ring(&[("alice", both), ("bob", entry("bob"))]);
        assert_eq!(ring.client(&KeyDigest::of("old")), Some("alice"));
        assert_eq!(ring.client(&KeyDigest::of("new")), Some("alice"));
        assert_eq!(ring.client(&KeyDigest::of("bob")), Some("bob"));
    }

    #[test]
    fn what_is_not_a_digest_lets_nobody_in() {
        let (ring, mut malformed) = ring(&[
            ("plain", b"secret".to_vec()),
            ("empty", Vec::new()),
            ("short", b"sha256:abcd".to_vec()),
            ("binary", vec![0xff, 0xfe]),
            (
                "half",
                [entry("x").as_slice(), b" sha256:zz".as_slice()].concat(),
            ),
        ]);
        malformed.sort();
        assert_eq!(malformed, ["binary", "empty", "half", "plain", "short"]);
        for key in ["secret", "", "x", "abcd"] {
            assert_eq!(ring.client(&KeyDigest::of(key)), None);
        }
    }

    #[test]
    fn only_one_bearer_key_counts() {
        let headers = |values: &[&'static str]| {
            let mut headers = HeaderMap::new();
            for value in values {
                headers.append(AUTHORIZATION, HeaderValue::from_static(value));
            }
            headers
        };
        assert!(presented(&headers(&["Bearer k"])).is_some());
        assert!(presented(&headers(&["bearer  k "])).is_some());
        for bad in [
            &[][..],
            &["k"],
            &["Basic k"],
            &["Bearer"],
            &["Bearer  "],
            &["Bearer a", "Bearer b"],
        ] {
            assert!(presented(&headers(bad)).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn digests_stay_out_of_debug_output() {
        let (ring, _) = ring(&[("alice", entry("secret"))]);
        let shown = format!("{ring:?} {:?}", KeyDigest::of("secret"));
        assert!(shown.contains("alice") && !shown.contains("2bb8") && !shown.contains("43"));
    }

    proptest! {
        #[test]
        fn exactly_the_holders_get_in(
            keys in prop::collection::btree_set("[a-z0-9]{1,8}", 1..20),
            stranger in "[A-Z]{1,8}",
        ) {
            let data = keys.iter().map(|k| (format!("client-{k}"), entry(k))).collect();
            let (ring, malformed) = KeyRing::parse(&data);
            prop_assert!(malformed.is_empty());
            for key in &keys {
                let expected = format!("client-{key}");
                prop_assert_eq!(ring.client(&KeyDigest::of(key)), Some(expected.as_str()));
            }
            prop_assert_eq!(ring.client(&KeyDigest::of(&stranger)), None);
        }
    }
}
