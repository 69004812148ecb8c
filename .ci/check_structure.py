#!/usr/bin/env python3
"""Checks the structure of the library crates; see docs/design.md, "Rooms".

usage: check_structure.py [--root FOLDER] [--lines]

Fails if a room (a folder of burn-fsep/src) imports one that is not below it, or if more than two files of a crate import
each other in a circle. --lines also prints how many lines of code each room has, without tests, comments and blank lines.
Unit tests (`#[cfg(test)] mod tests`) may import what they like.
"""

import argparse
import pathlib
import re
import sys

# From the top to the bottom; a room imports only rooms after it.
ROOMS = [
    "launch",
    "learner",
    "train",
    "hub",
    "checkpoint",
    "moe",
    "runtime",
    "schedule",
    "ops",
    "shard",
    "comm",
    "timeline",
    "error",
    "burn_compat",
]


def without_comments(text):
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    return re.sub(r"(?m)^\s*//.*$|(?<=[\s;{}(),])//.*$", "", text)


def without_tests(text):
    """Leaves out modules and items under `#[cfg(test)]`, `#[cfg(all(test, ..))]`; relies on rustfmt's indentation."""
    lines, kept, i = text.split("\n"), [], 0
    while i < len(lines):
        if re.match(r"#\[cfg\((all\()?test\b", lines[i]):
            # Up to the end of the item: a line that closes at the margin, or a whole item in a line.
            i += 1
            while i < len(lines) and not (lines[i].startswith("}") or (lines[i] and not lines[i][0].isspace() and lines[i].endswith(";"))):
                i += 1
            i += 1
            continue
        kept.append(lines[i])
        i += 1
    return "\n".join(kept)


def expand(tree):
    """`a::{b, c::d}` -> [[a, b], [a, c, d]]"""
    tree = tree.strip()
    brace = tree.find("{")
    if brace < 0:
        path = re.sub(r"\s+as\s+\w+$", "", tree)
        return [[part.strip() for part in path.split("::") if part.strip()]]
    head = [part.strip() for part in tree[:brace].split("::") if part.strip()]
    inner, depth, start, parts = tree[brace + 1 : tree.rfind("}")], 0, 0, []
    for i, char in enumerate(inner):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if char == "," and depth == 0:
            parts.append(inner[start:i])
            start = i + 1
    parts.append(inner[start:])
    return [head + rest for part in parts if part.strip() for rest in expand(part)]


class Crate:
    def __init__(self, source):
        self.source = source
        self.files = {}  # module path -> file
        for file in sorted(source.rglob("*.rs")):
            parts = list(file.relative_to(source).with_suffix("").parts)
            if parts[0] == "bin" or parts[-1] == "tests" or parts[-1] == "test_cases":
                continue
            if parts[-1] in ("mod", "lib"):
                parts.pop()
            self.files[tuple(parts)] = file
        self.text = {module: without_tests(without_comments(file.read_text())) for module, file in self.files.items()}
        self.exports = {module: self.exported(module) for module in self.files}

    def uses(self, module):
        """Absolute paths in the crate that a file names, in `use` or in the code."""
        text = self.text[module]
        trees = [m.group(1) for m in re.finditer(r"\buse\s+([^;]+);", text)]
        code = re.sub(r"\buse\s+[^;]+;", "", text)
        trees += [m.group(0) for m in re.finditer(r"\b(?:crate|super)(?:::\w+)+", code)]
        for tree in trees:
            for path in expand(tree):
                absolute = self.absolute(module, path)
                if absolute is not None:
                    yield absolute

    def absolute(self, module, path):
        if path[0] == "crate":
            return tuple(path[1:])
        if path[0] == "self":
            return module + tuple(path[1:])
        if path[0] == "super":
            base = module
            while path and path[0] == "super":
                base, path = base[:-1], path[1:]
            return base + tuple(path)
        # A child module, as `mod.rs` names it.
        if module + (path[0],) in self.files:
            return module + tuple(path)
        return None

    def exported(self, module):
        """Names that a module passes on from its children: name -> absolute path."""
        found = {}
        for m in re.finditer(r"\bpub(?:\([^)]*\))?\s+use\s+([^;]+);", self.text[module]):
            for path in expand(m.group(1)):
                absolute = self.absolute(module, path)
                if absolute:
                    found[path[-1]] = absolute
        return found

    def file_of(self, path, depth=0):
        """The file that defines what `path` names, as its module path."""
        module = path
        while module not in self.files:
            module = module[:-1]
        rest = path[len(module) :]
        if rest and depth < 8 and rest[0] in self.exports[module]:
            return self.file_of(self.exports[module][rest[0]] + rest[1:], depth + 1)
        return module

    def imports(self, module):
        return {self.file_of(path) for path in self.uses(module)} - {module}

    def is_index(self, module):
        return self.files[module].name in ("mod.rs", "lib.rs")

    def circles(self):
        """Groups of more than two files that import each other."""
        graph = {m: {i for i in self.imports(m) if not self.is_index(i)} for m in self.files if not self.is_index(m)}
        index, low, stack, on_stack, found = {}, {}, [], set(), []
        sys.setrecursionlimit(10_000)

        def visit(node):
            index[node] = low[node] = len(index)
            stack.append(node)
            on_stack.add(node)
            for after in graph[node]:
                if after not in index:
                    visit(after)
                    low[node] = min(low[node], low[after])
                elif after in on_stack:
                    low[node] = min(low[node], index[after])
            if low[node] == index[node]:
                group = []
                while True:
                    member = stack.pop()
                    on_stack.discard(member)
                    group.append(member)
                    if member == node:
                        break
                if len(group) > 2:
                    found.append(sorted(group))

        for node in graph:
            if node not in index:
                visit(node)
        return found


def upward_imports(crate):
    for module in crate.files:
        if not module:
            continue
        if module[0] not in ROOMS:
            yield f"{'::'.join(module)}: `{module[0]}` is no room; add it to ROOMS in {__file__} and to docs/design.md"
            continue
        allowed = set(ROOMS[ROOMS.index(module[0]) :])
        for path in sorted(set(crate.uses(module))):
            target = crate.file_of(path)
            room = (target or path)[0] if (target or path) else None
            # The crate's error wraps those of rooms that have one of their own.
            wraps = module == ("error",) and path[-1].endswith("Error")
            if room in ROOMS and room not in allowed and not wraps:
                yield f"{crate.files[module]}: {module[0]} imports {'::'.join(path)} of {room}, which is above it"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path(__file__).resolve().parent.parent)
    parser.add_argument("--lines", action="store_true")
    args = parser.parse_args()
    errors = []
    for name in ["burn-fsep", "burn-fsep-planner"]:
        crate = Crate(args.root / name / "src")
        if name == "burn-fsep":
            errors += upward_imports(crate)
        for group in crate.circles():
            errors.append(f"{name}: {len(group)} files import each other: " + ", ".join("::".join(m) for m in group))
        if args.lines:
            rooms = {}
            for module, text in crate.text.items():
                room = module[0] if module else "lib.rs"
                lines = [line for line in text.split("\n") if line.strip()]
                rooms[room] = rooms.get(room, 0) + len(lines)
            for room, lines in sorted(rooms.items()):
                print(f"{name:20}{room:20}{lines:6}")
            print(f"{name:20}{'all':20}{sum(rooms.values()):6}")
    for error in errors:
        print(error, file=sys.stderr)
    if errors:
        sys.exit(1)
    print("rooms import only rooms below them; no circle of more than two files")


if __name__ == "__main__":
    main()
