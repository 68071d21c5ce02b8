"""What every Hydra entry point shares: the resolver of the project root and the way a user's mistake is told."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from linearize.errors import LinearizeError

ROOT_VARIABLE = "LINEARIZE_ROOT"


def register_resolvers(root: str | Path | None = None) -> None:
    """Makes `${project_root:}` the folder that holds configs/.

    Args:
        root: That folder, as an entry point knows it; it is also left in the environment for the processes that a launcher starts. By
            default the environment variable LINEARIZE_ROOT, or else the current folder.
    """
    folder = Path(root or os.environ.get(ROOT_VARIABLE) or Path.cwd()).resolve()
    os.environ[ROOT_VARIABLE] = str(folder)
    OmegaConf.register_new_resolver("project_root", lambda: str(folder), replace=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Prints a user's mistake as one sentence and exits with 2; in a Hydra multirun the exception goes on to the sweeper."""
    try:
        yield
    except LinearizeError as error:
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
