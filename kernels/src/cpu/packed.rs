//! Weight matrices in the layout that the products read: panels of 16 output rows, interleaved.
//!
//! Within a panel the bytes of 16 rows lie side by side in groups of four inputs, so one 64-byte load feeds sixteen
//! outputs and an activation word is broadcast against it. Four-bit weights stay four bits, eight-bit ones eight.

use half::{bf16, f16};

use super::{BlockFormat, KernelError, quantize::BLOCK};

/// Rows of a panel.
pub const PANEL: usize = 16;

/// A weight matrix `[rows, columns]`, packed.
#[derive(Debug)]
pub struct PackedMatrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) data: Data,
}

#[derive(Debug)]
pub(crate) enum Data {
    /// `w = scale·q + min`, q in 0..=15. `q`: per (panel, block) 4 × 64 bytes, byte `4r+i` of load `j` holds inputs
    /// `4j+i` (low nibble) and `16+4j+i` (high) of row `r`. `scales`: per (panel, block) 16 scales then 16 minima, f16.
    Q4 { q: Vec<u8>, scales: Vec<u16> },
    /// `w = scale·(q − zero)`, one scale for `group` inputs. `q`: as of `Q4`. `scales`: per (panel, group) 16 scales then
    /// 16 zeros, f16.
    W4 {
        q: Vec<u8>,
        scales: Vec<u16>,
        group: usize,
    },
    /// `w = scale·(q − 128)`. `q`: per (panel, block) 8 × 64 bytes, byte `4r+i` of load `j` is input `4j+i` of row `r`.
    /// `scales`: per (panel, block) 16, f16.
    Q8 { q: Vec<u8>, scales: Vec<u16> },
    /// Per (panel, input) 16 values.
    F32(Vec<f32>),
    /// The same in f16.
    F16(Vec<u16>),
    /// The same in bf16.
    BF16(Vec<u16>),
}

/// Four-bit weights `w = (q − zero) · scale`, with a scale and a zero for each `group` inputs of a row.
#[derive(Debug, Clone, Copy)]
pub struct Int4Args<'a> {
    /// Outputs.
    pub rows: usize,
    /// Inputs, a multiple of `group`.
    pub columns: usize,
    /// A multiple of 32.
    pub group: usize,
    /// `[rows, columns / 8]`; nibble `j` (lowest first) of word `i` is column `8i + j`.
    pub qweight: &'a [u32],
    /// `[columns / group, rows]`
    pub scales: &'a [f16],
    /// `[columns / group, rows]`, each in 0..=15.
    pub zeros: &'a [u8],
}

impl PackedMatrix {
    /// Packs four-bit weights with their own scales and zeros, bit for bit.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when the lengths or the group do not fit, or a zero does not fit four bits.
    pub fn from_int4(args: &Int4Args<'_>) -> Result<Self, KernelError> {
        let Int4Args {
            rows,
            columns,
            group,
            ..
        } = *args;
        if group == 0 || !group.is_multiple_of(BLOCK) || !columns.is_multiple_of(group) {
            return Err(shape(
                "from_int4",
                format!("{columns} columns in groups of {group}; multiples of {BLOCK} are needed"),
            ));
        }
        check_len("from_int4", rows, columns / 8, args.qweight.len())?;
        check_len("from_int4", columns / group, rows, args.scales.len())?;
        check_len("from_int4", columns / group, rows, args.zeros.len())?;
        if let Some(zero) = args.zeros.iter().find(|zero| **zero > 15) {
            return Err(shape("from_int4", format!("the zero {zero} is above 15")));
        }
        Ok(Self {
            rows,
            columns,
            data: pack_int4(args),
        })
    }

