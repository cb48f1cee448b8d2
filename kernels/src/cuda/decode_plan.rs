//! How decode attention is cut into items: rows that share the beginning of their tables read it together, long tables are
//! cut so that a small batch fills the GPU.

use super::{attention::HeadShape, rope::BLOCK_SIZE};

/// Fewest pages in an item, one for each warp of a block, and the most pages of rows that are not cut: merging parts takes
/// longer than reading them one after another.
const NARROW: [usize; 2] = [4, 16];
const WIDE: [usize; 2] = [16, 32];
/// Narrow blocks on a multiprocessor.
const BLOCKS: usize = 3;
/// i32 values of an item, as in `decode_attention.cu`.
pub const ITEM_WORDS: usize = 8;
/// Parts of rows that there is room for, for each item.
pub const PARTS_PER_ITEM: usize = 4;

/// What decode attention's work is cut for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cut {
    /// Whether an item is the work of a block of 16 warps, which has a multiprocessor for itself, instead of 4.
    pub wide: bool,
    /// Items that fill the GPU once: if rows are fewer, they are cut.
    pub fill: usize,
    /// Items that there is room for, at least one for each row.
    pub max_items: usize,
}

impl Cut {
    /// What suits `rows` rows that share nothing: wide blocks if there are four multiprocessors for each of a
    /// row's kv heads: with more rows narrow ones, of which several hide each other's waits, are as fast.
    #[must_use]
    pub fn alone(shape: &HeadShape, rows: usize, multiprocessors: u32) -> Self {
        let items = multiprocessors as usize / shape.num_kv_heads;
        if !shape.has_wide() || 4 * rows > items {
            return Self::shared(shape, rows, multiprocessors);
        }
        Self {
            wide: true,
            fill: items,
            max_items: items,
        }
    }

    /// What suits `rows` rows, some of which read together: a small batch is cut so that it fills the GPU, and a large one has
    /// room for what its rows share.
    #[must_use]
    pub fn shared(shape: &HeadShape, rows: usize, multiprocessors: u32) -> Self {
        let fill = (BLOCKS * multiprocessors as usize).div_ceil(shape.num_kv_heads);
        Self {
            wide: false,
            fill,
            max_items: rows + fill.max(rows / 2),
        }
    }
}

/// Rows whose tables begin with the same pages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharedPrefix {
    /// The rows, by their index.
    pub members: Vec<u32>,
    /// Pages that all of them begin with, whole and older than the step.
    pub pages: usize,
}

/// Decode attention's list of work.
#[derive(Debug, Default)]
pub struct DecodePlan {
    /// `(first member, members, first page, page behind the last, first part, …)` of each item.
    pub items: Vec<[i32; ITEM_WORDS]>,
    /// Rows that items work for.
    pub members: Vec<i32>,
    /// For each row the first of its `slots`, and how many.
    pub row_parts: Vec<[i32; 2]>,
    /// Where the parts of rows lie, those of a row one after another.
    pub slots: Vec<i32>,
    /// Groups of rows that one item can take: (first in `members`, members, pages).
    chunks: Vec<(usize, usize, usize)>,
    /// Pages of each row: its own first, and the end.
    own: Vec<(usize, usize)>,
    /// Of each part of a row: the row, and its slot.
    parts: Vec<(usize, i32)>,
}

impl DecodePlan {
    /// Entries that `members` may have for so many rows.
    #[must_use]
    pub fn max_members(rows: usize) -> usize {
        2 * rows
    }

    /// Cuts the work so that there are about `cut.fill` items if the rows alone are fewer, but none so small, and no row so short,
    /// that it takes longer. `shared` are prefixes of different rows; those for which `cut.max_items` leave no room are left out,
    /// and their rows read them one by one.
    ///
    /// # Panics
    /// When there are more rows than items, a wide block would have several rows, or a prefix is longer than what a member has
    /// besides its last token.
    pub fn make(
        &mut self,
        shape: &HeadShape,
        context_lens: &[u32],
        shared: &[SharedPrefix],
        cut: &Cut,
    ) {
        let max_items = cut.max_items;
        assert!(
            context_lens.len() <= max_items,
            "every row has an item: this is a bug"
        );
        assert!(
            !cut.wide || shared.is_empty(),
            "wide blocks have one row each: this is a bug"
        );
        let [min_pages, whole_pages] = if cut.wide { WIDE } else { NARROW };
        self.prepare(shape, context_lens, shared, max_items);
        let own = self.own.iter().map(|(begin, end)| end - begin);
        let all = own.chain(self.chunks.iter().map(|chunk| chunk.2));
        let longest = all.max().unwrap_or(0);
        let most = cut
            .fill
            .max(context_lens.len() + self.chunks.len())
            .min(max_items);
        // The smallest size whose items fit: fewer pages, more items.
        let (mut low, mut high) = (min_pages, longest.max(min_pages));
        if longest <= whole_pages {
            low = high;
        }
        while low < high {
            let middle = usize::midpoint(low, high);
            let (items, parts) = self.count(middle);
            if items <= most && parts <= max_items * PARTS_PER_ITEM {
                high = middle;
            } else {
                low = middle + 1;
            }
        }
        self.cut(high);
    }

