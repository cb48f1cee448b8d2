#![allow(clippy::unwrap_used, missing_docs)] // Tests fail by panicking.

use std::collections::BTreeMap;

use proptest::prelude::*;
use serde::Deserialize;
use serde_json::{Value, json};

use super::*;

#[derive(Deserialize)]
struct Golden {
    rows: usize,
    columns: usize,
    /// f32, little-endian, in hexadecimal digits.
    values: BTreeMap<String, String>,
    cases: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    config: Value,
    tensors: BTreeMap<String, GoldenTensor>,
    /// Which of the golden values.
    values: String,
}

#[derive(Deserialize)]
struct GoldenTensor {
    dtype: Dtype,
    shape: Vec<usize>,
    data: String,
}

/// Tensors by their full names.
#[derive(Debug, Clone, Default)]
struct Tensors(BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>);

impl Tensors {
    fn find(&self, name: &str) -> Option<StoredTensor<'_>> {
        let (dtype, shape, data) = self.0.get(name)?;
        Some(StoredTensor {
            dtype: *dtype,
            shape,
            data: data.as_slice().into(),
        })
    }
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../../tests/reference/int4.json")).unwrap()
}

impl Case {
    fn tensors(&self) -> Tensors {
        let tensors = self.tensors.iter().map(|(name, tensor)| {
            let bytes = hex::decode(&tensor.data).unwrap();
            (
                format!("w.{name}"),
                (tensor.dtype, tensor.shape.clone(), bytes),
            )
        });
        Tensors(tensors.collect())
    }

    fn scheme(&self) -> Int4Scheme {
        Int4Scheme::from_config(&self.config).unwrap()
    }
}

fn read(
    scheme: &Int4Scheme,
    shape: (usize, usize),
    tensors: &Tensors,
) -> Result<Int4Matrix, Int4Error> {
    Int4Matrix::read(scheme, "w", shape, |name| tensors.find(name))
}

#[test]
fn every_layout_gives_the_golden_values_bit_for_bit() {
    let golden = golden();
    assert_eq!(golden.cases.len(), 6);
    for (name, case) in &golden.cases {
        let shape = (golden.rows, golden.columns);
        let matrix = read(&case.scheme(), shape, &case.tensors()).unwrap();
        assert_eq!(matrix.group, 32, "{name}");
        let values = matrix.dequantize();
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        assert!(hex::encode(bytes) == golden.values[&case.values], "{name}");
        let rows = |matrix: &Int4Matrix, rows: std::ops::Range<usize>| {
            let width = matrix.columns;
            matrix.dequantize()[rows.start * width..rows.end * width].to_vec()
        };
        let stacked = Int4Matrix::stack(&[&matrix, &matrix]);
        assert_eq!(rows(&stacked, 0..24), matrix.dequantize());
        assert_eq!(rows(&stacked, 24..48), matrix.dequantize());
    }
}

#[test]
fn all_layouts_of_one_matrix_read_the_same() {
    let golden = golden();
    let shape = (golden.rows, golden.columns);
    let matrix = |name: &str| {
        let case = &golden.cases[name];
        read(&case.scheme(), shape, &case.tensors()).unwrap()
    };
    assert_eq!(matrix("awq"), matrix("gptq_v1"));
    assert_eq!(matrix("awq"), matrix("gptq_v2"));
    assert_eq!(matrix("awq"), matrix("compressed_asymmetric"));
    assert_eq!(matrix("gptq_symmetric"), matrix("compressed_symmetric"));
}

#[test]
fn scales_of_other_types_and_one_group_for_a_row_are_read() {
    let golden = golden();
    let case = &golden.cases["compressed_symmetric"];
    let mut tensors = case.tensors();
    let value = half::bf16::from_f32(0.0123);
    let bytes = value.to_le_bytes().repeat(golden.rows);
    tensors.0.insert(
        "w.weight_scale".to_owned(),
        (Dtype::BF16, vec![golden.rows, 1], bytes),
    );
    let scheme = Int4Scheme {
        group: None,
        ..case.scheme()
    };
    let matrix = read(&scheme, (golden.rows, golden.columns), &tensors).unwrap();
    assert_eq!(matrix.group, golden.columns);
    assert!(
        matrix
            .scales
            .iter()
            .all(|scale| scale.to_f32() == value.to_f32())
    );
}

