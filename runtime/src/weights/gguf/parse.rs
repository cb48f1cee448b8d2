//! The one pass over a GGUF file's head that checks every length before using it.
//!
//! Errors are plain messages with the place in the file; [`super::Gguf::open`] adds the path.

use std::{collections::HashMap, ops::Range};

use super::{
    ElementKind, GgmlType, MAX_ALIGNMENT, MAX_ARRAY, MAX_DIMS, MAX_METADATA, MAX_NAME, MAX_STRING,
    MAX_TENSORS, TensorRecord, Value,
};

type Metadata = HashMap<String, Value>;
type Tensors = HashMap<String, TensorRecord>;

/// A cursor that cannot leave its bytes.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, position: 0 }
    }

    fn range(&mut self, len: usize) -> Result<Range<usize>, String> {
        let end = self
            .position
            .checked_add(len)
            .filter(|end| *end <= self.bytes.len());
        let end = end.ok_or_else(|| {
            format!(
                "it ends at byte {} where {len} more bytes from {} are needed",
                self.bytes.len(),
                self.position
            )
        })?;
        let range = self.position..end;
        self.position = end;
        Ok(range)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let range = self.range(N)?;
        Ok(self.bytes[range]
            .try_into()
            .expect("the range has N bytes: this is a bug"))
    }

    fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.fixed()?))
    }

    fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.fixed()?))
    }

    /// A length-prefixed string's bytes.
    pub(super) fn string(&mut self, max: u64) -> Result<Range<usize>, String> {
        let at = self.position;
        let len = self.u64()?;
        if len > max {
            return Err(format!(
                "the string at byte {at} claims {len} bytes (at most {max} are allowed)"
            ));
        }
        self.range(
            usize::try_from(len).map_err(|_| format!("the string at byte {at} is too long"))?,
        )
    }

    fn name(&mut self) -> Result<String, String> {
        let at = self.position;
        let range = self.string(MAX_NAME)?;
        let name = std::str::from_utf8(&self.bytes[range]);
        name.map(str::to_owned)
            .map_err(|error| format!("the name at byte {at} is not UTF-8: {error}"))
    }
}

impl ElementKind {
    const ARRAY_ID: u32 = 9;

