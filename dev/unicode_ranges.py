#!/usr/bin/env python3
"""
Prints the trainers' tables of Unicode letters and numbers: where their runs begin and end, as
distances in base 32. The last digit of each is a character from '(' on, those before it from ']'
on. The tables are of the Unicode version that Python's unicodedata has (Python 3.14: 16).
"""

import unicodedata


def edges(kind):
    """Code points at which a run of the general category that begins with `kind` begins or ends."""
    inside = [unicodedata.category(chr(code))[0] == kind for code in range(0x110000)]
    return [code for code in range(1, 0x110000) if inside[code] != inside[code - 1]]


def digits(distance):
    text = chr(ord("(") + distance % 32)
    while distance := distance // 32:
        text = chr(ord("]") + distance % 32) + text
    return text


if __name__ == "__main__":
    print("Unicode", unicodedata.unidata_version)
    for kind, name in (("L", "letters"), ("N", "numbers")):
        at = [0, *edges(kind)]
        table = "".join(digits(b - a) for a, b in zip(at, at[1:]))
        print(f"static const char* unicode_{name} =")
        print("\n".join(f'    "{table[i:i + 92]}"' for i in range(0, len(table), 92)) + ";")
