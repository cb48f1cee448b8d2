//! Bytes that go through the pool of page-locked buffers arrive as they were.

use std::{io, io::Read, thread};

use ashlar_kernels::cuda::{CudaError, Uploader};

use super::support::{Random, device};

const PIECE: usize = Uploader::PIECE;

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed);
    let words = (0..len.div_ceil(8)).flat_map(|_| random.word().to_le_bytes());
    words.take(len).collect()
}

/// Hands out a few bytes at a time, as files may.
struct Slowly<'a>(&'a [u8]);

impl Read for Slowly<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = into.len().min(100_003);
        self.0.read(&mut into[..len])
    }
}

#[test]
fn bytes_of_any_length_arrive_from_several_threads_at_once() {
    let uploader = Uploader::new(device());
    let lengths = [
        0,
        1,
        PIECE - 1,
        PIECE,
        PIECE + 1,
        2 * PIECE,
        7 * PIECE + 12_345,
    ];
    // Twice: the pool makes its buffers anew once they were freed.
    for turn in 0..2 {
        thread::scope(|scope| {
            for worker in 0..8 {
                let uploader = &uploader;
                scope.spawn(move || {
                    let stored: Vec<_> = (0..lengths.len())
                        .map(|index| {
                            // Threads are at different lengths at a time.
                            let len = lengths[(index + worker) % lengths.len()];
                            let sent = bytes((turn * 100 + worker * 10 + index) as u64, len);
                            let buffer = device().alloc(len).unwrap();
                            if index % 2 == 0 {
                                uploader.upload(&sent[..], buffer.view()).unwrap();
                            } else {
                                uploader.upload(Slowly(&sent), buffer.view()).unwrap();
                            }
                            (sent, buffer)
                        })
                        .collect();
                    for (sent, buffer) in stored {
                        let arrived = device().read(buffer.view()).unwrap();
                        assert!(arrived == sent, "{} bytes are others", sent.len());
                    }
                });
            }
        });
        uploader.finish().unwrap();
    }
}

#[test]
fn buffers_are_not_written_again_while_the_gpu_has_yet_to_copy_them() {
    let uploader = Uploader::new(device());
    let sent = bytes(1, Uploader::MAX_BYTES + 9 * PIECE + 17);
    let buffer = device().alloc(sent.len()).unwrap();
    // Work that all copies have to wait for, longer than the pool takes to be full.
    let large = device().alloc(1 << 30).unwrap();
    for turn in 0..500 {
        device().fill(large.view(), turn as u8).unwrap();
    }
    uploader.upload(&sent[..], buffer.view()).unwrap();
    uploader.finish().unwrap();
    assert!(device().read(buffer.view()).unwrap() == sent);
}

#[test]
fn stored_bytes_fill_memory_of_their_length_and_nothing_beside_a_view() {
    let uploader = Uploader::new(device());
    let sent = bytes(2, PIECE + 100);
    let stored = uploader.store(&sent).unwrap();
    let around = device().alloc(PIECE + 300).unwrap();
    device().fill(around.view(), 0xAB).unwrap();
    let middle = around.view().slice(100, PIECE + 100);
    uploader.upload(&sent[..], middle).unwrap();
    uploader.finish().unwrap();
    assert_eq!(stored.len(), sent.len());
    assert!(device().read(stored.view()).unwrap() == sent);
    let all = device().read(around.view()).unwrap();
    assert!(all[..100].iter().all(|byte| *byte == 0xAB));
    assert!(all[100..PIECE + 200] == sent);
    assert!(all[PIECE + 200..].iter().all(|byte| *byte == 0xAB));
}

#[test]
fn what_ends_too_early_is_an_error_and_costs_no_buffer() {
    let uploader = Uploader::new(device());
    let sent = bytes(3, PIECE + 10);
    let buffer = device().alloc(PIECE + 11).unwrap();
    for _ in 0..Uploader::MAX_BYTES / PIECE + 3 {
        let error = uploader.upload(&sent[..], buffer.view()).unwrap_err();
        assert!(
            matches!(error, CudaError::Source { .. }) && !error.is_fatal(),
            "{error}"
        );
    }
    let view = buffer.view().slice(0, sent.len());
    uploader.upload(&sent[..], view).unwrap();
    uploader.finish().unwrap();
    assert!(device().read(view).unwrap() == sent);
}
