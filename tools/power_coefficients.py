"""Generate the polynomials behind |c|^(q-1) for general q.

    |c|^e = 2^(e log2|c|),   log2(1 + r) = r P(r) on [sqrt(1/2) - 1, sqrt(2) - 1],   2^f = 1 + f Q(f) on [-1/2, 1/2].

P and Q interpolate at Chebyshev nodes, so they are within a small factor of the minimax polynomials. Every backend
evaluates the same coefficients in the same order without contraction: that is why they agree to the last bit.

    python tools/power_coefficients.py            # rewrite csrc/math/power_coefficients.h and kernels/power_coefficients.py
    python tools/power_coefficients.py --check    # exit 1 if the files differ from what would be written
"""

from __future__ import annotations

import sys
from pathlib import Path

import mpmath
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
DEGREES = {"float": (7, 5), "double": (22, 11)}  # of P and Q, by compute type
ROUND = {"float": np.float32, "double": np.float64}


def chebyshev_interpolant(function, low, high, degree):
    """Monomial coefficients, lowest first, of the polynomial through `function` at the Chebyshev nodes of [low, high]."""
    centre, half = (high + low) / 2, (high - low) / 2
    count = degree + 1
    nodes = [centre + half * mpmath.cos(mpmath.pi * (2 * i + 1) / (2 * count)) for i in range(count)]
    vandermonde = mpmath.matrix([[node**power for power in range(count)] for node in nodes])
    return list(mpmath.lu_solve(vandermonde, mpmath.matrix([function(node) for node in nodes])))


def coefficients() -> dict[str, dict[str, list[float]]]:
    mpmath.mp.prec = 300
    root = mpmath.sqrt(2)
    tables: dict[str, dict[str, list[float]]] = {}
    for kind, (log_degree, exp_degree) in DEGREES.items():
        exact = {
            "log2": chebyshev_interpolant(lambda r: mpmath.log(1 + r, 2) / r, 1 / root - 1, root - 1, log_degree),
            "exp2": chebyshev_interpolant(
                lambda f: (mpmath.mpf(2) ** f - 1) / f, mpmath.mpf(-1) / 2, mpmath.mpf(1) / 2, exp_degree
            ),
        }
        tables[kind] = {name: [float(ROUND[kind](float(value))) for value in row] for name, row in exact.items()}
    return tables


def header(tables) -> str:
    lines = ["// Written by tools/power_coefficients.py. Lowest power first.", "#pragma once", ""]
    lines += ["namespace pysteep {", ""]
    lines += ["template <typename T>", "struct Log2Coefficients;", "template <typename T>", "struct Exp2Coefficients;", ""]
    for kind, table in tables.items():
        suffix = "f" if kind == "float" else ""
        for name, row in table.items():
            values = ", ".join(f"{value.hex()}{suffix}" for value in row)
            lines += ["template <>", f"struct {name.capitalize()}Coefficients<{kind}> {{"]
            lines += [f"  static constexpr int count = {len(row)};"]
            lines += [f"  static constexpr {kind} value[] = {{{values}}};", "};"]
    lines += [""]
    lines += ["}  // namespace pysteep", ""]
    return "\n".join(lines)


def module(tables) -> str:
    lines = ['"""Written by tools/power_coefficients.py. Lowest power first."""', ""]
    for kind, table in tables.items():
        for name, row in table.items():
            lines.append(f"{name.upper()}_{kind.upper()} = (")
            lines += [f"    {value!r}," for value in row]
            lines.append(")")
    return "\n".join(lines) + "\n"


def main() -> int:
    tables = coefficients()
    files = {ROOT / "csrc/math/power_coefficients.h": header(tables), ROOT / "kernels/power_coefficients.py": module(tables)}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in files.items() if path.read_text() != text]
        print(*(f"stale: {path.relative_to(ROOT)}" for path in stale), sep="\n")
        return bool(stale)
    for path, text in files.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
