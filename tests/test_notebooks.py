"""Every notebook: its form, and the whole chain executed by papermill on settings that take seconds."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
import skimage
import timm
import torch
from helpers import network_references
from PIL import Image
from safetensors.torch import save_file

from smaflib.apps import ablation
from smaflib.apps.ablation import FULL, ablate
from smaflib.config import load_config
from smaflib.explorer.widget import Explorer
from smaflib.files import PROJECT_ROOT
from smaflib.maps import AttentionMaps
from smaflib.runs import runner
from smaflib.runs.kernel import NotebookKernel
from smaflib.runs.manifest import read_manifest
from smaflib.runs.runner import run_notebooks
from smaflib.runs.stages import ABLATION, STAGES, counts

NOTEBOOKS = sorted((PROJECT_ROOT / "notebooks").glob("*.ipynb"))
OF_STAGES = [PROJECT_ROOT / "notebooks" / f"{stage.name}.ipynb" for stage in STAGES]
# No stages: they make nothing that others need.
EXPLORE, LESSON, OF_SOURCES, OF_PHOTOS = (
    PROJECT_ROOT / "notebooks" / f"{name}.ipynb"
    for name in ("explore", "00b_cam_from_scratch", "09_attention_sources", "photos")
)
WIDTH = 104
"""Characters of a line of code that JupyterLab shows in a window of 1280 pixels, with its file browser open (107)."""
TINY = (
    "num_threads=1",
    "data.num_train=8",
    "data.num_val=4",
    "data.image_size=64",
    "classifier.iterations=6",
    "classifier.crop_size=48",
    "classifier.resize_range=[48, 72]",
    "self_training.iterations=4",
    "self_training.crop_size=48",
    "self_training.resize_range=[48, 72]",
    "segmentation.iterations=4",
    "segmentation.crop_size=48",
    "segmentation.resize_range=[48, 72]",
)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_form(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    title = notebook.cells[0].source.splitlines()[0]
    assert re.fullmatch(r"# (\d\db?|Explore|Your photos) · .*\?", title), (
        f"the first line must ask the notebook's question, got {title!r}"
    )
    conclusion = notebook.cells[-2 if path == EXPLORE else -1].source  # the explorer comes last
    assert conclusion.startswith("**Conclusion.**") and "\n\n*References.*\n\n- " in conclusion
    for cell in code_cells(path):
        assert not cell.outputs, "notebooks are stored without outputs: make format"
        assert cell.execution_count is None
        assert len(cell.source.splitlines()) <= 15, cell.source
        assert [line for line in cell.source.splitlines() if len(line) > WIDTH] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_papermill_knows_every_parameter(path, caplog):
    """A comment with an equals sign hides its line from papermill, which then warns of an unknown parameter."""
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    found = papermill.inspect_notebook(str(path))
    assert list(found) == [line.partition(":")[0] for line in cell.source.splitlines()]
    assert all(each["help"] for each in found.values()) and caplog.messages == []


def test_plain_papermill_takes_one_override_and_then_the_settings_of_the_run(tmp_path, config_file):
    """In the kernel of an editor; the cells that need torch are left out."""
    notebook, run_dir = nbformat.read(NOTEBOOKS[2], as_version=4), tmp_path / "run"
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    opened = "from smaflib.runs import open_run\nopen_run(run_dir, config_file, overrides, stage='01_data')"
    notebook.cells = [cell, nbformat.v4.new_code_cell(opened)]
    nbformat.write(notebook, tmp_path / "in.ipynb")
    for given in ({"config_file": str(config_file), "overrides": "data.num_train=3"}, {}):
        papermill.execute_notebook(
            tmp_path / "in.ipynb", None, given | {"run_dir": str(run_dir)}, cwd=PROJECT_ROOT, progress_bar=False
        )
        data = load_config(run_dir / "config.yaml").data
        assert (data.num_train, data.num_val) == (3, 2)


@pytest.mark.parametrize("path", OF_STAGES, ids=lambda path: path.stem)
def test_two_exercises_with_an_answer_a_check_and_a_folded_solution(path):
    cells = nbformat.read(path, as_version=4).cells
    places = [place for place, cell in enumerate(cells) if re.match(r"\*\*Exercise \d\.\*\*", cell.source)]
    assert [cells[place].source[:15] for place in places] == ["**Exercise 1.**", "**Exercise 2.**"]
    for number, place in enumerate(places, 1):
        answer, check, solution = cells[place + 1 : place + 4]
        assert [cell.metadata.get("tags") for cell in (answer, check, solution)] == [
            ["exercise"],
            ["check"],
            ["solution"],
        ]
        assert answer.source.startswith(f"answer_{number} = None  # ")  # and what belongs there
        assert re.search(rf"^check\(\s*answer_{number},", check.source, re.MULTILINE)
        # An answer that is seen before it is asked for teaches nothing. JupyterLab shows hidden outputs of a cell that
        # runs, and would save that; so a solution folds its output itself.
        assert check.metadata["jupyter"] == {"source_hidden": True} == solution.metadata["jupyter"]
        (block,) = [
            node for node in ast.parse(solution.source).body if not isinstance(node, ast.ImportFrom | ast.Import)
        ]
        assert ast.unparse(block).startswith("with solution():\n")
        # Neither changes anything of the run.
        assert not re.search(r"\brun\.(record|save_figure)\b|write_|save_|\.open\(", check.source + solution.source)


# Answers as a reader would give them, from what the solution has computed; and a wrong one.
ANSWERS = {
    "00_one_image_end_to_end": (
        ("{samples.class_names[k - 1] for k in noisy.unique().tolist() if k and not image_label[k - 1]}", "{'cat'}"),
        ("[(pseudo_mask(sample.image, denoised_student, b, config.pseudo_masks) > 0).float().mean().item() "
         "for b in (0.1, 0.35, 0.7)]", "[0.5, 0.5, 0.5]"),
    ),
    "01_data": (("wrong", "wrong + 1"), ("together", "together * 2")),
    "02_classifier": (
        ("(maps[train.files[0].labels[0]] > 0).double().mean()", "-1"),
        ("None\ngrey = shown[0].image.clone()\ngrey[:, 25:38, 25:38] = 128\n"
         "logits = [teacher.image_logits(teacher(normalize(i)[None]))[0, k] for i in (shown[0].image, grey)]\n"
         "answer_2 = logits[0] - logits[1]", "[1, 2]"),
    ),
    "03_multi_scale_attention": (("by_hand", "by_hand / 2"), ("pd.DataFrame(peaks).mean()", "[0, 0, 0, 0]")),
    "04_denoise_and_reactivate": (
        ("differing", "differing + 1"),
        ("pd.DataFrame(lines).T['labelled background']", "[0.5, 0.5, 0.5]"),
    ),
    "05_self_training": (
        ("[mac_loss(network(whole), target).item() for network in (with_background(run.network('teacher')), student)]",
         "0.1"),
        ("[lines[network]['score on objects'] for network in ('teacher', 'student')]", "'teacher'"),
    ),
    "06_pseudo_masks": (("totals['gained'] - totals['lost']", "10**9"), ("after.miou", "after.miou - 0.1")),
    "07_segmentation": (
        ("shares", "shares.T + 0.1"),
        ("counts['repeats the mistake'] / sum(counts.values())", "2"),
    ),
    "08_results": (("sum(scores) / len(scores)", "2"), ("set()", "{'full'}")),
}  # fmt: skip


WATCH = """
import os, sys

