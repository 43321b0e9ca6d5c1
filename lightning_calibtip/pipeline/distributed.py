"""Several processes: which options the Trainers of a run need, so that its processes work together."""

import os
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy


def distributed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a Trainer; where ``torchrun`` has started this process and they say nothing, those of its processes.

    Args:
        options: Options that the user has given.

    Example:
        >>> distributed_options({"accelerator": "cpu"})
        {'accelerator': 'cpu'}
    """
    if {"devices", "strategy", "num_nodes"} & options.keys() or not TorchElasticEnvironment.detect():
        return options
    count, on_this_node = TorchElasticEnvironment().world_size(), int(os.environ["LOCAL_WORLD_SIZE"])
    if count == 1:
        return options
    return {**options, "strategy": "ddp", "devices": on_this_node, "num_nodes": count // on_this_node}


def is_first_process() -> bool:
    """Whether this process is to be rank 0, by what its launcher has told it, before it knows of any other.

    Example:
        >>> is_first_process()
        True
    """
    for name in ("RANK", "SLURM_PROCID"):
        if name in os.environ:
            return os.environ[name] == "0"
    return all(os.environ.get(name, "0") == "0" for name in ("NODE_RANK", "LOCAL_RANK"))


def same_processes(trainer: pl.Trainer) -> dict[str, Any]:
    """Options with which another Trainer runs in the processes of a Trainer that is at work.

    Args:
        trainer: The Trainer that is at work.

    Example:
        >>> same_processes(pl.Trainer(accelerator="cpu", logger=False))
        {}
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or trainer.world_size == 1:
        return {}
    return {
        "strategy": "ddp",
        "devices": trainer.num_devices if strategy.root_device.type == "cpu" else trainer.device_ids,
        "num_nodes": trainer.num_nodes,
        "plugins": [strategy.cluster_environment],
    }
