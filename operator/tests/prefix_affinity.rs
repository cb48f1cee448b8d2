//! How much of what replicas have cached the gateway's routing finds: a chat trace through the real routing code and the
//! runtime's own block manager and hashes (its sources, so that the crates stay apart), four replicas against one that is
//! as large as all of them, and against random choice.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    missing_docs,
    reason = "a panic is a test's way to fail"
)]

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::sync::Arc;

use ashlar_operator::gateway::affinity::{Index, Prefix};
use ashlar_operator::gateway::limits::Limits;
use ashlar_operator::gateway::route::{Choice, pick};
use ashlar_operator::gateway::snapshot::{
    Access, GatewayNames, InFlight, Replica, ReplicaSpec, ServiceId, ServiceSpec, Snapshot,
};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::{Value, json};

use kv_cache::{BlockHasher, BlockManager, BlockTable};

/// What the runtime's cache takes from the rest of it.
mod engine {
    pub(crate) mod request {
        pub(crate) type TokenId = u32;
    }
}

#[path = "../../runtime/src/kv_cache/mod.rs"]
#[allow(
    dead_code,
    unreachable_pub,
    unused_imports,
    private_interfaces,
    reason = "the runtime's, as it is"
)]
mod kv_cache;

const REPLICAS: usize = 4;
/// Blocks of 16 tokens in one replica's cache: 16,000 tokens, so that four together just hold the chats that go on.
const BLOCKS: u32 = 1000;
const BLOCK_TOKENS: u32 = 16;
/// Requests that are open at one time, over all replicas.
const OPEN: usize = 24;
/// Chats that go on at one time, and applications that each begin their chats with their own system prompt.
const CHATS: usize = 60;
const APPLICATIONS: usize = 24;
const REQUESTS: usize = 6000;

struct Chat {
    messages: Vec<Value>,
    turns: usize,
}

fn words(rng: &mut StdRng, count: usize) -> String {
    let mut text = String::new();
    for _ in 0..count {
        let _ = write!(text, "w{} ", rng.random_range(0..50_000u32));
    }
    text
}

/// Tokens of about four bytes, the same for the same beginning: what a tokenizer gives a chat's template.
fn tokens(messages: &[Value]) -> Vec<u32> {
    let mut rendered = String::new();
    for message in messages {
        let (role, content) = (message["role"].as_str(), message["content"].as_str());
        let _ = write!(rendered, "<|{}|>{}<|end|>", role.unwrap(), content.unwrap());
    }
    rendered
        .as_bytes()
        .chunks(4)
        .map(|bytes| {
            bytes
                .iter()
                .fold(0u32, |token, byte| token << 8 | u32::from(*byte))
        })
        .collect()
}

/// The chats' turns in the order in which they come; the same for everybody.
struct Trace {
    rng: StdRng,
    systems: Vec<String>,
    chats: Vec<Chat>,
}

impl Trace {
    fn new() -> Self {
        let mut rng = StdRng::seed_from_u64(7);
        let systems = (0..APPLICATIONS).map(|_| words(&mut rng, 150)).collect();
        let mut trace = Self {
            rng,
            systems,
            chats: Vec::new(),
        };
        for _ in 0..CHATS {
            let chat = trace.begin();
            trace.chats.push(chat);
        }
        trace
    }

    fn begin(&mut self) -> Chat {
        let system = self.rng.random_range(0..APPLICATIONS);
        Chat {
            messages: vec![json!({"role": "system", "content": self.systems[system]})],
            turns: self.rng.random_range(2..9),
        }
    }

    /// The next request's messages, and those with its answer.
    fn next(&mut self) -> (Vec<Value>, Vec<Value>) {
        let at = self.rng.random_range(0..CHATS);
        let question = words(&mut self.rng, 30);
        let answer = words(&mut self.rng, 60);
        let chat = &mut self.chats[at];
        chat.messages
            .push(json!({"role": "user", "content": question}));
        let asked = chat.messages.clone();
        chat.messages
            .push(json!({"role": "assistant", "content": answer}));
        let answered = chat.messages.clone();
        chat.turns -= 1;
        if chat.turns == 0 {
            self.chats[at] = self.begin();
        }
        (asked, answered)
    }
}

/// The runtimes' caches, and the requests that hold blocks of them.
struct Caches {
    managers: Vec<BlockManager>,
    open: VecDeque<(usize, BlockTable, Option<InFlight>)>,
    found: u64,
    asked: u64,
}

