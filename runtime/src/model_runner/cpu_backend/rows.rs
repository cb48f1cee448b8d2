//! Rows of activations, and how they are spread over the threads.

use std::sync::Mutex;

use super::CpuBackend;

/// Rows that make a task worth handing out, where a row is a few thousand operations.
const ROWS_PER_TASK: usize = 16;

/// A row to work on, and what came of it.
type RowTask<'a, T> = (Option<&'a mut [f32]>, Option<T>);

/// Rows of f32 activations; grows to the largest step and stays.
#[derive(Debug)]
pub(in super::super) struct CpuBuf {
    pub(super) data: Vec<f32>,
    pub(super) rows: usize,
    pub(super) width: usize,
}

impl CpuBuf {
    /// An empty buffer for rows of `width` values.
    pub(in super::super) fn new(width: usize) -> Self {
        Self {
            data: Vec::new(),
            rows: 0,
            width,
        }
    }

    /// All rows, one after another.
    pub(in super::super) fn values(&self) -> &[f32] {
        &self.data[..self.rows * self.width]
    }

    pub(super) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.width]
    }

    /// Makes room for `rows` rows; what they hold is left over from earlier steps.
    pub(super) fn with_rows(&mut self, rows: usize) -> &mut [f32] {
        self.rows = rows;
        if self.data.len() < rows * self.width {
            self.data.resize(rows * self.width, 0.0);
        }
        self.values_mut()
    }
}

impl CpuBackend {
    /// Calls `run` with each of these rows of `buf` (all different) and its place in `rows`, on all threads.
    /// Results are in the order of `rows`; a row that is named twice or absent gets none.
    pub(in super::super) fn map_rows<T: Send>(
        &self,
        buf: &mut CpuBuf,
        rows: impl Iterator<Item = usize>,
        run: impl Fn(usize, &mut [f32]) -> T + Sync,
    ) -> Vec<Option<T>> {
        let width = buf.width;
        let mut all: Vec<Option<&mut [f32]>> =
            buf.values_mut().chunks_exact_mut(width).map(Some).collect();
        let tasks: Vec<Mutex<RowTask<'_, T>>> = rows
            .map(|row| Mutex::new((all.get_mut(row).and_then(Option::take), None)))
            .collect();
        self.pool.run(tasks.len(), &|task, _| {
            let mut slot = tasks[task].lock().expect("a task panicked: this is a bug");
            let (row, result) = &mut *slot;
            *result = row.as_mut().map(|row| run(task, row));
        });
        let results = tasks
            .into_iter()
            .map(|task| task.into_inner().expect("a task panicked: this is a bug").1);
        results.collect()
    }

    /// Calls `run(first_row, rows)` on pieces of `data` that cover it, on all threads.
    pub(super) fn for_rows(
        &self,
        data: &mut [f32],
        width: usize,
        run: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        if data.len() <= ROWS_PER_TASK * width {
            run(0, data);
            return;
        }
        let pieces: Vec<Mutex<&mut [f32]>> = data
            .chunks_mut(ROWS_PER_TASK * width)
            .map(Mutex::new)
            .collect();
        self.pool.run(pieces.len(), &|task, _| {
            let mut piece = pieces[task].lock().expect("a task panicked: this is a bug");
            run(task * ROWS_PER_TASK, &mut piece);
        });
    }
}
