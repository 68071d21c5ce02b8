import pytest

from linearize.processes import is_first_process, local_rank, process_place

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
SRUN = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
# What a batch script sees that asked for eight tasks and runs Python itself.
BATCH_SCRIPT = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
LIGHTNING_CHILD = {"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "place", "first", "local"),
    [
        ({}, (0, 1), True, 0),
        (TORCHRUN, (5, 8), False, 1),
        (TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0"}, (0, 8), True, 0),
        (SRUN, (5, 8), False, 1),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 8), True, 0),
        (SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_LOCALID": "0"}, (0, 1), True, 0),
        (BATCH_SCRIPT, (0, 1), True, 0),
        (LIGHTNING_CHILD, (0, 1), False, 1),
        (LIGHTNING_CHILD | {"LOCAL_RANK": "0", "NODE_RANK": "1"}, (0, 1), False, 0),
    ],
)
def test_a_process_knows_its_place(environment, place, first, local):
    assert process_place(environment) == place
    assert is_first_process(environment) == first
    assert local_rank(environment) == local