FOLDER = os.environ["SMAF_TEST_FOLDER"]

def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0]
        if isinstance(host, str) and host not in ("127.0.0.1", "::1", "localhost", ""):
            with open(f"{FOLDER}/connections", "a") as file:
                file.write(f"{event} {host} {sys.argv[:3]}\\n")
    if event == "import" and args[0].partition(".")[0] == "smaflib":
        with open(f"{FOLDER}/{os.getpid()}.modules", "a") as file:
            file.write(f"{args[0]}\\n")

sys.addaudithook(note)

if "ipykernel_launcher" in sys.orig_argv:
    from operator import attrgetter
    from smaflib import config, runs
    from smaflib.runs import stages

    opens = runs.open_run
    # How many processes there are decides no result, nor does the supervision that tables of later stages name.
    ASKED = ("data.num_workers", "self_training.batch_size", "segmentation.batch_size", "segmentation.enabled")
    ASKED += ("attention.source", "attention.options.model", "classifier.pretraining")
    ASKED += ("self_training.saliency_weight", "pseudo_masks.saliency_weight")

    def open_run(*args, stage, **options):
        run = opens(*args, stage=stage, **options)
        with open(f"{FOLDER}/{stage}", "w") as file:
            file.write(str(os.getpid()))
        for name in config.flat_settings(run.config):
            if not stages.counts("settings", name, stages.stage_named(stage)) and name not in ASKED:
                group, _, setting = name.rpartition(".")
                owner = attrgetter(group)(run.config)
                if not isinstance(owner, dict):  # such as the words of classes
                    vars(owner).pop(setting, None)  # reading it raises
        return run

    runs.open_run = open_run
