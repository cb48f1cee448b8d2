//! Rotation, revocation, outages and floods, with a Secret source that counts its reads.
#![allow(clippy::unwrap_used, reason = "a panic is a test's way to fail")]

use std::sync::atomic::AtomicUsize;

use sha2::{Digest as _, Sha256};

use super::super::snapshot::testing::{service, snapshot};
use super::*;

type Answer = Result<BTreeMap<String, Vec<u8>>, ReadError>;

#[derive(Default)]
struct Fake {
    secrets: Mutex<HashMap<String, Answer>>,
    reads: AtomicUsize,
}

impl Fake {
    fn set(&self, namespace: &str, keys: &[&str]) {
        let data = keys
            .iter()
            .map(|key| {
                let digest = hex::encode(Sha256::digest(key.as_bytes()));
                (
                    format!("client-{key}"),
                    format!("sha256:{digest}").into_bytes(),
                )
            })
            .collect();
        lock(&self.secrets).insert(format!("{namespace}/keys"), Ok(data));
    }

    fn fail(&self, namespace: &str, error: ReadError) {
        lock(&self.secrets).insert(format!("{namespace}/keys"), Err(error));
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

impl SecretSource for Fake {
    fn read<'a>(
        &'a self,
        namespace: &'a str,
        name: &'a str,
    ) -> BoxFuture<'a, Result<BTreeMap<String, Vec<u8>>, ReadError>> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let result = lock(&self.secrets)
            .get(&format!("{namespace}/{name}"))
            .cloned()
            .unwrap_or(Err(ReadError::NotFound));
        Box::pin(async move {
            tokio::task::yield_now().await;
            result
        })
    }
}

const NEVER: Duration = Duration::from_secs(3600);

/// Every interval out of reach: only what a test shortens can happen.
fn frozen() -> KeyPolicy {
    KeyPolicy {
        refresh: NEVER,
        max_age: NEVER,
        miss_interval: NEVER,
        misses_per_second: 1_000_000,
        timeout: NEVER,
    }
}

struct Bench {
    source: Arc<Fake>,
    store: Arc<KeyStore>,
    service: Arc<Service>,
}

fn bench(policy: KeyPolicy, keys: &[&str]) -> Bench {
    let source = Arc::new(Fake::default());
    source.set("a", keys);
    let store = Arc::new(KeyStore::new(
        Arc::clone(&source) as Arc<dyn SecretSource>,
        policy,
    ));
    let snapshot = snapshot([service("a", "s", "m")], []);
    let service = Arc::clone(snapshot.service("a", "s").unwrap());
    Bench {
        source,
        store,
        service,
    }
}

impl Bench {
    async fn check(&self, key: &str) -> Verdict {
        self.ask(key, OnMiss::ReadAgain).await
    }

    async fn ask(&self, key: &str, on_miss: OnMiss) -> Verdict {
        let key = KeyDigest::of(key);
        self.store.check(&self.service, &key, on_miss).await
    }
}

fn client(name: &str) -> Verdict {
    Verdict::Client(format!("client-{name}"))
}

#[tokio::test]
async fn a_ring_is_read_once_and_used_many_times() {
    let bench = bench(frozen(), &["k"]);
    for _ in 0..10 {
        assert_eq!(bench.check("k").await, client("k"));
    }
    assert_eq!(bench.ask("wrong", OnMiss::Reject).await, Verdict::Rejected);
    assert_eq!(bench.source.reads(), 1);
}

#[tokio::test]
async fn a_new_key_works_at_its_first_use() {
    let policy = KeyPolicy {
        miss_interval: Duration::ZERO,
        ..frozen()
    };
    let bench = bench(policy, &["old"]);
    assert_eq!(bench.check("old").await, client("old"));
    bench.source.set("a", &["old", "new"]);
    assert_eq!(bench.ask("new", OnMiss::Reject).await, Verdict::Rejected);
    assert_eq!(bench.check("new").await, client("new"));
    assert_eq!(bench.source.reads(), 2);
}

