//! Hugging Face folders: `config.json` beside `model.safetensors`, or shards listed by `model.safetensors.index.json`.
//!
//! The headers are read by the `safetensors` crate, which checks that the tensors tile the file without gap or
//! overlap; nothing is copied.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;

use super::{GgmlType, MappedFile, RawTensor, WeightsError, int4::StoredTensor};

/// Largest JSON file read whole.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Most shards of a checkpoint.
const MAX_SHARDS: usize = 1024;

/// An open folder.
#[derive(Debug)]
pub struct SafetensorsFolder {
    path: PathBuf,
    config: serde_json::Value,
    generation_config: Option<serde_json::Value>,
    files: Vec<MappedFile>,
    tensors: HashMap<String, TensorRecord>,
}

#[derive(Debug)]
struct TensorRecord {
    file: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

#[derive(Deserialize)]
struct ShardIndex {
    weight_map: BTreeMap<String, String>,
}

impl SafetensorsFolder {
    /// Reads the JSON files and the headers of all shards.
    ///
    /// # Errors
    /// [`WeightsError`] when a file is absent, malformed, or the index names a tensor that its shard lacks.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let mut folder = Self::open_config(path)?;
        folder.open_weights()?;
        Ok(folder)
    }

    /// Reads the JSON files only: a folder without any tensor.
    ///
    /// # Errors
    /// [`WeightsError`] when `config.json` is absent or malformed.
    pub fn open_config(path: &Path) -> Result<Self, WeightsError> {
        let config = read_json(&path.join("config.json"))?;
        let generation = path.join("generation_config.json");
        let generation_config = generation
            .is_file()
            .then(|| read_json(&generation))
            .transpose()?;
        Ok(Self {
            path: path.to_owned(),
            config,
            generation_config,
            files: Vec::new(),
            tensors: HashMap::new(),
        })
    }

    fn open_weights(&mut self) -> Result<(), WeightsError> {
        let index_path = self.path.join("model.safetensors.index.json");
        if !index_path.is_file() {
            return self.add_file("model.safetensors");
        }
        let index = serde_json::from_value::<ShardIndex>(read_json(&index_path)?);
        let index = index.map_err(|error| malformed(&index_path, "index", error.to_string()))?;
        let mut shards: Vec<&str> = index.weight_map.values().map(String::as_str).collect();
        shards.sort_unstable();
        shards.dedup();
        if shards.len() > MAX_SHARDS {
            let message = format!(
                "it names {} shards (at most {MAX_SHARDS} are allowed)",
                shards.len()
            );
            return Err(malformed(&index_path, "index", message));
        }
        for shard in shards {
            if shard.contains(['/', '\\']) || shard.starts_with('.') {
                return Err(malformed(
                    &index_path,
                    "index",
                    format!("{shard:?} is not a plain file name"),
                ));
            }
            self.add_file(shard)?;
        }
        if let Some((name, shard)) = index
            .weight_map
            .iter()
            .find(|(name, _)| !self.tensors.contains_key(*name))
        {
            return Err(malformed(
                &index_path,
                "index",
                format!("{shard} does not hold the tensor {name}"),
            ));
        }
        Ok(())
    }

    fn add_file(&mut self, name: &str) -> Result<(), WeightsError> {
        let path = self.path.join(name);
        let map = MappedFile::open(&path)?;
        let (header_len, header) = SafeTensors::read_metadata(&map)
            .map_err(|error| malformed(&path, "safetensors", error.to_string()))?;
        let data_start = header_len + 8;
        for (tensor, info) in header.tensors() {
            let (start, end) = info.data_offsets;
            let record = TensorRecord {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes: data_start + start..data_start + end,
            };
            if record.bytes.end > map.len() {
                return Err(malformed(
                    &path,
                    "safetensors",
                    format!("tensor {tensor} reaches past its end"),
                ));
            }
            if self.tensors.insert(tensor.clone(), record).is_some() {
                return Err(malformed(
                    &path,
                    "safetensors",
                    format!("tensor {tensor} is in two shards"),
                ));
            }
        }
        self.files.push(map);
        Ok(())
    }

    /// The folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `config.json`.
    #[must_use]
    pub fn config(&self) -> &serde_json::Value {
        &self.config
    }

    /// `generation_config.json`, where there is one.
    #[must_use]
    pub fn generation_config(&self) -> Option<&serde_json::Value> {
        self.generation_config.as_ref()
    }

    /// Whether the folder has a tensor of this name.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The tensor of this name as it is stored, of any type and shape.
    #[must_use]
    pub fn stored(&self, name: &str) -> Option<StoredTensor<'_>> {
        let record = self.tensors.get(name)?;
        Some(StoredTensor {
            dtype: record.dtype,
            shape: &record.shape,
            data: self.files[record.file].slice(record.bytes.clone()),
        })
    }

    /// The tensor of this name, if the folder has it.
    ///
    /// # Errors
    /// [`WeightsError::Unsupported`] when it is neither f32, f16 nor bf16, or has more than two dimensions.
    pub fn tensor(&self, name: &str) -> Result<Option<RawTensor<'_>>, WeightsError> {
        let Some(record) = self.tensors.get(name) else {
            return Ok(None);
        };
        let kind = match record.dtype {
            Dtype::F32 => GgmlType::F32,
            Dtype::F16 => GgmlType::F16,
            Dtype::BF16 => GgmlType::BF16,
            other => return Err(self.unsupported(format!("tensor {name} is stored as {other:?}"))),
        };
        let (rows, columns) = match record.shape.as_slice() {
            [columns] => (1, *columns),
            [rows, columns] => (*rows, *columns),
            shape => return Err(self.unsupported(format!("tensor {name} has the shape {shape:?}"))),
        };
        if rows == 0 || columns == 0 {
            return Err(self.unsupported(format!("tensor {name} is empty ({rows} × {columns})")));
        }
        let data = self.files[record.file].slice(record.bytes.clone());
        Ok(Some(RawTensor {
            kind,
            rows,
            columns,
            data: data.into(),
        }))
    }

    /// Bytes of all files of weights.
    #[must_use]
    pub fn num_bytes(&self) -> usize {
        self.files.iter().map(|file| file.len()).sum()
    }

    /// Tells the kernel that all files are about to be read.
    pub fn will_read_all(&self) {
        self.files.iter().for_each(MappedFile::will_read_all);
    }

    pub(crate) fn unsupported(&self, message: String) -> WeightsError {
        WeightsError::Unsupported {
            path: self.path.display().to_string(),
            message,
        }
    }
}

fn malformed(path: &Path, format: &'static str, message: String) -> WeightsError {
    WeightsError::Malformed {
        path: path.display().to_string(),
        format,
        message,
    }
}

fn read_json(path: &Path) -> Result<serde_json::Value, WeightsError> {
    let io = |source| WeightsError::Io {
        path: path.display().to_string(),
        source,
    };
    let len = fs::metadata(path).map_err(io)?.len();
    if len > MAX_JSON_BYTES {
        let message = format!("it has {len} bytes (at most {MAX_JSON_BYTES} are allowed)");
        return Err(malformed(path, "JSON", message));
    }
    let text = fs::read(path).map_err(io)?;
    serde_json::from_slice(&text).map_err(|error| malformed(path, "JSON", error.to_string()))
}

#[cfg(test)]
mod tests;
