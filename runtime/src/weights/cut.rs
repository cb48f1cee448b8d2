//! Cutting matrices for tensor-parallel ranks, as they are stored: no value is changed, quantised blocks stay whole.

use half::f16;

use super::{
    Fp8Matrix, GgmlType, Int4Matrix, RawTensor, Weight, fp8::Fp8Scales, int4::GROUP_MULTIPLE,
};

/// What one rank holds of an axis: `len` places from `start`, and zeros after them up to `padded`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First place.
    pub start: usize,
    /// Places taken.
    pub len: usize,
    /// Places held, at least `len`.
    pub padded: usize,
}

impl Span {
    /// All of an axis.
    #[must_use]
    pub fn whole(len: usize) -> Self {
        Self {
            start: 0,
            len,
            padded: len,
        }
    }

    /// The part of `rank` when `total` places are dealt out to `ranks` in runs of equal size, a multiple of `multiple`.
    #[must_use]
    pub fn of_rank(total: usize, (rank, ranks): (usize, usize), multiple: usize) -> Self {
        let padded = total.div_ceil(ranks).next_multiple_of(multiple);
        let start = (rank * padded).min(total);
        Self {
            start,
            len: padded.min(total - start),
            padded,
        }
    }

    /// The same of an axis on which each place is `width` places.
    #[must_use]
    pub fn times(self, width: usize) -> Self {
        Self {
            start: self.start * width,
            len: self.len * width,
            padded: self.padded * width,
        }
    }

    /// These places of `values`, zeros after them.
    #[must_use]
    pub fn take(self, values: &[f32]) -> Vec<f32> {
        let mut taken = values[self.start..self.start + self.len].to_vec();
        taken.resize(self.padded, 0.0);
        taken
    }
}

/// What one rank holds of a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// Of its outputs.
    Rows(Span),
    /// Of its inputs.
    Columns(Span),
}

impl<'a> Weight<'a> {
    /// The part of the matrix that `cut` names. Rows that lie together are not copied.
    ///
    /// # Errors
    /// In words, why its storage cannot be cut there.
    pub fn cut(self, cut: Cut) -> Result<Self, String> {
        Ok(match (self, cut) {
            (Self::Rows(raw), Cut::Rows(span)) => Self::Rows(raw.cut_rows(span)),
            (Self::Rows(raw), Cut::Columns(span)) => Self::Rows(raw.cut_columns(span)?),
            (Self::Int4(matrix), Cut::Rows(span)) => Self::Int4(matrix.cut_rows(span)),
            (Self::Int4(matrix), Cut::Columns(span)) => Self::Int4(matrix.cut_columns(span)?),
            (Self::Fp8(matrix), cut) => Self::Fp8(matrix.cut(cut)),
        })
    }
}

fn cannot(what: &str, span: Span, multiple: usize) -> String {
    format!(
        "{what} cannot be cut for tensor parallelism: this rank's inputs are {} to {}, held as {}, and must be multiples \
         of {multiple}; use another --tensor-parallel-size",
        span.start,
        span.start + span.len,
        span.padded
    )
}

impl<'a> RawTensor<'a> {
    fn cut_rows(self, span: Span) -> Self {
        let row = self.row_bytes();
        let wanted = span.start * row..(span.start + span.len) * row;
        let mut data = self.data.slice(wanted);
        if span.padded > span.len {
            // In every storage type a block of zero bytes is a block of zeros: its scale is 0.
            data.to_mut().resize(span.padded * row, 0);
        }
        Self {
            kind: self.kind,
            rows: span.padded,
            columns: self.columns,
            data,
        }
    }

    fn cut_columns(self, span: Span) -> Result<Self, String> {
        let block = self.kind.block_len();
        if [span.start, span.len, span.padded]
            .iter()
            .any(|place| !place.is_multiple_of(block))
        {
            return Err(cannot(&format!("{:?}", self.kind), span, block));
        }
        let bytes = |columns: usize| columns / block * self.kind.block_bytes();
        let (start, len, padded) = (bytes(span.start), bytes(span.len), bytes(span.padded));
        let mut data = Vec::with_capacity(self.rows * padded);
        for row in self.data.chunks_exact(self.row_bytes()) {
            data.extend_from_slice(&row[start..start + len]);
            data.resize(data.len() + padded - len, 0);
        }
        Ok(Self {
            kind: self.kind,
            rows: self.rows,
            columns: span.padded,
            data: data.into(),
        })
    }
}

impl Int4Matrix {
    fn cut_rows(&self, span: Span) -> Self {
        let words = self.columns / 8;
        let mut qweight = self.qweight[span.start * words..][..span.len * words].to_vec();
        qweight.resize(span.padded * words, 0);
        Self {
            rows: span.padded,
            columns: self.columns,
            group: self.group,
            qweight,
            scales: take_rows(&self.scales, self.rows, span, f16::ZERO),
            zeros: take_rows(&self.zeros, self.rows, span, 0),
        }
    }

