"""Results over seeds: mean ± standard deviation of each setting, and differences between runs of the same seed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import pandas as pd

from smaflib.errors import InputError
from smaflib.report.markdown import markdown_table
from smaflib.report.tables import MEASURES, labelled, results_table
from smaflib.runs import Run

COLUMNS = ["setting", "seed", "row", "value"]


def measurements(runs: Iterable[tuple[str, int, Run]], measure: str = "mIoU") -> pd.DataFrame:
    """One measure of several runs.

    Args:
        runs: setting (as people read it), seed, and the run.
        measure: a column of :func:`~smaflib.report.tables.results_table`.

    Returns:
        Columns ``setting``, ``seed``, ``row`` (stage, variant, split and scale, as people read them) and ``value`` in
        percent; rows in the order of the first run that has them.

    Raises:
        InputError: if there is no such measure.
    """
    if measure not in MEASURES:
        raise InputError(f"the measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    found: list[dict[str, Any]] = []
    for setting, seed, run in runs:
        metrics = run.metrics()
        table = labelled(results_table(metrics)) if len(metrics) else pd.DataFrame()
        for key, value in table[measure].dropna().items() if len(table) else ():
            stage, variant, split, scale = map(str, cast(tuple[Any, ...], key))
            row = f"{stage[:2]} {variant}, {split}" + (f", scale {scale}" if scale else "")
            found.append({"setting": setting, "seed": seed, "row": row, "value": float(value)})
    return pd.DataFrame(found, columns=COLUMNS)


def spread_table(values: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds: a line per row, a column per setting.

    Args:
        values: as of :func:`measurements`.

    Returns:
        Strings such as ``67.8 ± 0.4 (3)``, the number of seeds behind it; of one seed the value alone.
    """
    return _by_row(values, values["setting"].unique(), lambda column: _counted(column, "{:.1f}"))


def difference_table(values: pd.DataFrame) -> pd.DataFrame:
    """Differences to the first setting between runs of the same seed, mean ± standard deviation over the seeds.

    Args:
        values: as of :func:`measurements`.

    Returns:
        A line per row, a column per other setting; seeds that only one of the two has are left out.
    """
    settings = values["setting"].unique()
    if len(settings) < 2:
        return pd.DataFrame(index=pd.Index([], name="row"))
    first = values[values["setting"] == settings[0]].set_index(["row", "seed"])["value"]
    paired = values.join(first.rename("first"), on=["row", "seed"])
    paired = paired.assign(value=paired["value"] - paired["first"]).dropna(subset=["value"])
    table = _by_row(paired, settings[1:], lambda column: _counted(column, "{:+.1f}"))
    return table.rename(columns={name: f"{name} - {settings[0]}" for name in table.columns})


def _by_row(values: pd.DataFrame, settings: Iterable[str], cell: Callable[[pd.Series[float]], str]) -> pd.DataFrame:
    rows = values["row"].unique()
    columns = {}
    for setting in settings:
        of_setting = values[values["setting"] == setting]
        columns[setting or "value"] = [cell(of_setting.loc[of_setting["row"] == row, "value"]) for row in rows]
    return pd.DataFrame(columns, index=pd.Index(rows, name="row"))


def spread(values: Iterable[float], form: str = "{:.1f}") -> str:
    """Mean ± standard deviation, such as ``67.8 ± 0.4``; of one value that alone, of none nothing. NaN does not count.

    Args:
        values: of runs with several seeds, or of folds.
        form: of the mean; ``{:+.1f}`` for a difference. The deviation has as many digits and no sign.
    """
    column = pd.Series(list(values), dtype=float).dropna()
    if column.empty:
        return ""
    mean = form.format(column.mean())
    return mean if len(column) == 1 else f"{mean} ± {form.replace('+', '').format(column.std())}"


def _counted(values: pd.Series[float], form: str) -> str:
    return f"{spread(values, form)} ({len(values)})" if len(values) > 1 else spread(values, form)


def _markdown(table: pd.DataFrame) -> str:
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in table.reset_index().to_numpy().tolist()]
    return markdown_table([str(table.index.name), *map(str, table.columns)], cells) + "\n"


def _latex(table: pd.DataFrame) -> str:
    """Rows of a tabular with booktabs' rules; what LaTeX would obey is escaped."""
    lines = [[str(table.index.name), *map(str, table.columns)], *table.reset_index().to_numpy().tolist()]
    head, *body = [" & ".join(_escaped(str(cell)) for cell in line) + r" \\" for line in lines]
    rules = [rf"\begin{{tabular}}{{l{'r' * len(table.columns)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*rules, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _escaped(text: str) -> str:
    special = {character: rf"\{character}" for character in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$"}
    return "".join(special.get(character, character) for character in text)


FORMATS: Mapping[str, Callable[[pd.DataFrame], str]] = {
    "csv": lambda table: table.to_csv(lineterminator="\n"),
    "md": _markdown,
    "tex": _latex,
    "txt": lambda table: table.to_string() + "\n",
}
"""How a table is written, by the ending of its file."""


def formatted(table: pd.DataFrame, make: Callable[[pd.DataFrame], str]) -> str:
    """A table as text; one without any row says so."""
    return make(table) if len(table) else "nothing is measured yet\n"
