//! From a checkpoint's tensors to an [`Int4Matrix`].

use half::{bf16, f16};
use safetensors::Dtype;

use super::{GROUP_MULTIPLE, Int4Matrix, Int4Scheme, Int4Source, PER_WORD, StoredTensor};

/// Which column of eight the nibbles of an AWQ word hold, lowest nibble first.
const AWQ_ORDER: [usize; PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];
const IN_ORDER: [usize; PER_WORD] = [0, 1, 2, 3, 4, 5, 6, 7];
/// Words to a side of the squares in which matrices are turned: a cache line of each row.
const TILE: usize = 16;

/// Why four-bit weights cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Int4Error {
    /// A tensor is not there.
    #[error("the tensor {tensor} is missing")]
    Missing {
        /// Its name.
        tensor: String,
    },
    /// A tensor has another shape.
    #[error("{tensor} has the shape {found:?}, and {expected:?} is expected (group size {group})")]
    Shape {
        /// Its name.
        tensor: String,
        /// Its shape.
        found: Vec<usize>,
        /// What follows from the configuration.
        expected: Vec<usize>,
        /// Inputs that share a scale.
        group: usize,
    },
    /// A tensor has another type.
    #[error("{tensor} is stored as {found:?}, and {expected} is expected")]
    Type {
        /// Its name.
        tensor: String,
        /// Its type.
        found: Dtype,
        /// What is read there.
        expected: &'static str,
    },
    /// A tensor has fewer or more bytes than its shape says.
    #[error("{tensor} has {bytes} bytes, which are not its shape's; download the file again")]
    Length {
        /// Its name.
        tensor: String,
        /// Its length.
        bytes: usize,
    },
    /// The matrix does not divide into groups or words.
    #[error("{name} has {columns} inputs, which are not groups of {group}")]
    Group {
        /// The matrix.
        name: String,
        /// Its width.
        columns: usize,
        /// Inputs that share a scale.
        group: usize,
    },
    /// The number of outputs does not divide into words.
    #[error("{name} has {rows} outputs, which are not a multiple of {PER_WORD}")]
    Rows {
        /// The matrix.
        name: String,
        /// Its height.
        rows: usize,
    },
    /// Groups follow the order of activations.
    #[error(
        "{name} is quantised in the order of activations (desc_act), which no product reads; use a checkpoint without it"
    )]
    ActOrder {
        /// The matrix.
        name: String,
    },
    /// A scale is not a finite 16-bit float.
    #[error("{tensor} holds the scale {value} at {index}, which is not a finite 16-bit float")]
    Scale {
        /// Its name.
        tensor: String,
        /// Where.
        index: usize,
        /// The value, as text.
        value: String,
    },
}

/// The tensors of one matrix.
struct Source<'f, 'a> {
    name: &'f str,
    rows: usize,
    columns: usize,
    group: usize,
    find: &'f dyn Fn(&str) -> Option<StoredTensor<'a>>,
}

pub(super) fn read<'a>(
    scheme: &Int4Scheme,
    name: &str,
    (rows, columns): (usize, usize),
    find: &dyn Fn(&str) -> Option<StoredTensor<'a>>,
) -> Result<Int4Matrix, Int4Error> {
    let group = scheme.group_of(columns);
    if group == 0 || !group.is_multiple_of(GROUP_MULTIPLE) || !columns.is_multiple_of(group) {
        return Err(Int4Error::Group {
            name: name.to_owned(),
            columns,
            group,
        });
    }
    let source = Source {
        name,
        rows,
        columns,
        group,
        find,
    };
    let (qweight, scales, zeros) = match scheme.source {
        Int4Source::Awq => source.awq()?,
        Int4Source::Gptq { zero_minus_one } => source.gptq(scheme.act_order, zero_minus_one)?,
        Int4Source::CompressedTensors { symmetric } => {
            source.compressed_tensors(scheme.act_order, symmetric)?
        }
    };
    Ok(Int4Matrix {
        rows,
        columns,
        group,
        qweight,
        scales,
        zeros,
    })
}

type Parts = (Vec<u32>, Vec<f16>, Vec<u8>);

