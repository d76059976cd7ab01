"""Shards of a stage: parts of its images, made beside each other, that the stage then finds."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from helpers import fill_disk, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from smaflib import files
from smaflib.apps.cli import app
from smaflib.config import dump_config
from smaflib.config_reads import follow, recorded_settings, recording
from smaflib.data import make_data
from smaflib.errors import InputError, MissingStage, RunError
from smaflib.files import SHIPPED
from smaflib.models import sources
from smaflib.pipeline import self_train_rounds, train_teacher, write_maps, write_masks
from smaflib.runs import Run, open_run, shards
from smaflib.runs.attempt import put_entry, settings_file, settings_read
from smaflib.runs.inputs import code_hash, config_hash, data_hashes, stage_inputs
from smaflib.runs.manifest import Entry, list_artifacts, read_manifest, record_hash
from smaflib.runs.runner import run_notebooks
from smaflib.runs.shards import Part, parse_part, run_shard
from smaflib.runs.stages import STAGES, stage_named

ATTENTION, MASKS = stage_named("03"), stage_named("06")
NOTEBOOKS = SHIPPED / "notebooks"


def complete(run: Run, *names: str) -> None:
    """Write the entries of finished stages, as the runner does after their notebooks."""
    for stage in map(stage_named, names):
        entry: Entry = {"status": "complete", "exit_code": 0, "seconds": 1.0, "settings_read": {}}
        inputs = stage_inputs(run.folder, stage, NOTEBOOKS / f"{stage.name}.ipynb", data_hashes(run.config.data))
        made = {"records": record_hash(run.folder, stage), "artifacts": list_artifacts(run.folder, stage)}
        put_entry(run.folder, stage, entry | inputs | made, config_hash=config_hash(run.config))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of seven images, complete but for its masks; ``alone`` is the same with the masks that no shard made."""
    folder = tmp_path_factory.mktemp("shards")
    groups: dict[str, Any] = {"data": {"num_train": 7, "num_val": 3, "image_size": 64}}
    groups |= {"attention": {"bg_score": "auto"}, "pseudo_masks": {"crf": "mini", "num_workers": 1}}
    config = folder / "tiny.yaml"
    config.write_text(dump_config(tiny_config(**groups)))
    run = open_run(folder / "runs" / "run", config)
    make_data(run.config, run.folder)
    files.write_json(run.path("data.json"), {})
    train_teacher(run)
    complete(run, "01", "02")
    shutil.copytree(run.folder, folder / "runs" / "taught")
    for split in ("train", "val"):
        write_maps(run, "teacher", split)
    files.write_json(run.path("bg_scores", "teacher.json"), {"bg_score": 0.3})
    complete(run, "03")
    self_train_rounds(run)
    complete(run, "05")
    shutil.copytree(run.folder, folder / "runs" / "alone")
    write_masks(open_run(folder / "runs" / "alone", config))
    return run


@pytest.fixture
def runs(original: Run, tmp_path: Path) -> Path:
    """Copies of the runs ``taught`` (no maps yet), ``run`` (no masks yet) and ``alone`` (all, made without shards)."""
    shutil.copytree(original.folder.parent, tmp_path / "runs")
    return tmp_path / "runs"


def opened(runs: Path, name: str) -> Run:
    return shards.find_run(name, runs)


def entry(runs: Path, name: str, stage: str) -> Entry:
    return read_manifest(runs / name)["stages"][stage]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- parts ------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 300), st.integers(1, 40))
def test_parts_are_disjoint_and_complete(num: int, count: int) -> None:
    parts = [list(Part(number, count).of(num)) for number in range(1, count + 1)]
    assert sorted(index for part in parts for index in part) == list(range(num))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_part_is_counted_from_one() -> None:
    assert parse_part("2/8") == Part(2, 8) and str(Part(2, 8)) == "2/8"
    assert list(parse_part(" 2 / 3 ").of(8)) == [1, 4, 7]


@pytest.mark.parametrize("text", ["0/8", "9/8", "1/0", "0/0", "2", "2/", "a/b", "-1/2", "1.5/2", "", "1/10001"])
def test_parts_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match=r"--part must be a number and how many there are, from 1/8 to 8/8"):
        parse_part(text)


