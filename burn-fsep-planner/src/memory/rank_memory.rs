use super::{MemoryError, MemoryModel, MoeSizes, RankSplit, Recompute, TrainingSizes};

/// Bytes of index tensors for an assignment: three numbers of 64 bits, as LibTorch has them (`ops::RowIndices`).
const INDEX_BYTES: u64 = 3 * 8;
/// Numbers in single precision that the router keeps for a token and an expert: logits, scores, and the scores that are weighed.
const ROUTER_ELEMENTS: u64 = 3;
/// Bytes of an element in single precision.
const F32_BYTES: u64 = 4;

/// Bytes of what all ranks have alike and of what they share.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ByPlacement {
    /// Of replicated parameters.
    pub replicated: u64,
    /// Of expert shards.
    pub experts: u64,
}

impl ByPlacement {
    /// Both.
    pub fn total(&self) -> u64 {
        self.replicated + self.experts
    }
}

/// Bytes that are kept from forward to backward, of all layers, in one micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Activations {
    /// Outside of the experts.
    pub attention: u64,
    /// Rows of the experts: inputs `[rows, D]`, the first projection `[rows, 2F]` and outputs `[rows, D]`.
    pub experts: u64,
    /// Of routers, and index tensors.
    pub routing: u64,
    /// Copies of replicated parameters in the type of the computation, which products keep.
    pub parameter_copies: u64,
}

impl Activations {
    /// All.
    pub fn total(&self) -> u64 {
        self.attention + self.experts + self.routing + self.parameter_copies
    }
}

/// Bytes of a rank's memory by what they hold. The fields are components that can be measured one by one;
/// [`RankMemory::peak`] says which of them are there at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RankMemory {
    /// Parameters.
    pub parameters: ByPlacement,
    /// Gradients, once backward is through.
    pub gradients: ByPlacement,
    /// State of the optimizer, master weights included.
    pub optimizer: ByPlacement,
    /// Whole experts in slots at their most: what `UnshardedGauge::peak_bytes` counts without repairs. With micro-batches kept layers
    /// stay from one to the next, and two others come beside them. 0 in groups of one rank, where
    /// experts are as they are.
    pub restored_experts: u64,
    /// Of these, what forward leaves for backward: `kept_layers`.
    pub kept_experts: u64,
    /// Gradients of the slots of the layer in backward, `[C, M S]`.
    pub slot_gradients: u64,
    /// Gradients of slots on their way to the shards, and what has come of other ranks'.
    pub resharding: u64,
    /// The bf16 copy of a layer's shards that leaves for other ranks, or computes, where parameters are of another type.
    pub shard_copies: u64,
    /// Copies of all replicated gradients in buckets, in single precision, while they are averaged.
    pub gradient_buckets: u64,
    /// What gradients of shards take more until the end of backward: their means over replicas are of single precision, whatever the
    /// parameters' type.
    pub single_precision_means: u64,
    /// What was added up of the micro-batches before.
    pub accumulated_gradients: u64,
    /// What is kept for backward.
    pub activations: Activations,
    /// The same of one layer.
    pub activations_of_layer: u64,
    /// Logits, and what the loss and its backward pass make of them.
    pub logits: u64,
    /// The gradient of the logits alone, while the output layer's is computed.
    pub logits_gradient: u64,
    /// What the experts' backward pass takes in a layer before its slots' gradients are there: more than what it frees.
    pub expert_transient: u64,
    /// The same while these are computed.
    pub expert_transient_late: u64,
    /// What backward takes outside of experts in one layer.
    pub layer_transient: u64,
}

impl RankMemory {
    /// The memory of one rank: of the most loaded.
    ///
    /// # Errors
    ///
    /// [`MemoryError::Setting`] for sizes that make no sense, [`MemoryError::Overflow`] for more than 64 bits of bytes.
    pub fn of(model: &MemoryModel, training: &TrainingSizes, split: RankSplit) -> Result<Self, MemoryError> {
        model.check(split)?;
        training.check()?;
        Counted { model, training, split }.memory()
    }

