"""A comparison as LaTeX tables (booktabs), to be put into a paper with ``\\input``."""

from __future__ import annotations

import re

from phigrow.measure.estimates import EDGE_MARK, Comparison
from phigrow.measure.tables import Rows, frontier_rows, headline_rows, interval_sentences, loss_rows
from phigrow.measure.wording import mark_sentences, remarks, settings_sentences

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "\n": " ",
    "†": r"\dag{}", "‡": r"\ddag{}", "[": "{[}", "]": "{]}",
}  # fmt: skip
"""Replacements of characters that LaTeX reads as commands. It reads a bracket after a row as the height of a gap."""

PREAMBLE = r"""% Written by phigrow report. Needs \usepackage{booktabs}.
% Names from records are not translated: letters outside the Latin alphabet need LuaLaTeX or XeLaTeX."""


def latex(comparison: Comparison) -> str:
    """Return two tables: speedups in every unit and accounting with intervals, and held-out losses.

    >>> Path("speedup.tex").write_text(latex(compare(load_runs("runs"))))  # doctest: +SKIP
    """
    base = comparison.baseline.name
    parts = [PREAMBLE]
    if rows := headline_rows(comparison):
        words = (
            f"Speedup at the final held-out loss of {base}, {comparison.target():.3f} nats per token. Sunk leaves out "
            f"the source's training, and charged counts it. "
            f"{' '.join([*interval_sentences(comparison), *remarks(comparison), *settings_sentences(comparison)])}"
        )
        parts.append(latex_table(rows, words, "tab:speedup", grouped=True))
    if rows := frontier_rows(comparison):
        words = "FLOPs of each arm and of the best flat model of any size with the same loss, sunk and charged."
        parts.append(latex_table(rows, words, "tab:frontier"))
    words = " ".join(
        ["Held-out loss, nats per token.", *(s for s in mark_sentences(comparison) if s.startswith(EDGE_MARK))]
    )
    parts.append(latex_table(loss_rows(comparison), words, "tab:loss"))
    return "\n\n".join(parts) + "\n"


def latex_table(rows: Rows, words: str, label: str, *, grouped: bool = False) -> str:
    """Return rows as a booktabs table; if ``grouped``, columns named ``unit, accounting`` get a head of two lines."""
    names = list(rows[0])
    head = [" & ".join(map(escaped, names)) + r" \\"]
    if grouped:
        units = [name.partition(", ")[0] for name in names[1::2]]
        spans = " & ".join(rf"\multicolumn{{2}}{{c}}{{{escaped(unit)}}}" for unit in units)
        rules = " ".join(rf"\cmidrule(lr){{{2 * k + 2}-{2 * k + 3}}}" for k in range(len(units)))
        lower = " & ".join(escaped(name.partition(", ")[2]) for name in names[1:])
        head = [rf" & {spans} \\", rules, rf"{escaped(names[0])} & {lower} \\"]
    body = [" & ".join(_cell(row[name]) for name in names) + r" \\" for row in rows]
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{escaped(words)}}}",
            rf"  \label{{{label}}}",
            r"  \small",
            rf"  \begin{{tabular}}{{l{'r' * (len(names) - 1)}}}",
            r"    \toprule",
            *(f"    {line}" for line in head),
            r"    \midrule",
            *(f"    {line}" for line in body),
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
        ]
    )


def escaped(text: str) -> str:
    """Return text with all characters escaped that LaTeX reads as commands.

    >>> print(escaped("50 % of wr_2"))
    50 \\% of wr\\_2
    """
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def _cell(text: str) -> str:
    """Return a cell with a multiplication sign in place of x, and the interval in a smaller size."""
    text = re.sub(r"(?<=\d)x(?![A-Za-z])", r"$\\times$", escaped(text))
    return re.sub(r" (\{\[\}.*)$", r" {\\scriptsize \1}", text)
