"""Pipelines from the model hub, and what can go wrong on the way, each in one sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from linearize.errors import LinearizeError
from linearize.files import first_sentence


def fetch_index(hub_id: str, revision: str | None) -> Path:
    """Fetches a pipeline's model_index.json; the name of its folder is the commit that the revision resolved to.

    Raises:
        LinearizeError: The hub is unreachable, or the model gated, missing or no pipeline.
    """
    with _hub_errors(hub_id, revision):
        return Path(hf_hub_download(hub_id, "model_index.json", revision=revision))


def fetch_pipeline(pipeline_class: Any, hub_id: str, commit: str) -> Path:
    """Fetches all files of a pipeline, safetensors only, into the hub cache and returns their folder.

    Raises:
        LinearizeError: As `fetch_index`.
    """
    with _hub_errors(hub_id, commit):
        return Path(pipeline_class.download(hub_id, revision=commit, use_safetensors=True))


@contextlib.contextmanager
def _hub_errors(hub_id: str, revision: str | None) -> Iterator[None]:
    """Turns what the hub client raises into one sentence. The order matters.

    A gated repository is also a missing one, and both OSErrors.
    """
    try:
        yield
    except GatedRepoError as error:
        raise LinearizeError(
            f"{hub_id} is gated: accept its licence at https://huggingface.co/{hub_id}, then run `hf auth login` and "
            "start again."
        ) from error
    except RevisionNotFoundError as error:
        raise LinearizeError(
            f"{hub_id} has no revision {revision}: set teacher.revision=null for its main branch."
        ) from error
    except RepositoryNotFoundError as error:
        raise LinearizeError(
            f"{hub_id} is no public model of the hub: check teacher.hub_id, or run `hf auth login` if it is private."
        ) from error
    except FileNotFoundError as error:
        raise LinearizeError(
            f"The hub cannot be reached and {hub_id} is not in the local cache: check the network, or set "
            "teacher.path=<folder of a copy>."
        ) from error
    except EntryNotFoundError as error:
        raise LinearizeError(f"{hub_id} has no model_index.json: give the id of a diffusers pipeline.") from error
    except OSError as error:
        raise LinearizeError(
            f"{hub_id} could not be downloaded ({first_sentence(error)}): check the network and the disk space, or set "
            "teacher.path=<folder of a copy>."
        ) from error
