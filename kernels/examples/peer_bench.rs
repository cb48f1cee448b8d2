//! What sums over tensor-parallel ranks cost, fused with the residual and its norm, and the gathering of logits: as many
//! ranks as GPUs, or as `RANKS` says. Runs in graphs, as steps do; figures are the slowest rank's.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::{
    sync::{Arc, Barrier},
    thread,
};

use ashlar_kernels::cuda::{
    CudaError, Device, DeviceBuffer, Float,
    peers::{Endpoint, GatherColumns, Peers, ReduceAddNorm, Way},
};

const FLOAT: Float = Float::Bf16;
const MAX_ROWS: usize = 4096;
const WIDTH: usize = 8192;
const VOCAB: usize = 128_256;
const LOGIT_ROWS: usize = 64;
/// Sums in a graph, as many in each turn.
const RUNS: usize = 40;

struct Rank {
    device: Device,
    peers: Peers,
    weight: DeviceBuffer,
    residual: DeviceBuffer,
    out: DeviceBuffer,
    held: DeviceBuffer,
}

fn ranks(count: usize) -> Vec<Rank> {
    let gpus = Device::count().unwrap();
    let parts: Vec<(Device, Arc<Endpoint>)> = (0..count)
        .map(|rank| {
            let device = Device::open(rank % gpus).unwrap();
            let rows = || Arc::new(device.alloc(MAX_ROWS * WIDTH * 2).unwrap());
            let logits = Arc::new(device.alloc(LOGIT_ROWS * VOCAB * 4).unwrap());
            let endpoint = Endpoint::new(&device, count, WIDTH, [rows(), rows()], logits).unwrap();
            (device, Arc::new(endpoint))
        })
        .collect();
    let endpoints: Vec<_> = parts.iter().map(|part| Arc::clone(&part.1)).collect();
    let connect = |(rank, (device, _)): (usize, (Device, Arc<Endpoint>))| Rank {
        peers: Peers::connect(rank, endpoints.clone()).unwrap(),
        weight: device.alloc(WIDTH * 2).unwrap(),
        residual: device.alloc(MAX_ROWS * WIDTH * 2).unwrap(),
        out: device.alloc(MAX_ROWS * WIDTH * 2).unwrap(),
        held: device.alloc(LOGIT_ROWS * VOCAB * 4).unwrap(),
        device,
    };
    parts.into_iter().enumerate().map(connect).collect()
}

impl Rank {
    fn reduce(
        &self,
        turn: usize,
        (rows, width): (usize, usize),
        way: Way,
    ) -> Result<(), CudaError> {
        ReduceAddNorm {
            peers: &self.peers,
            slot: turn % 2,
            float: FLOAT,
            weight: self.weight.view(),
            residual: self.residual.view(),
            out: self.out.view(),
            rows,
            width,
            eps: 1e-5,
            way,
        }
        .launch()
    }

    fn gather(&self, rows: usize) -> Result<(), CudaError> {
        GatherColumns {
            peers: &self.peers,
            from: self.held.view(),
            rows,
            held: VOCAB.div_ceil(self.peers.ranks()).next_multiple_of(64),
            vocab: VOCAB,
        }
        .launch()
    }
}

/// Median microseconds of one run on the slowest rank, each rank's runs in a graph on a thread of its own.
fn time(ranks: &[Rank], body: impl Fn(&Rank, usize) -> Result<(), CudaError> + Sync) -> f64 {
    let start = Barrier::new(ranks.len());
    let measure = |rank: &Rank| {
        rank.device.bind().unwrap();
        let graph = rank
            .device
            .capture(|| (0..RUNS).try_for_each(|turn| body(rank, turn)))
            .unwrap();
        let mut times: Vec<f64> = (0..9)
            .map(|_| {
                start.wait();
                graph.launch().unwrap();
                let begin = rank.device.record().unwrap();
                graph.launch().unwrap();
                let end = rank.device.record().unwrap();
                rank.device.synchronize().unwrap();
                f64::from(begin.elapsed_ms(&end).unwrap()) * 1e3 / RUNS as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[4]
    };
    let measure = &measure;
    thread::scope(|scope| {
        let threads: Vec<_> = ranks
            .iter()
            .map(|rank| scope.spawn(move || measure(rank)))
            .collect();
        let times = threads.into_iter().map(|thread| thread.join().unwrap());
        times.fold(0.0, f64::max)
    })
}

fn main() {
    let count = std::env::var("RANKS")
        .ok()
        .and_then(|ranks| ranks.parse().ok())
        .unwrap_or_else(|| Device::count().unwrap());
    let ranks = ranks(count);
    println!(
        "{count} ranks on {} × {}",
        Device::count().unwrap(),
        ranks[0].device.name().unwrap()
    );
    for width in [4096, 8192] {
        for rows in [1, 2, 8, 16, 32, 64, 128, 256, 1024, 4096] {
            let bytes = (rows * width * 2) as f64;
            for way in [Way::Mail, Way::Read, Way::TwoShot] {
                if way == Way::Mail && (rows > 64 || rows * width > 64 << 12) {
                    continue;
                }
                let us = time(&ranks, |rank, turn| rank.reduce(turn, (rows, width), way));
                let chosen = if way == Way::of(rows, width, count) {
                    "  chosen"
                } else {
                    ""
                };
                println!(
                    "sum + norm {rows:5} × {width} {way:8?} {us:9.2} µs {:7.1} GB/s{chosen}",
                    bytes / us / 1e3
                );
            }
        }
    }
    for rows in [1, 16, 64] {
        let us = time(&ranks, |rank, _| rank.gather(rows));
        let bytes = (rows * VOCAB * 4) as f64 * (count - 1) as f64 / count as f64;
        println!(
            "gather logits {rows:3} × {VOCAB} {us:9.2} µs {:7.1} GB/s into each",
            bytes / us / 1e3
        );
    }
    assert!(ranks.iter().all(|rank| rank.peers.lost().is_none()));
}
