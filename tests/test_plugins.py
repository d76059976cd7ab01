"""Code of somebody's own behind a name in a config: found, tried, checked, hashed; what misbehaves is named."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_samples, tiny_config
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smaflib import plugins
from smaflib.apps.masks import make_masks
from smaflib.apps.sweep import sweep
from smaflib.config import PseudoMaskConfig, check_settings, load_config
from smaflib.errors import ConfigError, PluginError
from smaflib.files import PARTIAL, PROJECT_ROOT
from smaflib.models.backbones import build_backbone
from smaflib.models.networks import AttentionNetwork
from smaflib.pipeline import check_networks, check_plugins
from smaflib.plugins import BACKBONE, DATA, REFINEMENT, calling, checked_maps, describe, load
from smaflib.pseudo_masks import write_pseudo_masks
from smaflib.runs.runner import run_notebooks

numbers = itertools.count()
SETTINGS = {
    "fusion": ("attention", "fusion"),
    "source": ("attention", "source"),
    "backbone": ("model", "backbone"),
    "data": ("data", "kind"),
    "refine": ("pseudo_masks", "refine"),
    "targets": ("self_training", "refine"),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Writes a module into the folder where the command is called, and returns its name; gone afterwards."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.setenv(plugins.FOLDERS, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)

    def write(code: str) -> str:
        name = f"own_code_{next(numbers)}"
        header = "import torch\nfrom torch import nn\nfrom smaflib.data import Sample, SampleFiles, Samples\n"
        (home / f"{name}.py").write_text(header + code, encoding="utf-8")
        return name

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


def refused(kind: str, name: str, **groups: dict[str, Any]) -> str:
    """What the check before a run says about a config that names some code."""
    group, setting = SETTINGS[kind]
    config = tiny_config(**{**groups, group: groups.get(group, {}) | {setting: name}})
    with pytest.raises(PluginError) as caught:
        check_plugins(config)
    return str(caught.value)


# -------------------------------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize("kind", SETTINGS)
def test_names_that_are_not_there_say_what_is_missing_and_where_it_was_looked_for(
    kind: str, own: Callable[[str], str]
) -> None:
    setting = ".".join(SETTINGS[kind])
    said = refused(kind, "no_such_module:rule")
    assert f"{setting} is 'no_such_module:rule', but there is no module no_such_module" in said
    assert str(Path.cwd()) in said
    module = own("def softmax_sum(maps, scales): return maps.sum(dim=0)")
    said = refused(kind, f"{module}:softmaxsum")
    assert f"{module}.py has no softmaxsum; did you mean softmax_sum?" in said
    module = own("rule = 3")
    assert "which is a int and cannot be called" in refused(kind, f"{module}:rule")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import no_such_package", "cannot be imported: ModuleNotFoundError: No module named 'no_such_package'"),
        ("def f(:", "cannot be imported: SyntaxError"),
        ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "cannot be imported: SystemExit: 3"),
    ],
)
def test_modules_that_do_not_import_say_why_and_where(code: str, expected: str, own: Callable[[str], str]) -> None:
    module = own(code)
    said = refused("fusion", f"{module}:f")
    assert expected in said and f"{module}.py, line 4" in said


def test_the_ending_of_a_file_is_no_part_of_the_name(own: Callable[[str], str]) -> None:
    module = own("def f(maps, scales): return maps.sum(dim=0)")
    assert f"write {module}:..., without the file's ending" in refused("fusion", f"{module}.py:f")


@pytest.mark.parametrize("name", ["product", "my rule:f", "a:b:c", "/tmp/rule.py:f", ":f", "a:", "1a:b"])
def test_other_names_are_refused_by_the_config(name: str) -> None:
    with pytest.raises(ConfigError, match=r"attention\.fusion: must be sum, mean, max, size_adaptive or package\.mod"):
        check_settings({"attention": {"fusion": name}, "data": {"kind": "mini"}})


def test_reading_a_config_runs_none_of_its_code(tmp_path: Path) -> None:
    (tmp_path / "loud.py").write_text("print('executed')")
    (tmp_path / "c.yaml").write_text("data: {kind: 'loud:f'}\nattention: {fusion: 'loud:f', source: 'loud:f'}\n")
    script = (
        "import sys; from smaflib.config import load_config; load_config(sys.argv[1]); print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "c.yaml")]
    env = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_modules_are_found_where_the_command_is_called_and_beside_the_config(
    tmp_path: Path, own: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = own("def f(maps, scales): return maps.sum(dim=0)")
    beside = tmp_path / "configs"
    beside.mkdir()
    (beside / "own_beside.py").write_text("def f(maps, scales): return maps.amax(dim=0)")
    (beside / "c.yaml").write_text("data: {kind: mini}\nattention: {fusion: 'own_beside:f'}\n")
    load_config(beside / "c.yaml")
    # A process that is started now, such as a kernel or a worker, stands elsewhere.
    script = f"from smaflib.plugins import *; print(load(FUSION, '{here}:f'), load(FUSION, 'own_beside:f'))"
    env = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("<function f") == 2, done.stderr


# --------------------------------------------------------------------------------------------------------- misbehaviour


BACKBONE_CODE = """
class Small(nn.Module):
    num_features = 4
    def __init__(self, config):
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3, stride=8, padding=1)
    def forward(self, images): return self.layer(images)
