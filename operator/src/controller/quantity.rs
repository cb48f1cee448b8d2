//! Kubernetes quantities as numbers: `500m`, `1Gi`, `2`.

/// A quantity in thousandths of its unit; none when it is no quantity.
pub(super) fn thousandths(text: &str) -> Option<f64> {
    const SUFFIXES: [(&str, f64); 13] = [
        ("Ki", 1024.0),
        ("Mi", 1_048_576.0),
        ("Gi", 1_073_741_824.0),
        ("Ti", 1_099_511_627_776.0),
        ("Pi", 1_125_899_906_842_624.0),
        ("Ei", 1_152_921_504_606_846_976.0),
        ("m", 1e-3),
        ("k", 1e3),
        ("M", 1e6),
        ("G", 1e9),
        ("T", 1e12),
        ("P", 1e15),
        ("E", 1e18),
    ];
    let (number, factor) = SUFFIXES
        .iter()
        .find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))
        .unwrap_or((text, 1.0));
    Some((number.parse::<f64>().ok()? * factor * 1e3).round())
}

/// A quantity as a whole number of its unit, rounded down; none when it is no quantity, or below zero.
pub(super) fn whole(text: &str) -> Option<u64> {
    let number = thousandths(text)? / 1e3;
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "checked to fit"
    )]
    (0.0..9e18).contains(&number).then_some(number as u64)
}

#[cfg(test)]
mod tests {
    use super::whole;

    #[test]
    fn bytes_are_whole_and_not_negative() {
        assert_eq!(whole("1.5Ki"), Some(1536));
        assert_eq!(whole("200Gi"), Some(200 << 30));
        for bad in ["", "-1", "many", "NaN"] {
            assert_eq!(whole(bad), None, "{bad}");
        }
    }
}
