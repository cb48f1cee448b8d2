//! Eight-bit floats, e4m3: a sign, 4 bits of exponent (bias 7), 3 of mantissa; no infinities, one NaN of either sign.

/// The largest finite value.
pub const MAX: f32 = 448.0;

/// The value of an e4m3.
#[must_use]
pub fn widen(byte: u8) -> f32 {
    let (exponent, mantissa) = (byte >> 3 & 15, f32::from(byte & 7));
    let size = match (exponent, byte & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from(exponent).exp2() / 128.0,
    };
    if byte & 0x80 == 0 { size } else { -size }
}

/// The nearest e4m3, of two as near the even one; what is larger than [`MAX`] becomes it.
#[must_use]
pub fn narrow(value: f32) -> u8 {
    let sign = (value.to_bits() >> 24 & 0x80) as u8;
    let size = value.abs();
    if size.is_nan() {
        return sign | 0x7f;
    }
    if size >= MAX {
        return sign | 0x7e;
    }
    // Adding and taking off 2²³ steps rounds to a multiple of the step: 2⁻⁹ below 2⁻⁶, an eighth of the power of two above.
    let exponent = (size.to_bits() >> 23).cast_signed() - 127;
    let step_exponent = exponent.max(-6) - 3;
    let step = f32::from_bits(((step_exponent + 127) as u32) << 23);
    let count = size / step; // exact, below 16
    let rounded = (count + 8_388_608.0) - 8_388_608.0;
    // `count` eighths of 2^exponent: 8 is the power itself, 16 the next one.
    let base = ((step_exponent + 9) as u32) << 3;
    sign | (base + rounded as u32) as u8
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_byte_is_its_own_nearest() {
        for byte in 0..=255u8 {
            let value = widen(byte);
            if value.is_nan() {
                assert_eq!(byte & 0x7f, 0x7f);
                continue;
            }
            assert_eq!(narrow(value), byte, "{value}");
        }
        assert_eq!(
            (widen(0x7e), widen(0x01), widen(0x38)),
            (448.0, 0.001_953_125, 1.0)
        );
        let large = [1e9, -1e9, f32::INFINITY].map(narrow);
        assert_eq!(large, [0x7e, 0xfe, 0x7e]);
        assert!(widen(narrow(f32::NAN)).is_nan());
    }

    proptest! {
        #[test]
        fn the_nearest_is_taken_and_of_two_the_even_one(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            prop_assume!(value.is_finite());
            // Beyond the largest, differences would round to the same.
            let held = f64::from(value.clamp(-MAX, MAX));
            let nearest = (0..=255u8)
                .filter(|byte| !widen(*byte).is_nan() && (byte & 0x80 != 0) == value.is_sign_negative())
                .min_by(|a, b| {
                    let off = |byte: u8| (f64::from(widen(byte)) - held).abs();
                    off(*a).total_cmp(&off(*b)).then((a & 1).cmp(&(b & 1)))
                });
            prop_assert_eq!(Some(narrow(value)), nearest);
        }
        #[test]
        fn so_it_is_among_ordinary_sizes(value in -500f32..500.0) {
            let off = |byte: u8| (f64::from(widen(byte)) - f64::from(value)).abs();
            let least = (0..=255u8).filter(|byte| byte & 0x7f != 0x7f).map(off).min_by(f64::total_cmp);
            prop_assert_eq!(Some(off(narrow(value))), least);
        }
    }
}
