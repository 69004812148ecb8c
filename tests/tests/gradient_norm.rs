//! The global gradient norm is that of the dense model, whatever the world size, and clipping by it gives its gradients.

use std::sync::Arc;

use burn::{
    data::dataloader::batcher::Batcher,
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    tensor::{Tensor, TensorData},
};
use burn_fsep::{
    FSEPMoEConfig, FsepError, FsepRuntimeConfig,
    comm::local::LaunchConfig,
    train::{clip_grad_norm, sync_gradients},
};
use burn_fsep_tests::{
    SmallMoe, SplitAny, TaskBatcher, TaskItem, assert_close, device, launch, random_layout, task_items,
};

const TOLERANCE: f64 = 1e-6;
/// Items of a step, of all ranks together.
const ITEMS: usize = 48;

/// A parameter's name and gradient.
type Gradient = (String, Vec<f32>);

struct Collect<'a> {
    grads: &'a GradientsParams,
    path: Vec<String>,
    found: Vec<Gradient>,
}

impl ModuleVisitor for Collect<'_> {
    fn enter_module(&mut self, name: &str, _container: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let grad = self.grads.get::<D>(param.id).expect("every parameter has a gradient");
        self.found.push((self.path.join("."), grad.into_data().iter::<f32>().collect()));
    }
}

/// The gradients of all parameters, in the model's order.
fn gradients<M: Module>(model: &M, grads: &GradientsParams) -> Vec<Gradient> {
    let mut collect = Collect { grads, path: Vec::new(), found: Vec::new() };
    model.visit(&mut collect);
    collect.found
}

fn backward(model: &SmallMoe, items: &[TaskItem]) -> GradientsParams {
    let loss = model.loss(&TaskBatcher.batch(items.to_vec(), &device()));
    GradientsParams::from_grads(loss.backward(), model)
}

/// As from the textbook, in double precision.
fn norm<'a>(gradients: impl IntoIterator<Item = &'a Gradient>) -> f64 {
    gradients.into_iter().flat_map(|(_, values)| values).map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt()
}

fn relative(actual: f64, expected: f64) -> f64 {
    (actual - expected).abs() / expected
}

struct Case {
    config: FSEPMoEConfig,
    ranks: usize,
    slots: usize,
    split: SplitAny,
    seed: u64,
}

/// What a rank has after a backward pass.
struct RankGradients {
    before: Vec<Gradient>,
    /// The norm that [`clip_grad_norm`] returned, for either maximum.
    norms: [f64; 2],
    /// Clipped by the lower maximum.
    clipped: Vec<Gradient>,
    /// "Clipped" by the higher one.
    kept: Vec<Gradient>,
}

fn is_shard((name, _): &Gradient) -> bool {
    name.contains("experts")
}

impl Case {
    /// The gradients of one pass on every rank's share of the items, under layouts with replicas.
    fn ranks(&self, items: &[TaskItem], maxima: [f64; 2]) -> Vec<RankGradients> {
        let ranks = launch(&LaunchConfig::new(self.ranks), |comm| -> Result<_, FsepError> {
            let split = self.split;
            let config = FsepRuntimeConfig::new().with_seed(self.seed).with_dispatcher(move || split.dispatcher());
            let runtime = config.init(comm)?;
            let config = self.config.clone().with_slots_per_rank(Some(self.slots));
            let model = SmallMoe::fsep_of(&config, &runtime, &device())?;
            for layer in 0..runtime.num_layers() {
                let experts = config.num_moe_experts;
                let layout = random_layout(self.ranks, self.slots, experts, 10 * self.seed + layer as u64);
                runtime.set_layout(layer, Arc::new(layout))?;
            }
            let share = items.len() / self.ranks;
            let mut grads = runtime.run(|| backward(&model, &items[runtime.rank() * share..][..share]))?;
            sync_gradients(&runtime, &model, &mut grads)?;
            let before = gradients(&model, &grads);
            let kept_norm = clip_grad_norm(&runtime, &model, &mut grads, maxima[1])?;
            let kept = gradients(&model, &grads);
            let norm = clip_grad_norm(&runtime, &model, &mut grads, maxima[0])?;
            let clipped = gradients(&model, &grads);
            Ok(RankGradients { before, norms: [norm, kept_norm], clipped, kept })
        });
        ranks.into_iter().map(Result::unwrap).collect()
    }

