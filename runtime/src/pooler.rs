//! How a model's embeddings are made: which hidden states, and what is done to their mean.

use std::{fs, path::Path, str::FromStr};

use serde::Deserialize;

use crate::engine::request::Pooling;

/// Largest configuration read.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Settings of embeddings, in vLLM's words (`--pooler-config`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolerConfig {
    /// Which hidden states.
    pub pooling: Pooling,
    /// Scale to length 1.
    pub normalize: bool,
}

impl Default for PoolerConfig {
    /// What vLLM does with a decoder that says nothing.
    fn default() -> Self {
        Self {
            pooling: Pooling::Last,
            normalize: true,
        }
    }
}

/// vLLM's keys, older and newer.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PoolerFields {
    #[serde(alias = "seq_pooling_type")]
    pooling_type: Option<String>,
    #[serde(alias = "use_activation")]
    normalize: Option<bool>,
}

/// sentence-transformers' `1_Pooling/config.json`.
#[derive(Deserialize)]
struct SentenceTransformers {
    #[serde(default)]
    pooling_mode_cls_token: bool,
    #[serde(default)]
    pooling_mode_mean_tokens: bool,
    #[serde(default)]
    pooling_mode_max_tokens: bool,
    #[serde(default)]
    pooling_mode_lasttoken: bool,
}

impl FromStr for PoolerConfig {
    type Err = String;

    /// Reads `{"pooling_type": "MEAN", "normalize": true}`.
    fn from_str(text: &str) -> Result<Self, String> {
        let fields: PoolerFields = serde_json::from_str(text).map_err(|error| {
            format!("{error}; an example is {{\"pooling_type\": \"MEAN\", \"normalize\": true}}")
        })?;
        let default = Self::default();
        let pooling = match fields.pooling_type.as_deref() {
            None => default.pooling,
            Some(name) if name.eq_ignore_ascii_case("last") => Pooling::Last,
            Some(name) if name.eq_ignore_ascii_case("mean") => Pooling::Mean,
            Some(name) => {
                return Err(format!(
                    "pooling_type {name:?} is not supported: use LAST or MEAN"
                ));
            }
        };
        Ok(Self {
            pooling,
            normalize: fields.normalize.unwrap_or(default.normalize),
        })
    }
}

impl PoolerConfig {
    /// What the model's folder says in sentence-transformers' format, or the default.
    ///
    /// # Errors
    /// In words, when it says something that is not supported.
    pub fn of_model(path: &Path) -> Result<Self, String> {
        let file = path.join("1_Pooling").join("config.json");
        if !file.is_file() {
            return Ok(Self::default());
        }
        let wrong = |what: String| {
            let file = file.display();
            format!("{file}: {what}; say what to do with --pooler-config")
        };
        let length = fs::metadata(&file).map_or(0, |data| data.len());
        if length > MAX_CONFIG_BYTES {
            return Err(wrong(format!("it has {length} bytes")));
        }
        let text = fs::read(&file).map_err(|error| wrong(error.to_string()))?;
        let modes: SentenceTransformers =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        let pooling = match modes {
            SentenceTransformers {
                pooling_mode_mean_tokens: true,
                pooling_mode_cls_token: false,
                pooling_mode_max_tokens: false,
                pooling_mode_lasttoken: false,
            } => Pooling::Mean,
            SentenceTransformers {
                pooling_mode_lasttoken: true,
                pooling_mode_cls_token: false,
                pooling_mode_max_tokens: false,
                pooling_mode_mean_tokens: false,
            } => Pooling::Last,
            _ => {
                return Err(wrong(
                    "only the mean or the last token is supported".to_owned(),
                ));
            }
        };
        Ok(Self {
            pooling,
            ..Self::default()
        })
    }

    /// The first `dimensions` values (all without), scaled to length 1 if that is set.
    #[must_use]
    pub fn finish(&self, mut values: Vec<f32>, dimensions: Option<u32>) -> Vec<f32> {
        if let Some(dimensions) = dimensions {
            values.truncate(dimensions as usize);
        }
        if self.normalize {
            let squares: f64 = values.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let length = squares.sqrt();
            if length > 0.0 {
                for value in &mut values {
                    *value = (f64::from(*value) / length) as f32;
                }
            }
        }
        values
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)] // Tests fail by panicking.

    use std::fs;

    use super::{PoolerConfig, Pooling};

    #[test]
    fn the_flag_takes_vllm_s_keys_and_refuses_others_with_an_example() {
        let mean: PoolerConfig = r#"{"pooling_type": "MEAN", "normalize": false}"#.parse().unwrap();
        assert_eq!(
            mean,
            PoolerConfig {
                pooling: Pooling::Mean,
                normalize: false
            }
        );
        let newer: PoolerConfig = r#"{"seq_pooling_type": "LAST"}"#.parse().unwrap();
        assert_eq!(newer, PoolerConfig::default());
        let error = r#"{"pooling_type": "CLS"}"#.parse::<PoolerConfig>().unwrap_err();
        assert!(error.contains("use LAST or MEAN"), "{error}");
        let error = "mean".parse::<PoolerConfig>().unwrap_err();
        assert!(error.contains("an example is"), "{error}");
    }

    #[test]
    fn a_model_s_own_pooling_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let of_model = || PoolerConfig::of_model(folder.path());
        assert_eq!(of_model(), Ok(PoolerConfig::default()));
        let file = folder.path().join("1_Pooling/config.json");
        fs::create_dir(file.parent().unwrap()).unwrap();
        let write = |text: &str| fs::write(&file, text).unwrap();
        write(r#"{"word_embedding_dimension": 8, "pooling_mode_mean_tokens": true}"#);
        assert_eq!(of_model().unwrap().pooling, Pooling::Mean);
        write(r#"{"pooling_mode_lasttoken": true}"#);
        assert_eq!(of_model().unwrap().pooling, Pooling::Last);
        for unsupported in [r#"{"pooling_mode_cls_token": true}"#, "{}", "[]"] {
            write(unsupported);
            let error = of_model().unwrap_err();
            assert!(error.contains("--pooler-config"), "{error}");
        }
    }

    #[test]
    fn dimensions_are_cut_before_the_length_is_taken() {
        let config = PoolerConfig::default();
        assert_eq!(config.finish(vec![3.0, 4.0, 12.0], Some(2)), [0.6, 0.8]);
        assert_eq!(config.finish(vec![0.0; 3], None), [0.0; 3]);
        let raw = PoolerConfig {
            normalize: false,
            ..config
        };
        assert_eq!(raw.finish(vec![3.0, 4.0], None), [3.0, 4.0]);
    }
}
