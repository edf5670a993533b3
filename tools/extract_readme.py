#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes the C++ blocks of a Markdown file as source files, for the build to compile.

usage: extract_readme.py README.md FOLDER

A block that starts with ```cpp becomes FOLDER/block_LINE.cpp, unchanged. Files of blocks that are
gone are removed.
"""

import pathlib
import re
import sys

FENCE = re.compile(r"^\s*(`{3,})\s*(.*?)\s*$")


def blocks(text, name):
    """Yields (line, code) of each block to compile; line is that of its first line of code."""
    info, start, code = None, 0, []
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if info is None and fence:
            info, start, code = fence.group(2), number + 1, []
        elif info is not None and fence and not fence.group(2):
            if info == "cpp":
                yield start, "\n".join(code) + "\n"
            elif info.startswith("cpp"):
                raise ValueError(f"{name}:{start - 1}: unknown kind of block: {info}")
            info = None
        elif info is not None:
            code.append(line)
    if info is not None:
        raise ValueError(f"{name}:{start - 1}: the block does not end")


def write_blocks(readme, folder):
    folder.mkdir(parents=True, exist_ok=True)
    stale = set(folder.glob("block_*.cpp"))
    for line, code in blocks(readme.read_text(encoding="utf-8"), readme.name):
        file = folder / f"block_{line}.cpp"
        text = f'#line {line} "{readme.name}"\n{code}'
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
        stale.discard(file)
    for file in stale:
        file.unlink()


def main(arguments):
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        write_blocks(pathlib.Path(arguments[0]), pathlib.Path(arguments[1]))
    except ValueError as error:
        print(f"extract_readme: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
