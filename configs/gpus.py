"""The kinds of GPU whose figures are known: files of `configs/cluster/`, the package's and the working directory's."""

from __future__ import annotations

from omegaconf import OmegaConf

from crossguard.configs.compose import group_choices, group_file
from crossguard.configs.schema.cluster import ClusterConfig


def figures_of(device_name: str) -> ClusterConfig | None:
    """The figures of the GPU that torch.cuda.get_device_name() calls `device_name`; None when no file names it."""
    for choice in group_choices("cluster"):
        file = group_file("cluster", choice)
        merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(file) if file else {})
        if device_name in merged.device_names:
            figures = OmegaConf.to_object(merged)
            assert isinstance(figures, ClusterConfig)
            return figures
    return None
