//! Devices, random values, and the comparison that all tests use.

use std::sync::OnceLock;

use ashlar_kernels::{
    cuda::{Device, DeviceBuffer, Float, KvDtype},
    e4m3,
};
use half::{bf16, f16};

pub(crate) const FLOATS: [Float; 2] = [Float::Bf16, Float::F16];
/// What pages hold, and the scales of K and V.
pub(crate) const KV_DTYPES: [(KvDtype, [f32; 2]); 2] =
    [(KvDtype::Float, [1.0; 2]), (KvDtype::Fp8, [0.0125, 0.03])];

/// One device for all tests: they queue on one stream.
pub(crate) fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    let device = DEVICE.get_or_init(|| Device::open(0).unwrap());
    device.bind().unwrap();
    device
}

/// SplitMix64: the same numbers on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        x ^ (x >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.word() % limit as u64) as usize
    }

    /// Uniform in ±1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.word() >> 40) as f32 / 8_388_608.0 - 1.0
    }

    /// Values that `float` holds exactly.
    pub(crate) fn values(&mut self, float: Float, count: usize) -> Vec<f32> {
        (0..count).map(|_| round(float, self.unit())).collect()
    }

    pub(crate) fn shuffled(&mut self, count: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..count).collect();
        for i in (1..count).rev() {
            order.swap(i, self.below(i + 1));
        }
        order
    }
}

pub(crate) fn round(float: Float, value: f32) -> f32 {
    match float {
        Float::Bf16 => bf16::from_f32(value).to_f32(),
        Float::F16 => f16::from_f32(value).to_f32(),
    }
}

pub(crate) fn bytes_of(float: Float, values: &[f32]) -> Vec<u8> {
    let values = values.iter();
    match float {
        Float::Bf16 => values
            .flat_map(|v| bf16::from_f32(*v).to_le_bytes())
            .collect(),
        Float::F16 => values
            .flat_map(|v| f16::from_f32(*v).to_le_bytes())
            .collect(),
    }
}

/// What pages of this type hold of a value that is stored in them; they are scaled already.
pub(crate) fn stored(kv_dtype: KvDtype, value: f32) -> f32 {
    match kv_dtype {
        KvDtype::Float => value,
        KvDtype::Fp8 => e4m3::widen(e4m3::narrow(value)),
    }
}

pub(crate) fn page_bytes_of(float: Float, kv_dtype: KvDtype, values: &[f32]) -> Vec<u8> {
    match kv_dtype {
        KvDtype::Float => bytes_of(float, values),
        KvDtype::Fp8 => values.iter().map(|v| e4m3::narrow(*v)).collect(),
    }
}

pub(crate) fn page_values_of(float: Float, kv_dtype: KvDtype, bytes: &[u8]) -> Vec<f32> {
    match kv_dtype {
        KvDtype::Float => values_of(float, bytes),
        KvDtype::Fp8 => bytes.iter().map(|byte| e4m3::widen(*byte)).collect(),
    }
}

pub(crate) fn upload(float: Float, values: &[f32]) -> DeviceBuffer {
    upload_bytes(&bytes_of(float, values))
}

pub(crate) fn upload_bytes(bytes: &[u8]) -> DeviceBuffer {
    let buffer = device().alloc(bytes.len()).unwrap();
    device().write(bytes, buffer.view()).unwrap();
    buffer
}

pub(crate) fn upload_i32(values: &[i32]) -> DeviceBuffer {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    upload_bytes(&bytes)
}

pub(crate) fn upload_u32(values: &[u32]) -> DeviceBuffer {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    upload_bytes(&bytes)
}

pub(crate) fn upload_f32(values: &[f32]) -> DeviceBuffer {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    upload_bytes(&bytes)
}

/// Memory full of NaN: what a kernel does not write shows.
pub(crate) fn poisoned(bytes: usize) -> DeviceBuffer {
    let buffer = device().alloc(bytes).unwrap();
    device().fill(buffer.view(), 0xFF).unwrap();
    buffer
}

pub(crate) fn download(float: Float, buffer: &DeviceBuffer, count: usize) -> Vec<f32> {
    values_of(
        float,
        &device().read(buffer.view().slice(0, count * 2)).unwrap(),
    )
}

pub(crate) fn values_of(float: Float, bytes: &[u8]) -> Vec<f32> {
    let words = bytes.as_chunks::<2>().0.iter();
    match float {
        Float::Bf16 => words.map(|w| bf16::from_le_bytes(*w).to_f32()).collect(),
        Float::F16 => words.map(|w| f16::from_le_bytes(*w).to_f32()).collect(),
    }
}

pub(crate) fn download_f32(buffer: &DeviceBuffer, count: usize) -> Vec<f32> {
    let bytes = device().read(buffer.view().slice(0, count * 4)).unwrap();
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|w| f32::from_le_bytes(*w)).collect()
}

pub(crate) fn download_u32(buffer: &DeviceBuffer, count: usize) -> Vec<u32> {
    let bytes = device().read(buffer.view().slice(0, count * 4)).unwrap();
    let words = bytes.as_chunks::<4>().0.iter();
    words.map(|w| u32::from_le_bytes(*w)).collect()
}

/// ‖actual − expected‖ ≤ tolerance · ‖expected‖, and no single value off by more than 8 tolerances of the largest. NaN never
/// passes.
pub(crate) fn assert_close(what: &str, float: Float, actual: &[f32], expected: &[f64]) {
    let tolerance = match float {
        Float::Bf16 => 6e-3,
        Float::F16 => 1e-3,
    };
    assert_close_to(what, tolerance, actual, expected);
}

pub(crate) fn assert_close_to(what: &str, tolerance: f64, actual: &[f32], expected: &[f64]) {
    assert_eq!(actual.len(), expected.len(), "{what}");
    let (mut error, mut norm, mut largest) = (0.0, 0.0, 0f64);
    for (a, e) in actual.iter().zip(expected) {
        error += (f64::from(*a) - e).powi(2);
        norm += e * e;
        largest = largest.max(e.abs());
    }
    let relative = (error / norm.max(1e-30)).sqrt();
    let worst = actual
        .iter()
        .zip(expected)
        .enumerate()
        .max_by(|(_, (a, e)), (_, (b, f))| {
            (f64::from(**a) - **e)
                .abs()
                .total_cmp(&(f64::from(**b) - **f).abs())
        });
    assert!(
        relative <= tolerance,
        "{what}: relative error {relative:.2e}, worst at {worst:?}"
    );
    for (index, (a, e)) in actual.iter().zip(expected).enumerate() {
        let off = (f64::from(*a) - e).abs();
        assert!(
            off <= 8.0 * tolerance * largest,
            "{what}: [{index}] is {a}, not {e}"
        );
    }
}
