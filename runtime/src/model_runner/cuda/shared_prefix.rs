//! Which decode rows begin with the same blocks: attention reads those once for several rows.

use std::collections::HashMap;

use ashlar_kernels::cuda::decode_plan::SharedPrefix;

use super::BLOCK_SIZE;
use crate::kv_cache::BlockId;

/// Fewest rows that are worth a group.
const MIN_ROWS: usize = 4;
/// Fewest blocks that are worth a group, 512 tokens.
const MIN_BLOCKS: usize = 32;
/// Fewest blocks that a group must save its rows from reading one by one: on an H100, 16 rows gain nothing from 2,048 tokens in
/// common, and 64 rows half of attention's time.
const MIN_SAVED: usize = 2048;

/// Groups of rows, given each row's tokens and blocks; a row is in one group at most.
pub(super) fn shared_prefixes(rows: &[(u32, &[BlockId])]) -> Vec<SharedPrefix> {
    let mut by_first: HashMap<BlockId, Vec<u32>> = HashMap::new();
    for (index, (length, blocks)) in rows.iter().enumerate() {
        // The block of the last token is the row's own.
        if whole_blocks(*length) >= MIN_BLOCKS {
            by_first.entry(blocks[0]).or_default().push(index as u32);
        }
    }
    let mut groups: Vec<SharedPrefix> = by_first
        .into_values()
        .filter(|members| members.len() >= MIN_ROWS)
        .map(|members| {
            let (_, first) = rows[members[0] as usize];
            let common = members.iter().map(|member| {
                let (length, blocks) = rows[*member as usize];
                common_blocks(first, blocks).min(whole_blocks(length))
            });
            SharedPrefix {
                pages: common.min().unwrap_or(0),
                members,
            }
        })
        .filter(|group| {
            let saved = (group.members.len() - 1) * group.pages;
            group.pages >= MIN_BLOCKS && saved >= MIN_SAVED
        })
        .collect();
    // The order of a map is no one's business.
    groups.sort_by_key(|group| group.members[0]);
    groups
}

fn whole_blocks(length: u32) -> usize {
    (length.saturating_sub(1) / BLOCK_SIZE) as usize
}

fn common_blocks(a: &[BlockId], b: &[BlockId]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
#[allow(missing_docs)] // Tests fail by panicking.
mod tests {
    use super::shared_prefixes;
    use crate::kv_cache::BlockId;

    /// `shared` blocks from `base`, then `own` blocks from `1000 · row`.
    fn blocks(base: u32, shared: u32, row: u32, own: u32) -> Vec<BlockId> {
        let own = (0..own).map(|i| BlockId(100_000 * (row + 1) + i));
        (base..base + shared).map(BlockId).chain(own).collect()
    }

    #[test]
    fn rows_with_a_long_common_beginning_are_a_group() {
        let tables: Vec<Vec<BlockId>> = (0..60)
            .map(|row| blocks(0, 40 + row, row, 3))
            .chain((60..63).map(|row| blocks(5000, 2000, row, 3)))
            .chain((63..200).map(|row| blocks(10_000, 31, row, 30)))
            .chain((200..210).map(|row| blocks(15_000, 50, row, 30)))
            .collect();
        let rows: Vec<(u32, &[BlockId])> = tables
            .iter()
            .map(|table| (16 * table.len() as u32 - 5, table.as_slice()))
            .collect();
        let groups = shared_prefixes(&rows);
        // Three rows are too few, 31 blocks too short, ten times 50 blocks not worth it.
        assert_eq!(groups.len(), 1);
        assert_eq!(groups[0].members, (0..60).collect::<Vec<u32>>());
        assert_eq!(groups[0].pages, 40);
    }

    #[test]
    fn the_block_of_the_last_token_is_not_shared() {
        let table = blocks(0, 40, 0, 0);
        let rows: Vec<(u32, &[BlockId])> = (0..90).map(|_| (640, table.as_slice())).collect();
        assert_eq!(shared_prefixes(&rows)[0].pages, 39);
        let rows: Vec<(u32, &[BlockId])> = (0..90).map(|_| (512, table.as_slice())).collect();
        assert!(shared_prefixes(&rows).is_empty());
    }
}
