"""Tables of results: of a run, of several runs, and of seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from smaflib.config import Variant, config_differences, variant_label
from smaflib.runs import Run, find_run

ROW = ["stage", "variant", "fusion", "split", "scale"]
"""Index of the results; :func:`labelled` makes it readable."""

MEASURES = {  # column: (metric, object size)
    "mIoU": ("iou", "all"),
    "small": ("iou", "small"),
    "medium": ("iou", "medium"),
    "large": ("iou", "large"),
    "precision": ("precision", "all"),
    "recall": ("recall", "all"),
}

PAPER_TOLERANCE = 1.0
"""Points of mIoU by which a stage may be below the paper without a note."""


def results_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Results of a run in percent: a row per stage, variant, split and scale, in pipeline order.

    Args:
        metrics: tidy records as in ``metrics.json``.

    Returns:
        Columns of :data:`MEASURES`; NaN where nothing was measured. Rows without any IoU are left out, such as the
        precision of a classifier's labels.
    """
    means = metrics[metrics["class_name"] == "mean"]
    columns = {}
    for column, (metric, size) in MEASURES.items():
        columns[column] = _by_row(means[(means["metric"] == metric) & (means["object_size"] == size)])
    table = pd.DataFrame(columns).dropna(how="all", subset=["mIoU", "small", "medium", "large"])
    return _in_pipeline_order(table, metrics)


def headline(metrics: pd.DataFrame) -> list[tuple[str, float]]:
    """The chain's main results as (what, mIoU in percent), each at the background threshold that the run has chosen."""
    table, found = results_table(metrics).reset_index(), []
    variants, on_train = table["variant"], table["split"] == "train"
    for what, chosen in {
        "attention, scales fused": (variants == Variant.TEACHER_FUSED) & table["stage"].str.startswith("04") & on_train,
        "pseudo masks": (variants == Variant.PSEUDO_MASKS) & on_train,
        Variant.SEGMENTATION.label: variants == Variant.SEGMENTATION,
        Variant.FULL_SUPERVISION.label: variants == Variant.FULL_SUPERVISION,
    }.items():
        for split, value in table.loc[chosen, ["split", "mIoU"]].dropna().itertuples(index=False, name=None):
            found.append((f"{what} ({split})", float(value)))
    return found


def class_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """IoU in percent: rows as in :func:`results_table`, a column per class."""
    ious = metrics[(metrics["metric"] == "iou") & (metrics["object_size"] == "all") & (metrics["class_name"] != "mean")]
    columns = {name: _by_row(ious[ious["class_name"] == name]) for name in ious["class_name"].unique()}
    return _in_pipeline_order(pd.DataFrame(columns), metrics)


def labelled(table: pd.DataFrame) -> pd.DataFrame:
    """A table of results for people: each variant by its label and fusion rule."""
    if "fusion" not in table.index.names:
        return table
    keys = pd.MultiIndex.from_tuples(table.index, names=table.index.names).to_frame(index=False)
    keys["variant"] = [variant_label(*pair) for pair in zip(keys["variant"], keys["fusion"], strict=True)]
    return table.set_axis(pd.MultiIndex.from_frame(keys.drop(columns="fusion")))


def paper_table(metrics: pd.DataFrame, paper_results: Mapping[Variant, float]) -> pd.DataFrame:
    """A run's mIoU beside the paper's, in percent.

    Args:
        metrics: tidy records as in ``metrics.json``; of fused maps, those of the paper's rule ``sum`` count.
        paper_results: mIoU in percent; variants that the run did not measure are left out.

    Returns:
        By label: ``run``, ``paper``, ``difference`` in points, and ``note``: "below" where the run is more than
        :data:`PAPER_TOLERANCE` below.
    """
    measured = results_table(metrics).reset_index()
    measured = measured[measured["fusion"].isin(["", "sum"])].drop_duplicates("variant")  # the training split's row
    values, rows = dict(zip(measured["variant"], measured["mIoU"], strict=True)), {}
    for variant, paper in paper_results.items():
        if variant in values:
            difference = values[variant] - paper
            note = "below" if difference < -PAPER_TOLERANCE else ""
            rows[variant_label(variant)] = [values[variant], paper, difference, note]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["run", "paper", "difference", "note"]).round(1)


