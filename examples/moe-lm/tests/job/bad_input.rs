//! What cannot work: options, environments, texts and checkpoints. The message says what is wrong, the exit code is not 0, and
//! no file is left that was not there before.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use crate::common::small_job;

/// Options (instead of those of a job that works), and a part of the message.
const OPTIONS: &[(&str, &str)] = &[
    // Numbers that cannot be.
    ("--ranks 0", "--ranks must be at least 1"),
    ("--batch 0", "--batch must be at least 1"),
    ("--context 0", "--context must be at least 1"),
    ("--layers 0", "--layers must be at least 1"),
    ("--hidden 0", "--hidden must be at least 1"),
    ("--heads 0", "--heads must be at least 1"),
    ("--ffn 0", "--ffn must be at least 1"),
    ("--experts 0", "--experts must be at least 1"),
    ("--top-k 0", "--top-k must be at least 1"),
    ("--slots 0", "--slots must be at least 1"),
    ("--steps 0", "--steps must be at least 1"),
    ("--valid-batches 0", "--valid-batches must be at least 1"),
    ("--ranks-per-node 0", "--ranks-per-node must be at least 1"),
    ("--checkpoint-every 0", "--checkpoint-every must be at least 1"),
    ("--keep 0", "--keep must be at least 1"),
    ("--timeout 0", "--timeout"),
    ("--timeout 5000000000", "--timeout"),
    ("--rendezvous-timeout 0", "--rendezvous-timeout"),
    ("--ranks -2", "unexpected argument '-2'"),
    ("--ranks two", "--ranks"),
    ("--ranks 2000 --batch 2000", "--ranks 2000"),
    ("--ranks 99999999999999999999", "--ranks"),
    ("--steps 1.5", "--steps"),
    ("--seed -1", "unexpected argument '-1'"),
    ("--sample -1", "unexpected argument '-1'"),
    ("--keep -1", "unexpected argument '-1'"),
    ("--lr 0", "--lr must be a positive number"),
    ("--lr -0.1", "--lr must be a positive number"),
    ("--lr NaN", "--lr must be a positive number"),
    ("--lr inf", "--lr must be a positive number"),
    ("--lr 1", "--lr must be below 1"),
    ("--lr fast", "--lr"),
    ("--clip 0", "--clip must be a positive number"),
    ("--clip -1", "--clip must be a positive number"),
    ("--clip NaN", "--clip must be a positive number"),
    ("--aux-loss -1", "--aux-loss must not be negative"),
    ("--aux-loss NaN", "--aux-loss must not be negative"),
    ("--force-biased -1", "--force-biased must not be negative"),
    ("--force-biased inf", "--force-biased must not be negative"),
    ("--batch 4000000000 --steps 4000000000 --context 4000000000", "more bytes than can be counted"),
    ("--ffn 99999999999999999", "more than any machine can hold"),
    // Words that mean nothing.
    ("--planner best", "min-max"),
    ("--backend cubecl", "vulkan"),
    ("--comm smoke", "nccl"),
    ("--device tpu", "devices are cpu, cuda"),
    ("--device cuda:", "devices are cpu, cuda"),
    ("--device cuda:x", "devices are cpu, cuda"),
    ("--device cuda:-1", "devices are cpu, cuda"),
    ("--device CUDA", "devices are cpu, cuda"),
    ("--no-such-option", "--no-such-option"),
    ("nonsense", "nonsense"),
    ("--mixed-precision=yes", "--mixed-precision"),
    ("--steps", "--steps"),
    ("--steps 3 --steps 4", "--steps"),
    // Options that do not fit each other.
    ("--batch 6 --ranks 4", "--batch 6 cannot be split evenly over 4 ranks"),
    ("--heads 5", "--hidden 16 is no multiple of --heads 5"),
    ("--heads 32", "--hidden 16 is no multiple of --heads 32"),
    ("--top-k 5", "--top-k 5 is more than --experts 4"),
    ("--slots 5", "--slots 5 on 4 ranks cannot hold 4 experts: it must be between 1 and 4"),
    ("--slots 1 --ranks 2", "it must be between 2 and 4"),
    ("--slots 3 --planner static", "--slots has no meaning with --planner static"),
    ("--experts 6 --planner static", "--experts 6 is no multiple of 4"),
    ("--ranks-per-node 3", "--ranks-per-node 3"),
    ("--ranks-per-node 8", "--ranks-per-node 8"),
    ("--dense --ranks 2", "--ranks 2 contradicts --dense"),
    ("--dense --record-trace trace.csv", "--record-trace"),
    ("--dense --synchronous", "have no meaning with --dense"),
    ("--dense --planner paper", "have no meaning with --dense"),
    ("--force-shares 0.5,0.5", "--force-shares has 2 shares, --experts is 4"),
    ("--force-shares 0.4,0.4,0.4,0.4", "--force-shares must sum to 1"),
    ("--force-shares 0.7,0.1,0.1,0.1", "0.7 is not between 0 and 0.5"),
    ("--force-shares 0.5,0.5,0.5,-0.5", "-0.5 is not between"),
    ("--force-shares NaN,0.5,0.25,0.25", "NaN is not between"),
    ("--force-shares a,b,c,d", "--force-shares"),
    ("--force-shares 0.25,0.25,0.25,0.25 --force-biased 1", "exclude each other"),
    ("--device cuda", "--device cuda needs --backend libtorch"),
    ("--device cuda:0 --comm nccl", "--device cuda needs --backend libtorch"),
    ("--comm nccl", "--comm nccl needs --backend libtorch --device cuda"),
    ("--backend libtorch --comm nccl", "--comm nccl needs --backend libtorch --device cuda"),
    // Files.
    ("--text nothing.txt", "nothing.txt"),
    ("--text folder", "folder"),
    ("--text empty.txt", "the text is too short: 0 bytes"),
    ("--text short.txt", "the text is too short"),
    ("--text short.txt empty.txt", "the text is too short"),
    ("--context 90000", "--context 90000"),
    ("--summary no/such/summary.json", "--summary: there is no folder no/such"),
    ("--record-trace no/such/trace.csv", "--record-trace: there is no folder no/such"),
    ("--timeline no/such/timeline.json", "--timeline: there is no folder no/such"),
    ("--summary folder", "--summary: folder is a folder"),
    ("--record-trace folder", "--record-trace: folder is a folder"),
    ("--timeline ..", "--timeline: .. is a folder"),
    ("--out empty.txt", "--out: empty.txt is a file"),
    ("--out empty.txt/out", "empty.txt/out"),
    ("--resume nothing", "there is no checkpoint folder nothing, and no manifest.json in it"),
    ("--resume empty.txt", "there is no checkpoint folder empty.txt"),
    ("--resume folder", "manifest.json"),
];

