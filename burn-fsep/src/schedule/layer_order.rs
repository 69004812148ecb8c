/// The order in which a step runs its layers, learned from the step before.
#[derive(Debug, Default)]
pub(super) struct LayerOrder {
    before: Vec<usize>,
    current: Vec<usize>,
    /// Whether this step ran the same layers so far.
    follows: bool,
}

/// What is known of a layer that begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    /// The layer that comes next, if the step goes on as the one before.
    pub next: Option<usize>,
    /// How many come after it, if the step goes on as the one before.
    pub left: Option<usize>,
}

impl LayerOrder {
    /// A new step begins.
    pub fn begin(&mut self) {
        if !self.current.is_empty() {
            self.before = std::mem::take(&mut self.current);
        }
        self.follows = !self.before.is_empty();
    }

    /// A layer begins its forward pass.
    pub fn begin_layer(&mut self, layer: usize) -> Position {
        let place = self.current.len();
        self.current.push(layer);
        self.follows &= self.before.get(place) == Some(&layer);
        let next = self.before.get(place + 1).copied().filter(|_| self.follows);
        let left = self.before.len().checked_sub(place + 1).filter(|_| self.follows);
        Position { next, left }
    }

    /// The first layer of the step before.
    pub fn first(&self) -> Option<usize> {
        self.before.first().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_step_knows_what_comes_next() {
        let mut order = LayerOrder::default();
        order.begin();
        let unknown = Position { next: None, left: None };
        assert_eq!([3, 1, 3].map(|layer| order.begin_layer(layer)), [unknown; 3]);
        order.begin();
        assert_eq!(order.first(), Some(3));
        assert_eq!(order.begin_layer(3), Position { next: Some(1), left: Some(2) });
        assert_eq!(order.begin_layer(1), Position { next: Some(3), left: Some(1) });
        assert_eq!(order.begin_layer(3), Position { next: None, left: Some(0) });
        // A layer more than before: nothing is known of it.
        assert_eq!(order.begin_layer(1), unknown);
    }

    #[test]
    fn a_changed_order_is_not_followed_until_the_next_step() {
        let mut order = LayerOrder::default();
        for layers in [[0, 1, 2], [0, 2, 1]] {
            order.begin();
            let _ = layers.map(|layer| order.begin_layer(layer));
        }
        order.begin();
        assert_eq!(order.begin_layer(0).next, Some(2));
        assert_eq!(order.begin_layer(1).next, None);
        assert_eq!(order.begin_layer(2), Position { next: None, left: None });
    }
}
