import math
from pathlib import Path

import matplotlib
import nbformat
import pytest
from bs4 import BeautifulSoup
from helpers import network_references
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from smaflib.errors import RunError
from smaflib.report.html import write_index
from smaflib.report.notebook import notebook_body
from smaflib.report.tables import class_table, compare_runs, comparison_text, headline, results_table, results_text
from smaflib.runs import Run, open_run

matplotlib.use("agg")

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return new_run(tmp_path, "first")


def new_run(folder: Path, name: str, *overrides: str) -> Run:
    config_file = folder / "tiny.yaml"
    config_file.write_text("data: {kind: mini, num_train: 2, num_val: 2}\n")
    return open_run(folder / "runs" / name, config_file, overrides)


def iou(value: float, variant: str = "fused", **more: object) -> dict:
    return {"variant": variant, "metric": "iou", "value": value} | more


def attention_records() -> list[dict]:
    return [
        iou(0.622, "single", scale=1.0),
        iou(0.488, "single", scale=0.5),
        iou(0.646),
        iou(0.27, object_size="small"),
        iou(0.9, class_name="cat"),
        iou(0.3, class_name="dog"),
        {"variant": "fused", "metric": "precision", "value": 0.8},
        {"variant": "fused", "metric": "iou_sweep", "value": 0.1, "bg_score": 0.7},
        {"metric": "loss", "value": 3.0},
    ]


def parsed(html: str) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


def images(page: BeautifulSoup) -> list[str]:
    return [image["src"] for image in page.find_all("img")]


# tables


def test_results_are_percent_in_pipeline_order(run):
    run.record("05", [iou(0.65, "student")])
    run.record("03", attention_records())
    run.record("02", [{"variant": "teacher", "metric": "precision", "value": 0.9}])  # of labels, not of pixels
    table = results_table(run.metrics())
    assert table.index.tolist() == [
        ("03_multi_scale_attention", "single", "", "train", "1"),
        ("03_multi_scale_attention", "single", "", "train", "0.5"),
        ("03_multi_scale_attention", "fused", "", "train", ""),
        ("05_self_training", "student", "", "train", ""),
    ]
    assert list(table.columns) == ["mIoU", "small", "medium", "large", "precision", "recall"]
    fused = table.iloc[2].tolist()
    assert fused[:2] == pytest.approx([64.6, 27.0]) and fused[4] == pytest.approx(80.0)
    assert all(math.isnan(fused[column]) for column in (2, 3, 5))
    by_class = class_table(run.metrics())  # without the mean
    assert list(by_class.columns) == ["cat", "dog"] and by_class.iloc[0].tolist() == pytest.approx([90.0, 30.0])


def test_results_are_printed_with_one_decimal(run):
    assert "no results yet" in results_text(run)
    run.record("03", attention_records())
    lines = results_text(run).splitlines()
    assert lines[-1].split()[-7:] == ["train", "64.6", "27.0", "-", "-", "80.0", "-"]


def test_runs_are_compared_with_the_first(tmp_path):
    first, second = new_run(tmp_path, "first"), new_run(tmp_path, "second", "seed=1")
    first.record("03", [iou(0.60), iou(0.50, "single", scale=1.0)])
    second.record("03", [iou(0.645), iou(0.20, object_size="small")])
    table = compare_runs([first.folder, second.folder])
    assert list(table.columns) == ["first", "second", "second - first"]
    assert table.loc[("03_multi_scale_attention", "fused", "", "train", "")].tolist() == pytest.approx([60, 64.5, 4.5])
    assert math.isnan(table["second - first"].iloc[1])
    small = compare_runs([first.folder, second.folder], "small")
    assert len(small) == 1 and small["second"].iloc[0] == pytest.approx(20.0)

    text = comparison_text([first.folder, second.folder])
    assert "+4.5" in text and "seed: 0 | 1" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [new_run(tmp_path / parent, "mini").folder for parent in ("a", "b")]
    assert list(compare_runs(folders).columns[:2]) == [str(folder) for folder in folders]


def test_comparison_needs_runs_and_a_known_measure(run):
    with pytest.raises(RunError, match="no run 'nowhere'"):
        compare_runs([run.folder, "nowhere"])
    with pytest.raises(ValueError, match="small"):
        compare_runs([run.folder, run.folder], "tiny")


# pages


def executed_notebook(run: Run, name: str, text: str, *outputs: nbformat.NotebookNode) -> Path:
    document = new_notebook(cells=[new_markdown_cell(text), new_code_cell("secret_code = 1", outputs=list(outputs))])
    path = run.path(f"{name}.ipynb")
    nbformat.write(document, path)
    return path