impl<'a> Source<'_, 'a> {
    fn groups(&self) -> usize {
        self.columns / self.group
    }

    fn words_of_rows(&self) -> Result<usize, Int4Error> {
        if !self.rows.is_multiple_of(PER_WORD) {
            return Err(Int4Error::Rows {
                name: self.name.to_owned(),
                rows: self.rows,
            });
        }
        Ok(self.rows / PER_WORD)
    }

    fn awq(&self) -> Result<Parts, Int4Error> {
        let (words, groups) = (self.words_of_rows()?, self.groups());
        let stored = self.words("qweight", [self.columns, words])?;
        let qweight = pack_along_inputs(stored, self.columns, words, &AWQ_ORDER);
        let zeros = self.words("qzeros", [groups, words])?;
        let zeros = unpack_rows(zeros, &AWQ_ORDER, 0);
        Ok((qweight, self.scales("scales", [groups, self.rows])?, zeros))
    }

    fn gptq(&self, act_order: bool, zero_minus_one: bool) -> Result<Parts, Int4Error> {
        self.check_order("g_idx", act_order)?;
        let (words, groups) = (self.words_of_rows()?, self.groups());
        let inputs = self.columns / PER_WORD;
        let stored = self.words("qweight", [inputs, self.rows])?;
        let mut qweight = vec![0; inputs * self.rows];
        for_tiles(inputs, self.rows, |word, row| {
            qweight[row * inputs + word] = u32::from_le_bytes(stored[word * self.rows + row]);
        });
        let zeros = self.words("qzeros", [groups, words])?;
        let zeros = unpack_rows(zeros, &IN_ORDER, u8::from(zero_minus_one));
        Ok((qweight, self.scales("scales", [groups, self.rows])?, zeros))
    }

    fn compressed_tensors(&self, act_order: bool, symmetric: bool) -> Result<Parts, Int4Error> {
        self.check_order("weight_g_idx", act_order)?;
        let (rows, groups) = (self.rows, self.groups());
        let stored = self.words("weight_packed", [rows, self.columns / PER_WORD])?;
        let qweight = stored.iter().map(|word| u32::from_le_bytes(*word));
        let by_row = self.scales("weight_scale", [rows, groups])?;
        let mut scales = vec![f16::ZERO; by_row.len()];
        for (at, scale) in by_row.iter().enumerate() {
            scales[at % groups * rows + at / groups] = *scale;
        }
        let mut zeros = vec![8; groups * rows];
        if !symmetric {
            let stored = self.words("weight_zero_point", [rows.div_ceil(PER_WORD), groups])?;
            for (at, word) in stored.iter().enumerate() {
                let (first, group) = (at / groups * PER_WORD, at % groups);
                for (j, nibble) in nibbles(*word).into_iter().enumerate() {
                    if first + j < rows {
                        zeros[group * rows + first + j] = nibble;
                    }
                }
            }
        }
        Ok((qweight.collect(), scales, zeros))
    }

    fn stored(
        &self,
        suffix: &str,
        expected: &[usize],
    ) -> Result<(String, StoredTensor<'a>), Int4Error> {
        let tensor = format!("{}.{suffix}", self.name);
        let Some(stored) = (self.find)(&tensor) else {
            return Err(Int4Error::Missing { tensor });
        };
        if stored.shape != expected {
            return Err(Int4Error::Shape {
                tensor,
                found: stored.shape.to_vec(),
                expected: expected.to_vec(),
                group: self.group,
            });
        }
        Ok((tensor, stored))
    }

    fn words(&self, suffix: &str, shape: [usize; 2]) -> Result<&'a [[u8; 4]], Int4Error> {
        let (tensor, stored) = self.stored(suffix, &shape)?;
        if !matches!(stored.dtype, Dtype::I32 | Dtype::U32) {
            return Err(Int4Error::Type {
                tensor,
                found: stored.dtype,
                expected: "I32",
            });
        }
        chunks(tensor, stored.data.bytes(), shape[0] * shape[1])
    }

    fn scales(&self, suffix: &str, shape: [usize; 2]) -> Result<Vec<f16>, Int4Error> {
        let (tensor, stored) = self.stored(suffix, &shape)?;
        let len = shape[0] * shape[1];
        let scales: Vec<f16> = match stored.dtype {
            Dtype::F16 => chunks(tensor.clone(), &stored.data, len)?
                .iter()
                .map(|bytes| f16::from_le_bytes(*bytes))
                .collect(),
            Dtype::BF16 => chunks(tensor.clone(), &stored.data, len)?
                .iter()
                .map(|bytes| f16::from_f32(bf16::from_le_bytes(*bytes).to_f32()))
                .collect(),
            Dtype::F32 => chunks(tensor.clone(), &stored.data, len)?
                .iter()
                .map(|bytes| f16::from_f32(f32::from_le_bytes(*bytes)))
                .collect(),
            found => {
                return Err(Int4Error::Type {
                    tensor,
                    found,
                    expected: "F16, BF16 or F32",
                });
            }
        };
        match scales.iter().position(|scale| !scale.is_finite()) {
            Some(index) => Err(Int4Error::Scale {
                value: scales[index].to_string(),
                tensor,
                index,
            }),
            None => Ok(scales),
        }
    }

    /// Input `i` must be in group `i / group`: said so, or by leaving the order out.
    fn check_order(&self, suffix: &str, act_order: bool) -> Result<(), Int4Error> {
        let refuse = || Int4Error::ActOrder {
            name: self.name.to_owned(),
        };
        if (self.find)(&format!("{}.{suffix}", self.name)).is_none() {
            return if act_order { Err(refuse()) } else { Ok(()) };
        }
        let (tensor, stored) = self.stored(suffix, &[self.columns])?;
        if !matches!(stored.dtype, Dtype::I32 | Dtype::U32) {
            return Err(Int4Error::Type {
                tensor,
                found: stored.dtype,
                expected: "I32",
            });
        }
        let order: &[[u8; 4]] = chunks(tensor, &stored.data, self.columns)?;
        let trivial = order.iter().enumerate().all(|(input, group)| {
            usize::try_from(u32::from_le_bytes(*group)) == Ok(input / self.group)
        });
        if trivial { Ok(()) } else { Err(refuse()) }
    }
}

