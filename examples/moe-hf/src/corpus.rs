use std::path::{Path, PathBuf};

use burn_fsep::planner::SplitMix64;

use crate::{MoeHfError, TextCodec};

/// Text as tokens, split into a part to train on and a held-out part.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Corpus {
    /// Tokens to train on.
    pub train: Vec<u32>,
    /// Held-out tokens: the last tenth of each file.
    pub valid: Vec<u32>,
}

/// Where the default text is: this program's own workspace.
const WORKSPACE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
const DEFAULT_FOLDERS: [&str; 4] = ["burn-fsep/src", "burn-fsep-planner/src", "tests", "docs"];

impl Corpus {
    /// The given files, or the sources of burn-fsep if there are none.
    ///
    /// # Errors
    ///
    /// [`MoeHfError`] naming the file that cannot be read, or saying where sources were looked for.
    pub fn load(files: &[PathBuf], codec: &TextCodec) -> Result<Self, MoeHfError> {
        let found = if files.is_empty() { default_files()? } else { files.to_vec() };
        let mut corpus = Self { train: Vec::new(), valid: Vec::new() };
        for file in found {
            let tokens = codec.encode(&std::fs::read(&file).map_err(MoeHfError::file(&file))?)?;
            let (train, valid) = tokens.split_at(tokens.len() - tokens.len() / 10);
            corpus.train.extend_from_slice(train);
            corpus.valid.extend_from_slice(valid);
        }
        Ok(corpus)
    }

    /// Checks that there are enough tokens for sequences of `seq_len`.
    ///
    /// # Errors
    ///
    /// [`MoeHfError::Corpus`] saying how many there are.
    pub fn check(&self, seq_len: usize) -> Result<(), MoeHfError> {
        if self.train.len().min(self.valid.len()) < seq_len + 1 {
            return Err(MoeHfError::Corpus(format!(
                "the text is too short: {} tokens to train on and {} held out, but sequences of --seq-len {seq_len} need at \
                 least {} of each; give more or longer files to --text, or a smaller --seq-len",
                self.train.len(),
                self.valid.len(),
                seq_len + 1
            )));
        }
        Ok(())
    }

    /// The sequences of a step, at random places that are a function of seed and step alone. `[batch][seq_len]`
    pub fn batch(&self, seed: u64, step: usize, batch: usize, seq_len: usize) -> Vec<Vec<u32>> {
        let places = self.train.len() - seq_len;
        let start = |index: usize| SplitMix64::new(SplitMix64::at(seed, (step * batch + index) as u64)).below(places);
        (0..batch).map(|index| self.train[start(index)..][..seq_len].to_vec()).collect()
    }

    /// `count` sequences of held-out text, spread evenly over it. `[count][seq_len]`
    pub fn held_out(&self, count: usize, seq_len: usize) -> Vec<Vec<u32>> {
        let places = self.valid.len() - seq_len;
        (0..count).map(|index| self.valid[index * places / count..][..seq_len].to_vec()).collect()
    }
}

fn default_files() -> Result<Vec<PathBuf>, MoeHfError> {
    let mut files = Vec::new();
    for folder in DEFAULT_FOLDERS {
        text_files(&Path::new(WORKSPACE).join(folder), &mut files);
    }
    if files.is_empty() {
        return Err(MoeHfError::Corpus(format!(
            "no text to train on: burn-fsep's sources, the default text, are not in {WORKSPACE}; give files to --text"
        )));
    }
    Ok(files)
}

/// Rust and Markdown in this folder and those in it, in an order that is the same on all machines.
fn text_files(folder: &Path, files: &mut Vec<PathBuf>) {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(folder).map(|entries| entries.flatten().map(|e| e.path()).collect()).unwrap_or_default();
    entries.sort();
    for entry in entries {
        if entry.is_dir() {
            text_files(&entry, files);
        } else if entry.extension().is_some_and(|extension| extension == "rs" || extension == "md") {
            files.push(entry);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_text_is_there_and_batches_are_pieces_of_it() {
        let corpus = Corpus::load(&[], &TextCodec::Bytes).unwrap();
        assert!(corpus.train.len() > 500_000 && corpus.valid.len() > 50_000);
        corpus.check(128).unwrap();
        let batch = corpus.batch(1, 7, 4, 32);
        assert_eq!(batch, corpus.batch(1, 7, 4, 32));
        assert_ne!(batch, corpus.batch(1, 8, 4, 32));
        assert!(batch.iter().all(|row| corpus.train.windows(32).any(|window| window == row)));
        assert_eq!(corpus.held_out(3, 32).iter().map(Vec::len).collect::<Vec<_>>(), [32; 3]);
    }

    #[test]
    fn text_that_is_missing_or_too_short_is_named() {
        let error = Corpus::load(&["no/such/file.txt".into()], &TextCodec::Bytes).unwrap_err();
        assert!(error.to_string().contains("no/such/file.txt"), "{error}");
        let error = Corpus { train: vec![1; 200], valid: vec![1; 20] }.check(32).unwrap_err();
        assert!(error.to_string().contains("20 held out"), "{error}");
    }
}