    /// Groups that the cut would divide become smaller groups of the same scale.
    fn cut_columns(&self, span: Span) -> Result<Self, String> {
        let group = [span.start, span.len, span.padded]
            .into_iter()
            .fold(self.group, gcd);
        if !group.is_multiple_of(GROUP_MULTIPLE) {
            let what = format!("a matrix of groups of {}", self.group);
            return Err(cannot(&what, span, GROUP_MULTIPLE));
        }
        let words = |columns: usize| columns / 8;
        let mut qweight = Vec::with_capacity(self.rows * words(span.padded));
        for row in self.qweight.chunks_exact(words(self.columns)) {
            qweight.extend_from_slice(&row[words(span.start)..][..words(span.len)]);
            qweight.resize(qweight.len() + words(span.padded - span.len), 0);
        }
        let cells = span.padded / group * self.rows;
        let (mut scales, mut zeros) = (Vec::with_capacity(cells), Vec::with_capacity(cells));
        for column in (span.start..span.start + span.len).step_by(group) {
            let at = column / self.group * self.rows;
            scales.extend_from_slice(&self.scales[at..][..self.rows]);
            zeros.extend_from_slice(&self.zeros[at..][..self.rows]);
        }
        scales.resize(cells, f16::ZERO);
        zeros.resize(cells, 0);
        Ok(Self {
            rows: self.rows,
            columns: span.padded,
            group,
            qweight,
            scales,
            zeros,
        })
    }
}

impl<'a> Fp8Matrix<'a> {
    /// Blocks that the cut would divide become smaller blocks of the same scale.
    fn cut(self, cut: Cut) -> Self {
        let (rows, columns) = (self.rows, self.columns);
        let scales = match (self.scales, cut) {
            (Fp8Scales::Rows(scales), Cut::Rows(span)) => Fp8Scales::Rows(span.take(&scales)),
            (Fp8Scales::Rows(scales), Cut::Columns(_)) => Fp8Scales::Rows(scales),
            (Fp8Scales::Blocks { size, scales }, cut) => {
                cut_blocks((size, &scales), (rows, columns), cut)
            }
        };
        // Bytes are values here, and 0 is 0.
        let bytes = RawTensor {
            kind: GgmlType::I8,
            rows,
            columns,
            data: self.data,
        };
        let bytes = match cut {
            Cut::Rows(span) => bytes.cut_rows(span),
            Cut::Columns(span) => bytes
                .cut_columns(span)
                .expect("a byte is a block: this is a bug"),
        };
        Self {
            rows: bytes.rows,
            columns: bytes.columns,
            data: bytes.data,
            scales,
        }
    }
}

/// `cut` of the scales of blocks.
fn cut_blocks(
    (size, scales): ([usize; 2], &[f32]),
    (rows, columns): (usize, usize),
    cut: Cut,
) -> Fp8Scales {
    let (axis, span) = match cut {
        Cut::Rows(span) => (0, span),
        Cut::Columns(span) => (1, span),
    };
    let mut smaller = size;
    // The last block may be short, and what it lacks is not held.
    smaller[axis] = [span.start, span.len, span.padded]
        .into_iter()
        .fold(size[axis], gcd);
    let mut held = [rows, columns];
    held[axis] = span.padded;
    let width = columns.div_ceil(size[1]);
    let mut taken = Vec::new();
    for row in (0..held[0]).step_by(smaller[0]) {
        for column in (0..held[1]).step_by(smaller[1]) {
            let mut place = [row, column];
            let is_padding = place[axis] >= span.len;
            place[axis] += span.start;
            taken.push(if is_padding {
                0.0
            } else {
                scales[place[0] / size[0] * width + place[1] / size[1]]
            });
        }
    }
    Fp8Scales::Blocks {
        size: smaller,
        scales: taken,
    }
}

/// `span` of the rows of `[groups, rows]` cells.
fn take_rows<T: Copy>(cells: &[T], rows: usize, span: Span, zero: T) -> Vec<T> {
    let mut taken = Vec::with_capacity(cells.len() / rows * span.padded);
    for group in cells.chunks_exact(rows) {
        taken.extend_from_slice(&group[span.start..span.start + span.len]);
        taken.resize(taken.len() + span.padded - span.len, zero);
    }
    taken
}

/// The greatest common divisor; of 0 and `b`, `b`.
fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Inputs that a matrix of this type may be cut at, multiples of which fit every device.
#[must_use]
pub fn column_multiple(kind: GgmlType) -> usize {
    kind.block_len().max(GROUP_MULTIPLE)
}

#[cfg(test)]
mod tests;
