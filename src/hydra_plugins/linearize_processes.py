"""A Hydra launcher for one machine with several GPUs: `python train.py -m launcher=processes`.

Hydra looks for its plugins in the namespace package `hydra_plugins` and imports all of them at every start, so that
nothing heavy is imported here at the top.
"""

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

RECORD, LOG = "job.json", "log.txt"
_SECONDS_BETWEEN = 0.2
# The launcher decides on these two for its jobs.
_OWN_OVERRIDES = ("hydra.mode=", "hydra.run.dir=")
_log = logging.getLogger(__name__)


@dataclass
class ProcessesLauncherConf:
    """The node `hydra.launcher`.

    Attributes:
        jobs_per_device: Jobs at a time on each GPU, or on the processor where there is none.
    """

    _target_: str = "hydra_plugins.linearize_processes.ProcessesLauncher"
    jobs_per_device: int = 1


ConfigStore.instance().store(
    group="hydra/launcher", name="processes", node=ProcessesLauncherConf, provider="linearize_processes"
)


@dataclass
class Job:
    """A job of the sweep, and its process once it runs.

    Attributes:
        label: What it has and another job of the sweep has not.
        overrides: Of the command line, with its own choices.
        folder: Its run directory.
        config: What the task is given, interpolations as they are written.
        device: The value of CUDA_VISIBLE_DEVICES; None leaves it alone.
        process: The process.
        start: When it began, by `time.perf_counter`.
    """

    label: str
    overrides: list[str]
    folder: Path
    config: DictConfig
    device: str | None = None
    process: subprocess.Popen[bytes] | None = None
    start: float = 0.0

    def is_done(self) -> bool:
        """Whether an earlier sweep finished it, with the very same configuration."""
        from linearize.files import read_json

        written = self.folder / ".hydra" / "config.yaml"
        if not (self.folder / RECORD).is_file() or not written.is_file():
            return False
        same = OmegaConf.to_container(OmegaConf.load(written)) == OmegaConf.to_container(self.config)
        return same and read_json(self.folder / RECORD)["exit_code"] == 0

    def begin(self, command: list[str], device: str | None, num_threads: int) -> None:
        """Starts the process; what it prints goes to log.txt in its folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / RECORD).unlink(missing_ok=True)
        environment = {"OMP_NUM_THREADS": str(num_threads), **os.environ}
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = device
        self.device, self.start = device, time.perf_counter()
        with open(self.folder / LOG, "wb") as log:
            self.process = subprocess.Popen(
                [*command, *self.overrides, f"hydra.run.dir='{self.folder}'", "hydra.mode=RUN"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,  # Ctrl-C reaches the launcher alone, whose SIGTERM lets a job end its step
            )

    def end(self, neighbours: int) -> str | None:
        """Records how the process ended; returns its last line if it failed."""
        from linearize.files import write_json

        assert self.process is not None
        lines = (self.folder / LOG).read_text(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "nothing was printed")
        failure = None if self.process.returncode == 0 else last.removeprefix("error: ").strip()
        record = {
            "exit_code": self.process.returncode,
            "error": failure,
            "seconds": round(time.perf_counter() - self.start, 1),
            "jobs_per_device": neighbours,
        }
        write_json(self.folder / RECORD, record)
        return failure


class ProcessesLauncher(Launcher):
    """Runs every job as a process of its own with one GPU, several at a time.

    A job that fails does not stop the others; a job that an earlier sweep finished with the same configuration is not
    run again. What jobs return stays with them, so sweepers that optimise need another launcher.

    Args:
        jobs_per_device: Jobs at a time on each GPU, or on the processor where there is none.
    """

    def __init__(self, jobs_per_device: int) -> None:
        self.jobs_per_device = jobs_per_device

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Hydra's call before `launch`."""
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Runs the jobs of one batch of the sweep.

        Raises:
            LinearizeError: `jobs_per_device` is no number of jobs, or two jobs have one folder.
            SystemExit: Some failed; the message names them.
        """
        from linearize.errors import check_count

        check_count("hydra.launcher.jobs_per_device", self.jobs_per_device)
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        shared = [one for one in job_overrides[0] if all(one in overrides for overrides in job_overrides)]
        own = [[one for one in overrides if one not in shared] for overrides in job_overrides]
        jobs = [self._job(initial_job_idx + place, overrides, shared) for place, overrides in enumerate(own)]
        _check_folders(jobs)
        waiting = [job for job in jobs if not job.is_done()]
        _log.info("%d of %d jobs are done already.", len(jobs) - len(waiting), len(jobs))
        failures = self._run(waiting)
        if failures:
            told = "\n".join(f"  {label}: {failure}" for label, failure in failures.items())
            raise SystemExit(
                f"error: {len(failures)} of {len(jobs)} jobs failed; their folders hold {LOG}, and the same command "
                f"runs these alone again:\n{told}"
            )
        return [JobReturn(job.overrides, job.config, status=JobStatus.COMPLETED) for job in jobs]

    def _job(self, number: int, own: list[str], shared: list[str]) -> Job:
        overrides = [*shared, *own]
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
            folder = Path(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
            del config["hydra"]
        return Job(" ".join(own) or folder.name, overrides, folder.absolute(), config)

    def _run(self, waiting: list[Job]) -> dict[str, str]:
        """Runs the jobs, and returns the last line of those that failed."""
        free = self._devices() * self.jobs_per_device
        num_threads = max(1, (os.cpu_count() or 1) // len(free))
        command, waiting, failures = self._command(), list(waiting), {}
        running: list[Job] = []
        try:
            while waiting or running:
                while waiting and free:
                    running.append(waiting.pop(0))
                    running[-1].begin(command, free.pop(0), num_threads)
                    _log.info("%s: begins", running[-1].label)
                time.sleep(_SECONDS_BETWEEN)
                for job in [job for job in running if job.process and job.process.poll() is not None]:
                    running.remove(job)
                    free.append(job.device)
                    failure = job.end(self.jobs_per_device)
                    _log.info("%s: %s", job.label, "done" if failure is None else f"failed: {failure}")
                    if failure is not None:
                        failures[job.label] = failure
        finally:
            for job in running:
                assert job.process is not None
                job.process.terminate()
            for job in running:
                assert job.process is not None
                job.process.wait()
        return failures

    def _command(self) -> list[str]:
        passed_on = [one for one in self.config.hydra.overrides.hydra if not one.startswith(_OWN_OVERRIDES)]
        return [sys.executable, sys.argv[0], "--config-name", self.config.hydra.job.config_name, *passed_on]

    def _devices(self) -> list[Any]:
        """What CUDA_VISIBLE_DEVICES is for each GPU; [None] without one."""
        import torch

        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        return (listed.split(",") if listed else [str(index) for index in range(torch.cuda.device_count())]) or [None]


def _check_folders(jobs: Sequence[Job]) -> None:
    """Checks that no two jobs write into one folder, where one of them would be lost."""
    from linearize.errors import LinearizeError

    first: dict[Path, str] = {}
    for job in jobs:
        if job.folder in first:
            raise LinearizeError(
                f"The jobs {first[job.folder]} and {job.label} have one folder, {job.folder}: set hydra.sweep.subdir "
                "to a name with all that is swept, such as '${mixer.name}_${seed}'."
            )
        first[job.folder] = job.label
