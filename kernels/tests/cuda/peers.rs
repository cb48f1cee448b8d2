//! Tensor-parallel ranks that share one GPU: as many streams, the same memory traffic and flags as between GPUs.

use std::{sync::Arc, time::Instant};

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Float, Graph,
    peers::{Endpoint, GatherColumns, Peers, ReduceAddNorm, TIME_LIMIT, Way},
};

use super::{
    elementwise::norm,
    support::{FLOATS, Random, assert_close, bytes_of, round, values_of},
};

/// One rank with its buffers.
struct Rank {
    device: Device,
    peers: Peers,
    deltas: [Arc<DeviceBuffer>; 2],
    logits: Arc<DeviceBuffer>,
    held: DeviceBuffer,
    weight: DeviceBuffer,
    residual: DeviceBuffer,
    out: DeviceBuffer,
}

/// Sizes of a case.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    rows: usize,
    width: usize,
    held: usize,
    vocab: usize,
}

/// GPUs that ranks are dealt out to: 1, or as many as there are with `ASHLAR_TEST_GPUS=all`.
fn gpus() -> usize {
    let all = std::env::var("ASHLAR_TEST_GPUS").is_ok_and(|value| value == "all");
    if all { Device::count().unwrap() } else { 1 }
}

fn ranks(count: usize, sizes: Sizes) -> Vec<Rank> {
    let gpus = gpus();
    let parts: Vec<_> = (0..count)
        .map(|rank| {
            let device = Device::open(rank % gpus).unwrap();
            let rows = || Arc::new(device.alloc(sizes.rows * sizes.width * 2).unwrap());
            let deltas = [rows(), rows()];
            let logits = Arc::new(device.alloc(sizes.rows * sizes.vocab * 4).unwrap());
            let endpoint = Endpoint::new(
                &device,
                count,
                sizes.width,
                deltas.clone(),
                Arc::clone(&logits),
            );
            (device, deltas, logits, Arc::new(endpoint.unwrap()))
        })
        .collect();
    let endpoints: Vec<_> = parts.iter().map(|part| Arc::clone(&part.3)).collect();
    let connect = |(rank, (device, deltas, logits, _)): (usize, (Device, _, _, _))| {
        let alloc = |bytes| device.alloc(bytes).unwrap();
        Rank {
            peers: Peers::connect(rank, endpoints.clone()).unwrap(),
            deltas,
            logits,
            held: alloc(sizes.rows * sizes.held * 4),
            weight: alloc(sizes.width * 2),
            residual: alloc(sizes.rows * sizes.width * 2),
            out: alloc(sizes.rows * sizes.width * 2),
            device,
        }
    };
    parts.into_iter().enumerate().map(connect).collect()
}

impl Rank {
    fn reduce(&self, float: Float, slot: usize, sizes: Sizes, way: Way) -> Result<(), CudaError> {
        self.device.bind()?;
        ReduceAddNorm {
            peers: &self.peers,
            slot,
            float,
            weight: self.weight.view(),
            residual: self.residual.view(),
            out: self.out.view(),
            rows: sizes.rows,
            width: sizes.width,
            eps: 1e-5,
            way,
        }
        .launch()
    }

    fn gather(&self, sizes: Sizes) -> Result<(), CudaError> {
        self.device.bind()?;
        GatherColumns {
            peers: &self.peers,
            from: self.held.view(),
            rows: sizes.rows,
            held: sizes.held,
            vocab: sizes.vocab,
        }
        .launch()
    }

    fn write(&self, float: Float, values: &[f32], to: &DeviceBuffer) {
        let bytes = bytes_of(float, values);
        self.device.write(&bytes, to.view()).unwrap();
    }

    fn bytes(&self, of: &DeviceBuffer) -> Vec<u8> {
        self.device.bind().unwrap();
        self.device.read(of.view()).unwrap()
    }
}

fn sizes(rows: usize, width: usize) -> Sizes {
    Sizes {
        rows,
        width,
        held: 64,
        vocab: 100,
    }
}

/// Several sums after each other with fresh rows: buffers take turns, flags are used again, ways follow each other.
fn check_sums(float: Float, count: usize, sizes: Sizes, ways: &[Way]) {
    let ranks = ranks(count, sizes);
    let Sizes { rows, width, .. } = sizes;
    let mut random = Random((rows * width + count) as u64);
    let weight = random.values(float, width);
    let mut residual = random.values(float, rows * width);
    for rank in &ranks {
        rank.write(float, &weight, &rank.weight);
        rank.write(float, &residual, &rank.residual);
    }
    for (turn, way) in ways.iter().cycle().take(3 * ways.len()).enumerate() {
        let mut sums = vec![0f32; rows * width];
        for rank in &ranks {
            let delta = random.values(float, rows * width);
            rank.write(float, &delta, &rank.deltas[turn % 2]);
            sums.iter_mut().zip(&delta).for_each(|(sum, x)| *sum += x);
        }
        for rank in &ranks {
            rank.reduce(float, turn % 2, sizes, *way).unwrap();
        }
        let sums = sums.iter().zip(&residual);
        residual = sums
            .map(|(sum, before)| round(float, round(float, *sum) + before))
            .collect();
        let expected: Vec<f64> = residual
            .chunks(width)
            .flat_map(|row| norm(row, &weight, 1e-5))
            .collect();
        let first = ranks[0].bytes(&ranks[0].out);
        for rank in &ranks {
            let case = format!("{float:?} {count} ranks {sizes:?} {way:?} turn {turn}");
            assert_eq!(rank.peers.lost(), None, "{case}");
            assert_eq!(
                rank.bytes(&rank.residual),
                bytes_of(float, &residual),
                "{case}"
            );
            assert_eq!(rank.bytes(&rank.out), first, "{case}");
        }
        assert_close("norm", float, &values_of(float, &first), &expected);
    }
}

