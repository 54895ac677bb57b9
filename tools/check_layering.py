#!/usr/bin/env python3
"""Checks what the compiler does not: who includes whom, and the house rules that a script can see.

Usage: tools/check_layering.py [root]     prints one line per violation; exit status 1 if there is any

1. A file includes only headers of its own library, of the libraries that the table below names, and of the system.
2. *_internal.h belongs to its library (and to that library's tests). A header whose first comment says Folder-private
   belongs to its library, those of engine/ to all of it, and to tests.
3. Names of source files are unique in the repository.
4. Every folder of the table has a README.md, of at most 150 lines.
5. exit() and abort() are for tools/, tests/, bench/ and base/assert.c.
6. Source files have at most 800 lines; generated tables (*_table.h) may have more.
7. io/ and engine/ make system calls on files by the names of base/system.h, so that tests can disturb each.
"""
import os
import re
import sys

BELOW = ["kernels/device", "io/block", "io/formats", "kernels", "pager", "model"]  # what engine/ stands on
# Library: what it may include besides itself, base and the system. Longer names first, since kernels/device is not kernels.
LIBRARIES = {
    "base": [],
    "io/block": [],
    "io/formats": [],
    "kernels/device": [],
    "kernels": ["kernels/device"],
    "pager": ["kernels/device", "io/block"],
    "model": ["kernels"],
    "engine": [*BELOW, "engine/step", "engine/machine", "engine/run", "engine/planner", "engine/store"],
    # The parts of engine/ know what it tells the world (engine.h, run_config.h) and each other in this order.
    "engine/step": [*BELOW, "engine"],
    "engine/machine": [*BELOW, "engine", "engine/step"],
    "engine/run": [*BELOW, "engine", "engine/step", "engine/machine"],
    "engine/store": [*BELOW, "engine", "engine/step", "engine/machine"],
    "engine/planner": [*BELOW, "engine", "engine/step", "engine/machine", "engine/run", "engine/store"],
}
# Programs see the public headers of all libraries.
PROGRAMS = ["tools", "bench", "tests"]
# Folders under tests/ have short names.
TESTED = {"block": "io/block", "formats": "io/formats", "device": "kernels/device"}

SOURCES = (".c", ".h", ".cu", ".cuh", ".cpp", ".hpp")
NAMED = SOURCES + (".py", ".sh")
LINES_MAX, README_LINES_MAX = 800, 150
MAY_EXIT = re.compile(r"^(tools|tests|bench)/|^base/assert\.c$")
EXITS = re.compile(r"(?<![\w.>])(exit|_exit|_Exit|quick_exit|abort)\s*\(")
# FILE * is for what the kernel tells in /proc, and for reading descriptors that were opened so.
CALLS_FILES = re.compile(r"^(io|engine)/")
FILE_CALL = re.compile(r"(?<![\w.>])(open|openat|creat|close|read|pread|write|pwrite|fsync|fdatasync|ftruncate|fallocate|"
                       r"posix_fallocate|rename|renameat2?|unlink|unlinkat|rmdir|mkdir|mkdirat|remove|stat|lstat|fstat|fstatat|"
                       r"opendir|mkstemp|mkostemp)\s*\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def library_of(path):
    """The library or program folder that a path (relative to the root) belongs to; None for files beside them."""
    for folder in sorted(list(LIBRARIES) + PROGRAMS, key=len, reverse=True):
        if path.startswith(folder + "/"):
            return folder
    return None


def without_comments(text):
    """The same text with comments, strings and character constants blanked, line for line."""
    pattern = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'', re.S)
    return pattern.sub(lambda match: re.sub(r"[^\n]", " ", match.group()), text)


def list_files(root):
    for folder, folders, files in os.walk(root):
        relative = os.path.relpath(folder, root)
        folders[:] = sorted(d for d in folders if not d.startswith((".", "build")) and d != "__pycache__")
        if relative == ".":
            folders[:] = [d for d in folders if d != "runs"]
        for name in sorted(files):
            yield name if relative == "." else os.path.join(relative, name)


