"""What Hydra entry points share.

The project root, the way a user's mistake is told, and the step from a config to a teacher and its data.
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from linearize.compilation import compile_backend, compile_blocks
from linearize.data.ensure import ensure_samples
from linearize.data.prompts import PromptSource, prompt_source
from linearize.data.settings import GenerationSettings
from linearize.errors import INTERRUPTED, MISTAKE, LinearizeError, is_out_of_memory
from linearize.extras import describe_missing
from linearize.files import first_sentence, refused_write
from linearize.processes import process_place
from linearize.teachers import Teacher, load_teacher

if TYPE_CHECKING:
    from linearize.data.datamodule import SampleDataModule

ROOT_VARIABLE = "LINEARIZE_ROOT"
_REFUSED_WRITES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST}
_ASKED_FOR = re.compile(r"tried to allocate [\d.]+ \w+", re.IGNORECASE)


def register_resolvers(root: str | Path | None = None) -> None:
    """Makes `${project_root:}` the folder that holds configs/.

    Args:
        root: That folder, as an entry point knows it; it is also left in the environment for the processes that a
            launcher starts. By default the environment variable LINEARIZE_ROOT, or else the current folder.
    """
    folder = Path(root or os.environ.get(ROOT_VARIABLE) or Path.cwd()).resolve()
    os.environ[ROOT_VARIABLE] = str(folder)
    OmegaConf.register_new_resolver("project_root", lambda: str(folder), replace=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Prints a user's mistake, or what the machine refuses, as one sentence and exits with 2; after Ctrl-C with 130.

    In a Hydra multirun the exception goes on to the sweeper.
    """
    try:
        yield
    except (LinearizeError, InstantiationException, ModuleNotFoundError, OSError, RuntimeError, MemoryError) as error:
        sentence = describe_failure(error)
        if sentence is None or (HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN):
            raise
        sys.stderr.write(f"error: {sentence}\n")
        sys.exit(MISTAKE)
    except KeyboardInterrupt as stop:
        sys.stderr.write(f"{stop if str(stop) else 'Stopped.'}\n")
        sys.exit(INTERRUPTED)


def describe_failure(error: Exception) -> str | None:
    """One sentence about a failure that the user can mend; None about any other."""
    if isinstance(error, LinearizeError):
        return str(error)
    if isinstance(error, InstantiationException):
        cause = error.__cause__ or error
        known = None if isinstance(cause, InstantiationException) else describe_failure(cast(Exception, cause))
        place = str(error).rpartition("full_key: ")[2].strip()
        return (
            known
            or f"{place} cannot be built from its settings ({first_sentence(cast(Exception, cause))}): correct them."
        )
    if isinstance(error, ModuleNotFoundError):
        return describe_missing(error, "This run")
    if isinstance(error, OSError) and error.errno in _REFUSED_WRITES:
        return str(refused_write(error.filename or "A file of this run", error))
    if is_out_of_memory(error):
        asked_for = _ASKED_FOR.search(str(error))
        return (
            f"This machine ran out of memory{f' ({asked_for[0].lower()})' if asked_for else ''}: train with a smaller "
            "data.batch_size or activation_memory_gib, or with experiment=small_memory; sample and evaluate smaller "
            "pictures or batches."
        )
    return None


def plain(config: DictConfig) -> dict[str, Any]:
    """A config as a plain dict, its interpolations resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def under_root(root: str | Path, path: str | Path | None) -> Path | None:
    """A path of a config: relative ones are meant from the project root."""
    return None if path is None else Path(root) / Path(path).expanduser()


def build_teacher(config: DictConfig) -> Teacher:
    """The teacher of `config.teacher`, its blocks compiled as `config.compile` says; see configs/teacher."""
    source = {key: config.teacher[key] for key in ("hub_id", "revision", "dtype", "device")}
    random = None if config.teacher.random is None else plain(config.teacher.random)
    teacher = load_teacher(under_root(config.root, config.teacher.path), random=random, **source)
    transformer = teacher.pipeline.transformer
    compile_blocks(transformer, compile_backend(config.compile, transformer.device))
    return teacher


def build_prompts(prompts: DictConfig, root: str | Path) -> PromptSource:
    """The prompts of a config; see configs/prompts.

    A path that exists under the project root is that file, any other a name.
    """
    arguments = plain(prompts)
    local = under_root(root, arguments["path"])
    if local is not None and (local.exists() or arguments["source"] != "dataset"):
        arguments["path"] = str(local)
    return prompt_source(arguments)


def build_data(config: DictConfig, teacher: Teacher, *, progress: bool = True) -> "SampleDataModule":
    """The samples that `config.data` asks for, generated as far as they are missing; see configs/data."""
    from linearize.data.datamodule import SampleDataModule  # Lightning takes seconds to import, training alone needs it

    data, (rank, world_size) = config.data, process_place()
    folders = ensure_samples(
        teacher,
        build_prompts(data.prompts, config.root),
        GenerationSettings.from_config(plain(data.generation)),
        path=under_root(config.root, data.path),
        num_samples=data.num_samples,
        cache=Path(config.root) / data.cache,
        rank=rank,
        world_size=world_size,
        progress=progress,
    )
    names = ("batch_size", "num_samples", "val_share", "val_batch_size", "seed", "shuffle_shards", "num_workers")
    arguments = {name: data[name] for name in names}
    return SampleDataModule(folders, teacher=(teacher.name, teacher.weight_hash), **arguments)
