use std::{
    env,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use crate::MoeLmError;

/// Text, split into a part to train on and a held-out part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// Bytes to train on.
    pub train: Vec<u8>,
    /// Held-out bytes: the last tenth of each file.
    pub valid: Vec<u8>,
}

/// Dependencies whose sources are the default text, in this order. All of them are built before this program runs.
const DEFAULT_PACKAGES: [&str; 8] =
    ["burn-tensor", "burn-core", "burn-nn", "burn-autodiff", "burn-train", "rayon", "serde_json", "clap_builder"];
const LOCK: &str = include_str!("../../../Cargo.lock");
const DEFAULT_BYTES: usize = 4 << 20;

impl Corpus {
    /// The given files, or the sources of this program's dependencies if there are none.
    ///
    /// # Errors
    ///
    /// [`MoeLmError`] naming the file that cannot be read, or saying where sources were looked for.
    pub fn load(files: &[PathBuf]) -> Result<Self, MoeLmError> {
        let mut corpus = Self { train: Vec::new(), valid: Vec::new() };
        if files.is_empty() {
            for file in default_files()? {
                corpus.add(&file)?;
                if corpus.train.len() >= DEFAULT_BYTES {
                    break;
                }
            }
        }
        for file in files {
            corpus.add(file)?;
        }
        Ok(corpus)
    }

    fn add(&mut self, file: &Path) -> Result<(), MoeLmError> {
        let bytes = std::fs::read(file).map_err(MoeLmError::file(file))?;
        let (train, valid) = bytes.split_at(bytes.len() - bytes.len() / 10);
        self.train.extend_from_slice(train);
        self.valid.extend_from_slice(valid);
        Ok(())
    }

    /// Checks that there are enough bytes for sequences of `context` bytes.
    ///
    /// # Errors
    ///
    /// [`MoeLmError::Corpus`] saying how many there are.
    pub fn check(&self, context: usize) -> Result<(), MoeLmError> {
        let shortest = self.train.len().min(self.valid.len());
        if shortest < context + 2 {
            return Err(MoeLmError::Corpus(format!(
                "the text is too short: {} bytes to train on and {} held out, but sequences of --context {context} need \
                 at least {} of each; give more or longer files to --text",
                self.train.len(),
                self.valid.len(),
                context + 2
            )));
        }
        Ok(())
    }
}

/// Rust sources of the default packages, in the versions that Cargo.lock pins.
fn default_files() -> Result<Vec<PathBuf>, MoeLmError> {
    let home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
        .ok_or_else(|| {
            MoeLmError::Corpus("there is no home folder to look for cargo's sources in; use --text".into())
        })?;
    let sources = home.join("registry").join("src");
    let mut registries = folder(&sources);
    registries.sort();
    let mut files = Vec::new();
    for package in DEFAULT_PACKAGES {
        let Some(version) = locked_version(LOCK, package) else { continue };
        let found = registries.iter().map(|r| r.join(format!("{package}-{version}"))).find(|path| path.is_dir());
        if let Some(path) = found {
            rust_files(&path.join("src"), &mut files);
        }
    }
    if files.is_empty() {
        return Err(MoeLmError::Corpus(format!(
            "no text to train on: the sources of this program's dependencies are not in {}; give files to --text",
            sources.display()
        )));
    }
    Ok(files)
}

/// The version of a package in a Cargo.lock, the first if there are several.
fn locked_version<'a>(lock: &'a str, package: &str) -> Option<&'a str> {
    let name = format!("name = \"{package}\"");
    let mut lines = lock.lines().skip_while(|line| *line != name);
    lines.nth(1)?.strip_prefix("version = \"")?.strip_suffix('"')
}

fn rust_files(path: &Path, files: &mut Vec<PathBuf>) {
    let mut entries = folder(path);
    entries.sort();
    for entry in entries {
        if entry.is_dir() {
            rust_files(&entry, files);
        } else if entry.extension().is_some_and(|extension| extension == "rs") {
            files.push(entry);
        }
    }
}

fn folder(path: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(path).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default()
}

/// Checksum (SHA-256) of a corpus, by which trainings on other texts are told apart.
pub(crate) fn digest(corpus: &Corpus) -> String {
    let hasher = Sha256::new_with_prefix((corpus.train.len() as u64).to_le_bytes());
    format!("{:x}", hasher.chain_update(&corpus.train).chain_update(&corpus.valid).finalize())
}

/// Entropy of the bytes' distribution in nat a byte: the loss of the best model that knows no context.
pub fn unigram_entropy(bytes: impl Iterator<Item = u8>) -> f64 {
    let mut counts = [0u64; 256];
    bytes.for_each(|byte| counts[byte as usize] += 1);
    let total: u64 = counts.iter().sum();
    let share = |n: u64| n as f64 / total as f64;
    counts.into_iter().filter(|&n| n > 0).map(|n| -share(n) * share(n).ln()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entropy_of_known_distributions() {
        assert_eq!(unigram_entropy([7u8; 9].into_iter()), 0.0);
        assert!((unigram_entropy(0..=255u8) - 256f64.ln()).abs() < 1e-12);
    }

    /// It is kept in checkpoints, so no version of anything may change it.
    #[test]
    fn the_digest_of_a_text_stays() {
        let corpus = |train: &str, valid: &str| Corpus { train: train.into(), valid: valid.into() };
        // printf '\3\0\0\0\0\0\0\0abcd' | sha256sum
        assert_eq!(digest(&corpus("abc", "d")), "b9acc4937ee7d9aead8056ce46e8fe1e57d12f08f78e3c63b88985640e9829dc");
        assert_ne!(digest(&corpus("abc", "d")), digest(&corpus("ab", "cd")));
    }

    #[test]
    fn the_lock_pins_the_default_packages() {
        for package in DEFAULT_PACKAGES {
            assert!(locked_version(LOCK, package).is_some(), "{package}");
        }
        assert_eq!(locked_version(LOCK, "no-such-package"), None);
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Corpus::load(&["no/such/file.txt".into()]).unwrap_err();
        assert!(error.to_string().contains("no/such/file.txt"), "{error}");
    }
}
