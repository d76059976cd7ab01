"""Stage 2: attention at several scales, fusion, and the folder of maps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import PixelNetwork, generator, make_samples, slim_network
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from smaflib.cams import FUSIONS, fuse_cams, multi_scale_cams
from smaflib.config import AttentionConfig
from smaflib.errors import DataError
from smaflib.maps import ENDING, AttentionMaps, write_attention_maps
from smaflib.runtime import Runtime

RULES = list(FUSIONS)


def some_image(height: int = 40, width: int = 56, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator(seed))


def some_cams(seed: int, num_scales: int = 3, num_classes: int = 2) -> list[Tensor]:
    """Maps of growing size with peaks between 0.3 and 1.3."""
    source = generator(seed)
    return [
        torch.rand(num_classes, 2 + scale, 3 + 2 * scale, generator=source) + torch.rand((), generator=source) * 0.3
        for scale in range(num_scales)
    ]


# --- multi_scale_cams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_maps_of_a_network_that_can_be_worked_out_by_hand(flip: bool) -> None:
    image = torch.zeros(3, 4, 8, dtype=torch.uint8)
    image[0, :, :4] = 255  # red on the left half
    network = PixelNetwork(torch.tensor([[2.0, 0, 0], [-1.0, 0, 0]]), stride=2)
    (cam,) = multi_scale_cams(network, image, scales=[1.0], flip=flip)  # type: ignore[arg-type]
    assert cam.dtype == torch.float32 and cam.shape == (2, 2, 4)
    torch.testing.assert_close(cam[0], torch.tensor([[2.0, 2, 0, 0]] * 2), rtol=0, atol=1e-5)
    torch.testing.assert_close(cam[1], torch.zeros(2, 4), rtol=0, atol=1e-5)  # never negative


def test_flips_commute_with_attention() -> None:
    """Attention to the mirror image is the mirrored attention, for a network that knows left from right."""
    network, image = slim_network(), some_image()
    scales = (0.5, 1.0, 1.5)
    cams, mirrored = (multi_scale_cams(network, picture, scales) for picture in (image, image.flip(-1)))
    for cam, other in zip(cams, mirrored, strict=True):
        torch.testing.assert_close(other, cam.flip(-1), rtol=1e-4, atol=1e-5)
    one_sided, other_side = (
        multi_scale_cams(network, picture, [1.0], flip=False)[0] for picture in (image, image.flip(-1))
    )
    assert not torch.allclose(other_side, one_sided.flip(-1), rtol=1e-2, atol=1e-3)


# --- fuse_cams --------------------------------------------------------------------------------------------------------


def test_fusion_rules_by_hand() -> None:
    strong, weak = torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert fuse_cams([strong, weak], (1, 2), "sum").flatten().tolist() == pytest.approx([1, 0.25], abs=1e-5)
    assert fuse_cams([strong, weak], (1, 2), "max").flatten().tolist() == pytest.approx([1, 0.25], abs=1e-5)
    assert fuse_cams([strong, weak], (1, 2), "mean").flatten().tolist() == pytest.approx([1, 1], abs=1e-4)
    both = torch.tensor([[[4.0, 2.0]]])
    assert fuse_cams([both, weak], (1, 2), "sum").flatten().tolist() == pytest.approx([1, 0.75], abs=1e-5)
    assert fuse_cams([both, weak], (1, 2), "max").flatten().tolist() == pytest.approx([1, 0.5], abs=1e-5)
    assert fuse_cams([both, weak], (1, 2), "mean").flatten().tolist() == pytest.approx([2 / 3, 1], abs=1e-4)


def test_weights_of_the_scales_by_hand() -> None:
    one, other = torch.tensor([[[4.0, 0.0]]]), torch.tensor([[[0.0, 2.0]]])
    # Weighted: 2 and 4. The mean brings both to a peak of 1 first: .5 and 2. A weight of 0: as if there were none.
    for rule, expected in (("sum", [0.5, 1]), ("max", [0.5, 1]), ("mean", [0.25, 1])):
        fused = fuse_cams([one, other], (1, 2), rule, weights=(0.5, 2.0))
        assert fused.flatten().tolist() == pytest.approx(expected, abs=1e-4)
    for rule in FUSIONS:
        pair = fuse_cams([one, other], (1, 2), rule, (1.0, 2.0), weights=(1.0, 0.0))
        torch.testing.assert_close(pair, fuse_cams([one], (1, 2), rule, (1.0,)), atol=1e-4, rtol=0)


@settings(max_examples=12)
@given(seed=st.integers(0, 2**20), rule=st.sampled_from(RULES))
def test_every_class_peaks_at_1(seed: int, rule: str) -> None:
    cams = some_cams(seed)
    fused = fuse_cams(cams, (9, 11), rule, (0.5, 1.0, 2.0))
    assert fused.shape == (2, 9, 11) and float(fused.min()) >= 0
    peaks = fused.amax(dim=(1, 2))
    assert bool((peaks <= 1).all()) and bool((peaks > 1 - 1e-4).all())


def test_maps_that_cannot_be_fused_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot load product"):
        fuse_cams([torch.rand(2, 3, 3)], (4, 4), "product", [1.0])
    for scales in (None, [1.0]):
        with pytest.raises(ValueError, match="size_adaptive needs the scale of each of the 2 maps"):
            fuse_cams([torch.rand(2, 3, 3)] * 2, (4, 4), "size_adaptive", scales)


# --- the size-adaptive rule -------------------------------------------------------------------------------------------


def test_size_adaptive_fusion_listens_to_the_scale_of_the_objects_size() -> None:
    """Scale 2 responds to a small object, scale 0.5 to a large one; each fused map leans to its own scale."""
    small, large = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    small[0, :2, :2], large[0, :15, :15] = 1, 1
    decoy = torch.zeros(1, 16, 16)
    decoy[0, 15, 15] = 1
    for extent, right, wrong in ((small, 1, 0), (large, 0, 1)):
        cams = [torch.zeros(1), torch.zeros(1)]
        cams[right], cams[wrong] = extent, extent * 0.6 + decoy * 0.5
        adaptive = fuse_cams(cams, (16, 16), "size_adaptive", (0.5, 2.0))[0, 15, 15]
        assert float(adaptive) < float(fuse_cams(cams, (16, 16), "mean")[0, 15, 15])


# --- the folder of maps -----------------------------------------------------------------------------------------------


def test_maps_come_back_in_half_precision(tmp_path: Path) -> None:
    maps = AttentionMaps(tmp_path / "cams", (0.5, 1.0, 2.0))
    cams = some_cams(0)
    maps.write("a.b", cams, (9, 11))
    again, size = maps.read("a.b")
    assert size == (9, 11)
    for cam, back in zip(cams, again, strict=True):
        assert back.dtype == torch.float32 and torch.equal(back, cam.half().float())
    assert torch.equal(maps.fused("a.b", "mean"), fuse_cams(again, (9, 11), "mean"))
    assert [path.name for path in maps.folder.iterdir()] == ["a.b.safetensors.gz"]


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no attention maps .*cat\.safe.*; notebook 03 \(teacher\) or 05 \(student\)"):
        AttentionMaps(tmp_path, (1.0,)).read("cat")
    maps = AttentionMaps(tmp_path, (0.5, 1.0, 2.0))
    maps.write("a", some_cams(0), (9, 11))
    with pytest.raises(DataError, match="not a complete file of attention maps .*scale_3.*delete it and run again"):
        maps.read("a", [3.0])
    whole = maps.path("a").read_bytes()
    for kept in (0, len(whole) // 2, len(whole) - 1):
        maps.path("a").write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"a\.safe.* is not a complete file of attention maps .*delete it and run"):
            maps.read("a")


# --- a whole split ----------------------------------------------------------------------------------------------------


def test_split_is_written_once_and_missing_maps_are_added(tmp_path: Path) -> None:
    samples, config = make_samples(5, size=(16, 24)), AttentionConfig(scales=(0.5, 1.0))
    network, runtime = slim_network(), Runtime()
    maps = write_attention_maps(network, samples, tmp_path, config, runtime)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}{ENDING}" for name in samples.image_ids]
    for sample in samples:
        cams, size = maps.read(sample.image_id)
        assert size == (16, 24)
        for cam, alone in zip(cams, multi_scale_cams(network, sample.image, config.scales), strict=True):
            torch.testing.assert_close(cam, alone, rtol=2e-3, atol=1e-4)

    untouched = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != maps.path("image3")}
    maps.path("image3").unlink()
    with torch.no_grad():
        network.head.weight.zero_()  # whatever is written now is not what was written before
    write_attention_maps(network, samples, tmp_path, config, runtime)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path != maps.path("image3")} == untouched
    torch.testing.assert_close(maps.read("image3")[0][0], torch.full((3, 1, 2), 0.25), rtol=1e-3, atol=0)