    /// Packs `rows × columns` values stored row after row in `format`. F32, F16, BF16, Q4_0, Q4_1 and Q8_0 are kept
    /// as they are, bit for bit; the K-quants and Q5 are refused (dequantise them and use [`Self::quantize_q8`]).
    ///
    /// # Errors
    /// [`KernelError`] for a refused format, or when `data` is not `rows × columns` values.
    pub fn from_rows(
        format: BlockFormat,
        rows: usize,
        columns: usize,
        data: &[u8],
    ) -> Result<Self, KernelError> {
        let row_bytes = check(format, rows, columns, data)?;
        let panels = rows.div_ceil(PANEL);
        let row = |index: usize| (index < rows).then(|| &data[index * row_bytes..][..row_bytes]);
        let data = match format {
            BlockFormat::F32 => Data::F32(interleave(panels, columns, |r, c| {
                row(r).map_or(0.0, |row| {
                    f32::from_le_bytes([row[4 * c], row[4 * c + 1], row[4 * c + 2], row[4 * c + 3]])
                })
            })),
            BlockFormat::F16 | BlockFormat::BF16 => {
                let values = interleave(panels, columns, |r, c| {
                    row(r).map_or(0, |row| u16::from_le_bytes([row[2 * c], row[2 * c + 1]]))
                });
                if format == BlockFormat::F16 {
                    Data::F16(values)
                } else {
                    Data::BF16(values)
                }
            }
            BlockFormat::Q4_0 | BlockFormat::Q4_1 => pack_q4(format, panels, columns, row),
            BlockFormat::Q8_0 => pack_q8(panels, columns, row),
            _ => {
                return Err(KernelError::Format {
                    format,
                    message: "no product reads it directly; dequantise it and pack it as 8 bits"
                        .to_owned(),
                });
            }
        };
        Ok(Self {
            rows,
            columns,
            data,
        })
    }

    /// Packs f32 values, `[rows, columns]`.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when `values` has another length.
    pub fn from_f32(rows: usize, columns: usize, values: &[f32]) -> Result<Self, KernelError> {
        check_len("from_f32", rows, columns, values.len())?;
        let data = interleave(rows.div_ceil(PANEL), columns, |r, c| {
            if r < rows {
                values[r * columns + c]
            } else {
                0.0
            }
        });
        Ok(Self {
            rows,
            columns,
            data: Data::F32(data),
        })
    }

    /// Quantises f32 values `[rows, columns]` to 8 bits with a scale for each 32 inputs, as Q8_0 does.
    ///
    /// # Errors
    /// [`KernelError::Shape`] when `values` has another length or `columns` is not a multiple of 32.
    pub fn quantize_q8(rows: usize, columns: usize, values: &[f32]) -> Result<Self, KernelError> {
        check_len("quantize_q8", rows, columns, values.len())?;
        if !columns.is_multiple_of(BLOCK) {
            return Err(shape(
                "quantize_q8",
                format!("{columns} columns are not a multiple of {BLOCK}"),
            ));
        }
        let mut bytes = Vec::with_capacity(rows * columns / BLOCK * 34);
        for block in values.chunks_exact(BLOCK) {
            let largest = block.iter().fold(0f32, |max, x| max.max(x.abs()));
            let scale = f16::from_f32(largest / 127.0);
            let inverse = if scale.to_f32() > 0.0 {
                1.0 / scale.to_f32()
            } else {
                0.0
            };
            bytes.extend(scale.to_le_bytes());
            bytes.extend(
                block
                    .iter()
                    .map(|x| ((x * inverse).round().clamp(-127.0, 127.0) as i8).cast_unsigned()),
            );
        }
        Self::from_rows(BlockFormat::Q8_0, rows, columns, &bytes)
    }

