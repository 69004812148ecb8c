//! Fuzzing of everything that is read from files: whatever is in them, there is an answer or an error that names the
//! file, never a panic. With proptest, since cargo-fuzz needs a nightly compiler; `PROPTEST_CASES=100000` fuzzes longer.
#![cfg(feature = "cli")]

use std::path::Path;

use burn_fsep_planner::{
    tools::cli::{Cli, run},
    tools::trace::Trace,
};
use clap::Parser;
use proptest::prelude::*;

const TRACE: &str = "layer,step,src_rank,expert0,expert1\n0,0,0,5,6\n0,0,1,7,8\n0,1,0,1,2\n0,1,1,3,4\n";
const PLAN: &str =
    r#"{"ranks_per_node": 1, "slots_per_rank": 1, "counts": [[5, 6], [7, 8]], "history": [[[1, 2], [3, 4]]]}"#;

/// Pieces that parsers trip over.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        prop::sample::select(vec![
            "",
            ",",
            "\n",
            "\r\n",
            "-1",
            "0",
            "00",
            "1e9",
            "1.5",
            "4294967295",
            "4294967296",
            "18446744073709551615",
            "18446744073709551616",
            "NaN",
            "null",
            "\"",
            "{",
            "}",
            "[",
            "]",
            "[]",
            "[[]]",
            "\u{feff}",
            "\0",
            "é",
            "expert2",
            "counts",
            ":",
            " ",
        ])
        .prop_map(String::from),
        any::<u64>().prop_map(|n| n.to_string()),
        ".{0,4}",
    ]
}

/// A valid text with some parts of it replaced.
fn mutated(valid: &'static str) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec((any::<prop::sample::Index>(), 0usize..6, piece()), 0..6).prop_map(move |edits| {
        let mut text: Vec<u8> = valid.into();
        for (at, removed, piece) in edits {
            let start = at.index(text.len() + 1);
            let end = (start + removed).min(text.len());
            text.splice(start..end, piece.into_bytes());
        }
        text
    })
}

fn any_text(valid: &'static str) -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![4 => mutated(valid), 1 => prop::collection::vec(any::<u8>(), 0..200)]
}

/// Runs a command on a file of this content; an error has to name the file.
fn check(command: &str, content: &[u8]) {
    let folder = tempfile::tempdir().unwrap();
    let input = folder.path().join("input");
    std::fs::write(&input, content).unwrap();
    let absolute = |word: &str| match word {
        "INPUT" => input.clone(),
        "OUTPUT" => folder.path().join("output"),
        word => Path::new(word).to_path_buf(),
    };
    let words = std::iter::once("fsep-planner").chain(command.split(' '));
    let cli = Cli::try_parse_from(words.map(absolute)).unwrap();
    if let Err(error) = run(&cli) {
        assert!(error.to_string().contains(&*input.to_string_lossy()), "{error}");
        assert!(!folder.path().join("output").exists(), "nothing is written when a command fails");
    }
}

proptest! {
    #[test]
    fn traces(content in any_text(TRACE)) {
        if let Ok(trace) = Trace::from_csv(&String::from_utf8_lossy(&content)) {
            prop_assert_eq!(Trace::from_csv(&trace.to_csv()), Ok(trace), "what is written can be read");
        }
        check("replay --trace INPUT --slots-per-rank 2 --ranks-per-node 1 --skip-steps 0 --repair", &content);
    }

    #[test]
    fn plans(content in any_text(PLAN)) {
        check("plan --input INPUT --output OUTPUT", &content);
    }
}

#[test]
fn the_unchanged_texts_are_valid() {
    check("replay --trace INPUT --slots-per-rank 2 --ranks-per-node 1", TRACE.as_bytes());
    assert!(Trace::from_csv(TRACE).is_ok());
    let folder = tempfile::tempdir().unwrap();
    let [input, output] = ["in", "out"].map(|name| folder.path().join(name));
    std::fs::write(&input, PLAN).unwrap();
    let words = ["fsep-planner".as_ref(), "plan".as_ref(), "--input".as_ref(), input.as_os_str()];
    run(&Cli::try_parse_from(words.into_iter().chain(["--output".as_ref(), output.as_os_str()])).unwrap()).unwrap();
}
