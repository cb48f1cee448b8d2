//! The pool of blocks: reference counts, and a free list in order of last use.
//!
//! The list is doubly linked through the blocks themselves, so that a free block found by its hash leaves the middle
//! of the list in constant time. Its head is taken first.

use super::{BlockHash, BlockId};

/// End of the list, and "not in the list".
const NONE: u32 = u32::MAX;

struct Block {
    /// Tables that hold it.
    ref_count: u32,
    /// Set while the prefix cache knows it.
    hash: Option<BlockHash>,
    prev: u32,
    next: u32,
}

pub(super) struct BlockPool {
    blocks: Vec<Block>,
    head: u32,
    tail: u32,
    num_free: u32,
}

impl BlockPool {
    /// All blocks free, except the null block.
    pub(super) fn new(num_blocks: u32) -> Self {
        let mut pool = Self {
            blocks: (0..num_blocks)
                .map(|_| Block {
                    ref_count: 0,
                    hash: None,
                    prev: NONE,
                    next: NONE,
                })
                .collect(),
            head: NONE,
            tail: NONE,
            num_free: 0,
        };
        (1..num_blocks).for_each(|id| pool.push_back(id));
        pool
    }

    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.blocks.len()).expect("the pool is built from a u32: this is a bug")
    }

    pub(super) fn num_free(&self) -> u32 {
        self.num_free
    }

    pub(super) fn ref_count(&self, id: BlockId) -> u32 {
        self.blocks[id.0 as usize].ref_count
    }

    pub(super) fn hash(&self, id: BlockId) -> Option<&BlockHash> {
        self.blocks[id.0 as usize].hash.as_ref()
    }

    pub(super) fn set_hash(&mut self, id: BlockId, hash: Option<BlockHash>) {
        self.blocks[id.0 as usize].hash = hash;
    }

    /// Takes the block that was used longest ago; the hash it still carried is handed back for eviction.
    pub(super) fn take(&mut self) -> Option<(BlockId, Option<BlockHash>)> {
        let id = self.head;
        if id == NONE {
            return None;
        }
        self.unlink(id);
        let block = &mut self.blocks[id as usize];
        block.ref_count = 1;
        Some((BlockId(id), block.hash.take()))
    }

    /// One more table holds the block; a free one leaves the free list.
    pub(super) fn acquire(&mut self, id: BlockId) {
        if self.blocks[id.0 as usize].ref_count == 0 {
            self.unlink(id.0);
        }
        self.blocks[id.0 as usize].ref_count += 1;
    }

    /// One table less holds the block. A free block with cached content goes to the far end of the list, one without
    /// to the near end: cached content lives as long as it can.
    pub(super) fn release(&mut self, id: BlockId) {
        let block = &mut self.blocks[id.0 as usize];
        assert!(
            block.ref_count > 0,
            "block {} released twice: this is a bug",
            id.0
        );
        block.ref_count -= 1;
        if block.ref_count == 0 {
            if block.hash.is_some() {
                self.push_back(id.0);
            } else {
                self.push_front(id.0);
            }
        }
    }

    /// The free list from head to tail; bounded by the pool even if the links are broken.
    pub(super) fn free_list(&self) -> Vec<BlockId> {
        let mut list = Vec::with_capacity(self.num_free as usize);
        let mut id = self.head;
        while id != NONE && list.len() <= self.blocks.len() {
            list.push(BlockId(id));
            id = self.blocks[id as usize].next;
        }
        list
    }

    fn push_back(&mut self, id: u32) {
        let tail = self.tail;
        self.blocks[id as usize].prev = tail;
        self.blocks[id as usize].next = NONE;
        match tail {
            NONE => self.head = id,
            tail => self.blocks[tail as usize].next = id,
        }
        self.tail = id;
        self.num_free += 1;
    }

    fn push_front(&mut self, id: u32) {
        let head = self.head;
        self.blocks[id as usize].next = head;
        self.blocks[id as usize].prev = NONE;
        match head {
            NONE => self.tail = id,
            head => self.blocks[head as usize].prev = id,
        }
        self.head = id;
        self.num_free += 1;
    }

    fn unlink(&mut self, id: u32) {
        let (prev, next) = {
            let block = &mut self.blocks[id as usize];
            (
                std::mem::replace(&mut block.prev, NONE),
                std::mem::replace(&mut block.next, NONE),
            )
        };
        match prev {
            NONE => self.head = next,
            prev => self.blocks[prev as usize].next = next,
        }
        match next {
            NONE => self.tail = prev,
            next => self.blocks[next as usize].prev = prev,
        }
        self.num_free -= 1;
    }
}
