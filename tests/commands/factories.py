"""Input lines of `jdistill score`."""

import json

import numpy as np

VOCAB = 64


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def random_lines(num, seed=0):
    rng = np.random.default_rng(seed)
    lines = []
    for n in range(num):
        length = int(rng.integers(2, 40))
        line = {"token_ids": rng.integers(0, VOCAB, length).tolist()}
        positions = list(range(1, length))
        if n % 3 == 1 and length > 5:
            line["spans"] = [[1, 2], [4, length]]
            positions = [1, *range(4, length)]
        if n % 4 == 1:
            line["id"] = f"näme {n}"
        if n % 5 == 2:
            line["top_k"] = 3
        if n % 7 == 3:
            line["candidate_ids"] = rng.integers(0, VOCAB, (len(positions), 2)).tolist()
        lines.append((line, positions))
    return lines
