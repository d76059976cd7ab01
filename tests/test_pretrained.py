"""The networks that come with the package are small, load, and attend to the objects."""

import torch

from minidata.dataset import CLASS_NAMES, make_mini
from smaflib.cams import fuse_cams, multi_scale_cams
from smaflib.config import load_config
from smaflib.data import load_samples
from smaflib.evaluation import evaluate, masks_of
from smaflib.models.pretrained import ASSETS, pretrained_config, pretrained_network, short_config
from smaflib.models.weights import read_weights, write_weights
from smaflib.reactivation import denoise
from tools.make_assets import export_networks


def test_their_maps_lie_on_the_objects_of_images_they_have_never_seen(tmp_path):
    make_mini(tmp_path / "data", 8, 1, seed=987)
    config = short_config(tmp_path / "data")
    samples, attention = load_samples(config, "train"), config.attention
    for role in ("teacher", "student"):
        network = pretrained_network(role)
        denoised = [
            denoise(fuse_cams(multi_scale_cams(network, s.image, attention.scales), (128, 128), "sum"), s.image_label)
            for s in samples
        ]
        scores = evaluate(masks_of(denoised, attention.bg_score), samples.ground_truth, CLASS_NAMES)
        # Background everywhere would score 0.13, and maps at chance stay below 0.2.
        assert scores.miou > 0.4, role


def test_the_pretrained_model_is_that_of_the_mini_config():
    assert pretrained_config().model == load_config("configs/mini.yaml").model


def test_export_halves_the_floats_and_keeps_the_settings(tmp_path):
    run = tmp_path / "run"
    state = pretrained_network("teacher").state_dict()
    for role in ("teacher", "student"):
        write_weights(run / "checkpoints" / f"{role}.safetensors", state)
    (run / "config.yaml").write_text((ASSETS / "mini.yaml").read_text())
    export_networks(run, tmp_path / "assets")
    assert (tmp_path / "assets" / "mini.yaml").read_text() == (ASSETS / "mini.yaml").read_text()
    exported = read_weights(tmp_path / "assets" / "mini_teacher.safetensors")
    assert exported["head.weight"].dtype == torch.float16