"""
"""Imported by every Python process below, kernels and workers too: notes whom it speaks to on other machines and which
modules it imports, and takes from a notebook's config the settings that later stages are the first to depend on."""


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """A folder that takes the notes of all processes that are started meanwhile."""
    folder = tmp_path_factory.mktemp("watch")
    (folder / "sitecustomize.py").write_text(WATCH)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", path)
        patch.setenv("SMAF_TEST_FOLDER", str(folder))
        yield folder


FEW = """
from smaflib.models import pretrained
whole = pretrained.short_config
def short_config(folder):
    config, few = whole(folder), {"iterations": 4, "batch_size": 4}
    data = config.data.model_copy(update={"num_train": 6, "num_val": 2})
    trainings = {name: getattr(config, name).model_copy(update=few) for name in ("self_training", "segmentation")}
    return config.model_copy(update={"data": data} | trainings)
pretrained.short_config = short_config
"""
"""A cell for notebooks that draw images of their own: fewer, and fewer steps."""


def with_few_images(path):
    notebook = nbformat.read(path, as_version=4)
    (number,) = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    notebook.cells.insert(number + 1, nbformat.v4.new_code_cell(FEW))
    return notebook


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """The notebooks with a reader's right and wrong answers behind each solution."""
    folder = tmp_path_factory.mktemp("notebooks")
    for path in OF_STAGES:
        notebook = with_few_images(path) if path == OF_STAGES[0] else nbformat.read(path, as_version=4)
        for number, answers in enumerate(ANSWERS[path.stem], 1):
            (check,) = [cell for cell in notebook.cells if cell.id == f"{path.stem[:2]}-ex{number}-check"]
            place = notebook.cells.index(check) + 2  # behind the solution
            for answer in reversed(answers):
                source = f"answer_{number} = {answer}\n{check.source}"
                notebook.cells.insert(place, nbformat.v4.new_code_cell(source, metadata={"tags": ["answered"]}))
        nbformat.write(notebook, folder / path.name)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, watched, answered):
    """The whole chain on eight images of 64 pixels, with answers to all exercises; its ablation has the full row."""
    runs = tmp_path_factory.mktemp("papermill_runs")
    chain = partial(run_notebooks, notebooks=answered)
    run = chain(PROJECT_ROOT / "configs" / "mini.yaml", "tiny", TINY, until_stage="06", runs=runs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_notebooks", chain)
        patch.setattr(ablation, "RUNS", {FULL: None})
        assert ablate(run, [run.config.seed]) == []
    return chain(run.config_file, run.name, run.overrides, runs=runs)


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_stage_declares_the_modules_that_its_notebook_imports(run, watched, stage):
    kernel = (watched / stage.name).read_text()
    modules = {name.partition(".")[2] for name in (watched / f"{kernel}.modules").read_text().split()}
    assert "cams" in modules or stage.name[:2] in ("00", "01")  # 00 gets it by the front door, without an event
    later = {name for name in modules if not counts("code", name, stage)}
    assert later == set(), "declare them in smaflib/runs/stages.py for this stage or an earlier one"


def test_nothing_leaves_this_machine(run, watched):
    connections = watched / "connections"
    assert not connections.exists(), connections.read_text()
    call = "import socket; s = socket.socket(); s.settimeout(0.01); s.connect_ex(('192.0.2.1', 9))"
    subprocess.run([sys.executable, "-c", call], check=True)
    assert "socket.connect 192.0.2.1" in connections.read_text()  # it would have been noted
    connections.unlink()


def test_executed_notebooks_show_pictures_and_hold_no_progress_bars(run):
    for stage in STAGES:
        notebook = nbformat.read(run.path(f"{stage.name}.ipynb"), as_version=4)
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs), stage.name
        assert not [output for output in outputs if output.output_type == "error"]
        assert not [output for output in outputs if output.get("name") == "stderr"], stage.name
        assert "widgets" not in notebook.metadata  # sliders that nobody can move


