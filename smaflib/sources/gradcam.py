"""Grad-CAM and its relatives, as the package ``grad-cam`` computes them, on a trained network or a timm classifier.

The package makes a map of activations and gradients; here one forward pass gives those of all classes.
"""

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from smaflib.config import AttentionConfig
from smaflib.errors import ConfigError
from smaflib.sources import Attention, AttentionSource, Classes, imagenet

METHODS = {"gradcam": "GradCAM", "gradcam++": "GradCAMPlusPlus", "layercam": "LayerCAM", "xgradcam": "XGradCAM"}
"""Name of a source and the package's class: Selvaraju et al., ICCV 2017; Chattopadhay et al., WACV 2018; Jiang et al.,
TIP 2021; Fu et al., BMVC 2020."""


class GradCamSource(AttentionSource):
    """Maps from the gradients of class scores with respect to a layer's activations.

    Args:
        layer: a module inside the network whose output is (B, C, h, w).
        scores: images (B, 3, H, W) to class scores (B, K), by the network.
        method: one of :data:`METHODS`.
    """

    needs_classes = True

    def __init__(
        self, network: nn.Module, layer: nn.Module, scores: Callable[[Tensor], Tensor], method: str, supervision: str
    ) -> None:
        super().__init__()
        try:
            import pytorch_grad_cam
        except ImportError as error:
            raise ConfigError(f"{method} needs the package grad-cam; run: pip install 'smaflib[gradcam]'") from error
        self.network, self.scores, self.supervision = network, scores, supervision
        self._layer = [layer]  # in a list, as it is a module of the network already
        self._cam = getattr(pytorch_grad_cam, METHODS[method])(network, self._layer)
        self._cam.activations_and_grads.release()  # its hooks would keep every activation

    @classmethod
    def of_classifier(
        cls, classifier: imagenet.ImageNetClassifier, method: str, layer: nn.Module | None = None
    ) -> Self:
        """Of each of ImageNet's thousand classes; by default at the last features."""
        supervision = imagenet.ImageNetSource.supervision
        return cls(classifier, layer or classifier.features, classifier.logits, method, supervision)

    def attend(self, images: Tensor, classes: Classes) -> Attention:
        seen: list[Tensor] = []

        def start(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            torch.set_grad_enabled(True)  # from this layer on; what comes before needs no gradients
            seen.append(output.detach().requires_grad_())
            return seen[0].clone()  # the next layer may work in place

        with torch.no_grad(), self._layer[0].register_forward_hook(start):
            scores = self.scores(images)
            activations = seen[0].detach().float().cpu().numpy()
            maps = images.new_zeros(*scores.shape, *seen[0].shape[2:])
            for number in sorted({number for asked in classes for number in asked}):
                # Times the cells: the gradient of a mean over them is smaller at larger scales, and so would be maps.
                score = scores[:, number].sum() * seen[0].shape[2:].numel()
                (gradient,) = torch.autograd.grad(score, seen[0], retain_graph=True)
                found = self._cam.get_cam_image(images, None, None, activations, gradient.float().cpu().numpy(), False)
                for row, asked in enumerate(classes):
                    if number in asked:
                        maps[row, number] = torch.from_numpy(found[row]).to(maps).relu()
        return Attention(maps)


def make(attention: AttentionConfig, class_names: Sequence[str], network: nn.Module | None) -> GradCamSource:
    """Build the source on a teacher or student, or on ImageNet's classifier; ConfigError if it lacks the layer."""
    scores: Callable[[Tensor], Tensor]
    if network is None:
        source = imagenet.make_known(attention, class_names)
        network, layer = source.classifier, source.classifier.features
        scores, supervision = source.scores, source.supervision
    else:
        trained: Any = network
        scores, supervision = (lambda images: trained.image_logits(trained(images))), AttentionSource.supervision
        layer = trained.backbone
    if attention.options.layer is not None:
        layer = network.get_submodule(attention.options.layer)
    return GradCamSource(network, layer, scores, attention.source, supervision)
