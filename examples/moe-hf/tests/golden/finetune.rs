use burn_fsep::{
    planner::PlannerStrategy,
    train::{FusedAdamWConfig, PlannerConfig, TrainerConfig},
};
use moe_hf::TokenBatch;

use crate::common::{FAMILIES, Golden, load, on_ranks};

/// 20 steps of AdamW, with and without transformers' load-balancing loss, as transformers makes them; the planner changes
/// layouts meanwhile.
#[test]
fn twenty_steps_of_adamw_are_those_of_transformers() {
    for family in FAMILIES {
        let golden = Golden::of(family);
        let batches = golden.ids("finetune.ids");
        for (name, with_aux) in [("finetune.losses", true), ("finetune.losses_without_aux", false)] {
            let expected = golden.numbers(name);
            assert_eq!((expected.len(), batches.len()), (20, 20));
            for ranks in [1, 2, 4] {
                let losses = on_ranks(ranks, |runtime, device| {
                    let device = device.clone().autodiff();
                    let model = load(family, runtime, &device)?;
                    let coeff = if with_aux { model.config().router_aux_loss_coef } else { 0.0 };
                    let config = TrainerConfig::new()
                        .with_gradient_buckets(model.buckets().clone())
                        .with_planner(PlannerConfig::new(PlannerStrategy::MinMax).with_synchronous(true));
                    let optimizer = FusedAdamWConfig::new().with_epsilon(1e-8).with_weight_decay(0.01).init();
                    let mut trainer = config.init(runtime, model, optimizer)?;
                    let mut losses = Vec::new();
                    for texts in &batches {
                        let batch = TokenBatch::of_rank(texts, runtime, &device);
                        let step = trainer.step(1e-3, |model| model.loss(&batch, coeff, runtime))?;
                        losses.push(trainer.mean_loss(&step)?);
                    }
                    trainer.finish()?;
                    Ok(losses)
                });
                let differences = losses.iter().zip(&expected).map(|(a, e)| (a - f64::from(*e)).abs() / f64::from(*e));
                let worst = differences.fold(0.0, f64::max);
                println!("{family}, {ranks} ranks, {name}: within {worst:.2e}");
                assert!(worst <= 1e-4, "{family}, {ranks} ranks: {losses:?} is not {expected:?}");
                assert!(losses.iter().all(|loss| loss.is_finite()));
            }
        }
    }
}