    /// Finds what each row reads alone, and who reads what together.
    fn prepare(
        &mut self,
        shape: &HeadShape,
        context_lens: &[u32],
        shared: &[SharedPrefix],
        max_items: usize,
    ) {
        let rows = context_lens.len();
        self.own.clear();
        self.own.extend(context_lens.iter().map(|length| {
            let length = *length as usize;
            let first = match shape.window {
                0 => 0,
                window => length.saturating_sub(window) / BLOCK_SIZE,
            };
            (first, length.div_ceil(BLOCK_SIZE))
        }));
        self.members.clear();
        self.members.extend((0..rows).map(|row| row as i32));
        self.chunks.clear();
        let together = shape.rows_per_item();
        if together < 2 || shape.window > 0 {
            return;
        }
        for prefix in shared {
            let num_chunks = prefix.members.len().div_ceil(together);
            let has_parts = rows + self.members.len() <= max_items * PARTS_PER_ITEM;
            if rows + self.chunks.len() + num_chunks > max_items || !has_parts {
                continue;
            }
            let size = prefix.members.len().div_ceil(num_chunks);
            for members in prefix.members.chunks(size) {
                let chunk = (self.members.len(), members.len(), prefix.pages);
                self.chunks.push(chunk);
                for member in members {
                    let row = *member as usize;
                    let whole = (context_lens[row] as usize).saturating_sub(1) / BLOCK_SIZE;
                    assert!(
                        prefix.pages <= whole,
                        "the last page is a row's own: this is a bug"
                    );
                    self.own[row].0 = prefix.pages;
                    self.members.push(row as i32);
                }
            }
        }
        assert!(
            self.members.len() <= Self::max_members(rows),
            "a row is in one prefix: this is a bug"
        );
    }

    /// Items and parts of rows when an item has at most `size` pages.
    fn count(&self, size: usize) -> (usize, usize) {
        let own: usize = self.own.iter().map(|own| pieces(*own, size)).sum();
        let chunks = self.chunks.iter();
        chunks.fold((own, own), |(items, parts), (_, members, pages)| {
            let pieces = pages.div_ceil(size);
            (items + pieces, parts + pieces * members)
        })
    }

    fn cut(&mut self, size: usize) {
        self.items.clear();
        self.parts.clear();
        let mut slot = 0;
        // What is shared first: it is the most work.
        for (first, members, pages) in &self.chunks {
            for begin in (0..*pages).step_by(size) {
                let end = (begin + size).min(*pages);
                let words = [*first, *members, begin, end, slot, 0, 0, 0];
                self.items.push(words.map(|word| word as i32));
                for member in &self.members[*first..first + members] {
                    self.parts.push((*member as usize, slot as i32));
                    slot += 1;
                }
            }
        }
        for (row, (first, end)) in self.own.iter().enumerate() {
            for piece in 0..pieces((*first, *end), size) {
                let begin = first + piece * size;
                let words = [row, 1, begin, (begin + size).min(*end), slot, 0, 0, 0];
                self.items.push(words.map(|word| word as i32));
                self.parts.push((row, slot as i32));
                slot += 1;
            }
        }
        // Stable: a row's parts stay in the order of their pages.
        self.parts.sort_by_key(|(row, _)| *row);
        self.slots.clear();
        self.slots.extend(self.parts.iter().map(|(_, slot)| *slot));
        self.row_parts.clear();
        self.row_parts.resize(self.own.len(), [0; 2]);
        for (index, (row, _)) in self.parts.iter().enumerate() {
            let [first, count] = &mut self.row_parts[*row];
            if *count == 0 {
                *first = index as i32;
            }
            *count += 1;
        }
    }
}

/// Items of pages `begin..end`; an empty row has one, which writes its zeros.
fn pieces((begin, end): (usize, usize), size: usize) -> usize {
    (end - begin).div_ceil(size).max(1)
}

