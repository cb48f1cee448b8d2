#![allow(clippy::unwrap_used)] // Tests fail by panicking.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::weights::{GgmlType, Scheme};

fn scheme(config: &Value) -> Result<Fp8Scheme, String> {
    match Scheme::from_config(config)? {
        Scheme::Fp8(scheme) => Ok(scheme),
        Scheme::Int4(_) => Err("four bits".to_owned()),
    }
}

#[test]
fn configurations_are_understood_or_refused_with_a_reason() {
    let plain = scheme(&json!({"quant_method": "fp8", "activation_scheme": "dynamic"})).unwrap();
    assert_eq!(plain, PLAIN);
    let blocks =
        scheme(&json!({"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}));
    assert_eq!(blocks.unwrap().block, Some([128, 128]));
    let group = |weights: Value| {
        scheme(
            &json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": {
                "weights": weights, "input_activations": {"num_bits": 8, "type": "float", "dynamic": true}
            }}}),
        )
    };
    let channel = group(json!({"num_bits": 8, "type": "float", "strategy": "channel"})).unwrap();
    assert_eq!(channel.source, Fp8Source::CompressedTensors);
    assert!(channel.rounds_rows);
    // Weights alone, if only of some layers.
    let float = json!({"num_bits": 8, "type": "float"});
    let rounded = json!({"weights": float, "input_activations": float});
    for alone in [
        json!({"weights": float, "input_activations": null}),
        json!({"weights": float}),
    ] {
        let config = json!({"quant_method": "compressed-tensors", "format": "float-quantized",
            "config_groups": {"group_0": rounded, "group_1": alone}});
        assert!(!scheme(&config).unwrap().rounds_rows);
    }
    for (config, reason) in [
        (
            group(json!({"num_bits": 8, "type": "int"})),
            "8 bits of type int",
        ),
        (
            group(json!({"num_bits": 4, "type": "float"})),
            "4 bits of type float",
        ),
        (
            group(json!({"num_bits": 8, "type": "float", "strategy": "token"})),
            "for each token",
        ),
        (group(json!(null)), "has no weights"),
        (
            scheme(&json!({"quant_method": "compressed-tensors", "format": "float-quantized"})),
            "no config_groups",
        ),
        (
            scheme(&json!({"quant_method": "fp8", "weight_block_size": [128]})),
            "blocks are of the size [128]",
        ),
        (
            scheme(&json!({"quant_method": "fp8", "weight_block_size": [0, 128]})),
            "two positive numbers",
        ),
        (
            scheme(&json!({"quant_method": "fp8", "fmt": "e5m2"})),
            "e5m2",
        ),
        (
            scheme(&json!({"quant_method": "modelopt", "quant_algo": "NVFP4"})),
            "NVFP4",
        ),
        (
            scheme(&json!({"quant_method": "bitsandbytes"})),
            "method bitsandbytes",
        ),
        (scheme(&json!({})), "method unnamed"),
    ] {
        let error = config.unwrap_err();
        assert!(error.contains(reason), "{error} / {reason}");
    }
}

/// A tensor of a made-up file.
struct Stored {
    name: &'static str,
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

fn read(
    scheme: &Fp8Scheme,
    shape: (usize, usize),
    tensors: &[Stored],
) -> Result<Option<Fp8Matrix<'static>>, String> {
    let find = |name: &str| {
        let tensor = tensors.iter().find(|tensor| tensor.name == name)?;
        Some(StoredTensor {
            dtype: tensor.dtype,
            shape: &tensor.shape,
            data: tensor.data.as_slice().into(),
        })
    };
    let matrix = Fp8Matrix::read(scheme, "a", shape, find).map_err(|error| error.to_string())?;
    Ok(matrix.map(|matrix| Fp8Matrix {
        data: matrix.data.to_vec().into(),
        scales: matrix.scales,
        rows: matrix.rows,
        columns: matrix.columns,
    }))
}

fn weight(dtype: Dtype, shape: [usize; 2]) -> Stored {
    let bytes = shape[0] * shape[1] * if dtype == Dtype::F8_E4M3 { 1 } else { 2 };
    Stored {
        name: "a.weight",
        dtype,
        shape: shape.into(),
        data: (0..bytes).map(|i| (i % 120) as u8).collect(),
    }
}

fn scale(name: &'static str, shape: &[usize], values: &[f32]) -> Stored {
    Stored {
        name,
        dtype: Dtype::F32,
        shape: shape.into(),
        data: values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
    }
}

const PLAIN: Fp8Scheme = Fp8Scheme {
    source: Fp8Source::Fp8,
    block: None,
    rounds_rows: true,
};