    fn from_id(id: u32) -> Option<Self> {
        Some(match id {
            0 => Self::U8,
            1 => Self::I8,
            2 => Self::U16,
            3 => Self::I16,
            4 => Self::U32,
            5 => Self::I32,
            6 => Self::F32,
            7 => Self::Bool,
            8 => Self::Str,
            10 => Self::U64,
            11 => Self::I64,
            12 => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of one element; `None` for strings.
    fn size(self) -> Option<usize> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::Str => None,
        }
    }
}

/// Metadata and tensor records of a file, every range checked.
pub(super) fn parse(file: &[u8]) -> Result<(Metadata, Tensors), String> {
    let mut reader = Reader::new(file);
    if &reader.fixed::<4>()? != b"GGUF" {
        return Err("it does not start with \"GGUF\"".to_owned());
    }
    let version = reader.u32()?;
    if matches!(version.swap_bytes(), 1..=3) {
        return Err("it is big-endian; convert it to little-endian".to_owned());
    }
    if !matches!(version, 2 | 3) {
        return Err(format!(
            "its version is {version}; versions 2 and 3 are supported"
        ));
    }
    let tensor_count = bounded(reader.u64()?, MAX_TENSORS, "tensors")?;
    let metadata_count = bounded(reader.u64()?, MAX_METADATA, "metadata pairs")?;
    let mut metadata = Metadata::new();
    for _ in 0..metadata_count {
        let key = reader.name()?;
        let value = value(&mut reader).map_err(|message| format!("{key}: {message}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("the key {key} appears twice"));
        }
    }
    let records = (0..tensor_count)
        .map(|_| record(&mut reader))
        .collect::<Result<Vec<_>, _>>()?;
    let alignment = alignment(&metadata)?;
    let data_start = reader
        .position
        .checked_next_multiple_of(alignment)
        .ok_or("its head is too long")?;
    Ok((metadata, place(records, data_start, alignment, file.len())?))
}

fn bounded(count: u64, max: u64, what: &str) -> Result<u64, String> {
    if count > max {
        return Err(format!(
            "it claims {count} {what} (at most {max} are allowed)"
        ));
    }
    Ok(count)
}

fn value(reader: &mut Reader<'_>) -> Result<Value, String> {
    let id = reader.u32()?;
    if id == ElementKind::ARRAY_ID {
        return array(reader);
    }
    let kind = ElementKind::from_id(id).ok_or_else(|| format!("unknown value type {id}"))?;
    Ok(match kind {
        ElementKind::U8 => Value::UInt(u64::from(reader.fixed::<1>()?[0])),
        ElementKind::I8 => Value::Int(i64::from(i8::from_le_bytes(reader.fixed()?))),
        ElementKind::U16 => Value::UInt(u64::from(u16::from_le_bytes(reader.fixed()?))),
        ElementKind::I16 => Value::Int(i64::from(i16::from_le_bytes(reader.fixed()?))),
        ElementKind::U32 => Value::UInt(u64::from(reader.u32()?)),
        ElementKind::I32 => Value::Int(i64::from(i32::from_le_bytes(reader.fixed()?))),
        ElementKind::F32 => Value::Float(f64::from(f32::from_le_bytes(reader.fixed()?))),
        ElementKind::U64 => Value::UInt(reader.u64()?),
        ElementKind::I64 => Value::Int(i64::from_le_bytes(reader.fixed()?)),
        ElementKind::F64 => Value::Float(f64::from_le_bytes(reader.fixed()?)),
        ElementKind::Bool => match reader.fixed::<1>()?[0] {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            other => return Err(format!("a bool holds {other}")),
        },
        ElementKind::Str => Value::Str(reader.string(MAX_STRING)?),
    })
}

fn array(reader: &mut Reader<'_>) -> Result<Value, String> {
    let id = reader.u32()?;
    if id == ElementKind::ARRAY_ID {
        return Err("arrays of arrays are not supported".to_owned());
    }
    let kind = ElementKind::from_id(id).ok_or_else(|| format!("unknown element type {id}"))?;
    let len = bounded(reader.u64()?, MAX_ARRAY, "array elements")?;
    let len = usize::try_from(len).map_err(|_| "the array is too long".to_owned())?;
    let bytes = match kind.size() {
        Some(size) => reader.range(len.checked_mul(size).ok_or("the array is too long")?)?,
        None => {
            let start = reader.position;
            for _ in 0..len {
                reader.string(MAX_STRING)?;
            }
            start..reader.position
        }
    };
    Ok(Value::Array { kind, len, bytes })
}

/// A tensor record before its offset is checked against the file.
struct RawRecord {
    name: String,
    kind: GgmlType,
    dims: Vec<u64>,
    offset: u64,
}

fn record(reader: &mut Reader<'_>) -> Result<RawRecord, String> {
    let name = reader.name()?;
    let num_dims = reader.u32()?;
    if num_dims == 0 || num_dims > MAX_DIMS {
        return Err(format!(
            "tensor {name} has {num_dims} dimensions (1 to {MAX_DIMS} are allowed)"
        ));
    }
    let dims = (0..num_dims)
        .map(|_| reader.u64())
        .collect::<Result<Vec<_>, _>>()?;
    if dims.contains(&0) {
        return Err(format!("tensor {name} has an empty dimension: {dims:?}"));
    }
    let id = reader.u32()?;
    let kind = GgmlType::from_id(id).ok_or_else(|| {
        format!("tensor {name} has storage type {id}, which this runtime does not know")
    })?;
    Ok(RawRecord {
        name,
        kind,
        dims,
        offset: reader.u64()?,
    })
}

fn alignment(metadata: &Metadata) -> Result<usize, String> {
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::UInt(value)) => *value,
        Some(other) => return Err(format!("general.alignment is {}", other.kind_name())),
    };
    if alignment == 0 || !alignment.is_multiple_of(8) || alignment > MAX_ALIGNMENT {
        return Err(format!(
            "general.alignment is {alignment}: not a multiple of 8 up to {MAX_ALIGNMENT}"
        ));
    }
    usize::try_from(alignment).map_err(|_| "general.alignment is too large".to_owned())
}

/// Turns offsets into ranges of the file: aligned, inside, not overlapping, names unique.
fn place(
    records: Vec<RawRecord>,
    start: usize,
    alignment: usize,
    file_len: usize,
) -> Result<Tensors, String> {
    let mut tensors = Tensors::with_capacity(records.len());
    for raw in records {
        let RawRecord {
            name,
            kind,
            dims,
            offset,
        } = raw;
        if !offset.is_multiple_of(alignment as u64) {
            return Err(format!(
                "tensor {name} at offset {offset} is not aligned to {alignment} bytes"
            ));
        }
        if !dims[0].is_multiple_of(kind.block_len() as u64) {
            return Err(format!(
                "tensor {name} has rows of {} values, not whole {kind:?} blocks",
                dims[0]
            ));
        }
        let values = dims
            .iter()
            .try_fold(1u64, |product, dim| product.checked_mul(*dim));
        let size = values.and_then(|values| kind.bytes_of(values));
        let begin = usize::try_from(offset)
            .ok()
            .and_then(|offset| offset.checked_add(start));
        let end = begin
            .zip(size)
            .and_then(|(begin, size)| begin.checked_add(size))
            .filter(|end| *end <= file_len);
        let (Some(begin), Some(end)) = (begin, end) else {
            return Err(format!(
                "tensor {name} ({dims:?} {kind:?} at {offset}) reaches past the end of the file"
            ));
        };
        let record = TensorRecord {
            kind,
            dims,
            bytes: begin..end,
        };
        if tensors.insert(name.clone(), record).is_some() {
            return Err(format!("the tensor {name} appears twice"));
        }
    }
    let mut spans: Vec<(&Range<usize>, &str)> = tensors
        .iter()
        .map(|(name, t)| (&t.bytes, name.as_str()))
        .collect();
    spans.sort_unstable_by_key(|(range, _)| range.start);
    if let Some(pair) = spans
        .windows(2)
        .find(|pair| pair[0].0.end > pair[1].0.start)
    {
        return Err(format!("tensors {} and {} overlap", pair[0].1, pair[1].1));
    }
    Ok(tensors)
}