#[tokio::test]
async fn wrong_keys_wait_together_for_one_read() {
    let policy = KeyPolicy {
        miss_interval: Duration::from_millis(100),
        ..frozen()
    };
    let bench = bench(policy, &["old"]);
    assert_eq!(bench.check("old").await, client("old"));
    bench.source.set("a", &["new"]);
    let began = Instant::now();
    let keys = ["new", "guess", "new", "wrong"];
    let verdicts = futures::future::join_all(keys.iter().map(|key| bench.check(key))).await;
    let expected = [
        client("new"),
        Verdict::Rejected,
        client("new"),
        Verdict::Rejected,
    ];
    assert_eq!(verdicts, expected);
    assert_eq!(bench.source.reads(), 2);
    assert!(
        began.elapsed() >= Duration::from_millis(50),
        "the interval was not kept"
    );
}

#[tokio::test]
async fn a_revoked_key_stops_once_the_ring_is_too_old() {
    let policy = KeyPolicy {
        refresh: Duration::ZERO,
        max_age: Duration::ZERO,
        ..frozen()
    };
    let bench = bench(policy, &["k"]);
    assert_eq!(bench.check("k").await, client("k"));
    bench.source.set("a", &[]);
    assert_eq!(bench.check("k").await, Verdict::Rejected);
}

#[tokio::test]
async fn an_old_ring_is_read_again_in_the_background() {
    let policy = KeyPolicy {
        refresh: Duration::ZERO,
        ..frozen()
    };
    let bench = bench(policy, &["k"]);
    // The first use has to wait for the read; the second is answered at once from the ring it found.
    assert_eq!(bench.check("k").await, client("k"));
    bench.source.set("a", &["other"]);
    assert_eq!(bench.check("k").await, client("k"));
    tokio::time::timeout(Duration::from_secs(10), async {
        while bench.ask("other", OnMiss::Reject).await != client("other") {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the background read never came");
}

#[tokio::test]
async fn an_outage_changes_nothing_and_a_withdrawn_role_shuts_the_door() {
    let policy = KeyPolicy {
        refresh: Duration::ZERO,
        max_age: Duration::ZERO,
        ..frozen()
    };
    let bench = bench(policy, &["k"]);
    assert_eq!(bench.check("k").await, client("k"));
    let outage = ReadError::Unavailable("connection refused".to_owned());
    bench.source.fail("a", outage);
    assert_eq!(bench.check("k").await, client("k"));
    assert_eq!(bench.check("wrong").await, Verdict::Rejected);
    bench.source.fail("a", ReadError::Forbidden);
    assert_eq!(
        bench.check("k").await,
        Verdict::Unreadable("the gateway may not read the Secret")
    );
    bench.source.set("a", &["k"]);
    assert_eq!(bench.check("k").await, client("k"));
}

#[tokio::test]
async fn a_flood_of_wrong_keys_reads_no_more_than_allowed() {
    let policy = KeyPolicy {
        miss_interval: Duration::ZERO,
        misses_per_second: 3,
        ..frozen()
    };
    let bench = bench(policy, &["k"]);
    let began = Instant::now();
    for i in 0..500 {
        assert_eq!(bench.check(&format!("wrong{i}")).await, Verdict::Rejected);
    }
    let seconds = usize::try_from(began.elapsed().as_secs()).unwrap() + 2;
    assert!(
        bench.source.reads() <= 1 + 3 * seconds,
        "{}",
        bench.source.reads()
    );
    assert!(bench.source.reads() > 1);
}

#[tokio::test]
async fn readers_of_one_secret_share_one_read() {
    let bench = bench(frozen(), &["k"]);
    let verdicts = futures::future::join_all((0..50).map(|_| bench.check("k"))).await;
    assert!(verdicts.iter().all(|v| *v == client("k")));
    assert_eq!(bench.source.reads(), 1);
}

#[tokio::test]
async fn rings_that_nobody_names_are_dropped() {
    let bench = bench(frozen(), &["k"]);
    bench.check("k").await;
    bench.store.retain(&snapshot([service("a", "s", "m")], []));
    assert_eq!(lock(&bench.store.entries).len(), 1);
    bench.store.retain(&snapshot([service("b", "s", "m")], []));
    assert!(lock(&bench.store.entries).is_empty());
}