#[cfg(test)]
#[allow(missing_docs)] // Tests fail by panicking.
mod tests {
    use super::{Cut, DecodePlan, SharedPrefix};
    use crate::cuda::{Float, KvDtype, attention::HeadShape};

    const SHAPE: HeadShape = HeadShape {
        float: Float::Bf16,
        kv_dtype: KvDtype::Float,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        window: 0,
    };

    /// Every page of every row is read once, by items that its parts name.
    fn check(plan: &DecodePlan, context_lens: &[u32], first: impl Fn(u32) -> usize) {
        for (row, length) in context_lens.iter().enumerate() {
            let [start, count] = plan.row_parts[row];
            let slots = &plan.slots[start as usize..(start + count) as usize];
            let mut at = first(*length);
            for slot in slots {
                let item = plan
                    .items
                    .iter()
                    .find(|item| (item[4]..item[4] + item[1]).contains(slot));
                let item = item.unwrap_or_else(|| panic!("slot {slot} has no item"));
                let member = plan.members[(item[0] + slot - item[4]) as usize];
                assert_eq!((member as usize, item[2] as usize), (row, at));
                at = item[3] as usize;
            }
            assert_eq!(at, length.div_ceil(16) as usize, "row {row}");
        }
        let parts: i32 = plan.items.iter().map(|item| item[1]).sum();
        assert_eq!(parts as usize, plan.slots.len());
    }

    fn narrow(fill: usize, max_items: usize) -> Cut {
        Cut {
            wide: false,
            fill,
            max_items,
        }
    }

    #[test]
    fn few_rows_have_wide_blocks_and_are_cut_late() {
        let one = Cut::alone(&SHAPE, 1, 132);
        assert_eq!((one.wide, one.fill, one.max_items), (true, 16, 16));
        assert_eq!(Cut::alone(&SHAPE, 4, 132), one);
        let more = Cut::alone(&SHAPE, 5, 132);
        assert_eq!((more.wide, more.fill, more.max_items), (false, 50, 55));
        assert!(!Cut::shared(&SHAPE, 1, 132).wide);
        let mut plan = DecodePlan::default();
        for (length, items) in [(1, 1), (512, 1), (513, 3), (1024, 4), (8192, 16)] {
            plan.make(&SHAPE, &[length], &[], &one);
            assert_eq!(plan.items.len(), items, "{length}");
            check(&plan, &[length], |_| 0);
        }
        let odd = HeadShape {
            head_dim: 96,
            ..SHAPE
        };
        assert!(!Cut::alone(&odd, 1, 132).wide);
    }

    #[test]
    fn rows_are_cut_to_fill_the_items() {
        let mut plan = DecodePlan::default();
        for lengths in [vec![1], vec![1000; 3], vec![1, 16, 17, 5000, 64]] {
            for max_items in [5, 20, 300] {
                plan.make(&SHAPE, &lengths, &[], &narrow(max_items, max_items));
                assert!(plan.items.len() <= max_items);
                check(&plan, &lengths, |_| 0);
            }
        }
        let windowed = HeadShape {
            window: 100,
            ..SHAPE
        };
        plan.make(&windowed, &[1000, 30], &[], &narrow(8, 8));
        check(&plan, &[1000, 30], |length| {
            (length as usize).saturating_sub(100) / 16
        });
    }

    #[test]
    fn what_rows_share_is_read_by_few_items() {
        let lengths = vec![1100; 10];
        let shared = [SharedPrefix {
            members: (1..10).collect(),
            pages: 64,
        }];
        let mut plan = DecodePlan::default();
        plan.make(&SHAPE, &lengths, &shared, &narrow(0, 13));
        check(&plan, &lengths, |_| 0);
        // Four rows fill 16 columns: 9 rows make 3 items, and each row has its own.
        assert_eq!(plan.items.len(), 13);
        assert_eq!(plan.items.iter().filter(|item| item[1] == 3).count(), 3);
        // Of 4 pages each: 16 of each of the 3 chunks, 18 of the row alone, 2 of each other row's 5 own pages.
        plan.make(&SHAPE, &lengths, &shared, &narrow(200, 200));
        assert_eq!(plan.items.len(), 3 * 16 + 18 + 9 * 2);
        check(&plan, &lengths, |_| 0);
        // No room, or a window: everyone for themselves.
        plan.make(&SHAPE, &lengths, &shared, &narrow(0, 12));
        assert_eq!(plan.items.len(), 10);
        check(&plan, &lengths, |_| 0);
    }
}
