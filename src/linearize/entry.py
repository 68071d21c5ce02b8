"""The frame of a command line entry point: Hydra, and every mistake told in one sentence."""

import functools
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from linearize.errors import INTERRUPTED, MISTAKE
from linearize.extras import describe_missing


def entry_point(script: str | Path, config_name: str) -> Callable[[Callable[[Any], Any]], Callable[[], None]]:
    """Makes a function of a config the main function of a script: a decorator in the place of `hydra.main`.

    Hydra is imported when the function is called, so that its absence can be told. A mistake of the user ends with
    exit code 2 and one sentence, Ctrl-C and SIGTERM with 130. To a launcher the mistakes of its jobs stay exceptions.

    Args:
        script: The script's `__file__`; configs/ is beside it or in a folder above.
        config_name: The top-level config, without its ending.
    """
    root = next(folder for folder in Path(script).resolve().parents if (folder / "configs").is_dir())

    def decorate(task: Callable[[Any], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            signal.signal(signal.SIGTERM, _terminate)
            # It tells at every start that torchvision is missing, which FLUX's text-to-image pipeline never uses.
            logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)
            try:
                _run(task, root, config_name)
            except ModuleNotFoundError as error:
                sys.stderr.write(f"error: {describe_missing(error, Path(script).name)}\n")
                sys.exit(MISTAKE)
            except KeyboardInterrupt as stop:
                sys.stderr.write(f"{stop if str(stop) else 'Stopped.'}\n")
                sys.exit(INTERRUPTED)

        return main

    return decorate


def _run(task: Callable[[Any], Any], root: Path, config_name: str) -> None:
    import hydra

    from linearize.config import register_resolvers, user_errors
    from linearize.overrides import check_types, override_errors

    register_resolvers(root)
    configs = root / "configs"

    @functools.wraps(task)  # Hydra names the job after the script
    def guarded(config: Any) -> Any:
        with user_errors():
            check_types(config)
            return task(config)

    with override_errors(configs, config_name):
        hydra.main(version_base="1.3", config_path=str(configs), config_name=config_name)(guarded)()


def _terminate(number: int, frame: FrameType | None) -> None:
    """Turns SIGTERM into what Ctrl-C is, so that everything is tidied up on the way out."""
    raise KeyboardInterrupt("Terminated.")