    /// Output width.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input width.
    #[must_use]
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// True when products with it read int8 activations.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        matches!(
            self.data,
            Data::Q4 { .. } | Data::W4 { .. } | Data::Q8 { .. }
        )
    }

    /// Bytes in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match &self.data {
            Data::Q4 { q, scales } | Data::W4 { q, scales, .. } | Data::Q8 { q, scales } => {
                q.len() + 2 * scales.len()
            }
            Data::F32(values) => 4 * values.len(),
            Data::F16(values) | Data::BF16(values) => 2 * values.len(),
        }
    }

    /// Writes row `row` in f32: what a token's embedding is.
    ///
    /// # Panics
    /// When `row` or the length of `out` is out of range.
    pub fn dequantize_row(&self, row: usize, out: &mut [f32]) {
        assert!(
            row < self.rows && out.len() == self.columns,
            "row {row} of {}, {} values",
            self.rows,
            out.len()
        );
        let (panel, lane, blocks) = (row / PANEL, row % PANEL, self.columns / BLOCK);
        match &self.data {
            Data::Q4 { q, scales } => {
                for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    let at = panel * blocks + block;
                    let (d, m) = (
                        f16_bits(scales[at * 32 + lane]),
                        f16_bits(scales[at * 32 + 16 + lane]),
                    );
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = nibble(q, at, lane, i) * d + m;
                    }
                }
            }
            Data::W4 { q, scales, group } => {
                let groups = self.columns / group;
                for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    let scales = &scales[(panel * groups + block * BLOCK / group) * 32..][..32];
                    let (d, z) = (f16_bits(scales[lane]), f16_bits(scales[16 + lane]));
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = (nibble(q, panel * blocks + block, lane, i) - z) * d;
                    }
                }
            }
            Data::Q8 { q, scales } => {
                for (block, out) in out.chunks_exact_mut(BLOCK).enumerate() {
                    let at = panel * blocks + block;
                    let d = f16_bits(scales[at * 16 + lane]);
                    for (i, out) in out.iter_mut().enumerate() {
                        *out = (f32::from(q[at * 512 + i / 4 * 64 + lane * 4 + i % 4]) - 128.0) * d;
                    }
                }
            }
            Data::F32(values) => self.lane(row, values, out, |x| x),
            Data::F16(values) => self.lane(row, values, out, f16_bits),
            Data::BF16(values) => self.lane(row, values, out, |x| bf16::from_bits(x).to_f32()),
        }
    }

    fn lane<T: Copy>(&self, row: usize, values: &[T], out: &mut [f32], convert: impl Fn(T) -> f32) {
        let panel = &values[row / PANEL * PANEL * self.columns..];
        out.iter_mut()
            .enumerate()
            .for_each(|(c, out)| *out = convert(panel[c * PANEL + row % PANEL]));
    }
}

/// Input `i` of row `lane` of four-bit block number `block`.
fn nibble(q: &[u8], block: usize, lane: usize, i: usize) -> f32 {
    let byte = q[block * 256 + i % 16 / 4 * 64 + lane * 4 + i % 4];
    f32::from(if i < 16 { byte & 15 } else { byte >> 4 })
}

fn f16_bits(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32()
}

fn shape(op: &'static str, message: String) -> KernelError {
    KernelError::Shape { op, message }
}

fn check_len(op: &'static str, rows: usize, columns: usize, len: usize) -> Result<(), KernelError> {
    if rows == 0 || columns == 0 || rows.checked_mul(columns) != Some(len) {
        return Err(shape(
            op,
            format!("{len} values are not {rows} rows of {columns}"),
        ));
    }
    Ok(())
}

fn check(
    format: BlockFormat,
    rows: usize,
    columns: usize,
    data: &[u8],
) -> Result<usize, KernelError> {
    let row_bytes = format.row_bytes(columns).ok_or_else(|| {
        shape(
            "pack",
            format!(
                "{columns} columns are not a multiple of {format:?}'s {} values",
                format.block_len()
            ),
        )
    })?;
    check_len("pack", rows, row_bytes, data.len())?;
    Ok(row_bytes)
}

fn interleave<T>(panels: usize, columns: usize, at: impl Fn(usize, usize) -> T) -> Vec<T> {
    let mut values = Vec::with_capacity(panels * columns * PANEL);
    for panel in 0..panels {
        for column in 0..columns {
            values.extend((0..PANEL).map(|lane| at(panel * PANEL + lane, column)));
        }
    }
    values
}

