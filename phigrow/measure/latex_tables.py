"""A comparison as LaTeX tables (booktabs), to be put into a paper with ``\\input``."""

from __future__ import annotations

import re

from phigrow.measure.estimates import EDGE_MARK, Comparison
from phigrow.measure.tables import Rows, caption, frontier_rows, headline_rows, loss_rows
from phigrow.measure.wording import mark_sentences, settings_sentences

SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "\n": " ",
    "†": r"\dag{}", "‡": r"\ddag{}", "[": "{[}", "]": "{]}",
}  # fmt: skip
"""Brackets too: after the end of a row LaTeX would take one as that row's extra height."""

PREAMBLE = r"""% Written by phigrow report. Needs \usepackage{booktabs}.
% Text from records stands as it was recorded: letters outside Latin need LuaLaTeX or XeLaTeX."""


def latex(comparison: Comparison) -> str:
    """Return two tables: speedups in every unit and accounting with intervals, and held-out losses.

    >>> Path("speedup.tex").write_text(latex(compare(load_runs("runs"))))  # doctest: +SKIP
    """
    base = comparison.baseline.name
    remarks = caption(comparison, "tokens").partition(". ")[2]
    parts = [PREAMBLE]
    if rows := headline_rows(comparison):
        words = (
            f"Speedup over {base} at its final held-out loss, {comparison.target():.3f} nats per token; sunk leaves "
            f"the source's training out, charged counts it. {' '.join([remarks, *settings_sentences(comparison)])}"
        )
        parts.append(latex_table(rows, words, "tab:speedup", grouped=True))
    if rows := frontier_rows(comparison):
        words = "FLOPs against the best flat model of any size, at the loss of each arm's end; sunk and charged."
        parts.append(latex_table(rows, words, "tab:frontier"))
    words = " ".join(
        ["Held-out loss, nats per token.", *(s for s in mark_sentences(comparison) if s.startswith(EDGE_MARK))]
    )
    parts.append(latex_table(loss_rows(comparison), words, "tab:loss"))
    return "\n\n".join(parts) + "\n"


def latex_table(rows: Rows, words: str, label: str, *, grouped: bool = False) -> str:
    """Rows as one booktabs table; where ``grouped``, columns named ``unit, accounting`` get a head of two lines."""
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
    """Text in which LaTeX sees nothing but letters.

    >>> print(escaped("50 % of wr_2"))
    50 \\% of wr\\_2
    """
    return "".join(SPECIAL.get(letter, letter) for letter in text)


def _cell(text: str) -> str:
    """A cell with the sign of multiplication, its interval in a smaller size."""
    text = re.sub(r"(?<=\d)x(?![A-Za-z])", r"$\\times$", escaped(text))
    return re.sub(r" (\{\[\}.*)$", r" {\\scriptsize \1}", text)
