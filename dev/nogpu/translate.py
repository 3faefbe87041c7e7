#!/usr/bin/env python3
"""
Turns a CUDA source into C++ that g++ compiles against nogpu:

    python3 translate.py trainer.cu > trainer_nogpu.cpp

Four things in a CUDA source are not C++, or cannot be done by a macro; the rest of the text stays
as it is, line for line:

    kernel<<<grid, block, smem, stream>>>(arguments)
        becomes a call of nogpu::launch
    __shared__ float tile[16][17];
        becomes a reference to memory that the block's threads share
    extern __shared__ float buffer[];
        becomes a pointer to the launch's dynamic shared memory
    __launch_bounds__(256) void kernel(...) {
        gets a check of the block's size as its first statement

#include "x.cu" and "x.cuh" are read and translated in their place, so that a test can include a
trainer; any other quoted file is included from where it is. Launches must name one kernel, with its
template arguments if it has some.
"""

import os
import re
import sys


def fail(path, text, at, message):
    sys.exit(f"{path}:{text.count(chr(10), 0, at) + 1}: {message}")


def mask(text):
    """The text, as long as before, with comments and literals blanked: what is left is code."""
    token = re.compile(r"""
        //(?:[^\n\\]|\\.|\\\n)*                     # a comment to the end of the line
        | /\*.*?\*/                                 # a comment
        | R"([^\s()\\]{0,16})\(.*?\)\1"             # a raw string
        | "(?:[^"\\\n]|\\.)*"                       # a string
        | (?<![0-9a-fA-F])'(?:[^'\\\n]|\\.)*'       # a character, and no ' between digits
        """, re.S | re.X)
    return token.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def matching(code, at, closing):
    """The place of the bracket that closes the one at `at`, or -1."""
    opening, depth = code[at], 0
    for i in range(at, len(code)):
        depth += (code[i] == opening) - (code[i] == closing)
        if depth == 0:
            return i
    return -1


def split_commas(code, text):
    """The parts of text between commas outside all brackets (angle ones too, for declarations)."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(code):
        depth += (c in "([{<") - (c in ")]}>")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return parts + [text[start:]]


def kernel_start(code, end):
    """Where the kernel's name before <<< begins: name, space::name, name<arguments>."""
    i = end
    while code[i - 1].isspace():
        i -= 1
    if code[i - 1] == ">":
        angles = parentheses = 0  # inside parentheses > is "greater than"
        while True:
            i -= 1
            if i < 0:
                return -1
            parentheses += (code[i] == ")") - (code[i] == "(")
            if parentheses == 0:
                angles += (code[i] == ">") - (code[i] == "<")
                if angles == 0:
                    break
    name = re.search(r"[A-Za-z_][\w:]*\s*$", code[:i])
    return name.start() if name else -1


def launches(path, text, code):
    for m in re.finditer(r"<<<", code):
        start = kernel_start(code, m.start())
        if start < 0:
            fail(path, text, m.start(), "no kernel's name before <<<")
        depth, close = 0, -1
        for i in range(m.end(), len(code) - 2):
            depth += (code[i] in "([{") - (code[i] in ")]}")
            if depth == 0 and code.startswith(">>>", i):
                close = i
                break
        opening = re.compile(r"\s*\(").match(code, close + 3) if close >= 0 else None
        if not opening:
            fail(path, text, m.start(), "<<< without >>>(...)")
        kernel = text[start:m.start()].strip()
        name = re.sub(r"\s+", " ", kernel).replace("\\", "\\\\").replace('"', '\\"')
        arguments = opening.end()
        empty = code[arguments:matching(code, arguments - 1, ")")].strip() == ""
        head = f'nogpu::launch(nogpu::config("{name}", {text[m.end():close]}), {kernel}'
        head += "" if empty else ", "
        # Line ends between >>> and ( are kept, so that every line keeps its number.
        lines = text.count("\n", start, arguments) - head.count("\n")
        yield start, arguments, head + "\n" * lines


