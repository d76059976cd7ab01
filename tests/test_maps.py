"""Attention maps of a split, fused and denoised when they are read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LikeGpu, compile_without_compiler, generator, make_samples, slim_network

from smaflib.cams import FUSION_RULES, fuse_cams
from smaflib.config import AttentionConfig, EvaluationConfig
from smaflib.evaluation import masks_of, sweep_thresholds
from smaflib.maps import AttentionMaps, DenoisedMaps, MaskMaps, PresentMaps, fuse_and_denoise, write_attention_maps
from smaflib.reactivation import denoise, hard_labels
from smaflib.runtime import Runtime, cpu_runtime, is_compiled


@pytest.fixture
def maps(tmp_path: Path) -> AttentionMaps:
    maps = AttentionMaps(tmp_path, (0.5, 1.0))
    for seed, image_id in enumerate(make_samples(3).image_ids):
        torch.manual_seed(seed)
        maps.write(image_id, [torch.rand(3, 2, 3), torch.rand(3, 4, 5)], (32, 40))
    return maps


def test_denoised_maps_are_fused_and_denoised_in_the_order_of_the_split(maps: AttentionMaps) -> None:
    samples = make_samples(3).subset([2, 0])
    denoised = DenoisedMaps(maps, samples, rule="max", scales=[1.0])
    assert len(denoised) == 2
    for index, sample in enumerate(samples):
        expected = denoise(maps.fused(sample.image_id, "max", [1.0]), sample.image_label)
        assert torch.equal(denoised[index], expected)
        assert denoised[index].amax(dim=(1, 2)).round().tolist() == sample.image_label.tolist()


def test_denoised_maps_can_be_kept_in_half_precision(maps: AttentionMaps) -> None:
    samples = make_samples(3)
    lazy, cached = DenoisedMaps(maps, samples), DenoisedMaps(maps, samples, cached=True)
    first = cached[1]
    torch.testing.assert_close(first, lazy[1], rtol=1e-3, atol=1e-4)
    maps.path("image1").unlink()
    assert torch.equal(cached[1], first) and first.dtype == torch.float32
    with pytest.raises(ValueError, match="no attention maps"):
        lazy[1]


def test_only_maps_of_classes_that_are_there_are_kept(maps: AttentionMaps) -> None:
    cached = DenoisedMaps(maps, make_samples(3), cached=True)
    for index in range(3):  # image i shows class i
        assert torch.equal(cached[index], DenoisedMaps(maps, make_samples(3))[index].half().float())
        kept = cached._cache[index]
        assert kept.maps.shape == (1, 32, 40) and kept.maps.dtype == torch.float16 and kept.classes.tolist() == [index]
    everything = DenoisedMaps(maps, make_samples(3), cached=True, denoised=False)
    assert len(everything[0]) == len(everything._cache[0].maps) == 3


@pytest.mark.parametrize("settings", [{}, {"denoised": False}, {"cached": True}, {"saliency_weight": 0.3}])
def test_present_maps_are_evaluated_as_whole_ones(maps: AttentionMaps, settings: dict[str, Any]) -> None:
    samples, names, config = make_samples(3), ["a", "b", "c"], EvaluationConfig(thresholds=(0.2, 0.5, 0.9))
    denoised = DenoisedMaps(maps, samples, **settings)
    true = [torch.randint(0, 4, (32, 40), generator=generator(seed), dtype=torch.uint8) for seed in range(3)]
    sparse, whole = (sweep_thresholds(each, true, names, config) for each in (denoised, list(denoised)))
    for threshold in config.thresholds:
        assert torch.equal(sparse[threshold].confusion, whole[threshold].confusion)
        assert torch.equal(sparse[threshold].by_size, whole[threshold].by_size)
        for mask, of_whole in zip(masks_of(denoised, threshold), denoised, strict=True):
            assert torch.equal(mask, hard_labels(of_whole, threshold))


def test_image_without_any_class_is_background(maps: AttentionMaps) -> None:
    present = PresentMaps(3, torch.tensor([], dtype=torch.int64), torch.zeros(0, 2, 2))
    assert present.whole().tolist() == torch.zeros(3, 2, 2).tolist()
    assert present.strongest()[0].tolist() == [[0, 0], [0, 0]]


def test_threads_of_the_host_change_no_byte(tmp_path: Path) -> None:
    network, samples, config = slim_network(), make_samples(5), AttentionConfig(scales=(0.5, 1.0))
    for threads in (0, 3):
        folder = tmp_path / str(threads)
        write_attention_maps(network, samples, folder, config, cpu_runtime(), batch_size=2, host_threads=threads)
    written = sorted(path.name for path in (tmp_path / "0").iterdir())
    assert len(written) == 5
    for name in written:
        assert (tmp_path / "3" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_a_gpu_waits_for_nothing_that_threads_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given batches; inputs are pinned and maps waited for and written by threads; bytes are the same."""
    where: dict[str, set[str]] = {"pinned": set(), "waited for": set()}

    class Followed(LikeGpu):
        def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
            where["pinned"].add(threading.current_thread().name)
            return tensor

    def start_copy(tensors: Sequence[torch.Tensor]) -> Callable[[], list[torch.Tensor]]:
        assert threading.current_thread() is threading.main_thread()

        def wait() -> list[torch.Tensor]:
            where["waited for"].add(threading.current_thread().name)
            return list(tensors)

        return wait

    network, samples, config = slim_network(), make_samples(9), AttentionConfig(scales=(0.5, 1.0))
    write_attention_maps(network, samples, tmp_path / "plain", config, cpu_runtime())
    monkeypatch.setattr("smaflib.cams.start_copy", start_copy)
    gpu = Followed(torch.device("cpu"))
    write_attention_maps(network, samples, tmp_path / "gpu", config, gpu, host_threads=2)
    for names in where.values():
        assert names and all(name.startswith("ahead") for name in names)
    assert all(len(names) <= 2 for names in where.values())
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "gpu" / path.name).read_bytes() == path.read_bytes()