def compare_runs(folders: Sequence[str | Path], measure: str = "mIoU") -> pd.DataFrame:
    """One measure of several runs side by side, in percent, with the differences to the first run.

    Args:
        folders: names of runs or paths of run folders.
        measure: a column of :func:`results_table`.

    Returns:
        Rows as in :func:`results_table`; a column per run, then ``<run> - <first run>`` in percentage points.

    Raises:
        RunError: if there is no such run.
        ValueError: if there is no such measure.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure must be one of {', '.join(MEASURES)}, got {measure!r}")
    runs = [find_run(str(folder)) for folder in folders]
    labels, metrics = _labels(runs), [run.metrics() for run in runs]
    table = pd.DataFrame({label: results_table(part)[measure] for label, part in zip(labels, metrics, strict=True)})
    for label in labels[1:]:
        table[f"{label} - {labels[0]}"] = table[label] - table[labels[0]]
    return _in_pipeline_order(table, pd.concat(metrics)).dropna(how="all")


def flat_comparison(folders: Sequence[str | Path], measure: str = "mIoU") -> pd.DataFrame:
    """:func:`compare_runs` as text with one decimal, a name per row."""
    table = labelled(compare_runs(folders, measure))
    text = table.map("{:.1f}".format, na_action="ignore")
    differences = table.columns[len(folders) :]
    text[differences] = table[differences].map("{:+.1f}".format, na_action="ignore")
    rows = [" ".join(str(part) for part in key if part) for key in table.index]
    return text.fillna("").set_axis(pd.Index(rows, name=measure))


def comparison_text(folders: Sequence[str | Path], measure: str = "mIoU") -> str:
    """:func:`compare_runs` for a terminal, then the settings in which the runs differ."""
    runs = [find_run(str(folder)) for folder in folders]
    table = flat_comparison(folders, measure).rename_axis(None).to_string()
    lines = [f"{measure}, percent; differences in percentage points", table]
    for run, label in zip(runs[1:], _labels(runs)[1:], strict=True):
        differences = config_differences(runs[0].config, run.config)
        lines += [f"\nsettings of {runs[0].name} | {label}:" + ("" if differences else " the same")]
        lines += [f"  {line}" for line in differences]
    return "\n".join(lines)


def results_text(run: Run) -> str:
    """The results table for a terminal: one decimal, a dash where nothing was measured."""
    table = results_table(run.metrics())
    if table.empty:
        return f"{run.name}: no results yet"
    text = labelled(table).reset_index().to_string(index=False, na_rep="-", float_format="{:.1f}".format)
    return f"{run.name}: IoU in percent\n{text}"


def _by_row(records: pd.DataFrame) -> pd.Series:
    """Values in percent, indexed by :data:`ROW`."""
    rows = _keyed(records).drop_duplicates(ROW, keep="last")
    return rows.set_index(ROW)["value"].astype(float) * 100


def _in_pipeline_order(table: pd.DataFrame, metrics: pd.DataFrame) -> pd.DataFrame:
    """Stages by number, within a stage as its notebook recorded them."""
    keys = _keyed(metrics)[ROW].drop_duplicates().itertuples(index=False, name=None)
    position: dict[Any, int] = {key: number for number, key in enumerate(keys)}
    return table.iloc[sorted(range(len(table)), key=lambda row: (table.index[row][0], position[table.index[row]]))]


def _keyed(metrics: pd.DataFrame) -> pd.DataFrame:
    """Metrics whose columns :data:`ROW` are text."""
    scales = metrics["scale"].map(lambda scale: "" if pd.isna(scale) else f"{scale:g}")
    return metrics.assign(scale=scales, fusion=metrics["fusion"].fillna(""))


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of runs; where two share one, the folder's path."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]


# -------------------------------------------------------------------------------------------------------------- seeds


def measurements(runs: Iterable[tuple[str, int, Run]], measure: str = "mIoU") -> pd.DataFrame:
    """One measure of several runs, in percent.

    Args:
        runs: label of the settings, seed, and the run.
        measure: a column of :func:`results_table`.

    Returns:
        Columns ``setting``, ``seed``, ``row`` (such as ``06 pseudo masks, train``) and ``value``.
    """
    found = []
    for setting, seed, run in runs:
        metrics = run.metrics()
        table = labelled(results_table(metrics)).reset_index() if len(metrics) else pd.DataFrame()
        for record in table.dropna(subset=[measure]).to_dict("records") if len(table) else ():
            scale = f", scale {record['scale']}" if record["scale"] else ""
            row = f"{record['stage'][:2]} {record['variant']}, {record['split']}{scale}"
            found.append({"setting": setting, "seed": seed, "row": row, "value": float(record[measure])})
    return pd.DataFrame(found, columns=["setting", "seed", "row", "value"])


def spread_table(values: pd.DataFrame) -> pd.DataFrame:
    """Mean ± standard deviation over seeds: a line per row of :func:`measurements`, a column per setting.

    A cell such as ``67.8 ± 0.4 (3)`` ends with the number of seeds; a single seed gives its value alone.
    """
    return _cells(values, "{:.1f}")


def difference_table(values: pd.DataFrame) -> pd.DataFrame:
    """Differences to the first setting between runs of the same seed, as mean ± standard deviation over seeds.

    A column per other setting; a seed that only one of the two settings has is left out.
    """
    first = values[values["setting"] == values["setting"].iloc[0]] if len(values) else values
    paired = values.merge(first, on=["row", "seed"], suffixes=("", "_first"))
    paired["value"] -= paired["value_first"]
    table = _cells(paired[paired["setting"] != paired["setting_first"]], "{:+.1f}")
    return table.rename(columns=lambda setting: f"{setting} - {first['setting'].iloc[0]}")


def _cells(values: pd.DataFrame, form: str) -> pd.DataFrame:
    def cell(group: pd.Series[float]) -> str:
        return spread(group, form) + (f" ({len(group)})" if len(group) > 1 else "")

    cells = values.groupby(["row", "setting"], sort=False)["value"].agg(cell).unstack("setting", fill_value="")
    order = [setting for setting in values["setting"].unique() if setting in cells]
    return cells.reindex(values["row"].unique())[order].rename(columns={"": "value"}).rename_axis(columns=None)


def spread(values: Iterable[float], form: str = "{:.1f}") -> str:
    """Mean ± standard deviation, such as ``67.8 ± 0.4``; a single value alone, and nothing for none. NaN is ignored.

    Args:
        values: one per seed.
        form: of the mean; ``{:+.1f}`` for a difference. The deviation has as many digits and no sign.
    """
    column = pd.Series(list(values), dtype=float).dropna()
    if column.empty:
        return ""
    mean = form.format(column.mean())
    return mean if len(column) == 1 else f"{mean} ± {form.replace('+', '').format(column.std())}"


def _markdown(table: pd.DataFrame) -> str:
    head = [str(table.index.name), *map(str, table.columns)]
    rows = [head, ["---"] * len(head), *table.reset_index().to_numpy().tolist()]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def _latex(table: pd.DataFrame) -> str:
    form = "l" + "r" * len(table.columns)
    return table.reset_index().to_latex(index=False, escape=True, column_format=form).replace("±", r"$\pm$")


FORMATS: Mapping[str, Callable[[pd.DataFrame], str]] = {
    "csv": lambda table: table.to_csv(lineterminator="\n"),
    "md": _markdown,
    "tex": _latex,
    "txt": lambda table: table.to_string() + "\n",
}
"""How a table of text is written, by file ending."""
