"""docs/extend.md: its examples are taken from the page and run, through the chain and through real notebooks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import execute_here, tiny_config
from PIL import Image
from test_notebooks import TINY
from torch import Tensor

from smaflib import plugins
from smaflib.cams import class_attention, fuse_cams, peak_at_one
from smaflib.config import Config, load_config
from smaflib.data import load_samples, make_data
from smaflib.evaluation import evaluate
from smaflib.files import PROJECT_ROOT
from smaflib.models.networks import AttentionNetwork
from smaflib.pipeline import check_custom, self_train_rounds, train_segmentation, train_teacher, write_maps, write_masks
from smaflib.runs.inputs import outside_files, stage_inputs, why_not_complete
from smaflib.runs.kernel import NotebookKernel
from smaflib.runs.manifest import read_manifest
from smaflib.runs.run import find_run
from smaflib.runs.runner import run_notebooks
from smaflib.runs.stages import STAGES
from smaflib.workspace import Workspace

PAGE = (PROJECT_ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
EXAMPLES = {name: code for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", PAGE, re.DOTALL)}
NAMES = {
    "attention": {"fusion": "my_rules:softmax_sum", "source": "my_sources:GradCam"},
    "model": {"backbone": "my_networks:ThreeLayers"},
    "self_training": {"refine": "my_refinements:by_color"},
    "pseudo_masks": {"refine": "my_refinements:by_color"},
}


@pytest.fixture
def beside(code_folder: Path) -> Path:
    """The working directory, with the page's files."""
    for name, code in EXAMPLES.items():
        (code_folder / name).write_text(code, encoding="utf-8")
    return code_folder


def tiny(**groups: dict[str, Any]) -> Config:
    return tiny_config(data={"kind": "mini", "num_train": 10, "num_val": 4, "image_size": 64}, **groups)


def test_a_whole_chain_of_examples(beside: Path) -> None:
    config = tiny(**NAMES)
    check_custom(config)
    work = Workspace(beside / "work", config)
    make_data(config, work.folder)
    train_teacher(work)
    write_maps(work, "teacher")
    self_train_rounds(work)
    masks = write_masks(work)
    train_segmentation(work)
    samples = work.samples().with_ground_truth()
    assert 0 < evaluate(masks, [sample.mask for sample in samples], samples.class_names).miou < 1
    # The stored networks are built again by the example's class.
    rebuilt = work.network("student")
    assert type(rebuilt.backbone).__name__ == "ThreeLayers"  # type: ignore[union-attr]
    assert type(work.segmenter().backbone).__name__ == "ThreeLayers"  # type: ignore[union-attr]
    # Rule and refinement by hand.
    import my_refinements
    import my_rules

    maps = work.maps("student")
    cams, size = maps.read(samples.image_ids[0])
    upsampled = torch.stack([torch.nn.functional.interpolate(cam[None], size, mode="bilinear")[0] for cam in cams])
    by_hand = peak_at_one(my_rules.softmax_sum(upsampled, torch.tensor(config.attention.scales)))
    fused = fuse_cams(cams, size, config.attention.fusion, config.attention.scales)
    assert torch.allclose(fused, by_hand, atol=1e-6)
    assert torch.equal(fused, fuse_cams(cams, size, my_rules.softmax_sum, config.attention.scales))
    sample, denoised = samples[0], fused * samples[0].image_label[:, None, None]
    assert config.attention.bg_score != "auto"
    scores = torch.cat([torch.full_like(denoised[:1], config.attention.bg_score), denoised])
    assert torch.equal(masks[0].long(), my_refinements.by_color(sample.image, scores).argmax(dim=0))