def test_maps_of_a_compiled_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "compile", compile_without_compiler)
    samples, config = make_samples(3), AttentionConfig(scales=(0.5, 1.0))
    networks = [slim_network(), slim_network()]
    for network, compiled in zip(networks, (False, True), strict=True):
        runtime = Runtime(torch.device("cpu"), compile=compiled)
        write_attention_maps(network, samples, tmp_path / str(compiled), config, runtime)
    assert [is_compiled(network) for network in networks] == [False, True]
    for path in (tmp_path / "False").iterdir():
        assert (tmp_path / "True" / path.name).read_bytes() == path.read_bytes()


def test_whole_split_can_be_walked_through(maps: AttentionMaps) -> None:
    assert [tuple(denoised.shape) for denoised in DenoisedMaps(maps, make_samples(3))] == [(3, 32, 40)] * 3


@pytest.mark.parametrize("rule", FUSION_RULES)
def test_fusing_the_labelled_classes_alone_changes_nothing(rule: str) -> None:
    torch.manual_seed(0)
    cams, scales = [torch.rand(4, 2, 3), torch.rand(4, 5, 4)], (0.5, 1.0)
    for label in ([1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]):
        image_label = torch.tensor(label).float()
        expected = denoise(fuse_cams(cams, (8, 9), rule, scales), image_label)
        assert torch.equal(fuse_and_denoise(cams, (8, 9), image_label, rule, scales), expected)


def test_maps_of_absent_classes_stay_where_they_are_asked_for(maps: AttentionMaps) -> None:
    samples = make_samples(3)
    noisy = DenoisedMaps(maps, samples, denoised=False)
    assert torch.equal(noisy[1], maps.fused("image1"))
    assert not torch.equal(noisy[1], DenoisedMaps(maps, samples)[1])


def test_masks_are_maps_of_zero_and_one() -> None:
    (maps,) = MaskMaps([torch.tensor([[0, 2], [1, 2]], dtype=torch.uint8)], num_classes=2)
    assert maps.tolist() == [[[0, 0], [1, 0]], [[0, 1], [0, 1]]]