#[test]
fn ranks_sum_rows_alike_in_every_way() {
    for count in [2, 4] {
        for (rows, width) in [
            (1, 8),
            (1, 4096),
            (3, 576),
            (33, 2048),
            (64, 512),
            (2, 14336),
        ] {
            for float in FLOATS {
                let ways = [Way::Mail, Way::Read, Way::TwoShot];
                check_sums(float, count, sizes(rows, width), &ways);
            }
        }
        // More rows than mail takes, more than blocks, not a multiple of the ranks.
        for (rows, width) in [(130, 1024), (2049, 576)] {
            let ways = [Way::Read, Way::TwoShot, Way::TwoShot];
            check_sums(Float::Bf16, count, sizes(rows, width), &ways);
        }
    }
    check_sums(Float::F16, 3, sizes(7, 256), &[Way::Mail, Way::TwoShot]);
    check_sums(Float::F16, 8, sizes(17, 256), &[Way::Mail, Way::TwoShot]);
}

#[test]
fn the_columns_of_all_ranks_stand_side_by_side() {
    for (count, rows, held, vocab) in [
        (2, 1, 64, 128),
        (2, 5, 64, 100),
        (4, 3, 64, 132),
        (3, 40, 16448, 49152),
    ] {
        let sizes = Sizes {
            rows,
            width: 8,
            held,
            vocab,
        };
        let ranks = ranks(count, sizes);
        for turn in 0..3 {
            let value =
                |row: usize, column: usize| (turn * 1_000_000 + row * vocab + column) as f32;
            for (number, rank) in ranks.iter().enumerate() {
                let held_values = (0..rows).flat_map(|row| {
                    // Columns behind the vocabulary are padding.
                    (0..held).map(move |column| value(row, number * held + column))
                });
                let bytes: Vec<u8> = held_values.flat_map(f32::to_le_bytes).collect();
                rank.device.bind().unwrap();
                rank.device.write(&bytes, rank.held.view()).unwrap();
            }
            ranks.iter().for_each(|rank| rank.gather(sizes).unwrap());
            let expected: Vec<u8> = (0..rows)
                .flat_map(|row| (0..vocab).flat_map(move |column| value(row, column).to_le_bytes()))
                .collect();
            for rank in &ranks {
                assert!(
                    rank.bytes(&rank.logits) == expected,
                    "{count} ranks, {sizes:?}"
                );
                assert_eq!(rank.peers.lost(), None);
            }
        }
    }
}

#[test]
fn graphs_of_ranks_meet_each_other_again_and_again() {
    let float = Float::Bf16;
    let sizes = sizes(4, 1024);
    let ranks = ranks(2, sizes);
    let start = |seed: u64| {
        for (number, rank) in ranks.iter().enumerate() {
            let mut random = Random(seed);
            let values = random.values(float, sizes.rows * sizes.width);
            rank.write(float, &values, &rank.residual);
            rank.write(float, &values[..sizes.width], &rank.weight);
            for delta in &rank.deltas {
                let mut random = Random(seed + number as u64 + 1);
                let values = random.values(float, sizes.rows * sizes.width);
                rank.write(float, &values, delta);
            }
        }
    };
    let body = |rank: &Rank| -> Result<(), CudaError> {
        rank.reduce(float, 0, sizes, Way::Mail)?;
        rank.reduce(float, 1, sizes, Way::Read)?;
        rank.gather(sizes)
    };
    start(5);
    for _ in 0..10 {
        ranks.iter().for_each(|rank| body(rank).unwrap());
    }
    let expected = ranks[1].bytes(&ranks[1].residual);
    start(5);
    let graphs: Vec<Graph> = ranks
        .iter()
        .map(|rank| {
            rank.device.bind().unwrap();
            rank.device.capture(|| body(rank)).unwrap()
        })
        .collect();
    for _ in 0..10 {
        for (rank, graph) in ranks.iter().zip(&graphs) {
            rank.device.bind().unwrap();
            graph.launch().unwrap();
        }
    }
    for rank in &ranks {
        assert_eq!(rank.bytes(&rank.residual), expected);
        assert_eq!(rank.peers.lost(), None);
    }
}

#[test]
fn a_rank_that_does_not_come_is_told_and_holds_nobody_up_twice() {
    for way in [Way::Mail, Way::TwoShot] {
        let sizes = sizes(3, 256);
        let ranks = ranks(2, sizes);
        let started = Instant::now();
        for turn in 0..8 {
            ranks[0].reduce(Float::F16, turn % 2, sizes, way).unwrap();
        }
        ranks[0].device.synchronize().unwrap();
        let took = started.elapsed();
        assert!(took >= TIME_LIMIT && took < 2 * TIME_LIMIT, "{took:?}");
        assert_eq!(ranks[0].peers.lost(), Some(1));
        let error = CudaError::Lost { rank: 1 };
        assert!(error.is_fatal());
        let message = "tensor-parallel rank 1 has not answered for 5 s: it hangs";
        assert_eq!(error.to_string(), message);
    }
}