@given(st.text(max_size=12))
def test_any_text_is_a_part_or_an_error(text: str) -> None:
    try:
        part = parse_part(text)
    except InputError:
        return
    assert 1 <= part.number <= part.count


# --- what they make ---------------------------------------------------------------------------------------------------


def test_shards_of_attention_make_the_maps_of_the_stage(runs: Path) -> None:
    assert run_shard("taught", "03", Part(2, 2), runs).endswith("part 2/2: 4 made, 0 were there")  # 3 and 1
    assert run_shard("taught", "03", Part(1, 2), runs).endswith("part 1/2: 6 made, 0 were there")
    assert contents(runs / "taught" / "cams") == {
        name: content for name, content in contents(runs / "alone" / "cams").items() if name.startswith("teacher")
    }
    assert entry(runs, "taught", ATTENTION.name)["status"] == "running"
    # Another number of parts makes nothing again.
    assert run_shard("taught", "03", Part(1, 3), runs).endswith("part 1/3: 0 made, 4 were there")


def test_shards_of_masks_make_the_masks_of_the_stage(runs: Path) -> None:
    for number in (1, 3, 2):
        run_shard("run", "pseudo_masks", Part(number, 3), runs)
    for folder in ("masks", "bg_scores"):
        assert contents(runs / "run" / folder) == contents(runs / "alone" / folder)
    assert len(contents(runs / "run" / "masks")) == 7


