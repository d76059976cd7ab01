"""Tables of results: of a run, of several runs, and of seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from smaflib import files
from smaflib.config import AttentionConfig, Variant, check_settings, config_differences, variant_label
from smaflib.errors import ConfigError
from smaflib.files import RUNS_FOLDER
from smaflib.runs import Run, find_run
from smaflib.runs.stages import ABLATION

ROW = ["stage", "variant", "fusion", "split", "scale"]  # index of the results; by_name() makes it readable

MEASURES = {  # column: (metric, object size)
    "mIoU": ("iou", "all"),
    "small": ("iou", "small"),
    "medium": ("iou", "medium"),
    "large": ("iou", "large"),
    "precision": ("precision", "all"),
    "recall": ("recall", "all"),
}

PAPER_TOLERANCE = 1.0  #: Points of mIoU by which a stage may be below the paper without a note.


def results_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Results of a run in percent, from its records: a row per stage, variant, split and scale, in pipeline order.

    Columns are :data:`MEASURES`, NaN where nothing was measured. Rows without any IoU are left out, such as the
    precision of a classifier's labels.
    """
    means, names = metrics[metrics["class_name"] == "mean"], {pair: name for name, pair in MEASURES.items()}
    columns = [names.get(pair, "") for pair in zip(means["metric"], means["object_size"], strict=True)]
    table = _by_row(means.assign(column=columns)).reindex(columns=[*MEASURES])
    return table.dropna(how="all", subset=["mIoU", "small", "medium", "large"])


CHAIN = (
    "teacher teacher_fused student student_fused teacher_fused_refined pseudo_masks segmentation full_supervision"
).split()
"""The variants that tell a run's story."""


def chain_rows(table: pd.DataFrame, attention: AttentionConfig) -> pd.DataFrame:
    """Rows of :data:`CHAIN` by name, at the run's single scale and fusion rule, on *train* but for the last stage."""
    keys = table.index.to_frame(index=False)
    stage, scales = keys["stage"].str[:2], ["", f"{attention.single_scale:g}"]
    wanted = keys["variant"].isin(CHAIN) & (stage != "04") & ((stage == "07") | (keys["split"] == "train"))
    wanted &= keys["fusion"].isin(["", attention.fusion]) & keys["scale"].isin(scales)
    return by_name(table[wanted.to_numpy()])


def folded(table: pd.DataFrame, chosen: pd.DataFrame | None = None) -> Any:
    """Results in percent as HTML: the first eight rows of the first split; all, and each further split, are folded.

    ``chosen`` rows, by name, are shown instead if there are any. The highest value of a column is bold.
    """
    from IPython.display import HTML

    if table.empty:
        return HTML("<p>no ground truth to compare with</p>")
    several, splits = table.index.get_level_values("stage").nunique() > 1, table.index.get_level_values("split")
    parts = {f"all rows, {split}": by_name(table[splits == split], several) for split in splits.unique()}
    first = next(iter(parts))
    shown = parts[first].head(8) if chosen is None or chosen.empty else chosen
    if len(shown) == len(parts[first]):
        del parts[first]
    text = ""
    for name, rows in {"": shown, **parts}.items():
        style = rows.style.format("{:.1f}", na_rep="–").highlight_max(props="font-weight: bold")
        html = style.format_index(escape="html").format_index(escape="html", axis=1).to_html()
        text += f"<details><summary>{name}</summary>{html}</details>\n" if name else html
    return HTML(text + "".join(f"<p>{name}: {value}</p>" for name, value in table.attrs.items()))


def by_name(table: pd.DataFrame, numbered: bool = False) -> pd.DataFrame:
    """Results with a name per row: variant, fusion rule, scale, and the split unless it is *train*."""
    names = []
    for stage, variant, fusion, split, scale in table.index:
        name = variant_label(variant, fusion) + (f", scale {scale}" if scale else "")
        names.append(f"{stage[:2]} " * numbered + name + (f" ({split})" if split != "train" else ""))
    return table.set_axis(pd.Index(names, dtype=object)).rename_axis(columns=None)


