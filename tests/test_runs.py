import dataclasses
import subprocess
import sys
from operator import attrgetter
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from typer.testing import CliRunner

from smaflib.apps.cli import app
from smaflib.config import Config, DataConfig, changed_names, load_config
from smaflib.errors import RunError
from smaflib.files import PARTIAL, PROJECT_ROOT, absolute
from smaflib.runs import Run, find_run, open_run
from smaflib.runs.inputs import notebook_hash, outside_files, stage_inputs, why_not_complete
from smaflib.runs.manifest import Record, clear_stage, describe_results, put_entry, read_manifest, write_manifest
from smaflib.runs.stages import STAGES, Stage, counts, stage_named

CHAIN = (
    Stage("01_make", "?", outputs=("data.json", "cams/*/**"), required_outputs=("data.json", "cams/*/**")),
    Stage("02_use", "?", depends_on=("01_make",), outputs=("result.txt",), settings=("seed",)),
)


@pytest.fixture
def run(tmp_path: Path, config_file: Path) -> Run:
    return open_run(tmp_path / "runs" / "tiny", config_file, stages=CHAIN)


def write_notebook(path: Path, code: str, text: str = "Why?") -> Path:
    nbformat.write(new_notebook(cells=[new_markdown_cell(text), new_code_cell(code)]), path)
    return path


def make_stage(run: Run, notebook: Path, number: int = 0) -> None:
    """Do what a stage and the runner do, without a kernel."""
    stage = run.stages[number]
    if number == 0:
        run.path("data.json").write_text("{}")
        run.path("cams/teacher/deep").mkdir(parents=True, exist_ok=True)
        run.path("cams/teacher/deep/a.npz").write_text("cam of a")
        run.path("cams/teacher/b.npz").write_text("cam of b")
    run.record(stage.name, [{"metric": "iou", "value": 0.5}])
    entry = {"status": "complete", "inputs": inputs(run, notebook), **describe_results(run.folder, stage)}
    put_entry(run.folder, stage, entry)


def inputs(run: Run, notebook: Path) -> dict:
    return stage_inputs(run, stage_named(notebook.stem, CHAIN), notebook, outside_files(run.config))


def reason(run: Run, notebook: Path) -> str | None:
    return why_not_complete(run.folder, stage_named(notebook.stem, CHAIN), inputs(run, notebook))