def test_grad_cam_of_a_linear_head_is_its_class_activation_map(beside: Path) -> None:
    from smaflib.config import AttentionConfig
    from smaflib.sources import make_source

    network = AttentionNetwork(tiny().model, 3, background=False).eval()
    images = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    plugins.search_in(beside)
    source = make_source(AttentionConfig(source="my_sources:GradCam"), ("a", "b", "c"), network)
    maps: Tensor = class_attention(source, images, [[0, 1, 2]] * 2, flip=False)
    with torch.no_grad():
        cams = network(images).relu()
    # The mean over the cells divides the gradient by their number.
    assert torch.allclose(maps * (8 * 6), cams, atol=1e-5)
    assert not maps.requires_grad


def test_a_data_set_of_a_folder_per_class(beside: Path) -> None:
    for name, colour in (("green", (0, 200, 0)), ("red", (200, 0, 0))):
        (beside / "photos" / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (48, 40), colour).save(beside / "photos" / name / f"{number}.jpg")
    config = tiny_config(data={"kind": "my_data:folder_per_class", "root": str(beside / "photos")})
    check_custom(config)
    train, val = load_samples(config, "train"), load_samples(config, "val")
    assert (len(train), len(val)) == (8, 4) and train.class_names == ("green", "red")
    assert val.image_ids == ["green_0", "green_5", "red_0", "red_5"]
    assert train[train.image_ids.index("red_1")].image_label.tolist() == [0, 1]
    work = Workspace(beside / "work", config)
    train_teacher(work)
    write_maps(work, "teacher")
    assert len(list(work.maps("teacher").folder.glob("*.safetensors.gz"))) == 8
    before = outside_files(config)
    Image.new("RGB", (48, 40)).save(beside / "photos" / "red" / "6.jpg")
    assert outside_files(config) != before


def test_a_real_notebook_compares_the_rule_and_an_edit_makes_its_stage_stale(
    beside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file lies beside the config; the kernel stands in the folder of the notebooks."""
    in_kernel = NotebookKernel.execute

    def execute(kernel: NotebookKernel, notebook: Path, *where: Any, **more: Any) -> Any:
        return (in_kernel if notebook.stem.startswith("03") else execute_here)(kernel, notebook, *where, **more)

    monkeypatch.setattr(NotebookKernel, "execute", execute)
    home = beside / "home"
    home.mkdir()
    settings = yaml.safe_load((PROJECT_ROOT / "configs" / "mini.yaml").read_text(encoding="utf-8"))
    (home / "mine.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    (beside / "my_rules.py").rename(home / "my_rules.py")
    overrides = [*TINY, "attention.fusion=my_rules:softmax_sum"]
    run = run_notebooks(home / "mine.yaml", None, overrides, runs=beside / "runs", stages=STAGES[1:4])
    fused = run.metrics().query("stage == '03_multi_scale_attention' and metric == 'iou'")
    assert set(fused["fusion"].dropna()) == {"sum", "mean", "max", "size_adaptive", "my_rules:softmax_sum"}

    entries = read_manifest(run.folder)["stages"]
    assert "files of attention.fusion" in entries["03_multi_scale_attention"]["inputs"]
    assert "files of attention.fusion" not in entries["02_classifier"]["inputs"]

    def stale() -> dict[str, str | None]:
        config = load_config(home / "mine.yaml", overrides)
        reasons = {}
        for stage in STAGES[1:4]:
            notebook = PROJECT_ROOT / "notebooks" / f"{stage.name}.ipynb"
            inputs = stage_inputs(run, stage, notebook, outside_files(config))
            reasons[stage.name] = why_not_complete(run.folder, stage, inputs)
        return reasons

    assert set(stale().values()) == {None}
    with (home / "my_rules.py").open("a") as file:
        file.write("\nSHARPNESS = 8.0\n")
    assert stale() == {
        "01_data": None,
        "02_classifier": None,
        "03_multi_scale_attention": "files of attention.fusion changed",
    }
    json.dumps(find_run(str(run.folder)).config.model_dump(mode="json"))
    assert callable(plugins.load_custom("my_rules:softmax_sum"))
