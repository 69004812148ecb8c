//! A matrix within a tensor: what a parameter, or a part of an expert, is of it.

use std::ops::Range;

/// Element `[i, j]` stands at `base + i * row_stride + j * column_stride` of the tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct View {
    pub base: usize,
    pub rows: usize,
    pub columns: usize,
    pub row_stride: usize,
    pub column_stride: usize,
}

impl View {
    /// A run of elements.
    pub fn run(base: usize, len: usize) -> Self {
        Self { base, rows: 1, columns: len, row_stride: len, column_stride: 1 }
    }

    /// A matrix `[rows, columns]` of which the tensor has the transpose.
    pub fn transposed(base: usize, rows: usize, columns: usize) -> Self {
        Self { base, rows, columns, row_stride: 1, column_stride: rows }
    }

    /// Every `step`th row of `columns` elements.
    pub fn every_row(base: usize, rows: usize, columns: usize, step: usize) -> Self {
        Self { base, rows, columns, row_stride: step * columns, column_stride: 1 }
    }

    /// The transpose of every `step`th column of a matrix `[columns, step * rows]`.
    pub fn every_column_transposed(base: usize, rows: usize, columns: usize, step: usize) -> Self {
        Self { base, rows, columns, row_stride: step, column_stride: step * rows }
    }

    /// Every `step`th element.
    pub fn every(base: usize, len: usize, step: usize) -> Self {
        Self { base, rows: 1, columns: len, row_stride: step * len, column_stride: step }
    }

    pub fn len(&self) -> usize {
        self.rows * self.columns
    }

    /// Whether its elements follow each other.
    pub fn is_run(&self) -> bool {
        self.column_stride == 1 && (self.rows == 1 || self.row_stride == self.columns)
    }

    /// Where the element of this place, row by row, stands in the tensor.
    pub fn at(&self, place: usize) -> usize {
        self.base + place / self.columns * self.row_stride + place % self.columns * self.column_stride
    }

    /// What of the tensor has to be read for the elements at `range`, at most `most` elements of the tensor at once.
    pub fn spans(&self, range: Range<usize>, most: usize) -> Vec<Span> {
        let mut spans = Vec::new();
        if range.is_empty() {
            return spans;
        }
        let (first, last) = (range.start / self.columns, (range.end - 1) / self.columns);
        if self.is_run() {
            spans.push(Span { start: self.base + range.start, len: range.len(), rows: first..last + 1, columns: None });
        } else if self.column_stride == 1 {
            for row in first..=last {
                let places = (row * self.columns).max(range.start)..((row + 1) * self.columns).min(range.end);
                spans.push(Span { start: self.at(places.start), len: places.len(), rows: row..row + 1, columns: None });
            }
        } else {
            // The rows' part of one column. Where it is most of what lies between two columns, several are read at once.
            let part = (last - first) * self.row_stride + 1;
            let at_once = if part * 4 < self.column_stride { 1 } else { (most / self.column_stride).max(1) };
            for column in (0..self.columns).step_by(at_once) {
                let columns = column..(column + at_once).min(self.columns);
                spans.push(Span {
                    start: self.base + first * self.row_stride + column * self.column_stride,
                    len: (columns.len() - 1) * self.column_stride + part,
                    rows: first..last + 1,
                    columns: Some(columns),
                });
            }
        }
        spans
    }

    /// Copies the elements at `range` that a span has from there to their places, `width` bytes each.
    pub fn scatter(&self, range: &Range<usize>, span: &Span, from: &[u8], to: &mut [u8], width: usize) {
        self.pairs(range, span, |place, at| {
            to[place * width..][..width].copy_from_slice(&from[at * width..][..width]);
        });
    }

    /// Each place in `range`, counted from its start, with its place in the span.
    fn pairs(&self, range: &Range<usize>, span: &Span, mut pair: impl FnMut(usize, usize)) {
        let columns = span.columns.clone().unwrap_or(0..self.columns);
        for row in span.rows.clone() {
            for column in columns.clone() {
                let place = row * self.columns + column;
                if range.contains(&place) {
                    pair(place - range.start, self.at(place) - span.start);
                }
            }
        }
    }
}

/// A run of a tensor's elements, with the part of a view that it covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Span {
    pub start: usize,
    pub len: usize,
    rows: Range<usize>,
    /// `None`: the view's elements follow each other here.
    columns: Option<Range<usize>>,
}

impl Span {
    /// Whether it is elements of the view and nothing else, in their order.
    pub fn is_dense(&self) -> bool {
        self.columns.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_range_of_any_view_is_read() {
        let tensor: Vec<u8> = (0..240).collect();
        for view in [
            View::run(7, 100),
            View::transposed(0, 12, 20),
            View::transposed(0, 20, 12),
            View::every_row(0, 6, 20, 2),
            View::every_row(20, 6, 20, 2),
            View::every_column_transposed(1, 6, 20, 2),
            View::every(3, 30, 2),
            View { base: 24, rows: 4, columns: 6, row_stride: 6, column_stride: 1 },
        ] {
            let expected: Vec<u8> = (0..view.len()).map(|place| tensor[view.at(place)]).collect();
            for (start, end) in (0..view.len()).flat_map(|start| (start..=view.len()).map(move |end| (start, end))) {
                for most in [1, 50, 1000] {
                    let mut found = vec![0; end - start];
                    let mut filled = 0;
                    for span in view.spans(start..end, most) {
                        let bytes = &tensor[span.start..span.start + span.len];
                        if span.is_dense() {
                            found[filled..filled + span.len].copy_from_slice(bytes);
                            filled += span.len;
                        } else {
                            view.scatter(&(start..end), &span, bytes, &mut found, 1);
                        }
                    }
                    assert_eq!(found, expected[start..end], "{view:?} {start}..{end}");
                }
            }
        }
    }

    #[test]
    fn few_rows_of_a_transpose_are_not_read_with_all_others() {
        let view = View::transposed(0, 1000, 50);
        let read = |range| view.spans(range, 1 << 20).iter().map(|span| span.len).sum::<usize>();
        assert_eq!(read(0..500), 500);
        assert_eq!(read(0..view.len()), view.len());
        assert_eq!(view.spans(0..view.len(), 1 << 20).len(), 1);
    }
}
