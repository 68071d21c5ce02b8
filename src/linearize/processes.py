"""Which of the processes that share a run this one is, as torchrun, Slurm's srun or Lightning tell it."""

import os
from collections.abc import Mapping


def process_place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and number of the processes that a launcher started before Python began; (0, 1) without one.

    torchrun sets RANK and WORLD_SIZE. A task of srun has a step; a batch script that runs Python itself has none, and
    is alone however many tasks were asked for.
    """
    if "RANK" in environment:
        return int(environment["RANK"]), int(environment.get("WORLD_SIZE", 1))
    if "SLURM_STEP_ID" in environment and "SLURM_PROCID" in environment:
        return int(environment["SLURM_PROCID"]), int(environment.get("SLURM_STEP_NUM_TASKS", 1))
    return 0, 1


def is_first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process speaks, evaluates and exports; also right in the processes that Lightning starts itself."""
    started_by_lightning = int(environment.get("LOCAL_RANK", 0)) + int(environment.get("NODE_RANK", 0))
    rank, world_size = process_place(environment)
    return rank == 0 and (world_size > 1 or started_by_lightning == 0)


def local_rank(environment: Mapping[str, str] = os.environ) -> int:
    """This process's place among those of its machine, which is the number of its GPU."""
    if "LOCAL_RANK" in environment:
        return int(environment["LOCAL_RANK"])
    return int(environment["SLURM_LOCALID"]) if "SLURM_STEP_ID" in environment and "SLURM_LOCALID" in environment else 0
