//! The files of docs/launch say to ranks what these read.

use std::{collections::BTreeMap, fs, path::PathBuf};

use burn_fsep::launch::RankEnvironment;
use clap::Parser;
use moe_lm::Args;
use rank_args::Comm;
use yaml_rust2::{Yaml, YamlLoader};

const TOKEN: &str = "0123456789abcdef0123456789abcdef";

fn launch_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../docs/launch").join(name)
}

fn rank(variables: &BTreeMap<String, String>) -> RankEnvironment {
    let environment = RankEnvironment::from_lookup(|name| variables.get(name).cloned()).unwrap();
    environment.process_config().unwrap();
    environment
}

fn options<'a>(words: impl Iterator<Item = &'a str>) -> Args {
    Args::try_parse_from(std::iter::once("moe-lm").chain(words)).unwrap()
}

#[test]
fn a_pod_of_the_manifest_is_a_rank() {
    let text = fs::read_to_string(launch_file("kubernetes.yaml")).unwrap();
    let [service, job] = &YamlLoader::load_from_str(&text).unwrap()[..] else { panic!("a service and a job") };
    let (spec, name) = (&job["spec"], job["metadata"]["name"].as_str().unwrap());
    let pod = &spec["template"]["spec"];
    let container = &pod["containers"][0];

    // Names of pods: JOB-INDEX.SERVICE.
    let service_name = service["metadata"]["name"].as_str().unwrap();
    assert_eq!((service["kind"].as_str(), job["kind"].as_str()), (Some("Service"), Some("Job")));
    assert_eq!((service["spec"]["clusterIP"].as_str(), pod["subdomain"].as_str()), (Some("None"), Some(service_name)));
    assert_eq!(service["spec"]["selector"], spec["template"]["metadata"]["labels"]);
    assert_eq!(spec["completionMode"].as_str(), Some("Indexed"));

    let variables = container["env"].as_vec().unwrap().iter().map(|variable| {
        let source = &variable["valueFrom"];
        let value = match (&variable["value"], &source["fieldRef"]["fieldPath"], &source["secretKeyRef"]) {
            (Yaml::String(value), _, _) => value.as_str(),
            (_, Yaml::String(path), _) => {
                assert_eq!(path, "metadata.annotations['batch.kubernetes.io/job-completion-index']");
                "3"
            }
            (_, _, Yaml::Hash(_)) => TOKEN,
            _ => panic!("a value that is no text: {variable:?}"),
        };
        (variable["name"].as_str().unwrap().to_string(), value.to_string())
    });
    let rank = rank(&variables.collect());
    assert_eq!((rank.rank, rank.local_rank, rank.local_world_size), (3, 0, Some(1)));
    assert_eq!(rank.master.0, format!("{name}-0.{service_name}"));
    let pods = ["completions", "parallelism"].map(|key| spec[key].as_i64().unwrap() as usize);
    assert_eq!(pods, [rank.world_size; 2]);

    let args = options(container["args"].as_vec().unwrap().iter().map(|word| word.as_str().unwrap()));
    assert_eq!((args.parallel.ranks.comm, args.parallel.ranks_per_node), (Comm::Nccl, Some(1)));
    assert_eq!(args.training.batch % rank.world_size, 0);
    let mounts = container["volumeMounts"].as_vec().unwrap();
    assert!(mounts.iter().any(|mount| args.output.out.starts_with(mount["mountPath"].as_str().unwrap())));
}

/// The batch script with programs in place of Slurm's.
#[cfg(unix)]
#[test]
fn a_task_of_the_batch_script_is_a_rank() {
    use std::{os::unix::fs::PermissionsExt, process::Command};

    let script = launch_file("slurm.sh");
    let text = fs::read_to_string(&script).unwrap();
    let resources: BTreeMap<&str, &str> =
        text.lines().filter_map(|line| line.strip_prefix("#SBATCH --")?.split_once('=')).collect();
    let number = |name: &str| resources[name].parse::<usize>().unwrap();
    assert_eq!(number("ntasks"), number("nodes") * number("ntasks-per-node"));
    assert_eq!(number("gpus-per-node"), number("ntasks-per-node"));

    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for (name, body) in [
        ("scontrol", "printf 'node7\\nnode8\\n'"),
        ("srun", "env > variables; printf '%s\\n' \"$@\" > words"),
        ("openssl", &format!("echo {TOKEN}")),
        ("env.sh", ""),
    ] {
        let file = folder.join(name);
        fs::write(&file, format!("#!/bin/sh\n{body}\n")).unwrap();
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let ran = Command::new("bash")
        .arg(&script)
        .args(["--steps", "7"])
        .current_dir(folder)
        .env("PATH", format!("{}:{}", folder.display(), std::env::var("PATH").unwrap()))
        .envs([("SLURM_JOB_NODELIST", "node[7-8]"), ("SLURM_JOB_ID", "1234567"), ("SLURM_JOB_NAME", "moe-lm")])
        .envs([("LIBTORCH_ENV", "./env.sh"), ("MOE_LM", "moe-lm")])
        .output()
        .unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));

    let exported = fs::read_to_string(folder.join("variables")).unwrap();
    let launchers = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"];
    let mut variables: BTreeMap<String, String> = exported
        .lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, _)| !launchers.contains(name) && !name.starts_with("OMPI_"))
        .map(|(name, value)| (name.into(), value.into()))
        .collect();
    // Of the last task of the second node.
    for (name, value) in [
        ("SLURM_PROCID", "15"),
        ("SLURM_LOCALID", "7"),
        ("SLURM_NTASKS", resources["ntasks"]),
        ("SLURM_NTASKS_PER_NODE", resources["ntasks-per-node"]),
    ] {
        variables.insert(name.into(), value.into());
    }
    let rank = rank(&variables);
    assert_eq!((rank.rank, rank.world_size, rank.local_rank), (15, 16, 7));
    assert_eq!(rank.master.0, "node7");

    let words = fs::read_to_string(folder.join("words")).unwrap();
    let words: Vec<&str> = words.lines().skip_while(|word| *word != "moe-lm").skip(1).collect();
    let args = options(words.into_iter());
    assert_eq!((args.parallel.ranks.comm, args.parallel.ranks_per_node), (Comm::Nccl, Some(number("ntasks-per-node"))));
    assert_eq!((args.training.batch % rank.world_size, args.training.steps), (0, 7));
}