/// Of a build without MPI.
#[cfg(not(feature = "mpi"))]
const MPI_BUILD: &[(&str, &str)] = &[("--comm mpi", "built without it; get an MPI library")];
/// Of a build with MPI.
#[cfg(feature = "mpi")]
const MPI_BUILD: &[(&str, &str)] = &[("--comm mpi", "this process is no rank")];

/// Of a build without LibTorch.
#[cfg(not(feature = "libtorch"))]
const BUILD: &[(&str, &str)] = &[
    ("--backend libtorch", "built without it; get LibTorch"),
    ("--backend cuda", "--features cuda,fusion,autotune"),
    ("--backend libtorch --device cuda", "--features libtorch"),
    ("--backend libtorch --device cuda --comm nccl --ranks 2", "built without it; get LibTorch"),
];
/// Of a build with LibTorch, also on a machine with GPUs.
#[cfg(feature = "libtorch")]
const BUILD: &[(&str, &str)] = &[
    ("--backend libtorch --device cuda:4096", "LibTorch sees"),
    ("--backend libtorch --device cuda --ranks 1000 --batch 1000", "LibTorch sees"),
];

const RANK: [(&str, &str); 7] = [
    ("RANK", "1"),
    ("WORLD_SIZE", "2"),
    ("LOCAL_RANK", "1"),
    ("LOCAL_WORLD_SIZE", "2"),
    ("MASTER_ADDR", "127.0.0.1"),
    ("MASTER_PORT", "1"),
    ("BURN_FSEP_TOKEN", "0123456789abcdef"),
];