#[test]
fn scales_of_a_matrix_of_rows_and_of_blocks_are_read() {
    let of = |name, shape: &[usize], values: &[f32], scheme: &Fp8Scheme| {
        let tensors = [weight(Dtype::F8_E4M3, [2, 4]), scale(name, shape, values)];
        read(scheme, (2, 4), &tensors)
            .unwrap()
            .unwrap()
            .dequantize()
    };
    let expected = |scales: [f32; 8]| -> Vec<f32> {
        scales
            .iter()
            .enumerate()
            .map(|(i, scale)| widen(i as u8) * scale)
            .collect()
    };
    for shape in [&[][..], &[1], &[1, 1]] {
        assert_eq!(
            of("a.weight_scale", shape, &[2.0], &PLAIN),
            expected([2.0; 8])
        );
    }
    let rows = expected([2.0, 2.0, 2.0, 2.0, 3.0, 3.0, 3.0, 3.0]);
    for shape in [&[2][..], &[2, 1]] {
        assert_eq!(of("a.weight_scale", shape, &[2.0, 3.0], &PLAIN), rows);
    }
    let blocks = Fp8Scheme {
        block: Some([128, 3]),
        ..PLAIN
    };
    let expected = expected([2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 2.0, 3.0]);
    assert_eq!(
        of("a.weight_scale_inv", &[1, 2], &[2.0, 3.0], &blocks),
        expected
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let error = |tensors: &[Stored]| read(&PLAIN, (2, 4), tensors).unwrap_err();
    let good = || weight(Dtype::F8_E4M3, [2, 4]);
    assert_eq!(
        error(&[weight(Dtype::F8_E4M3, [4, 2])]),
        "the tensor a.weight has the shape [4, 2], and [2, 4] is expected"
    );
    assert_eq!(error(&[good()]), "the tensor a.weight_scale is missing");
    for (shape, values) in [(&[3][..], &[1.0, 1.0, 1.0][..]), (&[2, 2], &[1.0; 4])] {
        let message = error(&[good(), scale("a.weight_scale", shape, values)]);
        assert!(message.contains("[1] or [2, 1] is expected"), "{message}");
    }
    for value in [f32::NAN, f32::INFINITY, -1.0] {
        let message = error(&[good(), scale("a.weight_scale", &[1], &[value])]);
        assert!(message.contains("which is no scale"), "{message}");
    }
    let mut integers = scale("a.weight_scale", &[1], &[1.0]);
    integers.dtype = Dtype::I32;
    assert!(error(&[good(), integers]).contains("floats are expected"));
    assert_eq!(
        read(&PLAIN, (2, 4), &[weight(Dtype::BF16, [2, 4])]),
        Ok(None)
    );
    assert_eq!(read(&PLAIN, (2, 4), &[]), Ok(None));
}

proptest! {
    /// Tensors of any types and shapes give a matrix that is whole, none, or an error.
    #[test]
    fn any_tensors_give_a_whole_matrix_or_an_error(
        is_fp8 in any::<bool>(),
        shape in prop::collection::vec(0usize..5, 0..3),
        scale_shape in prop::option::of(prop::collection::vec(0usize..5, 0..4)),
        scale_kind in prop::sample::select(vec![Dtype::F32, Dtype::BF16, Dtype::F16, Dtype::U8, Dtype::I64]),
        bytes in prop::collection::vec(any::<u8>(), 64 * 8),
        block in prop::option::of((1usize..4, 1usize..4)),
    ) {
        let scheme = Fp8Scheme {
            block: block.map(|(rows, columns)| [rows, columns]),
            ..PLAIN
        };
        let sized = |dtype: Dtype, shape: &[usize]| {
            let count: usize = shape.iter().product();
            bytes[..count * dtype.bitsize() / 8].to_vec()
        };
        let dtype = if is_fp8 { Dtype::F8_E4M3 } else { Dtype::BF16 };
        let mut tensors = vec![Stored {
            name: "a.weight",
            dtype,
            data: sized(dtype, &shape),
            shape,
        }];
        if let Some(shape) = scale_shape {
            tensors.push(Stored {
                name: "a.weight_scale",
                dtype: scale_kind,
                data: sized(scale_kind, &shape),
                shape,
            });
        }
        if let Ok(Some(matrix)) = read(&scheme, (2, 4), &tensors) {
            prop_assert!(is_fp8);
            prop_assert_eq!(matrix.dequantize().len(), 8);
            prop_assert_eq!(matrix.data.len(), 8);
        }
    }
}

#[test]
fn rounding_at_load_keeps_each_rows_largest_value_and_three_bits_of_the_others() {
    let values = [1.0f32, -3.0, 0.01, 0.5, 0.0, 0.0, 0.0, 0.0];
    let raw = RawTensor {
        kind: GgmlType::F32,
        rows: 2,
        columns: 4,
        data: values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect::<Vec<u8>>()
            .into(),
    };
    let rounded = Fp8Matrix::quantize(&raw).unwrap().dequantize();
    for (value, rounded) in values.iter().zip(&rounded) {
        assert!(
            (value - rounded).abs() <= value.abs() / 16.0,
            "{value} became {rounded}"
        );
    }
    assert!((rounded[1] + 3.0).abs() < 1e-6);
    let quantized = RawTensor {
        kind: GgmlType::Q8_0,
        ..raw
    };
    assert!(Fp8Matrix::quantize(&quantized).is_none());
}