/// Exactly `len` values of `N` bytes.
fn chunks<const N: usize>(
    tensor: String,
    data: &[u8],
    len: usize,
) -> Result<&[[u8; N]], Int4Error> {
    let (values, rest) = data.as_chunks::<N>();
    if values.len() != len || !rest.is_empty() {
        return Err(Int4Error::Length {
            tensor,
            bytes: data.len(),
        });
    }
    Ok(values)
}

fn nibbles(word: [u8; 4]) -> [u8; PER_WORD] {
    std::array::from_fn(|j| word[j / 2] >> (j % 2 * 4) & 15)
}

/// Words packed along rows, one value a byte, with `plus` added (modulo 16).
fn unpack_rows(stored: &[[u8; 4]], order: &[usize; PER_WORD], plus: u8) -> Vec<u8> {
    let mut values = vec![0; stored.len() * PER_WORD];
    for (word, eight) in stored.iter().zip(values.chunks_exact_mut(PER_WORD)) {
        for (nibble, place) in nibbles(*word).into_iter().zip(order) {
            eight[*place] = (nibble + plus) & 15;
        }
    }
    values
}

/// Turns `stored`, `[inputs, words]` packed along the outputs, into `[8 · words, inputs / 8]` packed along the inputs.
fn pack_along_inputs(
    stored: &[[u8; 4]],
    inputs: usize,
    words: usize,
    order: &[usize; PER_WORD],
) -> Vec<u32> {
    let packed = inputs / PER_WORD;
    let mut out = vec![0; stored.len()];
    for_tiles(packed, words, |to, from| {
        let mut square: [u32; PER_WORD] = std::array::from_fn(|input| {
            u32::from_le_bytes(stored[(PER_WORD * to + input) * words + from])
        });
        transpose(&mut square);
        for (word, place) in square.into_iter().zip(order) {
            out[(PER_WORD * from + place) * packed + to] = word;
        }
    });
    out
}

/// Calls `run(i, j)` for all `i < height` and `j < width`, square by square.
fn for_tiles(height: usize, width: usize, mut run: impl FnMut(usize, usize)) {
    for top in (0..height).step_by(TILE) {
        for left in (0..width).step_by(TILE) {
            for i in top..(top + TILE).min(height) {
                for j in left..(left + TILE).min(width) {
                    run(i, j);
                }
            }
        }
    }
}

/// Swaps nibble `j` of word `i` with nibble `i` of word `j`.
fn transpose(square: &mut [u32; PER_WORD]) {
    for (distance, mask) in [(4, 0x0000_ffff), (2, 0x00ff_00ff), (1, 0x0f0f_0f0f_u32)] {
        for low in (0..PER_WORD).filter(|word| word & distance == 0) {
            let high = low + distance;
            let change = ((square[low] >> (4 * distance)) ^ square[high]) & mask;
            square[high] ^= change;
            square[low] ^= change << (4 * distance);
        }
    }
}
