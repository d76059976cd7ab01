import json
import math
from pathlib import Path

import matplotlib
import nbformat
import pytest
from bs4 import BeautifulSoup
from helpers import network_references
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from smaflib.report.html import write_index
from smaflib.report.notebook import notebook_body
from smaflib.report.tables import (
    beside_reference,
    chain_rows,
    class_table,
    compare_runs,
    comparison_text,
    conclusion,
    headline,
    results_table,
)
from smaflib.runs import Run, open_run
from smaflib.runs.stages import ABLATION

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


def test_the_chain_is_shown_in_the_runs_own_scale_and_rule(run):
    rule = run.config.attention.fusion
    run.record("03", [iou(0.5, "teacher", scale=s) for s in (0.5, 1.0)] + [iou(0.6, "teacher_fused", fusion="max")])
    run.record("04", [iou(0.61, "teacher_fused", fusion=rule), iou(0.3, "teacher_undenoised", fusion=rule)])
    run.record("06", [iou(0.7, "pseudo_masks"), iou(0.69, "teacher_fused_refined")])
    run.record("07", [iou(0.55, "segmentation", split="val")])
    names = [
        "teacher, scale 1",
        "pseudo masks (student, fused + CRF)",
        "teacher, fused + CRF",
        "segmentation network (val)",
    ]
    assert chain_rows(results_table(run.metrics()), run.config.attention).index.tolist() == names


# sentences


def with_ablation(folder: Path, gaps: list[float], config: dict | None = None) -> None:
    """An ablation over seeds in which self-training gains ``gaps`` points over 0.6 for the teacher's masks."""
    records = []
    for seed, gap in enumerate(gaps):
        for variant, value in {"full": 0.6 + gap / 100, "no_self_training": 0.6}.items():
            where = {"seed": seed, "variant": variant, "bg_choice": "own", "object_size": "all", "value": value}
            records += [
                where,
                where | {"bg_choice": "oracle", "value": 0.9},
                where | {"object_size": "small", "value": 0},
            ]
    (folder / ABLATION).parent.mkdir(parents=True, exist_ok=True)
    (folder / ABLATION).write_text(json.dumps({"records": records, "settings": config or {}}))


@pytest.mark.parametrize(
    ("student", "sentence"),
    [
        (0.661, "The student's masks are 1.9 points below its teacher's (66.1 and 68.0 % mIoU)"),
        (0.70, "The student's masks are 2.0 points above its teacher's (70.0 and 68.0 % mIoU)"),
        (0.6803, "The student's masks are as good as its teacher's (68.0 and 68.0 % mIoU)"),
    ],
)
def test_the_sentence_of_a_stage_has_the_sign_of_the_difference(run, student, sentence):
    run.record("06", [iou(student, "pseudo_masks"), iou(0.68, "teacher_fused_refined")])
    assert conclusion(run, "06") == f"{sentence}."
    with_ablation(run.folder, [-0.6, 0.5, 1.6])  # mean 0.5, standard deviation 1.1
    assert conclusion(run, "06") == f"{sentence}; over 3 seeds, self-training gave the masks +0.5 ± 1.1."
    assert f"<b>{sentence}".replace("'", "&#39;") not in write_index(run).read_text()  # the stage has not run


def test_sentences_of_the_other_stages(run):
    rule = run.config.attention.fusion
    nothing = "There is no ground truth to measure what this stage gained."
    assert [conclusion(run, stage) for stage in ("03", "04", "05", "06", "08")] == [nothing] * 5
    # With ground truth, too: a data set without saliency maps, a run without a segmentation network.
    assert {conclusion(run, stage) for stage in ("01", "02", "07")} == {"This stage measured nothing."}
    run.record("01", [{"metric": "saliency_iou", "value": 0.74}])
    run.record(
        "02",
        [
            {"variant": "classifier", "split": "val", "metric": m, "value": v}
            for m, v in (("recall", 0.9), ("precision", 0.8))
        ],
    )
    run.record(
        "03", [iou(0.9, "teacher", scale=2.0), iou(0.5, "teacher", scale=1.0), iou(0.52, "teacher_fused", fusion=rule)]
    )
    run.record("05", [iou(0.45, "student", scale=1.0), iou(0.99, "student", scale=1.0, split="val")])
    run.record("06", [iou(0.6, "pseudo_masks")])
    run.record("07", [iou(0.55, "segmentation", split="val")])
    assert conclusion(run, "01") == "The saliency maps and the true objects have an IoU of 74.0%."
    assert "names 90.0% of the labels of the split val, and 80.0% of the labels that it names" in conclusion(run, "02")
    assert conclusion(run, "03").startswith(
        "The fused maps are 2.0 points above those of a single scale (52.0 and 50.0 %"
    )
    assert "5.0 points below its teacher's (45.0 and 50.0 %" in conclusion(run, "05")
    assert (
        conclusion(run, "07")
        == "The segmentation network has 55.0 % mIoU on val, the pseudo masks have 60.0 % on train."
    )
    assert conclusion(run, "08").startswith("The pseudo masks are 8.0 points above the teacher's fused maps")