fn pack_q4<'a>(
    format: BlockFormat,
    panels: usize,
    columns: usize,
    row: impl Fn(usize) -> Option<&'a [u8]>,
) -> Data {
    let blocks = columns / BLOCK;
    let (mut q, mut scales) = (
        vec![0u8; panels * blocks * 256],
        vec![0u16; panels * blocks * 32],
    );
    for index in 0..panels * PANEL {
        let Some(bytes) = row(index) else { continue };
        let (panel, lane) = (index / PANEL, index % PANEL);
        for (block, bytes) in bytes.chunks_exact(format.block_bytes()).enumerate() {
            let at = panel * blocks + block;
            let d = u16::from_le_bytes([bytes[0], bytes[1]]);
            let (m, nibbles) = if format == BlockFormat::Q4_1 {
                (u16::from_le_bytes([bytes[2], bytes[3]]), &bytes[4..])
            } else {
                // Q4_0 stores q − 8: the minimum −8·d is exact in f16, short of overflow.
                (f16::from_f32(-8.0 * f16_bits(d)).to_bits(), &bytes[2..])
            };
            scales[at * 32 + lane] = d;
            scales[at * 32 + 16 + lane] = m;
            for (j, four) in nibbles.chunks_exact(4).enumerate() {
                q[at * 256 + j * 64 + lane * 4..][..4].copy_from_slice(four);
            }
        }
    }
    Data::Q4 { q, scales }
}

fn pack_int4(args: &Int4Args<'_>) -> Data {
    let (panels, blocks) = (args.rows.div_ceil(PANEL), args.columns / BLOCK);
    let groups = args.columns / args.group;
    let (mut q, mut scales) = (
        vec![0u8; panels * blocks * 256],
        vec![0u16; panels * groups * 32],
    );
    for (row, words) in args.qweight.chunks_exact(args.columns / 8).enumerate() {
        let (panel, lane) = (row / PANEL, row % PANEL);
        for (block, words) in words.chunks_exact(BLOCK / 8).enumerate() {
            let at = (panel * blocks + block) * 256;
            // Inputs 0..16 are two words, and 16..32, which share bytes with them, the other two.
            for i in 0..16 {
                let of = |words: &[u32]| (words[i / 8] >> (4 * (i % 8)) & 15) as u8;
                q[at + i / 4 * 64 + lane * 4 + i % 4] = of(words) | of(&words[2..]) << 4;
            }
        }
        for group in 0..groups {
            let (from, to) = (
                group * args.rows + row,
                (panel * groups + group) * 32 + lane,
            );
            scales[to] = args.scales[from].to_bits();
            scales[to + 16] = f16::from_f32(f32::from(args.zeros[from])).to_bits();
        }
    }
    Data::W4 {
        q,
        scales,
        group: args.group,
    }
}

fn pack_q8<'a>(panels: usize, columns: usize, row: impl Fn(usize) -> Option<&'a [u8]>) -> Data {
    let blocks = columns / BLOCK;
    let (mut q, mut scales) = (
        vec![128u8; panels * blocks * 512],
        vec![0u16; panels * blocks * 16],
    );
    for index in 0..panels * PANEL {
        let Some(bytes) = row(index) else { continue };
        let (panel, lane) = (index / PANEL, index % PANEL);
        for (block, bytes) in bytes.chunks_exact(34).enumerate() {
            let at = panel * blocks + block;
            scales[at * 16 + lane] = u16::from_le_bytes([bytes[0], bytes[1]]);
            for (j, four) in bytes[2..].chunks_exact(4).enumerate() {
                let to = &mut q[at * 512 + j * 64 + lane * 4..][..4];
                to.iter_mut()
                    .zip(four)
                    .for_each(|(to, from)| *to = from ^ 0x80);
            }
        }
    }
    Data::Q8 { q, scales }
}