def headline(metrics: pd.DataFrame) -> list[tuple[str, float]]:
    """The chain's main results as (what, mIoU in percent), each at the background threshold that the run has chosen."""
    table, found = results_table(metrics).reset_index().dropna(subset=["mIoU"]), []
    names = {Variant.TEACHER_FUSED: "attention, scales fused", Variant.TEACHER_FUSED_REFINED: "teacher's masks"}
    names |= {Variant.PSEUDO_MASKS: "student's masks"}
    names |= {variant: variant.label for variant in (Variant.SEGMENTATION, Variant.FULL_SUPERVISION)}
    stage = table["stage"].str[:2]  # at its oracle threshold in stage 03
    table = table[(stage == "07") | ((stage != "03") & (table["split"] == "train"))]
    for variant, what in names.items():
        rows = table[table["variant"] == variant]
        found += [(f"{what} ({split})", value) for split, value in zip(rows["split"], rows["mIoU"], strict=True)]
    return found


def class_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """IoU in percent: rows as in :func:`results_table`, a column per class."""
    ious = metrics[(metrics["metric"] == "iou") & (metrics["object_size"] == "all") & (metrics["class_name"] != "mean")]
    return _by_row(ious.assign(column=ious["class_name"])).reindex(columns=ious["class_name"].unique())


def paper_table(metrics: pd.DataFrame, paper_results: Mapping[Variant, float]) -> pd.DataFrame:
    """A run's mIoU beside the paper's, in percent, for the variants that the run measured (fused by the rule ``sum``).

    ``note`` says "below" where the run is more than :data:`PAPER_TOLERANCE` below.
    """
    measured = results_table(metrics).reset_index()
    measured = measured[measured["fusion"].isin(["", "sum"])].drop_duplicates("variant")  # the training split's row
    columns = {"paper": pd.Series(paper_results, dtype=float), "run": measured.set_index("variant")["mIoU"]}
    table = pd.concat(columns, axis=1, join="inner")
    table["difference"] = table["run"] - table["paper"]
    table["note"] = ["below" if gap < -PAPER_TOLERANCE else "" for gap in table["difference"]]
    return table[["run", "paper", "difference", "note"]].rename(index=variant_label).round(1)


def compare_runs(folders: Sequence[str | Path], measure: str = "mIoU") -> pd.DataFrame:
    """A column of :func:`results_table` for several runs, by name or folder, then ``<run> - <first run>`` in points.

    Text with one decimal, a name per row. RunError if there is no such run.
    """
    runs = [find_run(str(folder)) for folder in folders]
    labels = _labels(runs)
    columns = {label: results_table(run.metrics())[measure] for label, run in zip(labels, runs, strict=True)}
    table = pd.concat(columns, axis=1).sort_index(level="stage", sort_remaining=False, kind="stable").dropna(how="all")
    text = table.map("{:.1f}".format, na_action="ignore")
    for label in labels[1:]:
        text[f"{label} - {labels[0]}"] = (table[label] - table[labels[0]]).map("{:+.1f}".format, na_action="ignore")
    return by_name(text.astype(object).fillna(""), numbered=True).rename_axis(index=measure)


def comparison_text(folders: Sequence[str | Path], measure: str = "mIoU") -> str:
    """:func:`compare_runs` for a terminal, then the settings in which the runs differ."""
    runs = [find_run(str(folder)) for folder in folders]
    table = compare_runs(folders, measure).rename_axis(None).to_string()
    lines = [f"{measure}, percent; differences in percentage points", table]
    for run, label in zip(runs[1:], _labels(runs)[1:], strict=True):
        differences = config_differences(runs[0].config, run.config) or ["the same"]
        lines += [f"\nsettings of {runs[0].name} | {label}:", *(f"  {line}" for line in differences)]
    return "\n".join(lines)


def results_text(run: Run) -> str:
    """The results table for a terminal: one decimal, a dash where nothing was measured."""
    table = results_table(run.metrics())
    if table.empty:
        return f"{run.name}: no results yet"
    text = by_name(table, numbered=True).to_string(na_rep="-", float_format="{:.1f}".format)
    return f"{run.name}: IoU in percent; learned from {run.config.supervision}\n{text}"