#[test]
fn configurations_are_read_or_refused_by_name() {
    let scheme = |source, group, act_order| Int4Scheme {
        source,
        group,
        act_order,
    };
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 64, "version": "GEMM"});
    assert_eq!(
        Int4Scheme::from_config(&awq),
        Ok(scheme(Int4Source::Awq, Some(64), false))
    );
    let gptq = json!({"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": true});
    let zero_minus_one = true;
    assert_eq!(
        Int4Scheme::from_config(&gptq),
        Ok(scheme(Int4Source::Gptq { zero_minus_one }, None, true))
    );
    let groups = |changes: Value| {
        let mut weights = json!({"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128});
        for (key, value) in changes.as_object().unwrap() {
            weights[key] = value.clone();
        }
        json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": weights, "input_activations": null}},
        })
    };
    let symmetric = Int4Source::CompressedTensors { symmetric: true };
    assert_eq!(
        Int4Scheme::from_config(&groups(json!({"actorder": "weight"}))),
        Ok(scheme(symmetric, Some(128), false))
    );
    assert_eq!(
        Int4Scheme::from_config(&groups(json!({"actorder": "group"}))),
        Ok(scheme(symmetric, Some(128), true))
    );
    let refused = [
        (json!({"quant_method": "fp8"}), "the method fp8"),
        (json!({}), "the method unnamed"),
        (json!({"quant_method": "awq"}), "how many bits"),
        (json!({"quant_method": "awq", "bits": 8}), "8 bits"),
        (
            json!({"quant_method": "awq", "bits": 4, "version": "gemv"}),
            "gemv",
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 48}),
            "group_size is 48",
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}),
            "marlin",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "float-quantized"}),
            "float-quantized",
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "no config_groups",
        ),
        (groups(json!({"num_bits": 8})), "8 bits"),
        (groups(json!({"type": "float"})), "type float"),
        (groups(json!({"strategy": "block"})), "each block"),
    ];
    for (config, part) in refused {
        let message = Int4Scheme::from_config(&config).unwrap_err();
        assert!(
            message.contains(part),
            "{message:?} should contain {part:?}"
        );
    }
}

/// A change to a good checkpoint, and what the error must say.
type Damage = (&'static str, fn(&mut Tensors), &'static str);

#[test]
fn malformed_matrices_give_one_clear_error() {
    fn change(
        tensors: &mut Tensors,
        name: &str,
        run: impl FnOnce(&mut (Dtype, Vec<usize>, Vec<u8>)),
    ) {
        run(tensors.0.get_mut(name).unwrap());
    }
    let cases: Vec<Damage> = vec![
        (
            "awq",
            |t| drop(t.0.remove("w.qzeros")),
            "w.qzeros is missing",
        ),
        (
            "awq",
            |t| drop(t.0.remove("w.scales")),
            "w.scales is missing",
        ),
        (
            "awq",
            |t| change(t, "w.qweight", |w| w.1 = vec![12, 24]),
            "w.qweight has the shape [12, 24], and [96, 3] is expected (group size 32)",
        ),
        (
            "awq",
            |t| change(t, "w.scales", |s| s.1 = vec![1, 24]),
            "w.scales has the shape [1, 24], and [3, 24] is expected",
        ),
        (
            "awq",
            |t| change(t, "w.qweight", |w| w.2.truncate(100)),
            "which are not its shape's",
        ),
        (
            "awq",
            |t| change(t, "w.qzeros", |z| z.0 = Dtype::F32),
            "w.qzeros is stored as F32, and I32",
        ),
        (
            "awq",
            |t| change(t, "w.scales", |s| s.2[10..12].copy_from_slice(&[0, 0x7c])),
            "the scale inf at 5",
        ),
        (
            "gptq_v1",
            |t| change(t, "w.g_idx", |g| g.2.swap(0, 4 * 95)),
            "order of activations",
        ),
        (
            "gptq_v1",
            |t| change(t, "w.g_idx", |g| g.2[3] = 0x80),
            "order of activations",
        ),
        (
            "compressed_asymmetric",
            |t| drop(t.0.remove("w.weight_zero_point")),
            "w.weight_zero_point is missing",
        ),
        (
            "compressed_symmetric",
            |t| change(t, "w.weight_packed", |w| w.1.reverse()),
            "w.weight_packed has the shape [12, 24]",
        ),
    ];
    let golden = golden();
    let shape = (golden.rows, golden.columns);
    for (name, damage, part) in cases {
        let case = &golden.cases[name];
        let mut tensors = case.tensors();
        damage(&mut tensors);
        let message = read(&case.scheme(), shape, &tensors)
            .unwrap_err()
            .to_string();
        assert!(
            message.contains(part),
            "{message:?} should contain {part:?}"
        );
    }
    let case = &golden.cases["awq"];
    for (group, rows, columns, part) in [
        (Some(64), 24, 96, "96 inputs, which are not groups of 64"),
        (Some(0), 24, 96, "groups of 0"),
        (None, 24, 100, "groups of 100"),
        (Some(32), 20, 96, "20 outputs"),
    ] {
        let scheme = Int4Scheme {
            group,
            ..case.scheme()
        };
        let message = read(&scheme, (rows, columns), &case.tensors()).unwrap_err();
        assert!(message.to_string().contains(part), "{message}");
    }
    let ordered = Int4Scheme {
        act_order: true,
        ..golden.cases["gptq_v1"].scheme()
    };
    let mut tensors = golden.cases["gptq_v1"].tensors();
    assert!(
        read(&ordered, shape, &tensors).is_ok(),
        "a trivial order is no order"
    );
    tensors.0.remove("w.g_idx");
    assert!(matches!(
        read(&ordered, shape, &tensors),
        Err(Int4Error::ActOrder { .. })
    ));
}

