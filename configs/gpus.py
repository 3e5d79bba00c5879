"""The kinds of GPU whose figures are known: the files of `configs/cluster/`, of the package and the working directory."""

from __future__ import annotations

from omegaconf import OmegaConf

from crossguard.configs.compose import group_choices, group_file
from crossguard.configs.schema.cluster import ClusterConfig


def figures_of(device_name: str) -> ClusterConfig | None:
    """The figures of the GPU that torch.cuda.get_device_name() calls `device_name`; None when no file names it."""
    for choice in group_choices("cluster"):
        file = group_file("cluster", choice)
        found = OmegaConf.load(file) if file else OmegaConf.create()
        if device_name in (found.get("device_names") or []):
            figures = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), found))
            assert isinstance(figures, ClusterConfig)
            return figures
    return None