def test_shards_ask_the_source_of_attention_that_the_settings_name(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    source_of = sources.source_of
    monkeypatch.setattr(sources, "source_of", lambda network, name: (asked.append(name), source_of(network, name))[1])
    run_shard("taught", "03", Part(1, 2), runs)
    assert asked == [opened(runs, "taught").config.attention.source]


def test_part_without_images_makes_nothing(runs: Path) -> None:
    assert run_shard("run", "06", Part(9, 9), runs).endswith("part 9/9: 0 made, 0 were there")


def test_settings_that_shards_read_are_those_of_the_stage(runs: Path, tmp_path: Path) -> None:
    for number in (1, 2):
        run_shard("taught", "03", Part(number, 2), runs)
    read = settings_read(opened(runs, "taught"), ATTENTION)
    shutil.rmtree(runs / "run" / "cams")
    alone = opened(runs, "run")
    with recording(tmp_path / "alone"):
        follow(alone.config)
        for split in ("train", "val"):
            write_maps(alone, "teacher", split)
    assert read == recorded_settings(tmp_path / "alone", alone.config)
    assert {"attention.flip", "attention.scales", "model.backbone"} <= {*read}


def test_stage_goes_on_from_its_shards(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shard("taught", "03", Part(1, 1), runs)
    before = {path: path.stat().st_mtime_ns for path in (runs / "taught" / "cams").rglob("*.npz")}
    assert len(before) == 10
    begun: list[Entry] = []

    def stop(self: Any, stage: Any, notebook: Path, begun_entry: Entry) -> None:
        begun.append(begun_entry)
        raise RunError("no kernel in this test")

    monkeypatch.setattr("smaflib.runs.runner._Chain._execute", stop)
    monkeypatch.setattr("smaflib.runs.runner.STAGES", STAGES[1:])
    run = opened(runs, "taught")
    with pytest.raises(RunError, match="no kernel"):
        run_notebooks(run.config_file, "taught", until_stage="03", runs=runs, stages=STAGES[1:])
    assert begun[0]["resumed"] and "shards" not in begun[0]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "attention.flip" in settings_file(run.folder, ATTENTION).read_text().split()
    assert not list(run.folder.glob(".*-of-*.settings"))


def test_complete_stage_needs_no_shard(runs: Path) -> None:
    assert run_shard("run", "03", Part(1, 2), runs) == "03_multi_scale_attention  complete, nothing to do for part 1/2"


def test_shard_resumes_after_a_kill(runs: Path) -> None:
    run_shard("taught", "03", Part(1, 2), runs)
    cams = runs / "taught" / "cams" / "teacher"
    lost, *_ = sorted(cams.glob("*.npz"))
    lost.rename(cams / f"{files.PARTIAL}{lost.name}")  # killed while it wrote
    assert run_shard("taught", "03", Part(1, 2), runs).endswith("1 made, 5 were there")
    assert not list(cams.glob(f"{files.PARTIAL}*"))


def test_full_disk_ends_a_shard_and_what_is_there_stays(runs: Path, small_disk: Path) -> None:
    """The disk of one machine is full: its part ends with an error, and the same command goes on."""
    shutil.copytree(runs / "taught", small_disk / "taught")
    assert run_shard("taught", "03", Part(1, 2), small_disk).endswith("6 made, 0 were there")
    other = fill_disk(small_disk)
    before = contents(small_disk / "taught" / "cams")
    with pytest.raises((OSError, RunError), match="No space left on device"):
        run_shard("taught", "03", Part(2, 2), small_disk)
    assert contents(small_disk / "taught" / "cams") == before
    other.unlink()
    assert run_shard("taught", "03", Part(2, 2), small_disk).endswith("4 made, 0 were there")


# --- who may work beside whom -----------------------------------------------------------------------------------------


@pytest.fixture
def working(runs: Path) -> Iterator[Path]:
    """A run whose stage 03 a shard of another process works at."""
    run_shard("taught", "03", Part(1, 2), runs)
    name = f"{ATTENTION.name}.2-of-2.lock"
    with files.locked(runs / "taught" / shards.FOLDER, "smaf shard", name):
        yield runs


def test_shards_work_beside_each_other(working: Path) -> None:
    assert run_shard("taught", "03", Part(1, 2), working).endswith("0 made, 6 were there")


def test_one_part_is_made_once(working: Path) -> None:
    with pytest.raises(RunError, match=r"another smaf shard 03_multi_scale_attention --part 2/2 is at work in"):
        run_shard("taught", "03", Part(2, 2), working)


def test_stage_is_kept_out_while_a_shard_works(working: Path) -> None:
    run = opened(working, "taught")
    with pytest.raises(RunError, match=r"another smaf shard 03_multi_scale_attention --part 2/2 is at work"):
        run_notebooks(run.config_file, "taught", until_stage="03", runs=working)
    assert len(list((working / "taught" / "cams").rglob("*.npz"))) == 6


def test_shard_is_kept_out_while_the_stage_works(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BEGIN_SECONDS", 0.2)
    with (
        files.locked(runs / "taught", "smaf run"),
        pytest.raises(RunError, match=r"another smaf run is at work .* \(0 s were waited for it\)"),
    ):
        run_shard("taught", "03", Part(1, 2), runs)
    assert ATTENTION.name not in read_manifest(runs / "taught")["stages"]


def test_many_shards_may_begin_at_once(runs: Path) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            shards._join(run, ATTENTION, inputs, code_agreed=False)
        except BaseException as error:
            errors.append(error)

    run = opened(runs, "taught")
    inputs = shards._inputs_of_complete_stages(run, ATTENTION, NOTEBOOKS)
    with ExitStack() as stack:
        for number in (1, 2, 3):
            name = f"{ATTENTION.name}.{number}-of-3.lock"
            thread = threading.Thread(target=work, args=(number,))
            thread.start()
            thread.join()
            stack.enter_context(files.locked(run.path(shards.FOLDER), "smaf shard", name))
    assert errors == [] and entry(runs, "taught", ATTENTION.name)["shards"]


# --- unequal code -----------------------------------------------------------------------------------------------------


def other_code(runs: Path, name: str, stage: str) -> None:
    """As if shards of another version had begun the stage."""
    made = entry(runs, name, stage)
    put_entry(runs / name, stage_named(stage), made | {"modules": made["modules"] | {"smaflib.cams": "0"}})


def test_shard_refuses_beside_shards_of_other_code(runs: Path) -> None:
    run_shard("taught", "03", Part(1, 2), runs)
    other_code(runs, "taught", ATTENTION.name)
    before = contents(runs / "taught" / "cams")
    with pytest.raises(
        RunError, match=r"(?s)begun with other code than is here \(smaflib\.cams differs\).*--from 03_multi"
    ):
        run_shard("taught", "03", Part(2, 2), runs)
    assert contents(runs / "taught" / "cams") == before


def test_stage_refuses_shards_of_other_code_unless_it_begins_anew(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shard("taught", "03", Part(1, 2), runs)
    other_code(runs, "taught", ATTENTION.name)
    begun: list[Entry] = []

    def note(self: Any, stage: Any, notebook: Path, begun_entry: Entry) -> None:
        begun.append(begun_entry)
        raise RunError("no kernel in this test")

    monkeypatch.setattr("smaflib.runs.runner._Chain._execute", note)
    run = opened(runs, "taught")
    chain: dict[str, Any] = {"until_stage": "03", "runs": runs, "stages": STAGES[1:]}
    with pytest.raises(RunError, match="begun with other code"):
        run_notebooks(run.config_file, "taught", **chain)
    assert not begun and len(contents(runs / "taught" / "cams")) == 6
    with pytest.raises(RunError, match="no kernel"):
        run_notebooks(run.config_file, "taught", from_stage="03", **chain)
    assert not begun[0]["resumed"] and not list((runs / "taught" / "cams").rglob("*.npz"))


def test_where_all_agreed_on_the_code_older_shards_are_thrown_away(runs: Path) -> None:
    run_shard("taught", "03", Part(1, 2), runs)
    other_code(runs, "taught", ATTENTION.name)
    agreed = code_hash(NOTEBOOKS)
    assert run_shard("taught", "03", Part(2, 2), runs, code=agreed).endswith("4 made, 0 were there")
    assert len(contents(runs / "taught" / "cams")) == 4
    with files.locked(runs / "taught" / shards.FOLDER, "smaf shard", f"{ATTENTION.name}.1-of-2.lock"):
        other_code(runs, "taught", ATTENTION.name)
        with pytest.raises(RunError, match="it works with other code, settings or data"):
            run_shard("taught", "03", Part(2, 2), runs, code=agreed)


def test_other_code_than_the_work_was_planned_with_is_refused(runs: Path) -> None:
    refusal = r"are not those that this work was planned with \(--code 0000, here \w{12}\); install the same version"
    with pytest.raises(RunError, match=refusal):
        run_shard("taught", "03", Part(1, 2), runs, code="0000")
    run = opened(runs, "taught")
    with pytest.raises(RunError, match=refusal):
        run_notebooks(run.config_file, "taught", runs=runs, code="0000")
    assert not (runs / "taught" / "cams").exists()


# --- bad input --------------------------------------------------------------------------------------------------------


def test_earlier_stage_that_is_not_complete_is_named(runs: Path) -> None:
    (runs / "taught" / "checkpoints" / "teacher.safetensors").write_bytes(b"damaged")
    with pytest.raises(
        MissingStage, match=r"need 02_classifier, which is not complete .*teacher.* is missing or damaged"
    ):
        run_shard("taught", "03", Part(1, 2), runs)


@pytest.mark.parametrize("stage", ["02", "self_training", "08"])
def test_stage_without_shards(runs: Path, stage: str) -> None:
    with pytest.raises(RunError, match=r"has no shards: only 03_multi_scale_attention and 06_pseudo_masks are work"):
        run_shard("run", stage, Part(1, 2), runs)


@pytest.mark.skipif(os.name != "posix", reason="Windows has no SIGTERM to catch")
def test_sigterm_ends_a_shard_as_an_exit_that_says_how_to_resume(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_stopped(work: Any, part: Part) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from ()

    monkeypatch.setitem(shards.SHARDED, ATTENTION.name, be_stopped)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as error:
        run_shard("taught", "03", Part(1, 2), runs)
    assert error.value.code == 128 + signal.SIGTERM
    assert "part 1/2 of 03_multi_scale_attention was stopped by SIGTERM" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    with files.locked(runs / "taught", "smaf run"):
        shards.refuse_beside_shards(runs / "taught")  # its lock is free again


def test_command(runs: Path) -> None:
    words = ["shard", "taught", "03", "--runs", str(runs), "--part"]
    done = CliRunner().invoke(app, [*words, "1/2"])
    assert done.exit_code == 0 and "part 1/2: 6 made, 0 were there" in done.output
    refused = CliRunner().invoke(app, [*words, "3/2"])
    assert refused.exit_code == 2 and "--part must be" in refused.output
    missing = CliRunner().invoke(app, ["shard", "nowhere", "03", "--runs", str(runs), "--part", "1/2"])
    assert missing.exit_code == 2 and "there is no run 'nowhere'" in missing.output