    /// Parameters, gradients and optimizer state.
    pub fn model_states(&self) -> u64 {
        self.parameters.total() + self.gradients.total() + self.optimizer.total()
    }
}

struct Counted<'a> {
    model: &'a MemoryModel,
    training: &'a TrainingSizes,
    split: RankSplit,
}

/// A product that cannot overflow, since `check` bounds its factors; refused if it is beyond what sums of bytes may hold.
fn bytes<const N: usize>(what: &'static str, factors: [u64; N]) -> Result<u64, MemoryError> {
    let product = factors.iter().try_fold(1u128, |product, &factor| product.checked_mul(u128::from(factor)));
    // Room for sums of all components.
    product
        .and_then(|product| u64::try_from(product).ok())
        .filter(|&bytes| bytes <= 1 << 58)
        .ok_or(MemoryError::Overflow { what })
}

impl Counted<'_> {
    fn memory(&self) -> Result<RankMemory, MemoryError> {
        let (model, training, split) = (self.model, self.training, self.split);
        let moe = &model.moe;
        let replicated = if training.cut_dense_parameters {
            model.replicated_parameters.div_ceil(split.world_size)
        } else {
            model.replicated_parameters
        };
        let shards = self.shards_of_layer()?;
        let held = |what, width: u64| -> Result<ByPlacement, MemoryError> {
            let experts = bytes(what, [moe.layers, shards, width])?;
            Ok(ByPlacement { replicated: bytes(what, [replicated, width])?, experts })
        };
        let parameters = held("parameters", training.parameter_bytes)?;
        let is_sharded = split.group_ranks > 1;
        // Whole experts of a layer, with the padding of their shards.
        let slots = bytes(
            "restored experts",
            [moe.slots_per_rank, split.group_ranks, moe.shard_len(split.group_ranks), training.compute_bytes],
        )?;
        let restored = if is_sharded && moe.layers > 0 { slots } else { 0 };
        let kept = training.kept_layers.min(moe.layers);
        // The layer that computes, and the next one's on their way; between micro-batches they come on top of what stays.
        let passing = if training.prefetch { 2 } else { 1 };
        let alive = if training.micro_batches > 1 { kept + passing } else { passing.max(kept) }.min(moe.layers);
        let slot_gradients = match moe.layers {
            0 => 0,
            // Groups of one rank have the experts' own gradients: nothing is returned to shards.
            _ if !is_sharded => bytes("gradients of slots", [shards, training.compute_bytes])?,
            _ => slots,
        };
        let shard_copies = if training.is_mixed() && moe.layers > 0 {
            bytes("copies of shards", [shards, training.compute_bytes])?
        } else {
            0
        };
        let rows = if moe.layers == 0 { 0 } else { training.rows(moe) };
        let row = |elements: u64| bytes("rows of experts", [rows, elements, training.compute_bytes]);
        let activations = self.activations(rows, row(self.kept_elements(moe))?)?;
        let [logits, logits_gradient] = self.logits()?;
        // Where forward kept less, the same tensors are made again in the layer's backward pass.
        let again = row(2 * moe.hidden_size + moe.first_width())? - row(self.kept_elements(moe))?;
        let of_layer = match model.activations.layers {
            0 => 0,
            layers => activations.total().div_ceil(layers),
        };
        let recomputed = if training.recompute == Recompute::Layers { self.attention_of_layer()? } else { 0 };
        Ok(RankMemory {
            parameters,
            gradients: parameters,
            optimizer: self.optimizer(replicated)?,
            restored_experts: alive * restored,
            kept_experts: kept * restored,
            slot_gradients,
            // What leaves and what comes is as large; delayed, it is there while the layer before has its own.
            resharding: if is_sharded { 2 * slot_gradients } else { 0 },
            shard_copies,
            gradient_buckets: if split.world_size > 1 {
                bytes("gradient buckets", [replicated, F32_BYTES])?
            } else {
                0
            },
            single_precision_means: if split.replicas() > 1 {
                bytes(
                    "means of shards' gradients",
                    [moe.layers, shards, F32_BYTES.saturating_sub(training.parameter_bytes)],
                )?
            } else {
                0
            },
            accumulated_gradients: if training.micro_batches > 1 { parameters.total() } else { 0 },
            activations,
            activations_of_layer: of_layer,
            logits,
            logits_gradient,
            // Measured against `gpu_layer --memory`: see the tests. Gradients of outputs take the place of the outputs; then come the
            // gradients of both projections and the activated rows, before the first projection is freed.
            expert_transient: again + row(2 * moe.intermediate_size + moe.first_width())?,
            expert_transient_late: again + row(moe.intermediate_size)?,
            layer_transient: recomputed
                + bytes("a layer's gradients", [3, training.tokens, moe.hidden_size, training.compute_bytes])?,
        })
    }

    /// Elements of a rank's shards of a layer, `E S`.
    fn shards_of_layer(&self) -> Result<u64, MemoryError> {
        let moe = &self.model.moe;
        bytes("expert shards", [moe.experts, moe.shard_len(self.split.group_ranks)])
    }

    fn optimizer(&self, replicated: u64) -> Result<ByPlacement, MemoryError> {
        let (state, split) = (self.training.optimizer, self.split);
        let width = state.tensors * state.element_bytes + state.master_bytes;
        let cut = |elements: u64, ranks: u64| if split.zero { elements.div_ceil(ranks) } else { elements };
        // Parameters that are cut already have as much state.
        let ranks = if self.training.cut_dense_parameters { 1 } else { split.world_size };
        let shards = cut(self.shards_of_layer()?, split.replicas());
        Ok(ByPlacement {
            replicated: bytes("optimizer state", [cut(replicated, ranks), width])?,
            experts: bytes("optimizer state", [self.model.moe.layers, shards, width])?,
        })
    }

    /// Elements that a row of the experts keeps in forward.
    fn kept_elements(&self, moe: &MoeSizes) -> u64 {
        match self.training.recompute {
            Recompute::None => 2 * moe.hidden_size + moe.first_width(),
            Recompute::Experts => 2 * moe.hidden_size,
            Recompute::Layers => 0,
        }
    }

    fn attention_of_layer(&self) -> Result<u64, MemoryError> {
        let (sizes, training) = (&self.model.activations, self.training);
        let half = bytes("activations", [training.tokens, sizes.elements_per_token, training.compute_bytes])?;
        Ok(half + bytes("activations", [training.tokens, sizes.f32_elements_per_token, F32_BYTES])?)
    }

    fn activations(&self, rows: u64, experts_of_layer: u64) -> Result<Activations, MemoryError> {
        let (model, training) = (self.model, self.training);
        let (moe, layers) = (&model.moe, model.activations.layers);
        // Nodes of autodiff hold the copies that computed, until backward has passed them.
        let parameter_copies = if training.is_mixed() && !training.cut_dense_parameters {
            bytes("copies of parameters", [model.replicated_parameters, training.compute_bytes])?
        } else {
            0
        };
        if training.recompute == Recompute::Layers {
            let input = [layers, training.tokens, moe.hidden_size, training.compute_bytes];
            return Ok(Activations {
                attention: bytes("activations", input)?,
                parameter_copies,
                ..Activations::default()
            });
        }
        let router = bytes("routing", [training.tokens, moe.experts, ROUTER_ELEMENTS * F32_BYTES])?;
        let routing = router + bytes("routing", [rows, INDEX_BYTES])?;
        Ok(Activations {
            attention: bytes("activations", [layers, self.attention_of_layer()?])?,
            experts: bytes("activations of experts", [moe.layers, experts_of_layer])?,
            routing: bytes("routing", [moe.layers, routing])?,
            parameter_copies,
        })
    }

    /// Logits `[T, V]` in the type of the computation; in single precision the logarithms of probabilities, and the gradients of these
    /// and of the logits. Then the gradient of the logits alone.
    fn logits(&self) -> Result<[u64; 2], MemoryError> {
        let (training, vocabulary) = (self.training, self.model.activations.vocabulary);
        let logits = |width| bytes("logits", [training.tokens, vocabulary, width]);
        Ok([logits(training.compute_bytes + 3 * F32_BYTES)?, logits(training.compute_bytes)?])
    }
}
