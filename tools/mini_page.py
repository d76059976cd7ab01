"""The tables of docs/mini_results.md, from the reference run and its ablation: ``make reference`` writes them anew."""

from __future__ import annotations

from smaflib.apps.ablation import ablation_table, read_ablation
from smaflib.config import variant_label
from smaflib.errors import RunError
from smaflib.files import PROJECT_ROOT, RUNS_FOLDER, display_path
from smaflib.report.markdown import fill_page, markdown_table
from smaflib.report.tables import results_table
from smaflib.runs import Run, read_run
from smaflib.runs.manifest import read_manifest

PAGE, COMMAND = PROJECT_ROOT / "docs" / "mini_results.md", "tools/mini_page.py"
REFERENCE = RUNS_FOLDER / "reference"


def tables(run: Run) -> dict[str, str]:
    """Markdown by the name of its place in the page.

    Args:
        run: complete, with an ablation.

    Raises:
        RunError: if it has no ablation.
    """
    ablation = read_ablation(run)
    if ablation is None:
        raise RunError(f"{display_path(run.folder)} has no ablation; make reference makes it")
    rows = ablation_table(ablation["records"])
    head = ["", *(column.replace("to full", "to the whole chain") for column in rows.columns)]
    lines = [[str(label), *map(str, values)] for label, values in zip(rows.index, rows.to_numpy(), strict=True)]
    seeds = ", ".join(str(seed) for seed in ablation["seeds"])
    where = f"`{ablation['command']}`: seeds {seeds}, {ablation['device']}, {ablation['finished'][:10]}."
    return {"results": _results(run), "ablation": f"{markdown_table(head, lines)}\n\n{where}"}


def _results(run: Run) -> str:
    """A row per network and way of fusing, on the split that it is evaluated on; and how the run was made."""
    lines = []
    for row in results_table(run.metrics()).reset_index().to_dict("records"):
        if row["split"] != "train" and row["stage"] != "07_segmentation":
            continue
        fusion, scale = (row[key] if isinstance(row[key], str) else "" for key in ("fusion", "scale"))
        label = variant_label(row["variant"], fusion or None) + (f", scale {scale}" if scale else "")
        values = [f"{row[each]:.1f}" if row[each] == row[each] else "" for each in ("mIoU", "small", "medium", "large")]
        if [label, row["split"], *values] not in lines:  # stage 04 evaluates the fused maps of stage 03 again
            lines.append([label, row["split"], *values])
    manifest = read_manifest(run.folder)
    entries = manifest["stages"].values()
    minutes = sum(entry["seconds"] for entry in entries) / 60
    memory = max(entry["peak_memory_mb"] for entry in entries) / 1000
    date = max(entry["started"] for entry in entries)[:10]
    where = (
        f"`make reference`: seed {manifest['seed']}, {manifest['device']}, torch {manifest['packages']['torch']}, "
        f"commit `{manifest['git_commit'][:8]}`, {date}; {minutes:.0f} minutes beside other work, {memory:.1f} GB."
    )
    return f"{markdown_table(['', 'split', 'mIoU', 'small', 'medium', 'large'], lines)}\n\n{where}"


def write_page() -> None:
    """Put the tables of the reference run into the page."""
    fill_page(PAGE, COMMAND, tables(read_run(REFERENCE)))


if __name__ == "__main__":
    write_page()