    /// Checks the case; returns the largest relative error of a norm.
    fn check(&self) -> f64 {
        let what = format!("{} ranks, {} slots, {:?}, seed {}", self.ranks, self.slots, self.config, self.seed);
        let items = task_items(ITEMS, self.seed);
        let dense = SmallMoe::dense_of(&self.config, self.seed, &device()).unwrap();
        let expected = gradients(&dense, &backward(&dense, &items));
        let expected_norm = norm(&expected);
        let max_norm = expected_norm / 3.0;
        let ranks = self.ranks(&items, [max_norm, 2.0 * expected_norm]);

        let mut worst = 0.0f64;
        for rank in &ranks {
            assert_eq!(rank.norms, ranks[0].norms, "the ranks' norms, {what}");
            assert_eq!(rank.kept, rank.before, "gradients below the maximum, {what}");
            worst = rank.norms.iter().fold(worst, |worst, &norm| worst.max(relative(norm, expected_norm)));
            // What the comparison has to tell apart: a rank's own gradients, and replicated ones that count once a rank.
            if self.ranks > 1 {
                let own = norm(&rank.before);
                let shards = norm(ranks.iter().flat_map(|rank| &rank.before).filter(|grad| is_shard(grad)));
                let replicated = norm(rank.before.iter().filter(|grad| !is_shard(grad)));
                let naive = (shards.powi(2) + self.ranks as f64 * replicated.powi(2)).sqrt();
                let least = relative(own, expected_norm).min(relative(naive, expected_norm));
                assert!(least > 100.0 * TOLERANCE, "{least:e}, {what}");
            }
        }
        assert!(worst <= TOLERANCE, "norm: {:?}, dense {expected_norm}, {what}", ranks[0].norms);

        let factor = (max_norm / expected_norm) as f32;
        let clipped = self.whole(&ranks, &expected);
        assert!(relative(norm(&clipped), max_norm) <= TOLERANCE, "norm of clipped gradients, {what}");
        assert_eq!(clipped.len(), expected.len(), "parameters, {what}");
        for ((name, actual), (_, dense)) in clipped.into_iter().zip(expected) {
            let data = |values: Vec<f32>| TensorData::new(values.clone(), [values.len()]);
            let dense = dense.into_iter().map(|value| value * factor).collect();
            assert_close(&format!("clipped gradient of {name}, {what}"), &data(actual), &data(dense), 1e-5);
        }
        worst
    }

    /// The clipped gradients of the whole model: each replicated one once, equal on all ranks, and whole experts.
    fn whole(&self, ranks: &[RankGradients], dense: &[Gradient]) -> Vec<Gradient> {
        let experts = self.config.num_moe_experts;
        let whole = |(place, (name, values)): (usize, &Gradient)| {
            let of_ranks = || ranks.iter().map(move |rank| &rank.clipped[place].1);
            if !is_shard(&ranks[0].clipped[place]) {
                assert!(of_ranks().all(|theirs| theirs == values), "{name} differs between ranks");
                return (name.clone(), values.clone());
            }
            let (shard, params) = (values.len() / experts, dense[place].1.len() / experts);
            let expert = |expert: usize| {
                let parts = of_ranks().flat_map(move |values| &values[expert * shard..(expert + 1) * shard]);
                let padded: Vec<f32> = parts.copied().collect();
                assert!(padded[params..].iter().all(|&value| value == 0.0), "padding of {name} has a gradient");
                padded.into_iter().take(params)
            };
            (name.clone(), (0..experts).flat_map(expert).collect())
        };
        ranks[0].clipped.iter().enumerate().map(whole).collect()
    }
}

#[test]
fn the_norm_over_shards_is_that_of_the_dense_model() {
    // 105 and 630 parameters an expert, of which 4 and 8 ranks have unequal shares, and 192, which all divide.
    let configs = [
        FSEPMoEConfig::new(7, 5, 8).with_moe_router_topk(2),
        FSEPMoEConfig::new(14, 15, 11).with_moe_router_topk(3),
        FSEPMoEConfig::new(8, 8, 16).with_moe_router_topk(4),
    ];
    for ranks in [1, 2, 4, 8] {
        let mut worst = 0.0f64;
        for (config, split) in configs.iter().zip(SplitAny::ALL) {
            for seed in 0..4 {
                let experts = config.num_moe_experts;
                let slots = (experts.div_ceil(ranks) + 1 + seed as usize % 2).min(experts);
                let case = Case { config: config.clone(), ranks, slots, split, seed };
                worst = worst.max(case.check());
            }
        }
        println!("{ranks} ranks: largest relative error of the norm {worst:.2e}");
    }
}
