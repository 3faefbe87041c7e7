#!/usr/bin/env python3
"""
Draws dev/results/linear_layer.svg: one linear layer's two passes at full rank and compressed, each
matrix as a box in the proportions of its shape.

example: dev/linear_layer.py
"""

import os

N, n, m, r = 110, 64, 84, 16  # a token, an input, an output and a kept column, in pixels of a box
COLORS = {"x": "#4c78a8", "z": "#e45756", "W": "#9d9d9d", "dy": "#72b7b2", "P": "#eeca3b",
          "G": "#e45756", "M": "#b279a2", "V": "#b279a2", "U": "#f58518"}
TOP, ROW = 92, 208  # of the first row of boxes, and from row to row

FULL = [
    ("forward", ["x|N × n|N|n", "·", "Wᵀ|n × m|n|m", "=", "y|N × m|N|m|dy"]),
    ("kept", ["x|N × n|N|n"]),
    ("weight gradient", ["dyᵀ|m × N|m|N|dy", "·", "x|N × n|N|n", "=", "dW|m × n|m|n|x"]),
    ("moments (AdamW)", ["M|m × n|m|n", "V|m × n|m|n"]),
    ("step", ["W  −=  lr", "U|m × n|m|n"])]
COMPRESSED = [
    ("forward, as above; and", ["x|N × n|N|n", "·", "P|n × r|n|r", "=", "z|N × r|N|r"]),
    ("kept", ["z|N × r|N|r"]),
    ("weight gradient", ["dyᵀ|m × N|m|N|dy", "·", "z|N × r|N|r", "=", "G|m × r|m|r"]),
    ("moment (Muon)", ["M|m × r|m|r"]),
    ("step", ["W  −=  lr", "U|m × r|m|r", "·", "Pᵀ|r × n|r|n"])]
STARTS = [20, 350, 450, 790, 990]  # of the columns


def box(label, shape, height, width, kind, x, middle):
    height, width = ({"N": N, "n": n, "m": m, "r": r}[size] for size in (height, width))
    top = middle - height / 2
    name = label if width > 30 and height > 20 else ""
    beside = "" if name else f'<text x="{x + width / 2}" y="{top - 6}">{label}</text>'
    return width, (
        f'<rect x="{x}" y="{top}" width="{width}" height="{height}" rx="3" '
        f'fill="{COLORS[kind]}" fill-opacity="0.55" stroke="{COLORS[kind]}"/>'
        f'<text x="{x + width / 2}" y="{middle + 5}">{name}</text>{beside}'
        f'<text class="small" x="{x + width / 2}" y="{top + height + 15}">{shape}</text>')


def row(parts, title, top):
    middle, found = top + N / 2 + 26, [f'<text class="title" x="20" y="{top - 26}">{title}</text>']
    for start, (heading, words) in zip(STARTS, parts):
        found.append(f'<text class="head" x="{start}" y="{top - 4}">{heading}</text>')
        x = start
        for word in words:
            if "|" in word:
                label, shape, height, width, *kind = word.split("|")
                kind = kind[0] if kind else label.strip("ᵀ")
                advance, drawn = box(label, shape, height, width, kind, x, middle)
                found.append(drawn)
            else:
                advance = 9 * len(word)
                found.append(f'<text x="{x + advance / 2}" y="{middle + 5}">{word}</text>')
            x += advance + 12
    return "\n".join(found)


SVG = """\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1230 {height}" font-family="sans-serif">
<style>text {{ font-size: 15px; fill: #222; text-anchor: middle }}
.small {{ font-size: 11px; fill: #555 }}
.head {{ font-size: 13px; fill: #555; text-anchor: start }}
.title {{ font-weight: bold; text-anchor: start }}</style>
<rect width="100%" height="100%" rx="8" fill="#fcfcfc"/>
<text class="title" x="20" y="28">{title}</text>
{full}
{compressed}
</svg>
"""


def main():
    full = row(FULL, "Full rank", TOP)
    compressed = row(COMPRESSED, "Compressed (r = n / 4). The output y, and the gradient "
                     "dx = dy W for the layer below, stay exact", TOP + ROW)
    title = "One linear layer y = x Wᵀ + b: N tokens, n inputs, m outputs, r kept columns"
    out = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "linear_layer.svg")
    with open(out, "w", encoding="utf-8") as file:
        file.write(SVG.format(height=TOP + 2 * ROW - 22, title=title, full=full,
                              compressed=compressed))


if __name__ == "__main__":
    main()