def test_a_run_is_within_or_outside_the_spread_of_the_reference(run, tmp_path, monkeypatch):
    monkeypatch.setattr("smaflib.report.tables.RUNS_FOLDER", tmp_path)
    assert beside_reference(run) == ""  # there is no reference
    settings = run.config.model_dump(mode="json")
    del settings["data"]["longest_side"]  # a setting that is younger than the reference
    with_ablation(tmp_path / "reference", [1.0, 2.0, 3.0], settings | {"seed": 7, "num_threads": 1})  # 62 ± 1
    run.record("06", [iou(0.639, "pseudo_masks"), iou(0.59, "teacher_fused_refined")])
    teacher, student = beside_reference(run).splitlines()
    assert student.startswith("pseudo masks (student, fused + CRF): 63.9 %, within the spread of the reference run")
    assert student.endswith("3 seeds (62.0 ± 1.0, two deviations)")
    assert teacher.startswith("teacher, fused + CRF: 59.0 %, OUTSIDE")
    with_ablation(tmp_path / "reference", [1.0, 2.0, 3.0], settings | {"attention": {"bg_score": 0.9}})
    assert beside_reference(run) == ""  # other settings


def test_runs_are_compared_with_the_first(tmp_path):
    first, second = new_run(tmp_path, "first"), new_run(tmp_path, "second", "seed=1")
    first.record("03", [iou(0.60), iou(0.50, "single", scale=1.0)])
    second.record("03", [iou(0.645), iou(0.20, object_size="small")])
    table = compare_runs([first.folder, second.folder])
    assert list(table.columns) == ["first", "second", "second - first"]
    assert table.loc["03 fused"].tolist() == ["60.0", "64.5", "+4.5"]
    assert table.loc["03 single, scale 1"].tolist() == ["50.0", "", ""]
    small = compare_runs([first.folder, second.folder], "small")
    assert small["second"].tolist() == ["20.0"]

    text = comparison_text([first.folder, second.folder])
    assert "+4.5" in text and "seed: 0 | 1" in text


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
    run.record("06", [iou(0.692, "teacher_fused_refined"), iou(0.685, "pseudo_masks", split="train")])
    run.record("07", [iou(0.573, "segmentation", split="val")])
    text = write_index(run).read_text()
    page = parsed(text)
    assert headline(run.metrics()) == [
        ("attention, scales fused (train)", pytest.approx(61.1)),
        ("teacher's masks (train)", pytest.approx(69.2)),
        ("student's masks (train)", pytest.approx(68.5)),
        ("segmentation network (val)", pytest.approx(57.3)),
    ]
    places = [text.index(part) for part in ("68.5 %", "00_scales.png", "00_mask.png", "08_sizes.png", 'id="results"')]
    assert places == sorted(places)
    assert images(page).count("figures/00_scales.png") == 1
    assert "Compare smallest and largest scale" in page.text and "follow the IoU from left to right" in page.text
    # A dark page turns the colours of plots, not of photos.
    assert [image["src"] for image in page.find_all("img", class_="plot")] == ["figures/08_sizes.png"]


def test_formulas_become_mathml_and_prose_stays(run):
    text = r"""## The loss $L_{mac}$

$$\mathcal{L} = \sum_i a*b*c_i \text{ over } i$$

Here `$HOME` is code, $a_1*b$ and $a_2*b$ are not.

\begin{align}
x &= 1
\end{align}

```python
price = "$x$"
```"""
    picture = new_output("display_data", data={"image/png": PIXEL})
    body = notebook_body(executed_notebook(run, "02_classifier", text, picture))
    assert body.count("<math") == 5 and body.count('display="block"') == 2
    assert "Here <code>$HOME</code> is" in body
    assert "<em>" not in body and "xmlns" not in body and "align}" not in body
    page = parsed(body)
    assert 'price = "$x$"' in page.text and page.img["alt"] == "The loss $L_{mac}$"
