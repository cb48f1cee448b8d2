//! Speed of the GPU kernels on one line each, as a share of this GPU's limits (read bandwidth 4.55 TB/s and 790 TFLOP/s on an
//! H200, or `ASHLAR_GPU_GBPS` and `ASHLAR_GPU_TFLOPS`). Weights and caches rotate, so that nothing is found in the L2.
//! Arguments name sections; without one all are run.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod attention;
mod elementwise;
mod products;
mod quantized;
mod sampling;

use ashlar_kernels::cuda::{Device, DeviceBuffer, Float, elementwise::fill_random};

const FLOAT: Float = Float::Bf16;

struct Bench {
    device: Device,
    gbps: f64,
    tflops: f64,
}

fn limit(name: &str, default: f64) -> f64 {
    std::env::var(name)
        .ok()
        .and_then(|v| v.parse().ok())
        .unwrap_or(default)
}

impl Bench {
    fn random(&self, values: usize) -> DeviceBuffer {
        let buffer = self.device.alloc(values * 2).unwrap();
        fill_random(&self.device, FLOAT, buffer.view(), values as u64, 1.0).unwrap();
        buffer
    }

    fn random_f16(&self, values: usize) -> DeviceBuffer {
        let buffer = self.device.alloc(values * 2).unwrap();
        fill_random(&self.device, Float::F16, buffer.view(), values as u64, 1.0).unwrap();
        buffer
    }

    fn i32s(&self, values: &[i32]) -> DeviceBuffer {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let buffer = self.device.alloc(bytes.len()).unwrap();
        self.device.write(&bytes, buffer.view()).unwrap();
        buffer
    }

    /// Median microseconds of one run, from graphs of `runs` runs.
    fn time(&self, runs: usize, mut body: impl FnMut(usize)) -> f64 {
        body(0);
        self.device.synchronize().unwrap();
        let graph = self
            .device
            .capture(|| {
                (0..runs).for_each(&mut body);
                Ok::<(), ashlar_kernels::cuda::CudaError>(())
            })
            .unwrap();
        graph.launch().unwrap();
        let mut times: Vec<f64> = (0..7)
            .map(|_| {
                let start = self.device.record().unwrap();
                graph.launch().unwrap();
                let end = self.device.record().unwrap();
                self.device.synchronize().unwrap();
                f64::from(start.elapsed_ms(&end).unwrap()) * 1e3 / runs as f64
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[3]
    }

    fn bandwidth(&self, what: &str, us: f64, bytes: f64) {
        let gbps = bytes / us / 1e3;
        println!(
            "{what:52} {us:9.1} µs {gbps:8.0} GB/s {:5.1} %",
            gbps / self.gbps * 100.0
        );
    }

    fn rate(&self, what: &str, us: f64, flop: f64) {
        let tflops = flop / us / 1e6;
        println!(
            "{what:52} {us:9.1} µs {tflops:8.0} TFLOP/s {:5.1} %",
            tflops / self.tflops * 100.0
        );
    }
}

type Section = fn(&Bench);

fn main() {
    let device = Device::open(0).unwrap();
    device.bind().unwrap();
    println!(
        "{} ({} multiprocessors)",
        device.name().unwrap(),
        device.multiprocessors()
    );
    let bench = Bench {
        device,
        gbps: limit("ASHLAR_GPU_GBPS", 4550.0),
        tflops: limit("ASHLAR_GPU_TFLOPS", 790.0),
    };
    let sections: [(&str, Section); 6] = [
        ("elementwise", Bench::elementwise),
        ("attention", Bench::attention),
        ("sampling", Bench::sampling),
        ("int4", Bench::four_bit_products),
        ("fp8", Bench::eight_bit_products),
        ("products", Bench::products),
    ];
    let asked: Vec<String> = std::env::args().skip(1).collect();
    for (name, run) in sections {
        if asked.is_empty() || asked.iter().any(|section| section == name) {
            run(&bench);
        }
    }
}