def test_solutions_have_run_and_say_something(run):
    for stage in STAGES:
        notebook = nbformat.read(run.path(f"{stage.name}.ipynb"), as_version=4)
        solutions = [cell for cell in notebook.cells if "solution" in cell.metadata.get("tags", [])]
        assert len(solutions) == 2
        assert all(cell.execution_count and cell.outputs for cell in solutions), stage.name
        page = run.path(f"{stage.name}.html").read_text()
        assert page.count("<summary>Solution</summary>") == 2
        sentence = [cell.outputs[0].text for cell in notebook.cells if cell.id.endswith("-sentence")]
        assert (
            len(sentence) == 1 and "no ground truth" not in sentence[0] and sentence[0].strip() in html.unescape(page)
        )
        assert "No answer yet" not in page  # nobody can answer on a page
        checks = [cell for cell in notebook.cells if "check" in cell.metadata.get("tags", [])]
        assert ["No answer yet" in cell.outputs[0].text for cell in checks] == [True, True]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_checks_say_right_to_a_readers_answer_and_what_to_look_at_to_a_wrong_one(run, stage):
    cells = nbformat.read(run.path(f"{stage.name}.ipynb"), as_version=4).cells
    told = [cell.outputs[0].text for cell in cells if cell.metadata.get("tags") == ["answered"]]
    first = [text[: len("Not yet")].strip() for text in told]
    assert first == ["Right.", "Not yet"] * 2, told


def test_metrics_have_every_row_of_the_chain_and_read_in_one_line(run):
    metrics = pd.read_json(run.path("metrics.json"))
    evaluated = metrics[(metrics.metric == "iou") & (metrics.object_size == "all") & (metrics.class_name == "mean")]
    evaluated = evaluated.fillna({"fusion": "", "scale": 0})
    rows = set(zip(evaluated.stage, evaluated.variant, evaluated.fusion, evaluated.scale, evaluated.split, strict=True))
    for row in (
        ("03_multi_scale_attention", "teacher", "", 0.5, "train"),
        ("03_multi_scale_attention", "teacher_fused", "size_adaptive", 0, "val"),
        ("04_denoise_and_reactivate", "teacher_undenoised", run.config.attention.fusion, 0, "train"),
        ("05_self_training", "student", "", 1, "val"),
        ("05_self_training", "control_fused", "size_adaptive", 0, "train"),
        ("06_pseudo_masks", "unrefined_masks", "", 0, "train"),
        ("06_pseudo_masks", "pseudo_masks", "", 0, "train"),
        ("07_segmentation", "segmentation", "", 0, "val"),
    ):
        assert row in rows
    assert evaluated.value.between(0, 1).all()
    assert set(metrics[metrics.metric == "iou"].object_size) == {"all", "small", "medium", "large"}


def test_the_report_needs_no_network(run):
    assert 'src="explorer.html"' in run.path("index.html").read_text()
    for page in [
        run.path("index.html"),
        run.path("explorer.html"),
        *(run.path(f"{stage.name}.html") for stage in STAGES),
    ]:
        assert network_references(page.read_text()) == []


def test_explore_runs_headless_ends_with_the_explorer_and_links_a_page_that_needs_no_kernel(tmp_path):
    executed = tmp_path / "explore.ipynb"
    NotebookKernel("explore").execute(EXPLORE, executed, {"num_images": 3}, cwd=tmp_path)
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "application/vnd.jupyter.widget-view+json" in cells[-1].outputs[-1].data
    (link,) = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    (page,) = tmp_path.glob("*.html")
    assert f"href='{page.name}'" in link and network_references(page.read_text()) == []
    assert "mean IoU" in "".join(output.get("text", "") for output in outputs)


def test_photos_become_masks_a_review_and_an_export(tmp_path):
    executed, photos = tmp_path / "executed.ipynb", tmp_path / "photos"
    photos.mkdir()
    for name in ("chelsea", "coffee"):
        picture = Image.open(Path(skimage.__file__).parent / "data" / f"{name}.png")
        picture.resize((96, 24)).save(photos / f"{name}.png")
    (tmp_path / "labels.csv").write_text("image;labels\nchelsea;cat\ncoffee;cup,drink\n")
    settings = {"images": "photos", "labels": "labels.csv", "out": "masks", "iterations": 2}
    NotebookKernel("photos").execute(OF_PHOTOS, executed, settings, cwd=tmp_path)
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert "application/vnd.jupyter.widget-view+json" in cells[-2].outputs[-1].data
    assert "2 masks; " in cells[-1].outputs[-1].text
    told = json.loads((tmp_path / "masks_coco" / "instances.json").read_text())
    assert [each["name"] for each in told["categories"]] == ["cat", "cup", "drink"] and len(told["images"]) == 2


