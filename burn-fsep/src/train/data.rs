use burn::data::dataset::{Dataset, DatasetError};

use crate::{FsepError, FsepRuntime};

/// A rank's part of each global batch of a dataset.
///
/// Global batch `b` is items `b * B .. (b + 1) * B`; rank `r` gets its `r`-th `N`-th. Loaded without shuffling in
/// batches of `B / N`, all ranks together see the same batches whatever the world size is. Items behind the last whole
/// global batch are left out, so that all ranks make the same number of steps.
pub struct RankDataset<D> {
    inner: D,
    global_batch: usize,
    rank: usize,
    world_size: usize,
}

impl<D> RankDataset<D> {
    /// The part of the rank of `runtime`; `global_batch` is `B`.
    ///
    /// # Errors
    ///
    /// [`FsepError::Config`] if `global_batch` is 0 or cannot be split evenly over the ranks, or if there are not enough items
    /// for one.
    pub fn new<I>(dataset: D, global_batch: usize, runtime: &FsepRuntime) -> Result<Self, FsepError>
    where
        D: Dataset<I>,
    {
        let world_size = runtime.world_size();
        if global_batch == 0 || !global_batch.is_multiple_of(world_size) {
            return Err(FsepError::Config(format!(
                "a global batch of {global_batch} cannot be split evenly over {world_size} ranks; use a positive \
                 multiple of {world_size}"
            )));
        }
        if dataset.len() < global_batch {
            return Err(FsepError::Config(format!(
                "{} items make no global batch of {global_batch}: no rank would get anything; use more data or a smaller \
                 global batch",
                dataset.len()
            )));
        }
        Ok(Self { inner: dataset, global_batch, rank: runtime.rank(), world_size })
    }

    /// Items of this rank in each batch: `B / N`.
    pub fn batch_size(&self) -> usize {
        self.global_batch / self.world_size
    }
}

impl<I, D> Dataset<I> for RankDataset<D>
where
    D: Dataset<I>,
    I: Send + Sync,
{
    fn get(&self, index: usize) -> Result<I, DatasetError> {
        // Behind the end may lie other ranks' items, and those that no rank gets.
        assert!(index < self.len(), "index {index} of a rank's {} items", self.len());
        let (batch, place) = (index / self.batch_size(), index % self.batch_size());
        self.inner.get(batch * self.global_batch + self.rank * self.batch_size() + place)
    }

    fn len(&self) -> usize {
        self.inner.len() / self.global_batch * self.batch_size()
    }
}

#[cfg(test)]
mod tests {
    use burn::data::dataset::InMemDataset;

    use super::*;
    use crate::comm::local::{LaunchConfig, launch};

    #[test]
    fn ranks_share_each_global_batch() {
        for world_size in [1, 2, 4] {
            let parts: Vec<Vec<usize>> = launch(&LaunchConfig::new(world_size), |comm| {
                let part = RankDataset::new(InMemDataset::new((0..11).collect()), 4, &FsepRuntime::new(comm)?)?;
                Ok::<_, FsepError>((0..Dataset::<usize>::len(&part)).map(|i| part.get(i).unwrap()).collect())
            })
            .into_iter()
            .map(Result::unwrap)
            .collect();
            for batch in 0..2 {
                let size = 4 / world_size;
                let seen: Vec<_> =
                    parts.iter().flat_map(|part| part[batch * size..(batch + 1) * size].to_vec()).collect();
                assert_eq!(seen, (batch * 4..(batch + 1) * 4).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    #[should_panic(expected = "index 8 of a rank's 8 items")]
    fn items_that_no_rank_gets_cannot_be_read() {
        let part = RankDataset::new(InMemDataset::new((0..11).collect()), 4, &FsepRuntime::single()).unwrap();
        let _: Result<i32, _> = part.get(8);
    }

    #[test]
    fn a_batch_that_does_not_divide_is_refused() {
        let runtime = FsepRuntime::single();
        assert!(RankDataset::new(InMemDataset::new(vec![1]), 0, &runtime).is_err());
    }

    #[test]
    fn data_for_less_than_one_global_batch_is_refused() {
        let runtime = FsepRuntime::single();
        let part = |items: usize| RankDataset::new(InMemDataset::new(vec![0; items]), 4, &runtime);
        for items in [0, 3] {
            let Err(FsepError::Config(reason)) = part(items) else { panic!("{items} items are taken") };
            assert!(reason.contains(&format!("{items} items make no global batch of 4")), "{reason}");
        }
        assert_eq!(Dataset::<i32>::len(&part(4).unwrap()), 4);
    }
}