"""


def test_weights_and_options_of_own_backbones(tmp_path: Path, own: Callable[[str], str]) -> None:
    from smaflib.models.weights import write_weights

    name = f"{own(BACKBONE_CODE)}:Small"
    config = tiny_config(model={"backbone": name}).model
    first = build_backbone(config)
    write_weights(tmp_path / "small.safetensors", first.state_dict())
    again = build_backbone(config.model_copy(update={"weights": str(tmp_path / "small.safetensors")}))
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(first(images), again(images))
    assert AttentionNetwork(config, 2, True)(images).shape == (1, 3, 4, 4)
    check_networks(tiny_config(model={"backbone": name}))
    with pytest.raises(ConfigError, match="there are no such weights of .*; give a file or null"):
        build_backbone(config.model_copy(update={"weights": "pretrained"}))
    with pytest.raises(ConfigError, match="has no features at stride 4; set 0"):
        check_networks(tiny_config(model={"backbone": name}, segmentation={"skip_channels": 4}))


REFINEMENTS = {
    "return scores[1:]": r"returned the shape \(2, 24, 20\); it must be \(3, 24, 20\): \(K\+1, H, W\)",
    "return scores.argmax(dim=0)": "returned a tensor of torch.int64",
    "return scores.log()": "returned values that are not finite",
    "return -scores": "returned negative values",
    "return image @ scores": "raised RuntimeError",
}


@pytest.mark.parametrize("kind", ["refine", "targets"])
@pytest.mark.parametrize("body", REFINEMENTS)
def test_refinements_that_misbehave_are_named(body: str, kind: str, own: Callable[[str], str]) -> None:
    module = own(f"def refine(image, scores):\n    {body}")
    said = refused(kind, f"{module}:refine")
    assert said.startswith(f"the refinement {module}:refine ")
    assert re.search(REFINEMENTS[body], said), said


# ---------------------------------------------------------------------------------------------- nothing is half-written


def test_no_command_leaves_anything_behind_when_code_is_refused(own: Callable[[str], str], tmp_path: Path) -> None:
    bad = f"{own('def bad(*given): return given')}:bad"
    overrides = [f"attention.fusion={bad}"]
    with pytest.raises(PluginError, match="the fusion rule"):
        run_notebooks("configs/mini.yaml", "mine", overrides, runs=tmp_path / "runs")
    with pytest.raises(PluginError, match="the fusion rule"):
        grid = {"attention.fusion": ["sum", bad]}
        sweep(PROJECT_ROOT / "configs" / "mini.yaml", tmp_path / "sweep", [0, 1], grid)
    (tmp_path / "labels.csv").write_text("image,labels\n")
    data = {"kind": "folder", "images": str(tmp_path), "labels": str(tmp_path / "labels.csv")}
    with pytest.raises(PluginError, match="the refinement"):
        make_masks(tiny_config(data=data, pseudo_masks={"refine": bad}), tmp_path / "masks")
    command = [sys.executable, "-m", "smaflib", "ablate", "configs/mini.yaml", "--runs", str(tmp_path / "ablations")]
    command += ["--set", overrides[0]]
    env = os.environ | {"PYTHONPATH": f"{PROJECT_ROOT}{os.pathsep}{Path.cwd()}"}
    done = subprocess.run(command, cwd=PROJECT_ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: the fusion rule {bad} returned a tuple"), (
        done.stderr
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "labels.csv"]


LATER = """
calls = []
def good(self_or_first, *rest):
    calls.append(1)
    made = {made}
    return made * float("nan") if len(calls) > {last} else made