/// A change to [`RANK`], where an empty value unsets, options, and a part of the message.
const ENVIRONMENT: &[(&str, &str, &str)] = &[
    ("WORLD_SIZE=", "--comm process", "WORLD_SIZE is not set, although RANK is"),
    ("LOCAL_RANK=", "--comm process", "LOCAL_RANK is not set, although RANK is"),
    ("MASTER_ADDR=", "--comm process", "MASTER_ADDR is not set, although RANK is"),
    ("MASTER_PORT=", "--comm process", "MASTER_PORT is not set, although RANK is"),
    ("BURN_FSEP_TOKEN=", "--comm process", "BURN_FSEP_TOKEN is not set"),
    ("BURN_FSEP_TOKEN=short", "--comm process", "BURN_FSEP_TOKEN: "),
    ("RANK=one", "--comm process", "RANK is `one`"),
    ("RANK=-1", "--comm process", "RANK is `-1`"),
    ("RANK=2", "--comm process", "RANK=2 contradicts WORLD_SIZE=2"),
    ("WORLD_SIZE=2.0", "--comm process", "WORLD_SIZE is `2.0`"),
    ("WORLD_SIZE=0", "--comm process", "contradicts WORLD_SIZE=0"),
    ("LOCAL_RANK=2", "--comm process", "LOCAL_RANK=2 contradicts"),
    ("LOCAL_WORLD_SIZE=9", "--comm process", "LOCAL_WORLD_SIZE=9 contradicts WORLD_SIZE=2"),
    ("LOCAL_WORLD_SIZE=4(x2)", "--comm process", "LOCAL_WORLD_SIZE is `4(x2)`"),
    ("MASTER_PORT=70000", "--comm process", "MASTER_PORT is `70000`"),
    ("MASTER_PORT=0", "--comm process", "MASTER_PORT is `0`"),
    ("OMPI_COMM_WORLD_RANK=0", "--comm process", "RANK=1 contradicts OMPI_COMM_WORLD_RANK=0"),
    ("RANK=", "--comm process", "this process is no rank"),
    ("WORLD_SIZE=3", "--comm process", "--batch 4 cannot be split evenly over 3 ranks"),
    ("WORLD_SIZE=2", "--comm process --ranks 4", "--ranks 4 contradicts the launcher, which says that there are 2"),
    ("WORLD_SIZE=2", "--comm process --dense", "--dense trains on one rank, but the launcher started 2"),
    ("WORLD_SIZE=2", "--comm process --slots 1", "--slots 1 on 2 ranks"),
    ("WORLD_SIZE=2", "--comm process --ranks-per-node 4", "--ranks-per-node 4"),
    ("WORLD_SIZE=2", "--comm local", "a launcher started several processes (WORLD_SIZE=2)"),
    ("OMPI_COMM_WORLD_SIZE=4", "--comm local --ranks 4", "a launcher started several processes"),
    // Without --comm a launcher makes processes.
    ("RANK=", "", "a launcher started several processes (WORLD_SIZE=2)"),
    ("WORLD_SIZE=3", "", "--batch 4 cannot be split evenly over 3 ranks"),
    ("BURN_FSEP_TOKEN=", "", "BURN_FSEP_TOKEN is not set"),
    // Ranks that do not meet.
    ("WORLD_SIZE=2", "--comm process --rendezvous-timeout 1", "rank 0 could not be reached at `127.0.0.1:1`"),
    (
        "MASTER_ADDR=no.such.host.invalid",
        "--comm process --rendezvous-timeout 1",
        "`no.such.host.invalid:1`, cannot be resolved",
    ),
    (
        "RANK=0 LOCAL_RANK=0 MASTER_ADDR=192.0.2.1",
        "--comm process --rendezvous-timeout 1",
        "cannot listen on `192.0.2.1:1`",
    ),
    (
        "RANK=0 LOCAL_RANK=0 MASTER_PORT=29871",
        "--comm process --rendezvous-timeout 1",
        "rank(s) [1] did not come within 1s",
    ),
    ("RANK=1 WORLD_SIZE=2000", "--comm process --batch 2000", "1024 the largest world size"),
];

