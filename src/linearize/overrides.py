"""Tells a mistake on a Hydra command line in one sentence with the choices, instead of Hydra's page."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from linearize.config import describe_failure
from linearize.errors import MISTAKE, LinearizeError
from linearize.extras import missing_sentence

_UNKNOWN_KEY = re.compile(r"Could not override '([^']+)'")
_TIME = re.compile(r"[\d:]+")
_MULTIRUN = {"-m", "--multirun"}
# Settings whose names are the user's own: a dictionary adds to them.
_OPEN = re.compile(r"(model\.mixers|train_step\.recipes)(\.\w+)?=\s*\{")


@contextlib.contextmanager
def override_errors(config_folder: str | Path, config_name: str) -> Iterator[None]:
    """Prints what is wrong with the command line and exits with 2, before anything runs.

    A sweep is composed as a whole before its first job, so a knob that one of its points lacks is told here too.
    Dictionaries of students and recipes, which have names of the user's own, are marked as Hydra wants what it adds.

    Args:
        config_folder: Folder of the configs.
        config_name: The top-level config of the entry point that runs inside the block.
    """
    # Without it Hydra prints the error itself and exits, and nobody else sees it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    arguments = [f"++{argument}" if _OPEN.match(argument) else argument for argument in sys.argv[1:]]
    # Lightning starts its other processes with more overrides at the end, which argparse refuses after a late -m.
    sys.argv[1:] = sorted(arguments, key=lambda argument: argument not in _MULTIRUN)
    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        sys.stderr.write(f"error: {describe(error, Path(config_folder), config_name, sys.argv[1:])}\n")
        sys.exit(MISTAKE)
    except LinearizeError as error:  # of a launcher, or of a job that it ran in this process
        sys.stderr.write(f"error: {error}\n")
        sys.exit(MISTAKE)
    except RuntimeError as error:
        if "srun" not in str(error):
            raise
        sys.stderr.write(
            "error: launcher=slurm needs Slurm's srun, which is not on this machine: start the sweep where jobs are "
            "submitted, or set launcher=local or launcher=processes.\n"
        )
        sys.exit(MISTAKE)
    except OSError as error:  # of Hydra's own folders
        sentence = describe_failure(error)
        if sentence is None:
            raise
        sys.stderr.write(f"error: {sentence} hydra.run.dir=<folder> sets it.\n")
        sys.exit(MISTAKE)


def check_types(config: DictConfig) -> None:
    """Checks that no override puts a text where the config has a number or a switch, or any value in place of a group.

    Args:
        config: The composed config of the running job.

    Raises:
        LinearizeError: one does.
    """
    running = HydraConfig.get()
    groups = set(running.runtime.choices)
    overrides = {override: override.split("=")[0].lstrip("+") for override in running.overrides.task}
    given = {}
    for key in overrides.values():
        value = None if key in groups else OmegaConf.select(config, key, throw_on_resolution_failure=False)
        # Lightning takes times such as 00:12:00:00 for numbers of steps.
        if isinstance(value, int | float) or (isinstance(value, str) and not _TIME.fullmatch(value)):
            given[key] = value
    if not given or not GlobalHydra.instance().is_initialized():
        return
    defaults = compose(
        running.job.config_name, overrides=[override for override, key in overrides.items() if key in groups]
    )
    for key, value in given.items():
        default = OmegaConf.select(defaults, key, throw_on_resolution_failure=False)
        if isinstance(default, DictConfig):
            raise LinearizeError(f"{key}={value} replaces several settings: set {key}.<name> of {', '.join(default)}.")
        if not isinstance(value, str):
            continue
        if isinstance(default, bool):
            raise LinearizeError(f"{key}={value} is neither true nor false: its default is {str(default).lower()}.")
        if isinstance(default, int | float):
            raise LinearizeError(f"{key}={value} is no number: its default is {default}.")


def describe(error: Exception, config_folder: Path, config_name: str, arguments: Sequence[str]) -> str:
    """One sentence about an error that Hydra raised for these command line arguments."""
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        if choice.startswith("submitit"):
            return missing_sentence("This launcher", ["submitit"])
        close = difflib.get_close_matches(choice, error.options, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{group}={choice} does not exist{hint}: choose {group}= one of {', '.join(error.options)}."
    if isinstance(error, OverrideParseException):
        reason = str(error.message).splitlines()[0]
        return f"{error.override} cannot be read ({reason}): write key=value, and quote spaces, brackets and commas."
    unknown = _UNKNOWN_KEY.search(str(error))
    if unknown is not None and _MULTIRUN & set(arguments):
        return f"{unknown.group(1)} is no setting of every point of this sweep: sweep only over choices that have it."
    if unknown is not None:
        config = _compose_without(unknown.group(1), config_folder, config_name, arguments)
        return _describe_unknown_key(unknown.group(1), config)
    lines = [line for line in str(error).splitlines() if line and not line.startswith("See https://")]
    return f"{'; '.join(lines)}: correct the command line, python {sys.argv[0]} --help shows the choices."


def _compose_without(key: str, config_folder: Path, config_name: str, arguments: Sequence[str]) -> DictConfig | None:
    """The config of the command line without `key`; None if something else is wrong with it too."""
    overrides = [text for text in arguments if "=" in text and not text.startswith("-") and text.split("=")[0] != key]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder), version_base="1.3"):
            return compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException):
        return None


def _describe_unknown_key(key: str, config: DictConfig | None) -> str:
    parent, _, name = key.rpartition(".")
    node = config if not parent or config is None else OmegaConf.select(config, parent)
    known = [str(one) for one in node] if isinstance(node, DictConfig) else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f" (did you mean {parent + '.' if parent else ''}{close[0]}?)" if close else ""
    if parent and known:
        return f"{key} is no setting{hint}: {parent} has {', '.join(known)}."
    mixer = OmegaConf.to_container(config.mixer) if config is not None and "mixer" in config else None
    if isinstance(mixer, dict):
        knobs = ", ".join(str(knob) for knob in mixer if knob != "name") or "no knobs"
        rest = f"python {sys.argv[0]} --help shows the rest"
        return f"{key} is no setting{hint}: mixer={mixer['name']} has {knobs}, and {rest}."
    return f"{key} is no setting{hint}: python {sys.argv[0]} --help shows what there is."