def shared_declarations(path, text, code):
    alignment = r"\b(?:alignas|__align__)\s*\(([^()]*)\)"
    before = rf"(?:\b(?:extern|static|volatile)\b|{alignment})\s+"
    for m in re.finditer(rf"(?:{before})*\b__shared__\b[^;]*;", code):
        start, end = m.span()
        words = code[start:end - 1]  # without comments
        align = re.search(alignment, words)
        dynamic = re.search(r"\bextern\b", words)
        words = re.sub(rf"{alignment}|\b(?:__shared__|static|extern)\b", " ", words).strip()
        parts = split_commas(words, words)
        first = re.match(r"([^=]*?[\s>*&])([A-Za-z_]\w*)\s*((?:\[.*\])?)$", parts[0], re.S)
        if not first:
            fail(path, text, start, "a __shared__ declaration that is not TYPE NAME [SIZE]...;")
        kind = first.group(1).strip()
        out = []
        for part in [parts[0][first.start(2):]] + parts[1:]:
            d = re.match(r"\s*(\w+)\s*((?:\[.*\])?)\s*$", part, re.S)
            if not d:
                fail(path, text, start, "a __shared__ declaration that is not TYPE NAME [SIZE]...;")
            name, size = d.groups()
            if dynamic:
                boundary = align.group(1) if align else f"alignof({kind})"
                out.append(f"{kind}* {name} = ({kind}*)nogpu::dynamic_shared({boundary});")
            else:
                t, id_ = f"nogpu_type_of_{name}", f"nogpu_id_of_{name}"
                boundary = align.group(1) if align else f"alignof({t})"
                out.append(f"typedef {kind} {t}{size}; static const int {id_} = "
                           f'nogpu::shared_id("{name}", sizeof({t}), {boundary}); '
                           f"{t}& {name} = *({t}*)nogpu::shared({id_});")
        out = " ".join(out)
        yield start, end, out + "\n" * (text.count("\n", start, end) - out.count("\n"))


def launch_bounds(path, text, code):
    for m in re.finditer(r"__launch_bounds__\s*\(", code):
        close = matching(code, m.end() - 1, ")")
        bound = split_commas(code[m.end():close], text[m.end():close])[0].strip()
        i = close + 1
        # past the parameters to the body, or to the end of a declaration
        while i < len(code) and code[i] not in "{;":
            i = matching(code, i, ")") if code[i] == "(" else i
            i += 1
        if i < len(code) and code[i] == "{":
            yield i + 1, i + 1, f" nogpu::launch_bounds({bound});"


def translate(path, seen):
    with open(path) as f:
        text = f.read()
    code = mask(text)
    edits = [*launches(path, text, code), *shared_declarations(path, text, code),
             *launch_bounds(path, text, code)]
    for m in re.finditer(r"^[ \t]*#[ \t]*pragma[ \t]+(?:unroll|once)\b[^\n]*", code, re.M):
        edits.append((m.start(), m.end(), ""))  # g++ would warn
    for m in re.finditer(r"\b__noinline__\b", code):
        edits.append((m.start(), m.end(), "__attribute__((noinline))"))
    for m in re.finditer(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"[^\n]*', text, re.M):
        if code[m.start():m.start(1)].strip() == "":
            continue  # in a comment
        file = os.path.join(os.path.dirname(path), m.group(1))
        if not os.path.exists(file):
            continue  # the compiler looks for it on its include path
        if not file.endswith((".cu", ".cuh")):
            edits.append((m.start(), m.end(), f'#include "{os.path.abspath(file)}"'))
        elif os.path.abspath(file) not in seen:
            line = text.count("\n", 0, m.start()) + 2
            edits.append((m.start(), m.end(), translate(file, seen) + f'#line {line} "{path}"'))
        else:
            edits.append((m.start(), m.end(), ""))
    if re.search(r"^[ \t]*#[ \t]*pragma[ \t]+once\b", code, re.M):
        seen.add(os.path.abspath(path))
    # #line is not read where #if leaves text out, so the count is set right again wherever text may
    # go on.
    for m in re.finditer(r"^[ \t]*#[ \t]*(?:else|elif|endif)\b(?:[^\n\\]|\\.)*", code, re.M | re.S):
        edits.append((m.end(), m.end(), f'\n#line {text.count(chr(10), 0, m.end()) + 2} "{path}"'))
    for start, end, new in sorted(edits, reverse=True):  # from the end, so that places stay valid
        text = text[:start] + new + text[end:]
    return f'#line 1 "{path}"\n' + text + "\n"


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: translate.py SOURCE.cu > SOURCE.cpp")
    sys.stdout.write(f'// Made by translate.py from {sys.argv[1]}\n#include "nogpu.h"\n'
                     + translate(sys.argv[1], set()))


if __name__ == "__main__":
    main()