/// What happens to a checkpoint, options, and a part of the message.
const CHECKPOINTS: &[(Damage, &str, &str)] = &[
    (Damage::None, "--batch 8", "that training was another one"),
    (Damage::None, "--context 8", "`positions.weight` is [16, 16]"),
    (Damage::None, "--steps 13", "that training was another one"),
    (Damage::None, "--lr 1e-3", "that training was another one"),
    (Damage::None, "--clip 2", "that training was another one"),
    (Damage::None, "--seed 7", "that training was another one"),
    (Damage::None, "--heads 4", "that training was another one"),
    (Damage::None, "--top-k 1", "that training was another one"),
    (Damage::None, "--force-biased 1", "that training was another one"),
    (Damage::None, "--force-shares 0.1,0.2,0.3,0.4", "that training was another one"),
    (Damage::None, "--mixed-precision", "that training was another one"),
    (Damage::None, "--aux-loss 0.1", "that training was another one"),
    (Damage::None, "--text other.txt", "that training was another one"),
    (Damage::None, "--hidden 32", "does not fit the model"),
    (Damage::None, "--ffn 16", "does not fit the model"),
    (Damage::None, "--experts 8", "does not fit the model"),
    (Damage::None, "--layers 3", "does not fit the model"),
    (Damage::None, "--dense", "does not fit the model"),
    (Damage::Remove("manifest.json"), "", "manifest.json"),
    (Damage::Cut("manifest.json"), "", "manifest.json"),
    (Damage::Remove("experts"), "", "experts"),
    (Damage::Cut("experts"), "", "experts"),
    (Damage::Flip("experts"), "", "experts"),
    (Damage::Remove("replicated"), "", "replicated"),
    (Damage::Cut("replicated"), "", "replicated"),
    (Damage::Flip("replicated"), "", "replicated"),
];

/// What happens to the first file whose name begins so.
#[derive(Debug, Clone, Copy)]
enum Damage {
    None,
    Remove(&'static str),
    Cut(&'static str),
    Flip(&'static str),
}

impl Damage {
    fn apply(self, checkpoint: &Path) {
        let (Damage::Remove(name) | Damage::Cut(name) | Damage::Flip(name)) = self else { return };
        let files = files(checkpoint);
        let named = |path: &&PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with(name);
        let file = checkpoint.join(files.keys().find(named).unwrap_or_else(|| panic!("no {name} in {files:?}")));
        let mut bytes = fs::read(&file).unwrap();
        match self {
            Damage::Remove(_) => return fs::remove_file(file).unwrap(),
            Damage::Cut(_) => bytes.truncate(bytes.len() / 2),
            _ => *bytes.last_mut().unwrap() ^= 1,
        }
        fs::write(file, bytes).unwrap();
    }
}

/// Files below a folder, with their lengths; folders without files do not count.
fn files(folder: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                folders.push(entry.path());
            } else {
                let path = entry.path().strip_prefix(folder).unwrap().to_path_buf();
                found.insert(path, entry.metadata().unwrap().len());
            }
        }
    }
    found
}