COMPARED = {  # by stage what its sentence compares with what, by mIoU
    "03": ("The fused maps are", Variant.TEACHER_FUSED, "those of a single scale", Variant.TEACHER),
    "04": ("The denoised maps are", Variant.TEACHER_FUSED, "those of all classes", Variant.TEACHER_UNDENOISED),
    "05": ("At a single scale, the student's maps are", Variant.STUDENT, "its teacher's", Variant.TEACHER),
    "06": ("The student's masks are", Variant.PSEUDO_MASKS, "its teacher's", Variant.TEACHER_FUSED_REFINED),
    "08": ("The pseudo masks are", Variant.PSEUDO_MASKS, "the teacher's fused maps", Variant.TEACHER_FUSED),
}


def conclusion(run: Run, stage: str) -> str:
    """What a stage (``"05"``) gained or lost, in one sentence that is computed from the run's records.

    Of the student also what self-training gave over the seeds of the run's ablation, if there is one.
    """
    records = run.metrics().query("class_name == 'mean' and object_size == 'all'")
    of_stage = records[records["stage"].str.startswith(stage)]
    found = dict(zip(of_stage["metric"], of_stage["value"], strict=True))
    if "saliency_iou" in found:
        return f"The saliency maps and the true objects have an IoU of {found['saliency_iou']:.1%}."
    if stage == "02" and "recall" in found:
        of = f"The classifier names {found['recall']:.1%} of the labels of the split {of_stage['split'].iloc[0]}"
        return f"{of}, and {found['precision']:.1%} of the labels that it names are right."
    values = _miou(run) if stage in ("07", *COMPARED) else {}
    if stage == "07" and found:
        pseudo = values.get(Variant.PSEUDO_MASKS, float("nan"))
        new = f"The segmentation network has {100 * found['iou']:.1f} % mIoU on {of_stage['split'].iloc[0]}"
        return f"{new}, the pseudo masks have {pseudo:.1f} % on train."
    if stage not in COMPARED:
        return "This stage measured nothing."
    what, one, other, base = COMPARED[stage]
    if one not in values or base not in values:
        return "There is no ground truth to measure what this stage gained."
    how = against(values[one], values[base])
    ablation, seeds = files.read_json(run.path(ABLATION), {}), ""
    if ablation and stage in ("05", "06", "08"):
        masks = _ablation_masks(ablation)
        gains = (masks["full"] - masks["no_self_training"]).dropna()
        seeds = f"; over {len(gains)} seeds, self-training gave the masks {spread(gains, '{:+.1f}')}"
    sentence = f"{what} {how} {other} ({values[one]:.1f} and {values[base]:.1f} % mIoU){seeds}."
    if stage == "06" and Variant.CONTROL_REFINED in values:
        gap = against(values[Variant.STUDENT_REFINED], values[Variant.CONTROL_REFINED])
        sentence += f" In one pass per image, a student of fused targets is {gap} one of single-scale targets."
    return sentence


def against(percent: float, base: float) -> str:
    """Such as "1.9 points below", or "as good as" for a difference that rounds to 0."""
    gap = round(percent - base, 1)
    return f"{abs(gap):.1f} points {'above' if gap > 0 else 'below'}" if gap else "as good as"


def beside_reference(run: Run) -> str:
    """Whether a run's masks are within the spread of the reference run's seeds; empty if its settings are others."""
    stored = files.read_json(RUNS_FOLDER / "reference" / ABLATION, {})
    try:
        differing = config_differences(check_settings(stored["settings"]), run.config) if stored else []
    except ConfigError:  # an older reference, whose settings have other names
        return ""
    free = ("seed", "device", "precision", "num_threads")
    if not stored or any(line.partition(":")[0] not in free for line in differing):
        return ""
    masks, values, lines = _ablation_masks(stored), _miou(run), []
    for variant, name in {Variant.TEACHER_FUSED_REFINED: "no_self_training", Variant.PSEUDO_MASKS: "full"}.items():
        if variant in values:
            inside = abs(values[variant] - masks[name].mean()) <= 2 * masks[name].std()
            where = f"{'within' if inside else 'OUTSIDE'} the spread of the reference run's {len(masks)} seeds"
            lines.append(f"{variant.label}: {values[variant]:.1f} %, {where} ({spread(masks[name])}, two deviations)")
    return "\n".join(lines)


