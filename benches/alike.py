"""Compares columns of two CSV files, row by row.

    python3 benches/alike.py FIRST SECOND COLUMN,... TOLERANCE

Numbers may be apart by TOLERANCE, or by that share of the larger one if that is above 1. Prints by how much they are at
most. Exit status: 0 if all agree, 1 if not, 2 if they cannot be compared.
"""

import csv
import math
import sys


def rows(path, columns):
    with open(path, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    missing = [name for name in columns if not found or name not in found[0]]
    if missing:
        raise ValueError(f"{path}: no {', '.join(missing)}")
    return found


def main():
    if len(sys.argv) != 5:
        raise ValueError("expected FIRST SECOND COLUMN,... TOLERANCE")
    columns, tolerance = sys.argv[3].split(","), float(sys.argv[4])
    first, second = (rows(path, columns) for path in sys.argv[1:3])
    if len(first) != len(second):
        raise ValueError(f"{len(first)} rows in {sys.argv[1]}, {len(second)} in {sys.argv[2]}")
    worst = dict.fromkeys(columns, 0.0)
    for a, b in zip(first, second):
        for name in columns:
            if a[name] == b[name]:
                continue
            # One that is absent, or a NaN, agrees with itself alone.
            x, y = (float(row[name] or "nan") for row in (a, b))
            apart = abs(x - y) / max(1.0, abs(x), abs(y))
            worst[name] = max(worst[name], math.inf if math.isnan(apart) else apart)
    print(f"{len(first)} rows, at most apart: " + ", ".join(f"{name} {apart:.1e}" for name, apart in worst.items()))
    return 0 if max(worst.values()) <= tolerance else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (OSError, ValueError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
