use std::{path::Path, sync::Arc};

use burn::{module::Module, tensor::FloatDType};

use super::{
    HubError, HubFolder, SaveConfig,
    folder::{CONFIG, INDEX},
    hub_folder::Inner,
    layout::Layout,
    load::check_equal,
    model::model_params,
    output::Output,
    plan::{Lookup, Plan},
    values::{ParamValue, param_values},
    write::Job,
};
use crate::{
    FsepRuntime,
    checkpoint::{Work, all_or_none},
    comm::{self, Communicator, Operation, digest},
};

const SAVE: Operation = Operation::new("save of a model folder");
impl HubFolder {
    /// Writes a model of this folder's to a new folder, on a file system that all ranks share. Collective.
    ///
    /// Tensors have the names, shapes and types that this folder has: a model that was loaded and not changed is written bit for
    /// bit. What is quantised here is BF16 there, and `config.json` says so. What the model has not (and may not have) is copied,
    /// and so are `config.json` and the files of the tokenizer. The new folder appears whole or not at all; one job at a time writes it.
    ///
    /// Ranks write different files; a rank holds one replicated parameter, and some MB of the experts of all, at once.
    ///
    /// # Errors
    ///
    /// On all ranks if one has an error: [`HubError::Exists`]; those of [`HubFolder::load`] if folder and model are not the same;
    /// [`HubError::Divergence`] if replicated parameters differ between ranks; [`HubError::Option`] for options that cannot work;
    /// [`HubError::Io`], [`HubError::Peer`], [`HubError::Comm`].
    pub fn save<M: Module>(
        &self,
        runtime: &FsepRuntime,
        model: &M,
        folder: impl AsRef<Path>,
        config: &SaveConfig,
    ) -> Result<(), HubError> {
        let comm = runtime.comm();
        let prepared = self.prepare(runtime, model, folder.as_ref(), config);
        let job = Arc::new(all_or_none(comm, SAVE, prepared)?);
        check_equal(comm, &self.inner, &job.plan)?;
        let values = param_values(model);
        check_replicas(comm, &job, &values)?;
        let output = job.output.clone();
        let begun = if comm.rank() == 0 { output.begin() } else { Ok(()) };
        all_or_none(comm, SAVE, begun)?;
        let written = Job::write(&job, comm, &values, &config.progress).and_then(|()| {
            let (job, config, rank) = (job.clone(), config.clone(), comm.rank());
            let committed = Work::start(move || if rank == 0 { complete(&job, &config) } else { Ok(()) });
            committed.finish(comm, SAVE)
        });
        if written.is_err() && comm.rank() == 0 {
            output.discard();
        }
        written
    }

    fn prepare<M: Module>(
        &self,
        runtime: &FsepRuntime,
        model: &M,
        folder: &Path,
        config: &SaveConfig,
    ) -> Result<Job, HubError> {
        let params = model_params(Some(runtime), model)?;
        let lookup = Lookup { as_written: true, ..self.inner.lookup() };
        let plan = Plan::new(&lookup, params, &config.prefix, &config.ignored)?;
        let layout = Layout::new(&self.inner, &plan, config)?;
        let expert_ranks = runtime.groups().experts().size();
        Ok(Job { folder: self.inner.clone(), plan, layout, output: Output::new(folder)?, expert_ranks })
    }
}

/// Whether what all ranks have is equal, as it is written by one of them.
fn check_replicas(comm: &dyn Communicator, job: &Job, values: &[ParamValue]) -> Result<(), HubError> {
    if comm.size() == 1 {
        return Ok(());
    }
    let replicated = || job.plan.params.iter().zip(values).filter(|(planned, _)| planned.param.experts.is_none());
    let digests =
        replicated().map(|(planned, value)| Ok((planned.param.path.clone(), digest(value.all()?.as_bytes()))));
    let digests: Result<Vec<_>, HubError> = digests.collect();
    let digests = all_or_none(comm, SAVE, digests)?;
    match comm::agree(comm, SAVE, &digests)? {
        None => Ok(()),
        Some(comm::Difference { field, rank, .. }) => Err(HubError::Divergence {
            what: format!("the replicated parameter `{field}`"),
            rank,
            hint: "give all ranks the same values once, before the first step (`broadcast_parameters`), and average the \
                   gradients of each step (`sync_gradients`)",
        }),
    }
}

/// Writes what is beside the weights and gives the folder its name.
fn complete(job: &Job, config: &SaveConfig) -> Result<(), HubError> {
    let Job { folder, layout, output, .. } = job;
    if let Some(index) = &layout.index {
        output.write_json(INDEX, index)?;
    }
    write_config(folder, output, config.dtype)?;
    output.copy_companions(&folder.path)?;
    let files: Vec<_> = layout.files.iter().map(|file| (file.name.as_str(), file.len)).collect();
    output.commit(&files)
}

/// The folder's configuration, as it is if that is true of what is written.
fn write_config(folder: &Inner, output: &Output, dtype: Option<FloatDType>) -> Result<(), HubError> {
    if dtype.is_none() && folder.config.quantization.is_none() {
        return output.copy(&folder.path, CONFIG);
    }
    let mut config = folder.config_json.clone();
    config.remove("quantization_config");
    let name = match dtype {
        Some(FloatDType::F64) => "float64",
        Some(FloatDType::F32) => "float32",
        Some(FloatDType::F16) => "float16",
        _ => "bfloat16",
    };
    let key = if config.contains_key("torch_dtype") && !config.contains_key("dtype") { "torch_dtype" } else { "dtype" };
    config.insert(key.into(), name.into());
    output.write_json(CONFIG, &config)
}