def _miou(run: Run) -> dict[str, float]:
    """The mIoU in percent by variant, on *train*, at the run's single scale and fusion rule."""
    attention, table = run.config.attention, results_table(run.metrics()).reset_index()
    wanted = table["fusion"].isin(["", attention.fusion]) & table["scale"].isin(["", f"{attention.single_scale:g}"])
    table = table[wanted & (table["split"] == "train")].dropna(subset=["mIoU"])
    return dict(zip(table["variant"], table["mIoU"], strict=True))


def _ablation_masks(ablation: dict[str, Any]) -> pd.DataFrame:
    """The mIoU of masks in percent from an ablation's result: a row per seed, a column per variant."""
    own = pd.DataFrame(ablation["records"]).query("object_size == 'all' and bg_choice == 'own'")
    return 100 * own.pivot(index="seed", columns="variant", values="value").astype(float)


def _by_row(records: pd.DataFrame) -> pd.DataFrame:
    """Values in percent: a row per :data:`ROW`, in the order of the records; a column per name in ``column``."""
    scales = records["scale"].map(lambda scale: "" if pd.isna(scale) else f"{scale:g}")
    rows = records.assign(scale=scales, fusion=records["fusion"].fillna(""), value=100 * records["value"].astype(float))
    table = rows.pivot_table("value", ROW, "column", aggfunc="last", sort=False)
    table.attrs = dict(records.attrs)  # the supervision
    return table


def _labels(runs: Sequence[Run]) -> list[str]:
    """Names of runs; where two share one, the folder's path."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.folder) for run in runs]


def measurements(runs: Iterable[tuple[str, int, Run]], measure: str = "mIoU") -> pd.DataFrame:
    """A column of :func:`results_table` for several runs, each with the label of its settings and its seed.

    The ``value`` is in percent; a ``row`` is named as by :func:`by_name`.
    """
    found: list[tuple[Any, ...]] = []
    for setting, seed, run in runs:
        values = by_name(results_table(run.metrics()), numbered=True)[measure].dropna()
        found += [(setting, seed, row, value) for row, value in values.items()]
    return pd.DataFrame(found, columns=["setting", "seed", "row", "value"])


def spread_table(values: pd.DataFrame, form: str = "{:.1f}") -> pd.DataFrame:
    """Mean ± standard deviation over seeds: a line per row of :func:`measurements`, a column per setting.

    A cell such as ``67.8 ± 0.4 (3)`` ends with the number of seeds; a single seed gives its value alone. ``form`` is
    that of :func:`spread`.
    """

    def cell(group: pd.Series[float]) -> str:
        return spread(group, form) + (f" ({len(group)})" if len(group) > 1 else "")

    cells = values.groupby(["row", "setting"], sort=False)["value"].agg(cell).unstack("setting", fill_value="")
    order = [setting for setting in values["setting"].unique() if setting in cells]
    return cells.reindex(values["row"].unique())[order].rename(columns={"": "value"}).rename_axis(columns=None)


def difference_table(values: pd.DataFrame) -> pd.DataFrame:
    """Differences to the first setting between runs of the same seed, as mean ± standard deviation over seeds.

    A column per other setting; a seed that only one of the two settings has is left out.
    """
    first = values[values["setting"] == values["setting"].iloc[0]] if len(values) else values
    paired = values.merge(first, on=["row", "seed"], suffixes=("", "_first"))
    paired["value"] -= paired["value_first"]
    table = spread_table(paired[paired["setting"] != paired["setting_first"]], "{:+.1f}")
    return table.rename(columns=lambda setting: f"{setting} - {first['setting'].iloc[0]}")


def spread(values: Iterable[float], form: str = "{:.1f}") -> str:
    """Mean ± standard deviation, such as ``67.8 ± 0.4``; a single value alone, and nothing for none. NaN is ignored.

    ``form`` is the mean's, ``{:+.1f}`` for a difference; the deviation has as many digits and no sign.
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


FORMATS: Mapping[str, Callable[[pd.DataFrame], str]] = {  # how a table of text is written, by file ending
    "csv": lambda table: table.to_csv(lineterminator="\n"),
    "md": _markdown,
    "tex": _latex,
    "txt": lambda table: table.to_string() + "\n",
}