def test_index_ties_the_run_together_without_a_network(run):
    figure = Figure()
    figure.suptitle("Maps <of> a cat")
    run.save_figure(figure, "03_scales")
    run.record("03", attention_records())
    picture = new_output("display_data", data={"image/png": PIXEL})
    executed_notebook(run, "02_classifier", "# Classifier", picture)
    executed_notebook(run, "03_multi_scale_attention", "# Scales\n\n$x_1$ and [paper](https://arxiv.org)", picture)
    index = write_index(run)

    page = parsed(index.read_text())
    assert page.img["src"] == "figures/03_scales.png" and page.img["alt"] == "Maps <of> a cat"
    assert "64.6" in page.text and "What do small and large scales find" in page.text
    links = {link["href"] for link in page.find_all("a")}
    assert {"03_multi_scale_attention.html", "02_classifier.ipynb", "metrics.json"} <= links

    notebook = parsed(run.path("03_multi_scale_attention.html").read_text())
    assert notebook.img["alt"] == "Scales" and "secret_code" not in notebook.text
    assert {"index.html", "02_classifier.html", "https://arxiv.org"} <= {a["href"] for a in notebook.find_all("a")}
    for html in run.folder.glob("*.html"):
        assert network_references(html.read_text()) == []


def test_index_begins_with_the_result_and_the_scales_and_ends_with_the_tables(run):
    for name in ("00_mask", "00_scales", "03_scales"):
        figure = Figure()
        figure.subplots().imshow([[0, 1]])
        run.save_figure(figure, name)
    plot = Figure()
    plot.subplots().plot([0, 1])
    run.save_figure(plot, "08_sizes")
    run.record("03", [iou(0.9, "teacher_fused", fusion="sum", split="train")])  # at an oracle threshold
    run.record("04", [iou(0.611, "teacher_fused", fusion="sum", split="train")])
    run.record("06", [iou(0.685, "pseudo_masks", split="train")])
    run.record("07", [iou(0.573, "segmentation", split="val")])
    text = write_index(run).read_text()
    page = parsed(text)
    assert headline(run.metrics()) == [
        ("attention, scales fused (train)", pytest.approx(61.1)),
        ("pseudo masks (train)", pytest.approx(68.5)),
        ("segmentation network (val)", pytest.approx(57.3)),
    ]
    places = [text.index(part) for part in ("68.5 %", "00_scales.png", "00_mask.png", "08_sizes.png", 'id="results"')]
    assert places == sorted(places)
    assert images(page).count("figures/00_scales.png") == 1
    assert "Compare smallest and largest scale" in page.text and "follow the IoU from left to right" in page.text
    # A dark page turns the colours of plots, not of photos.
    assert [image["src"] for image in page.find_all("img", class_="plot")] == ["figures/08_sizes.png"]


def test_best_of_each_split_is_marked_once_there_are_results(run):
    assert "Nothing has been measured yet" in write_index(run).read_text()
    run.record("03", [iou(0.5, "single"), iou(0.6), iou(0.7, split="val")])
    assert len(parsed(write_index(run).read_text()).find_all("td", class_="best")) == 2


def test_formulas_become_mathml_and_prose_stays(run):
    text = r"""## The loss $L_{mac}$

$$\mathcal{L} = \sum_i a*b*c_i \text{ over } i$$

It costs $5 and $6, `$HOME` and `$$PATH$$` are code, $a_1*b$ and $a_2*b$ are not.

\begin{align}
x &= 1
\end{align}

```python
price = "$x$"
```"""
    picture = new_output("display_data", data={"image/png": PIXEL})
    body = notebook_body(executed_notebook(run, "02_classifier", text, picture))
    assert body.count("<math") == 5 and body.count('display="block"') == 2
    assert "costs $5 and $6, <code>$HOME</code> and <code>$$PATH$$</code> are" in body
    assert "<em>" not in body and "xmlns" not in body and "align}" not in body
    page = parsed(body)
    assert 'price = "$x$"' in page.text and page.img["alt"] == "The loss $L_{mac}$"


def test_solutions_are_folded_and_keep_their_code(run):
    shown = new_code_cell("total = 1 < 2", outputs=[new_output("stream", name="stdout", text="plain")])
    solution = new_code_cell(
        "print(1 < 2)", metadata={"tags": ["solution"]}, outputs=[new_output("stream", name="stdout", text="solved")]
    )
    nbformat.write(new_notebook(cells=[shown, solution]), run.path("a.ipynb"))
    body = notebook_body(run.path("a.ipynb"))
    before, _, folded = body.partition('<details class="solution"><summary>Solution</summary>')
    inside, _, after = folded.partition("</details>")
    assert "plain" in before and "total" not in body
    assert "print(1 &lt; 2)" in inside and "solved" in inside
    assert "solved" not in after


def test_markdown_outputs_may_hold_formulas_and_a_damaged_formula_stays_as_it_is(run):
    output = new_output("display_data", data={"text/markdown": "IoU $= \\frac{1}{2}$"})
    body = notebook_body(executed_notebook(run, "02_classifier", r"so $\left($ fails", output))
    assert "<mfrac>" in body and "<code>\\left(</code>" in body