def is_folder_private(text):
    """Whether the comment at the head of a file says so."""
    comment = re.match(r"\s*/\*.*?\*/", text, re.S)
    return comment is not None and "Folder-private" in comment.group()


def owner_of(library):
    """What a Folder-private header of the library is for: the parts of engine/ are one here."""
    return "engine" if library.startswith("engine/") else library


def check_include(path, line, header, files, private):
    own, target = library_of(path), library_of(header)
    place = f"{path}:{line}"
    if header not in files:
        return f"{place}: includes \"{header}\", which is not a path from the root of the repository"
    if target is None or own is None:
        return f"{place}: \"{header}\" belongs to no library"
    if header.endswith("_internal.h") and own != target:
        tested = path.split("/")[1] if own == "tests" and path.count("/") > 1 else None
        if TESTED.get(tested, tested) not in (target, target.split("/")[0]):
            return f"{place}: \"{header}\" is private to {target}"
    if header in private and own != "tests" and owner_of(own) != owner_of(target):
        return f"{place}: \"{header}\" is private to {owner_of(target)}"
    if own == target or target == "base" or own in PROGRAMS:
        if target in PROGRAMS and own != target and own != "tests":
            return f"{place}: {own} must not know {target}"
        return None
    if target not in LIBRARIES.get(own, []):
        return f"{place}: {own} must not know {target} (\"{header}\")"
    return None


def check_source(path, text, files, private):
    found = []
    lines = text.splitlines()
    if len(lines) > LINES_MAX and not path.endswith("_table.h"):
        found.append(f"{path}: {len(lines)} lines are more than {LINES_MAX}")
    for number, line in enumerate(lines, 1):
        match = INCLUDE.match(line)
        violation = match and check_include(path, number, match.group(1), files, private)
        if violation:
            found.append(violation)
    if not MAY_EXIT.match(path):
        for number, line in enumerate(without_comments(text).splitlines(), 1):
            match = EXITS.search(line)
            if match:
                found.append(f"{path}:{number}: {match.group(1)}() is not for libraries: return a flap_status")
    if CALLS_FILES.match(path):
        for number, line in enumerate(without_comments(text).splitlines(), 1):
            match = FILE_CALL.search(line)
            if match:
                found.append(f"{path}:{number}: {match.group(1)}() goes round base/system.h: flap_system_{match.group(1)}()")
    return found


def check_names(files):
    found, first = [], {}
    for path in files:
        name = os.path.basename(path)
        if not name.endswith(NAMED):
            continue
        if name in first:
            found.append(f"{path}: there is a {first[name]} already: names of files are unique")
        first.setdefault(name, path)
    return found


def check_readmes(root, files):
    found = []
    for folder in list(LIBRARIES) + PROGRAMS:
        if any(path.startswith(folder + "/") for path in files) and f"{folder}/README.md" not in files:
            found.append(f"{folder}: has no README.md")
    for path in files:
        if os.path.basename(path) == "README.md" and "/" in path:
            with open(os.path.join(root, path), encoding="utf-8") as file:
                count = sum(1 for _ in file)
            if count > README_LINES_MAX:
                found.append(f"{path}: {count} lines are more than {README_LINES_MAX}")
    return found


def check(root):
    files = list(list_files(root))
    known = set(files)
    found = check_names(files) + check_readmes(root, known)
    texts = {}
    for path in files:
        if path.endswith(SOURCES) and library_of(path):
            with open(os.path.join(root, path), encoding="utf-8") as file:
                texts[path] = file.read()
    private = {path for path, text in texts.items() if is_folder_private(text)}
    for path, text in texts.items():
        found += check_source(path, text, known, private)
    return sorted(found), len(files)


def main():
    root = sys.argv[1] if len(sys.argv) > 1 else os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found, count = check(root)
    for violation in found:
        print(violation)
    print(f"layering: {count} files, {len(found)} violations")
    return 1 if found or count == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