proptest! {
    /// Whatever the configuration says and the tensors hold: a matrix of the right lengths, or an error.
    #[test]
    fn any_tensors_give_a_whole_matrix_or_an_error(
        case in 0usize..6,
        group in prop_oneof![Just(None), (0usize..200).prop_map(Some)],
        (rows, columns) in (0usize..64, 0usize..200),
        damage in prop::collection::vec((0usize..4, 0usize..6, any::<usize>()), 0..4),
    ) {
        let golden = golden();
        let case = golden.cases.values().nth(case).unwrap();
        let mut tensors = case.tensors();
        let names: Vec<String> = tensors.0.keys().cloned().collect();
        for (tensor, kind, value) in damage {
            let tensor = tensors.0.get_mut(&names[tensor % names.len()]).unwrap();
            match kind {
                0 => tensor.0 = [Dtype::I32, Dtype::F16, Dtype::BF16, Dtype::I64][value % 4],
                1 => tensor.1 = vec![value % 100, value / 100 % 100],
                2 => drop(tensor.1.pop()),
                3 => tensor.2.truncate(value % (tensor.2.len() + 1)),
                4 => tensor.2.push(value as u8),
                _ => {
                    let at = value % tensor.2.len().max(1);
                    if let Some(byte) = tensor.2.get_mut(at) {
                        *byte ^= (value >> 32) as u8;
                    }
                }
            }
        }
        for (group, shape) in [(group, (rows, columns)), (Some(32), (24, 96))] {
            let scheme = Int4Scheme { group, ..case.scheme() };
            if let Ok(matrix) = read(&scheme, shape, &tensors) {
                let cells = matrix.rows * matrix.columns / matrix.group;
                prop_assert_eq!((matrix.rows, matrix.columns), shape);
                prop_assert_eq!(matrix.scales.len(), cells);
                prop_assert_eq!(matrix.zeros.len(), cells);
                prop_assert!(matrix.zeros.iter().all(|zero| *zero < 16));
                prop_assert_eq!(matrix.dequantize().len(), shape.0 * shape.1);
            }
        }
    }

    /// Any JSON in the configuration: a scheme or words.
    #[test]
    fn any_configuration_is_read_or_refused(
        method in prop_oneof![Just("awq"), Just("gptq"), Just("compressed-tensors")],
        key in prop_oneof![Just("bits"), Just("group_size"), Just("config_groups"), Just("format"), Just("version")],
        value in prop_oneof![Just(json!(null)), Just(json!({"a": {"weights": {}}})), Just(json!([])), Just(json!("pack-quantized")),
            any::<i64>().prop_map(|n| json!(n)), any::<f64>().prop_map(|n| json!(n))],
    ) {
        let mut config = json!({"quant_method": method, "bits": 4, "group_size": 64});
        config[key] = value;
        if let Ok(scheme) = Int4Scheme::from_config(&config) {
            prop_assert!(scheme.group.is_none_or(|group| group > 0 && group % 32 == 0));
        }
    }
}

#[test]
fn random_values_depend_on_the_seed_alone() {
    let random = |seed| Int4Matrix::random((16, 64), 32, seed);
    assert_eq!(random(1), random(1));
    assert_ne!(random(1).qweight, random(2).qweight);
    let values = random(3).dequantize();
    let mean_square = values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32;
    assert!((0.7..1.3).contains(&(mean_square * 64.0)), "{mean_square}");
}