def test_the_lesson_of_sources_shows_them_and_fusion_helps_each(tmp_path):
    executed, photos = tmp_path / "sources.ipynb", tmp_path / "photos"
    photos.mkdir()
    shutil.copy(Path(skimage.__file__).parent / "data" / "chelsea.png", photos)
    weights = tmp_path / "vit.safetensors"
    save_file(timm.create_model("deit_small_patch16_224").state_dict(), weights)
    settings = {
        "photos": str(photos),
        "scales": [0.35],
        "vit_weights": str(weights),
        "work_folder": str(tmp_path / "work"),
    }
    nbformat.write(with_few_images(OF_SOURCES), tmp_path / "few.ipynb")
    NotebookKernel("sources").execute(tmp_path / "few.ipynb", executed, settings, cwd=tmp_path)
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error"]
    told = "".join(output.get("text", "") for output in outputs)
    assert "ImageNet's classifier sees: Egyptian cat" in told and "layercam, earlier layer, vit, vit-rollout" in told
    (page,) = [o.data["text/html"] for o in outputs if "mIoU" in o.get("data", {}).get("text/html", "")]
    values = dict(re.findall(r">(\w+\+*, [\w ]+)</th>\s*<td[^>]*>([\d.]+)<", page))
    assert len(values) == 10
    for source in ("classifier", "gradcam", "layercam", "xgradcam"):
        assert float(values[f"{source}, fused"]) > float(values[f"{source}, scale 1"])


def test_the_lesson_computes_the_librarys_map_and_checks_it(tmp_path):
    executed = tmp_path / "lesson.ipynb"
    NotebookKernel("lesson").execute(LESSON, executed, {}, cwd=tmp_path)
    outputs = [o for cell in nbformat.read(executed, as_version=4).cells for o in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    told = "".join(output.get("text", "") for output in outputs)
    logit, mean = re.search(r"logit ([\d.]+); mean of its map plus bias ([\d.]+)", told).groups()
    assert logit == mean and float(re.search(r"difference from the ten lines: (\S+)", told)[1]) < 1e-3
    correlations = [float(value) for value in re.findall(r"trained map ([+-][\d.]+)", told)]
    assert correlations[0] == 1 and max(map(abs, correlations[1:])) < 0.6


def test_a_run_is_explored_with_what_it_made(run):
    explorer = Explorer.from_run(run, num_images=2)
    assert explorer.gallery.roles == ("teacher", "student")
    for role in explorer.gallery.roles:
        explorer.controls["role"].value = role
        cams, _ = AttentionMaps(run.path("cams", role), run.config.attention.scales).read("000000")
        assert all(map(torch.equal, explorer.gallery.cams(0, role, True), cams))
    assert explorer.exploration.iou is not None
    assert "explorer.html" in read_manifest(run.folder)["stages"]["08_results"]["artifacts"]


def test_ablation_of_the_run_agrees_with_its_notebooks(run):
    """What both measure, they measure alike; notebook 08 shows it; finished stages are reused."""
    notebooks = run.metrics().query(
        "stage == '06_pseudo_masks' and metric == 'iou' and class_name == 'mean' and object_size == 'all'"
    )
    by_notebook = dict(zip(notebooks["variant"], notebooks["value"], strict=True))
    records = pd.DataFrame(json.loads(run.path(ABLATION).read_text())["records"])
    records = records.query("bg_choice == 'own' and object_size == 'all'")
    by_ablation = dict(zip(records["variant"], records["value"], strict=True))
    for variant, row in {
        "full": "pseudo_masks",
        "no_crf": "unrefined_masks",
        "no_self_training": "teacher_fused_refined",
    }.items():
        assert by_ablation[variant] == pytest.approx(by_notebook[row]), variant
    assert run.path("ablation/seed0-full/checkpoints/student.safetensors").samefile(run.checkpoint("student"))
    assert "without self-training" in run.path("08_results.html").read_text()
    assert run.path("figures/08_ablation.png").is_file()
