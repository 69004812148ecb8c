#!/usr/bin/env python3
"""Tries burn-fsep against another version of Burn: `scripts/try_burn.py 0.23.0-pre.1`.

Copies the workspace to a temporary folder, swaps Burn's version there, leaves LibTorch out (Burn has it up to 0.22 only), applies
what is known to be needed (`scripts/burn-0.23.patch` for 0.23), and checks the workspace, its tests and examples. Prints what
breaks, grouped by message. If it compiles, the contract tests of `burn_compat` run, or what `--test` says:

    scripts/try_burn.py 0.23.0-pre.1 --test flex      the suite on the CPU
    scripts/try_burn.py 0.23.0-pre.1 --test webgpu    what .ci/cube runs, on Burn's GPU backend

Exit code: 0 if all of that succeeds, 1 if not, 2 if it could not be tried.

What is known of a version stands in docs/burn-compat.md.
"""

import argparse
import collections
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Dependencies that go with the backend that is left out.
LIBTORCH = ["burn-tch", "tch"]
WEBGPU = ["-p", "burn-fsep", "-p", "burn-fsep-tests", "--features", "burn-fsep-tests/webgpu"]
TESTS = {
    "contracts": [["-p", "burn-fsep", "--lib", "burn_compat::"]],
    "flex": [["-p", "burn-fsep", "-p", "burn-fsep-tests"]],
    # As in .ci/cube.
    "webgpu": [[*WEBGPU, "--lib", "cube"], [*WEBGPU, "--test", "cube"]],
}


def replace(path, *edits):
    """Edits a file of the copy; an edit that finds nothing means that this script is out of date."""
    text = path.read_text()
    for pattern, new in edits:
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        if count == 0:
            sys.exit(f"error: {path.name} has nothing like `{pattern}`: mend scripts/try_burn.py")
    path.write_text(text)


def copy_workspace(folder, version):
    """The workspace with another Burn."""
    listed = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=True)
    libtorch = "|".join(LIBTORCH)
    replace(
        folder / "Cargo.toml",
        (rf"^(?:{libtorch}) = .*\n", ""),
        (r'^(burn(?:-\w+)? = (?:\{ version = )?)"=[^"]+"', rf'\1"={version}"'),
    )
    for path in sorted(folder.glob("**/Cargo.toml")):
        text = re.sub(rf"^(?:{libtorch})(?:\.workspace)? = .*\n", "", path.read_text(), flags=re.MULTILINE)
        path.write_text(re.sub(r"^libtorch = \[.*\]$", "libtorch = []", text, flags=re.MULTILINE))
    for path in (folder / "burn-fsep" / "src" / "ops").rglob("*.rs"):
        text = path.read_text()
        path.write_text(re.sub(r', LibTorch: cfg\(feature = "libtorch"\)', "", text))
    patch = ROOT / "scripts" / f"burn-{'.'.join(version.split('.')[:2])}.patch"
    if patch.exists():
        # In a folder that is not the repository's, where git would apply nothing without a word.
        environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
        if subprocess.run(["git", "apply", patch], cwd=folder, env=environment).returncode:
            sys.exit(f"error: {patch.name} no longer fits: mend it by hand in a copy (--keep), see docs/burn-compat.md")


def cargo(folder, target, *arguments, **options):
    environment = os.environ | {"CARGO_TARGET_DIR": str(target), "CARGO_TERM_COLOR": "never"}
    return subprocess.run(["cargo", *arguments], cwd=folder, env=environment, text=True, **options)


def diagnostics(folder, target, features):
    """What the compiler says of our own crates, by level and message: where. `None` if it did not come to them."""
    arguments = ["check", "--keep-going", "--workspace", "--all-targets", "--features", features]
    checked = cargo(folder, target, *arguments, "--message-format=json", stdout=subprocess.PIPE)
    found = collections.defaultdict(list)
    reached = False
    for line in checked.stdout.splitlines():
        message = json.loads(line)
        reached |= message["reason"] in ("compiler-message", "compiler-artifact") and message["target"]["name"] == "burn_fsep"
        diagnostic = message.get("message")
        if message["reason"] != "compiler-message" or str(folder) not in message["manifest_path"] or not diagnostic["spans"]:
            continue
        spans = [span for span in diagnostic["spans"] if span["is_primary"]]
        places = [f"{span['file_name']}:{span['line_start']}" for span in spans]
        helps = [" ".join(child["message"].split()) for child in diagnostic["children"] if child["level"] in ("help", "note")]
        code = (diagnostic["code"] or {}).get("code", "")
        key = (diagnostic["level"], code, diagnostic["message"], "; ".join(helps[:1]))
        found[key] += [place for place in places if place not in found[key]]
    return (found if reached else None), checked.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", help="of burn on crates.io")
    parser.add_argument("--features", default="burn-fsep-tests/webgpu", help="to check with (default: %(default)s)")
    parser.add_argument("--test", choices=TESTS, default="contracts", help="what to run if it compiles (default: %(default)s)")
    parser.add_argument("--target-dir", type=pathlib.Path, default=ROOT / "target" / "try-burn", help="of its own build")
    parser.add_argument("--keep", type=pathlib.Path, help="copy to this folder and leave it there, to go on by hand")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or pathlib.Path(temporary)
        folder = folder.resolve()
        copy_workspace(folder, arguments.version)
        target = arguments.target_dir.resolve()
        found, compiles = diagnostics(folder, target, arguments.features)
        if found is None:
            print(f"error: burn {arguments.version} or another dependency cannot be built; see above", file=sys.stderr)
            return 2
        for (level, code, message, more), places in sorted(found.items()):
            print(f"{level}{f'[{code}]' if code else ''}: {message}" + (f" ({more})" if more else ""))
            print("".join(f"    {place}\n" for place in places), end="")
        errors = sum(len(places) for (level, *_), places in found.items() if level == "error")
        print(f"burn-fsep with burn {arguments.version}: {'compiles' if compiles else f'{errors} errors'}")
        if not compiles:
            print("Errors of later compiler passes show when these are mended.")
            return 1
        for tests in TESTS[arguments.test]:
            if cargo(folder, target, "test", *tests).returncode:
                return 1
        return 0


if __name__ == "__main__":
    sys.exit(main())
