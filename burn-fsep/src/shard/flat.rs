use std::ops::Range;

/// A tensor that is flattened and cut into equal parts, one for each of several ranks. The last parts are padded with zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FlatParts {
    /// Elements of the tensor.
    len: usize,
    ranks: usize,
}

impl FlatParts {
    /// Parts of `len` elements; `None` where there is nothing to cut: for one rank, or of one element. So a part never has the
    /// tensor's own shape.
    pub fn new(len: usize, ranks: usize) -> Option<Self> {
        (len > 1 && ranks > 1).then_some(Self { len, ranks })
    }

    /// Elements of each part, with padding. Large parts begin where vectors of 16 bytes do, which GPU kernels load.
    pub fn part_len(self) -> usize {
        const ALIGN: usize = 8;
        const LARGE: usize = 1024;
        let part = self.len.div_ceil(self.ranks);
        if part < LARGE { part } else { part.next_multiple_of(ALIGN) }
    }

    /// The elements of a rank's part, without padding.
    pub fn range(self, rank: usize) -> Range<usize> {
        let part = self.part_len();
        (rank * part).min(self.len)..((rank + 1) * part).min(self.len)
    }

    /// Shape of a part: as many dimensions as the tensor has, since optimizers tell states apart by that. `[1, .., 1, part_len]`
    pub fn part_shape(self, num_dims: usize) -> Vec<usize> {
        let mut shape = vec![1; num_dims];
        if let Some(last) = shape.last_mut() {
            *last = self.part_len();
        }
        shape
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_tensor_once_in_order() {
        for len in (2..40).chain([2047, 2049, 4099, 12_345]) {
            for ranks in 2..10 {
                let parts = FlatParts::new(len, ranks).unwrap();
                let elements: Vec<_> = (0..ranks).flat_map(|rank| parts.range(rank)).collect();
                assert_eq!(elements, (0..len).collect::<Vec<_>>(), "{parts:?}");
                assert!((0..ranks).all(|rank| parts.range(rank).len() <= parts.part_len()));
                assert!(parts.part_len() < len && parts.part_len() * ranks >= len);
                assert!(parts.part_len() < 1024 || parts.part_len().is_multiple_of(8));
                assert_eq!(parts.part_shape(3), [1, 1, parts.part_len()]);
            }
        }
        assert_eq!([FlatParts::new(0, 4), FlatParts::new(1, 4), FlatParts::new(7, 1)], [None; 3]);
    }
}
