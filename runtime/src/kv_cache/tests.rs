#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::{HashMap, HashSet};

use proptest::prelude::*;

use super::{BlockHash, BlockHasher, BlockId, BlockManager, BlockTable};

const BLOCK_SIZE: u32 = 4;

fn manager(num_blocks: u32) -> BlockManager {
    BlockManager::new(num_blocks, BLOCK_SIZE, true)
}

fn hashes(tokens: &[u32], salt: Option<&str>) -> Vec<BlockHash> {
    let mut hashes = Vec::new();
    BlockHasher::new(BLOCK_SIZE, 0, salt).extend(&mut hashes, tokens);
    hashes
}

fn filled(manager: &mut BlockManager, num_blocks: u32) -> BlockTable {
    let mut table = BlockTable::default();
    assert!(manager.admit(&mut table, &[], num_blocks, 0));
    table
}

/// A table whose blocks hold `tokens`, published.
fn published(manager: &mut BlockManager, tokens: &[u32]) -> BlockTable {
    let blocks = manager.blocks_for(u32::try_from(tokens.len()).unwrap());
    let table = filled(manager, blocks);
    for (&block, hash) in table.blocks().iter().zip(hashes(tokens, None)) {
        assert!(manager.publish(block, hash));
    }
    table
}

#[test]
fn the_null_block_is_never_handed_out() {
    let mut manager = manager(5);
    assert_eq!(manager.num_total(), 4);
    let table = filled(&mut manager, 4);
    assert!(!table.blocks().contains(&BlockId::NULL));
    assert!(!manager.admit(&mut BlockTable::default(), &[], 1, 0));
    manager.check_integrity([&table]).unwrap();
}

#[test]
fn too_few_blocks_take_nothing() {
    let mut manager = manager(5);
    let mut table = filled(&mut manager, 2);
    assert!(!manager.grow(&mut table, 5 * BLOCK_SIZE));
    assert!(!manager.admit(&mut BlockTable::default(), &[], 2, 1));
    assert_eq!((table.len(), manager.num_free()), (2, 2));
    assert!(manager.grow(&mut table, 3 * BLOCK_SIZE + 1));
    assert_eq!((table.len(), manager.num_free()), (4, 0));
    manager.check_integrity([&table]).unwrap();
}

#[test]
fn a_prefix_is_found_by_blocks_and_leaves_a_token_to_compute() {
    let mut manager = manager(20);
    let tokens: Vec<u32> = (0..12).collect();
    let mut first = published(&mut manager, &tokens);
    let held = first.blocks().to_vec();
    let found = |tokens: &[u32]| {
        let len = u32::try_from(tokens.len()).unwrap();
        manager.lookup(&hashes(tokens, None), len)
    };
    // 12 tokens are 3 blocks, but the last token has to be computed.
    assert_eq!(found(&tokens), held[..2]);
    assert_eq!(found(&(0..13).collect::<Vec<_>>()), held[..3]);
    assert_eq!(found(&[0, 1, 2, 3, 4, 5, 6, 99, 8]), held[..1]);
    assert_eq!(found(&[9, 1, 2, 3, 4, 5, 6, 7, 8]), []);
    assert_eq!(manager.lookup(&hashes(&tokens, Some("tenant")), 12), []);
    manager.free(&mut first);
    // Freed blocks keep their content until they are taken.
    let hits = manager.lookup(&hashes(&tokens, None), 12);
    let mut second = BlockTable::default();
    assert!(manager.admit(&mut second, &hits, 3, 0));
    assert_eq!(second.blocks()[..2], held[..2]);
    manager.check_integrity([&second]).unwrap();
}

#[test]
fn equal_content_has_one_name_and_outlives_its_copy() {
    let mut manager = manager(20);
    let tokens: Vec<u32> = (0..8).collect();
    let mut first = published(&mut manager, &tokens);
    let mut second = filled(&mut manager, 2);
    for (&block, hash) in second.blocks().iter().zip(hashes(&tokens, None)) {
        assert!(!manager.publish(block, hash));
    }
    manager.free(&mut second);
    assert_eq!(manager.lookup(&hashes(&tokens, None), 9), first.blocks());
    manager.free(&mut first);
    manager.check_integrity([]).unwrap();
}

#[test]
fn ends_of_prefixes_are_evicted_before_their_beginnings_and_empty_blocks_before_both() {
    let mut manager = manager(8);
    let tokens: Vec<u32> = (0..16).collect();
    let mut cached = published(&mut manager, &tokens);
    let mut empty = filled(&mut manager, 3);
    manager.free(&mut cached);
    manager.free(&mut empty);
    let found = |manager: &BlockManager| manager.lookup(&hashes(&tokens, None), 17).len();
    let mut taken = filled(&mut manager, 3);
    assert_eq!(found(&manager), 4);
    for left in [3, 2, 1, 0] {
        let tokens = u32::try_from(taken.len()).unwrap() * BLOCK_SIZE + 1;
        assert!(manager.grow(&mut taken, tokens));
        assert_eq!(found(&manager), left);
    }
    manager.check_integrity([&taken]).unwrap();
}

#[test]
fn a_new_block_never_evicts_a_hit_of_the_same_admission() {
    let mut manager = manager(4);
    let tokens: Vec<u32> = (0..8).collect();
    let mut cached = published(&mut manager, &tokens);
    manager.free(&mut cached);
    let hits = manager.lookup(&hashes(&tokens, None), 9);
    let mut table = BlockTable::default();
    assert!(!manager.admit(&mut table, &hits, 4, 0));
    assert!(manager.admit(&mut table, &hits, 3, 0));
    assert_eq!(table.blocks()[..2], hits);
    assert!(!hits.contains(&table.blocks()[2]));
    manager.check_integrity([&table]).unwrap();
}