"""


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if PARTIAL in path.name]


def test_worker_processes_find_the_refinement(own: Callable[[str], str], tmp_path: Path) -> None:
    module = own(
        "def refine(image, scores):\n"
        "    import os\n"
        "    assert os.getpid() != PARENT\n"
        "    return scores.flip(0)\n"
        f"PARENT = {os.getpid()}"
    )
    samples = make_samples(num=10, size=(16, 20))
    maps = [torch.rand(3, 16, 20, generator=torch.Generator().manual_seed(index)) for index in range(10)]
    settings = PseudoMaskConfig(refine=f"{module}:refine", num_workers=2)
    write_pseudo_masks(samples, maps, tmp_path / "masks", 0.3, settings)
    from smaflib.data.masks import read_mask

    by_hand = torch.cat([torch.full((1, 16, 20), 0.3), maps[3]]).flip(0).argmax(dim=0)
    assert torch.equal(read_mask(tmp_path / "masks" / "image3.png").long(), by_hand)


# ------------------------------------------------------------------------------------------------------------- Python


values = st.one_of(st.floats(width=32), st.just(float("nan")), st.just(float("inf")))
some_maps = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        values, min_size=shape[0] * shape[1] * shape[2], max_size=shape[0] * shape[1] * shape[2]
    ).map(lambda listed: torch.tensor(listed).view(shape))
)


@given(some_maps)
def test_maps_pass_just_if_all_of_them_are_finite_and_not_negative(maps: Tensor) -> None:
    fit = all(0 <= value < float("inf") for value in maps.flatten().tolist())
    try:
        checked = checked_maps("it", maps, tuple(maps.shape), "(K, H, W)")
    except PluginError:
        assert not fit
    else:
        assert fit and torch.equal(checked, maps)


@given(some_maps, st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_maps_pass_just_in_the_shape_asked_for(maps: Tensor, shape: list[int]) -> None:
    fine = maps.nan_to_num(posinf=1).abs()
    if tuple(shape) == tuple(maps.shape):
        assert checked_maps("it", fine, tuple(shape), "").shape == maps.shape
    else:
        with pytest.raises(PluginError, match="returned the shape"):
            checked_maps("it", fine, tuple(shape), "")


def test_checked_maps_are_floats_without_gradient() -> None:
    maps = torch.rand(2, 2, requires_grad=True).double()
    checked = checked_maps("it", maps, (2, None), "")
    assert checked.dtype == torch.float32 and not checked.requires_grad


def test_interrupts_are_not_taken_for_errors_of_the_code() -> None:
    with pytest.raises(KeyboardInterrupt), calling("it"):
        raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------------------------- hashes


def test_facts_of_code_that_is_not_there(own: Callable[[str], str]) -> None:
    for name in ("no_such_module:f", "no.such.module:f"):
        with pytest.raises(PluginError, match="there is no module"):
            describe(REFINEMENT, name)
    with pytest.raises(PluginError, match="has no file"):
        describe(DATA, "sys:exit")
    with pytest.raises(PluginError, match="no backbone and not package.module:attribute"):
        load(BACKBONE, "resnet5000")