def test_runs_are_light_to_import_on_every_system():
    code = """if True:
        import sys
        sys.modules["fcntl"] = None  # Windows has none
        import smaflib.runs.runner
        print({"torch", "pandas", "matplotlib", "jupyter_client", "papermill"} & set(sys.modules))
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n" and done.returncode == 0, done.stderr


# stages


def test_stage_has_several_names():
    for name in ("2", "02", "classifier", "02_classifier", "Classifier"):
        assert stage_named(name).name == "02_classifier"
    with pytest.raises(RunError, match="there is no stage 'clasifier'") as error:
        stage_named("clasifier")
    assert all(stage.name in str(error.value) for stage in STAGES)


def test_settings_and_modules_count_from_the_stage_that_declares_the_longest_name():
    chain = (Stage("01_a", "?"), Stage("02_b", "?", settings=("attention.scales",)), Stage("03_c", "?", code=("maps",)))
    chain += (Stage("04_d", "?", settings=("attention",), code=("*",)),)

    def first(kind: str, name: str) -> str:
        return next(stage.name for stage in chain if counts(kind, name, stage, chain))

    for name, stage in (("seed", "01_a"), ("attention.scales", "02_b"), ("attention.fusion", "04_d")):
        assert first("settings", name) == stage
    for name, stage in (("cams", "01_a"), ("maps", "03_c"), ("maps.inner", "03_c"), ("mapsize", "01_a")):
        assert first("code", name) == stage
    assert counts("code", "maps", chain[3], chain) and not counts("code", "maps", chain[1], chain)


def test_every_declared_name_is_a_stage_a_setting_or_a_module():
    config, library = Config(data=DataConfig(kind="mini")), PROJECT_ROOT / "smaflib"
    for number, stage in enumerate(STAGES):
        assert set(stage.depends_on) <= {earlier.name for earlier in STAGES[:number]}
        for name in stage.settings:
            attrgetter(name)(config)
        for name in set(stage.code) - {"*"}:
            path = library.joinpath(*name.split("."))
            assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_refined_targets_depend_on_the_settings_of_masks(run, tmp_path):
    notebook = write_notebook(tmp_path / "05_self_training.ipynb", "x = 1")

    def asked(run: Run) -> dict:
        return stage_inputs(run, stage_named("05"), notebook, {})

    whole = dataclasses.replace(run, stages=STAGES)
    assert "pseudo_masks.crf.iterations" not in asked(whole)
    refined = run.config.self_training.model_copy(update={"refine": "crf"})
    assert "pseudo_masks.crf.iterations" in asked(with_settings(whole, self_training=refined))


# the folder


def test_relative_paths_are_relative_to_the_checkout(monkeypatch, tmp_path, config_file):
    monkeypatch.chdir(tmp_path)
    run = Run(absolute("papermill_runs/x"), config=None, config_file=PROJECT_ROOT / "configs/mini.yaml")
    assert run.folder == PROJECT_ROOT / "papermill_runs" / "x"
    assert run.command("--until", "classifier") == "smaf run configs/mini.yaml --name x --until classifier"


def test_folder_of_other_settings_is_refused_and_kept_unless_nothing_was_made_in_it(run, config_file):
    assert open_run(run.folder, config_file, ["seed=3"]).config.seed == find_run(str(run.folder)).config.seed == 3
    open_run(run.folder, config_file)
    run.path("data.json").write_text("{}")
    before = run.path("config.yaml").read_text()
    with pytest.raises(RunError, match="--name") as error:
        open_run(run.folder, config_file, ["seed=3", "data.num_val=5"])
    assert "seed: 0 | 3" in str(error.value) and "data.num_val: 2 | 5" in str(error.value)
    assert run.path("config.yaml").read_text() == before


def test_without_a_config_file_a_run_has_its_own_settings_and_a_new_one_those_of_mini(tmp_path, config_file):
    first = open_run(tmp_path / "own", config_file, "seed=3")  # papermill gives a single override as a string
    assert first.overrides == ("seed=3",) and first.config.seed == 3
    assert open_run(tmp_path / "own").config == first.config
    assert open_run(tmp_path / "own", overrides=["seed=3"]).config == first.config
    assert open_run(tmp_path / "new").config == load_config(PROJECT_ROOT / "configs" / "mini.yaml")


# metrics


def test_records_are_tidy_and_pandas_reads_them(run):
    run.record("02_use", [{"metric": "iou", "value": 0.25, "scale": 1.5, "object_size": "small"}])
    run.record("01_make", [{"metric": "loss", "value": float("nan"), "variant": "eps"}])
    table = pd.read_json(run.path("metrics.json"))
    assert list(table.columns) == list(Record.model_fields)
    assert table["stage"].tolist() == ["01_make", "02_use"]
    assert table["value"].isna().tolist() == [True, False]
    assert table.loc[1, ["split", "class_name", "scale"]].tolist() == ["train", "mean", 1.5]
    assert table["fusion"].isna().all() and run.metrics()["fusion"].isna().all()  # NaN there, None here
    pd.testing.assert_frame_equal(table.drop(columns="fusion"), run.metrics().drop(columns="fusion"), check_dtype=False)


# what is complete


def test_require_names_the_missing_file_and_the_command(run, config_file):
    with pytest.raises(RunError) as error:
        run.require("02_use")
    message = str(error.value)
    assert "data.json is missing" in message
    assert f"smaf run {config_file} --name tiny --runs {run.folder.parent} --until make" in message


def test_require_trusts_files_made_by_hand_but_no_unfinished_stage(run, tmp_path):
    make_stage(run, write_notebook(tmp_path / "01_make.ipynb", "x = 1"))
    run.require("02_use")
    manifest = read_manifest(run.folder)
    write_manifest(run.folder, {"stages": {}})
    run.require("use")
    manifest["stages"]["01_make"]["status"] = "running"
    write_manifest(run.folder, manifest)
    with pytest.raises(RunError, match="it has not finished"):
        run.require("02_use")


def test_text_layout_and_comments_do_not_change_the_code(tmp_path):
    before = notebook_hash(write_notebook(tmp_path / "a.ipynb", "x = 1\ny = f(x)", text="Why?"))
    assert notebook_hash(write_notebook(tmp_path / "b.ipynb", "x = 1  # one\n\ny = f( x )", text="Because.")) == before
    assert notebook_hash(write_notebook(tmp_path / "c.ipynb", "x = 2\ny = f(x)")) != before
    assert notebook_hash(write_notebook(tmp_path / "d.ipynb", "%matplotlib inline")) != before


def with_settings(run: Run, **config: object) -> Run:
    return dataclasses.replace(run, config=run.config.model_copy(update=config))


def test_reasons_to_run_a_stage_again(run, tmp_path):
    notebook = write_notebook(tmp_path / "01_make.ipynb", "x = 1")
    assert reason(run, notebook) == "has not run"
    make_stage(run, notebook)
    assert reason(run, notebook) is None
    assert reason(with_settings(run, seed=1), notebook) is None  # a later stage is the first to depend on it
    data = run.config.data.model_copy(update={"num_val": 9})
    assert reason(with_settings(run, data=data), notebook) == "data.num_val differs (2 | 9)"
    run.path("data.json").write_text("")
    assert reason(run, notebook) == "data.json is missing or damaged"
    run.path("data.json").write_text("{}")
    run.path("cams/teacher/deep/a.npz").write_text("cam of a cat")
    assert reason(run, notebook) == "cams/teacher/ is missing or damaged"
    run.path("cams/teacher/deep/a.npz").write_text("cam of a")
    run.path("metrics.json").unlink()
    assert reason(run, notebook) == "its records in metrics.json changed"
    write_notebook(notebook, "x = 2")
    assert reason(run, notebook) == "its notebook changed"
    put_entry(run.folder, CHAIN[0], {"status": "running", "inputs": inputs(run, notebook)})
    assert reason(run, notebook) == "has not finished"


def test_status_verifies_the_content_of_artifacts(tmp_path, config_file):
    run, stage = open_run(tmp_path / "runs" / "tiny", config_file), STAGES[1]
    run.path("data.json").write_text("{}")
    put_entry(run.folder, stage, {"status": "complete", "seconds": 1.0, **describe_results(run.folder, stage)})
    run.path("data.json").write_text("[]")

    def status(*options: str) -> str:
        return CliRunner().invoke(app, ["status", str(run.folder), *options]).output

    assert "01_data                    complete" in status() and "data.json" not in status()
    assert "data.json is missing or damaged" in status("--verify")


def test_other_inputs_clear_a_stage_and_leave_others_alone(run, tmp_path):
    make_stage(run, write_notebook(tmp_path / "01_make.ipynb", "x = 1"))
    make_stage(run, write_notebook(tmp_path / "02_use.ipynb", "x = 1"), number=1)
    clear_stage(run.folder, CHAIN[0])
    names = sorted(path.name for path in run.folder.iterdir())
    assert names == ["cams", "config.yaml", "manifest.json", "metrics.json"]
    assert not any(run.path("cams").iterdir())
    assert run.metrics()["stage"].tolist() == ["02_use"]


def test_data_sets_count_by_lists_tables_and_the_sizes_of_pictures(tmp_path):
    def hashes(kind: str, **more: object) -> dict[str, str]:
        return outside_files(Config(data=DataConfig(kind=kind, root=tmp_path, **more)))

    for name in ("JPEGImages/a.jpg", "SegmentationClass/a.png", "ImageSets/Segmentation/train.txt", "train2014/a.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("a")
    before = hashes("voc", saliency=tmp_path / "maps")
    assert list(before) == ["data.root/JPEGImages", "data.root/SegmentationClass", "data.train_split"]
    (tmp_path / "JPEGImages/.hidden").touch()
    (tmp_path / "JPEGImages/a.jpg").write_text("b")  # of the same size
    assert hashes("voc") == before
    (tmp_path / "JPEGImages/a.jpg").write_text("larger")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("b")
    (tmp_path / "labels.csv").write_text("image,labels")
    assert set(changed_names(before, hashes("voc"))) == {
        "data.root/JPEGImages",
        "data.train_split",
        "data.root/labels.csv",
    }
    (tmp_path / "mine.txt").write_text("a")
    by_path = hashes("voc", train_split=str(tmp_path / "mine.txt"))
    (tmp_path / "mine.txt").write_text("b")
    assert changed_names(by_path, hashes("voc", train_split=str(tmp_path / "mine.txt"))) == ["data.train_split"]
    (tmp_path / "maps").mkdir()
    assert "data.saliency" in hashes("voc", saliency=tmp_path / "maps")
    assert list(hashes("coco", train_split="train2014")) == ["data.root/train2014"]
    photos = {"images": tmp_path / "JPEGImages", "labels": tmp_path / "labels.csv"}
    before = hashes("folder", **photos)
    (tmp_path / "labels.csv").write_text("image,label")
    assert changed_names(before, hashes("folder", **photos)) == ["data.labels"]
    assert outside_files(Config(data=DataConfig(kind="mini"))) == {}


def test_half_written_and_damaged_files_of_a_killed_attempt_go_and_others_stay(run, tmp_path):
    make_stage(run, write_notebook(tmp_path / "01_make.ipynb", "x = 1"))
    for name in ("cams/teacher/c.npz", "data.json", "01_make.ipynb"):
        path = run.path(name)
        path.with_name(f"{PARTIAL}{path.name}").touch()
    run.path("data.json").write_text("cut sh")
    clear_stage(run.folder, CHAIN[0], read_manifest(run.folder)["stages"]["01_make"])
    assert not list(run.folder.rglob(f"{PARTIAL}*")) and not run.path("data.json").exists()
    assert run.path("cams/teacher/b.npz").exists() and len(run.metrics()) == 1