#[test]
fn a_withdrawn_block_is_not_found() {
    let mut manager = manager(9);
    let tokens: Vec<u32> = (0..8).collect();
    let table = published(&mut manager, &tokens);
    manager.withdraw(table.blocks()[1]);
    let found = manager.lookup(&hashes(&tokens, None), 9);
    assert_eq!(found, table.blocks()[..1]);
    manager.check_integrity([&table]).unwrap();
}

#[test]
fn without_caching_nothing_is_found() {
    let mut manager = BlockManager::new(9, BLOCK_SIZE, false);
    let tokens: Vec<u32> = (0..8).collect();
    let table = filled(&mut manager, 2);
    assert!(!manager.publish(table.blocks()[0], hashes(&tokens, None)[0]));
    assert_eq!(manager.lookup(&hashes(&tokens, None), 8), []);
}

#[test]
fn broken_books_are_noticed() {
    let mut manager = manager(9);
    let table = filled(&mut manager, 2);
    manager.check_integrity([]).unwrap_err();
    manager.check_integrity([&table, &table]).unwrap_err();
    manager.check_integrity([&table]).unwrap();
}

#[test]
fn a_hash_covers_everything_before_its_block_and_the_salt() {
    let all: HashSet<BlockHash> = [
        hashes(&[1, 2, 3, 4, 5, 6, 7, 8], None),
        hashes(&[0, 2, 3, 4, 5, 6, 7, 8], None),
        hashes(&[1, 2, 3, 4, 5, 6, 7, 8], Some("")),
        hashes(&[1, 2, 3, 4, 5, 6, 7, 8], Some("a")),
    ]
    .into_iter()
    .flatten()
    .collect();
    assert_eq!(all.len(), 8);
    let mut group_1 = Vec::new();
    BlockHasher::new(BLOCK_SIZE, 1, None).extend(&mut group_1, &[1, 2, 3, 4]);
    assert!(!all.contains(&group_1[0]));
}

#[test]
fn slots_follow_the_table() {
    let mut manager = manager(9);
    let table = filled(&mut manager, 2);
    let block = i64::from(table.blocks()[1].0);
    assert_eq!(table.slot_of(5, BLOCK_SIZE), block * 4 + 1);
}

#[derive(Debug, Clone)]
enum Op {
    /// A sequence with this prompt starts, its full blocks published.
    Start(Vec<u32>),
    /// Sequence `i` gets this token.
    Append(usize, u32),
    /// Sequence `i` ends.
    End(usize),
    /// Block `i` of those in use is withdrawn.
    Withdraw(usize),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        prop::collection::vec(0u32..2, 1..30).prop_map(Op::Start),
        (any::<usize>(), 0u32..2).prop_map(|(i, token)| Op::Append(i, token)),
        (any::<usize>(), 0u32..2).prop_map(|(i, token)| Op::Append(i, token)),
        any::<usize>().prop_map(Op::End),
        any::<usize>().prop_map(Op::Withdraw),
    ]
}

/// A table, its tokens, and how many of its blocks were published.
type Live = (BlockTable, Vec<u32>, usize);

fn publish(manager: &mut BlockManager, live: &mut Live, content: &mut HashMap<BlockId, Vec<u32>>) {
    let (table, tokens, done) = live;
    for (index, hash) in hashes(tokens, None).into_iter().enumerate().skip(*done) {
        let block = table.blocks()[index];
        content.insert(block, tokens[..(index + 1) * BLOCK_SIZE as usize].to_vec());
        manager.publish(block, hash);
        *done = index + 1;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever happens, no block is lost or held twice by mistake, and a hit holds what it promises.
    #[test]
    fn blocks_are_conserved(num_blocks in 2u32..40, ops in prop::collection::vec(op(), 1..120)) {
        let mut manager = manager(num_blocks);
        let mut live: Vec<Live> = Vec::new();
        let mut content: HashMap<BlockId, Vec<u32>> = HashMap::new();
        for op in ops {
            match op {
                Op::Start(tokens) => {
                    let len = u32::try_from(tokens.len()).unwrap();
                    let hits = manager.lookup(&hashes(&tokens, None), len);
                    for (index, hit) in hits.iter().enumerate() {
                        let end = (index + 1) * BLOCK_SIZE as usize;
                        prop_assert_eq!(&content[hit][..], &tokens[..end]);
                    }
                    let mut table = BlockTable::default();
                    if manager.admit(&mut table, &hits, manager.blocks_for(len), 0) {
                        let mut started = (table, tokens, hits.len());
                        publish(&mut manager, &mut started, &mut content);
                        live.push(started);
                    }
                }
                Op::Append(i, token) if !live.is_empty() => {
                    let at = i % live.len();
                    let len = u32::try_from(live[at].1.len()).unwrap() + 1;
                    if manager.grow(&mut live[at].0, len) {
                        live[at].1.push(token);
                        publish(&mut manager, &mut live[at], &mut content);
                    }
                }
                Op::End(i) if !live.is_empty() => {
                    let (mut table, ..) = live.swap_remove(i % live.len());
                    manager.free(&mut table);
                }
                Op::Withdraw(i) if !live.is_empty() => {
                    let table = &live[i % live.len()].0;
                    manager.withdraw(table.blocks()[i % table.len()]);
                }
                _ => {}
            }
            manager.check_integrity(live.iter().map(|l| &l.0)).unwrap();
            prop_assert_eq!(manager.all_free(), live.iter().all(|l| l.0.is_empty()));
        }
        for (mut table, ..) in live {
            manager.free(&mut table);
        }
        prop_assert_eq!(manager.num_free(), num_blocks - 1);
        prop_assert!(manager.all_free());
        manager.check_integrity([]).unwrap();
    }
}