impl Caches {
    fn new(count: usize, blocks: u32) -> Self {
        let manager = || BlockManager::new(blocks, BLOCK_TOKENS, true);
        Self {
            managers: (0..count).map(|_| manager()).collect(),
            open: VecDeque::new(),
            found: 0,
            asked: 0,
        }
    }

    fn end_oldest(&mut self) {
        let (replica, mut table, _) = self.open.pop_front().unwrap();
        self.managers[replica].free(&mut table);
    }

    fn serve(&mut self, replica: usize, trace: &(Vec<Value>, Vec<Value>), guard: Option<InFlight>) {
        if self.open.len() == OPEN {
            self.end_oldest();
        }
        let (prompt, whole) = (tokens(&trace.0), tokens(&trace.1));
        let mut hashes = Vec::new();
        let hasher = BlockHasher::new(BLOCK_TOKENS, 0, None);
        hasher.extend(&mut hashes, &prompt);
        let length = u32::try_from(prompt.len()).unwrap();
        let total = u32::try_from(whole.len()).unwrap();
        let mut table = BlockTable::default();
        loop {
            let manager = &mut self.managers[replica];
            let hits = manager.lookup(&hashes, length);
            if manager.admit(&mut table, &hits, manager.blocks_for(total), 0) {
                self.found += hits.len() as u64 * u64::from(BLOCK_TOKENS);
                break;
            }
            self.end_oldest();
        }
        self.asked += u64::from(length);
        hashes.clear();
        hasher.extend(&mut hashes, &whole);
        for (block, hash) in table.blocks().to_vec().into_iter().zip(&hashes) {
            self.managers[replica].publish(block, *hash);
        }
        self.open.push_back((replica, table, guard));
    }

    fn hit_rate(&self) -> f64 {
        self.found as f64 / self.asked as f64
    }
}

fn replicas() -> Vec<Arc<Replica>> {
    let names = GatewayNames {
        service: "ashlar-gateway".to_owned(),
        namespace: "ashlar-system".to_owned(),
        cluster_domain: "cluster.local".to_owned(),
    };
    let service = ServiceSpec {
        id: ServiceId::new("a", "s"),
        model: "m".to_owned(),
        access: Access::Open,
        limits: Limits::default(),
        hosts: Vec::new(),
        alias: true,
        created: 1,
        canary: None,
    };
    let pods = (0..REPLICAS).map(|number| ReplicaSpec {
        service: ServiceId::new("a", "s"),
        uid: format!("uid-{number}"),
        revision: String::new(),
        ready_since: "t0".to_owned(),
        address: format!("10.0.0.{number}:8000").parse().unwrap(),
        tls: None,
    });
    let snapshot = Snapshot::build(&Snapshot::empty(names), [service], pods);
    snapshot.service("a", "s").unwrap().replicas.clone()
}

#[test]
fn a_chat_finds_its_beginning_again() {
    let replicas = replicas();
    let (mut index, mut rng) = (Index::default(), StdRng::seed_from_u64(1));
    let mut routed = Caches::new(REPLICAS, BLOCKS);
    let mut random = Caches::new(REPLICAS, BLOCKS);
    let mut one = Caches::new(1, BLOCKS * REPLICAS as u32);
    let mut trace = Trace::new();
    let mut taken = [0usize; REPLICAS];
    for _ in 0..REQUESTS {
        let turn = trace.next();
        let body = json!({"model": "m", "messages": turn.0, "stream": true}).to_string();
        let prefix = Prefix::of_body(body.as_bytes()).unwrap();
        let choice = Choice {
            excluded: &[],
            prefix: Some(&prefix),
        };
        let replica = pick(&replicas, &choice, &index, &mut rng).unwrap();
        index.sent(&prefix, replica.id);
        let at = replicas.iter().position(|r| r.id == replica.id).unwrap();
        taken[at] += 1;
        routed.serve(at, &turn, Some(replica.enter()));
        random.serve(rng.random_range(0..REPLICAS), &turn, None);
        one.serve(0, &turn, None);
    }
    let (routed, random, one) = (routed.hit_rate(), random.hit_rate(), one.hit_rate());
    println!(
        "prompt tokens found in a cache: {:.1} % routed, {:.1} % at random, {:.1} % in one replica of four times the cache; requests by replica {taken:?}",
        routed * 100.0,
        random * 100.0,
        one * 100.0
    );
    assert!(routed >= 0.9 * one, "{routed} of {one}");
    assert!(routed >= 2.0 * random, "{routed} against {random}");
    // Affinity does not come at the price of balance.
    let most = *taken.iter().max().unwrap();
    assert!(most * REPLICAS <= REQUESTS * 3 / 2, "{taken:?}");
}
