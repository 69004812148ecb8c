use std::sync::Arc;

use burn::{
    data::{
        dataloader::batcher::Batcher,
        dataset::{Dataset, DatasetError},
    },
    tensor::{Device, Int, Tensor, TensorData},
};
use burn_fsep::planner::SplitMix64;

/// Windows of `context + 1` bytes of a text, in an order that depends on the seed alone.
#[derive(Debug, Clone)]
pub(crate) struct Windows {
    text: Arc<Vec<u8>>,
    context: usize,
    count: usize,
    order: Order,
}

/// Where windows are.
#[derive(Debug, Clone, Copy)]
enum Order {
    /// At random places.
    Random { seed: u64 },
    /// Spread evenly over the text.
    Spread,
}

impl Windows {
    /// `count` windows at random places.
    pub fn random(text: Arc<Vec<u8>>, context: usize, count: usize, seed: u64) -> Self {
        Self { text, context, count, order: Order::Random { seed } }
    }

    /// `count` windows, spread evenly over the text.
    pub fn spread(text: Arc<Vec<u8>>, context: usize, count: usize) -> Self {
        Self { text, context, count, order: Order::Spread }
    }

    fn start(&self, index: usize) -> usize {
        let places = self.text.len() - self.context;
        match self.order {
            // A function of seed and index alone, since a training that goes on begins anywhere.
            Order::Random { seed } => SplitMix64::new(SplitMix64::at(seed, index as u64)).below(places),
            Order::Spread => (index as u128 * places as u128 / self.count as u128) as usize,
        }
    }

    /// The bytes to be predicted.
    pub fn targets(&self) -> impl Iterator<Item = u8> + '_ {
        let window = |start: usize| self.text[start + 1..start + 1 + self.context].iter().copied();
        (0..self.count).flat_map(move |index| window(self.start(index)))
    }
}

impl Dataset<Vec<u8>> for Windows {
    fn get(&self, index: usize) -> Result<Vec<u8>, DatasetError> {
        let start = self.start(index);
        Ok(self.text[start..start + self.context + 1].to_vec())
    }

    fn len(&self) -> usize {
        self.count
    }
}

/// Bytes and the bytes that follow them.
#[derive(Debug, Clone)]
pub(crate) struct LmBatch {
    /// `[B, L]`
    pub inputs: Tensor<2, Int>,
    /// `[B, L]`
    pub targets: Tensor<2, Int>,
}

#[derive(Debug, Clone)]
pub(crate) struct LmBatcher;

impl Batcher<Vec<u8>, LmBatch> for LmBatcher {
    fn batch(&self, items: Vec<Vec<u8>>, device: &Device) -> LmBatch {
        let (batch, context) = (items.len(), items[0].len() - 1);
        let tensor = |shift: usize| {
            let ids: Vec<i32> =
                items.iter().flat_map(|item| item[shift..shift + context].iter().map(|&b| i32::from(b))).collect();
            Tensor::from_data(TensorData::new(ids, [batch, context]), device)
        };
        LmBatch { inputs: tensor(0), targets: tensor(1) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_follow_inputs() {
        let windows = Windows::random(Arc::new((0..100).collect()), 8, 3, 1);
        let item = windows.get(2).unwrap();
        assert_eq!(item.len(), 9);
        assert!(item.windows(2).all(|pair| pair[1] == pair[0] + 1));
        assert_eq!(windows.targets().count(), 24);
    }
}