/// Runs a job that has to fail; returns what is wrong with that.
fn check(folder: &Path, mut job: Command, what: &str, message: &str) -> Option<String> {
    let before = files(folder);
    let output = job.current_dir(folder).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    let is_error = text.starts_with("error: ") && text.matches("error: ").count() == 1 && !text.contains("panicked");
    let after = files(folder);
    let problem = if !output.status.code().is_some_and(|code| code == 1 || code == 2) {
        format!("{:?}", output.status)
    } else if !(is_error && text.contains(message)) {
        format!("expected `{message}`")
    } else if after != before {
        format!("left {:?}", after.keys().filter(|file| !before.contains_key(*file)).collect::<Vec<_>>())
    } else {
        return None;
    };
    Some(format!("{what}: {problem}: {text}"))
}

/// A small job with other options, and no launcher.
fn job(folder: &Path, options: &str) -> Command {
    let words: Vec<&str> = options.split_whitespace().collect();
    let mut job = small_job(folder, &words);
    for variable in
        RANK.map(|(name, _)| name).iter().chain(&["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_PROCID"])
    {
        job.env_remove(variable);
    }
    job
}

#[test]
fn what_cannot_work_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    fs::create_dir(folder.join("folder")).unwrap();
    for (name, text) in [("empty.txt", ""), ("short.txt", "to be or not"), ("other.txt", &"other ".repeat(500))] {
        fs::write(folder.join(name), text).unwrap();
    }
    let mut problems = Vec::new();
    for (options, message) in OPTIONS.iter().chain(BUILD).chain(MPI_BUILD) {
        problems.extend(check(folder, job(folder, options), options, message));
    }
    for (change, options, message) in ENVIRONMENT {
        let mut job = job(folder, options);
        job.envs(RANK);
        for (name, value) in change.split(' ').map(|part| part.split_once('=').unwrap()) {
            if value.is_empty() {
                job.env_remove(name)
            } else {
                job.env(name, value)
            };
        }
        problems.extend(check(folder, job, &format!("{change} {options}"), message));
    }

    let made = job(folder, "--out made --ranks 2 --checkpoint-every 5 --keep 3").current_dir(folder).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let whole = folder.join("made/checkpoints/000001-step-00000005");
    for (damage, options, message) in CHECKPOINTS {
        let copy = folder.join("checkpoint");
        fs::create_dir(&copy).unwrap();
        for file in files(&whole).keys() {
            fs::create_dir_all(copy.join(file).parent().unwrap()).unwrap();
            fs::copy(whole.join(file), copy.join(file)).unwrap();
        }
        damage.apply(&copy);
        let options = format!("--resume checkpoint {options}");
        problems.extend(check(folder, job(folder, &options), &format!("{damage:?} {options}"), message));
        fs::remove_dir_all(copy).unwrap();
    }
    assert!(problems.is_empty(), "{}", problems.join("\n"));
    assert!(OPTIONS.len() + ENVIRONMENT.len() + CHECKPOINTS.len() >= 100);
}

#[test]
fn a_training_that_is_done_is_not_done_again() {
    let folder = tempfile::tempdir().unwrap();
    let options = "--ranks 2 --checkpoint-every 5";
    assert!(job(folder.path(), options).output().unwrap().status.success());
    let again = job(folder.path(), "--resume auto");
    assert_eq!(check(folder.path(), again, "--resume auto", "that training is done"), None);
}

#[test]
fn files_that_cannot_be_written_leave_no_part() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["metrics.jsonl", "curves.html"] {
        let blocked = folder.path().join("out").join(name);
        fs::create_dir_all(&blocked).unwrap();
        let output = job(folder.path(), "--steps 2").output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(1) && text.contains(name), "{name}: {text}");
        let left = files(folder.path());
        assert!(left.keys().all(|file| file.extension().is_none_or(|extension| extension != "partial")), "{left:?}");
        fs::remove_dir_all(folder.path().join("out")).unwrap();
    }
}
