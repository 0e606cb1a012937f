"""Repositories of the Hugging Face hub, into the cache that every library reads. The hub's client resumes and verifies.

`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and the usual proxy variables apply.
"""

from __future__ import annotations

from tools.downloads.catalogue import Repository
from tools.downloads.errors import DownloadError, redacted


def snapshot(repository: Repository) -> None:
    """Load what is missing of a repository.

    Raises:
        DownloadError: the licence is not accepted, no such repository, no connection; with the remedy.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    page = f"https://huggingface.co/{repository.name}"
    try:
        snapshot_download(
            repository.name, allow_patterns=list(repository.patterns), ignore_patterns=list(repository.ignore)
        )
    except (GatedRepoError, RepositoryNotFoundError) as error:  # the second is also what a refused token looks like
        known = "asks for its licence to be accepted" if isinstance(error, GatedRepoError) else "is not accessible"
        raise DownloadError(
            f"{repository.name} {known}: accept the licence at {page}, then run `hf auth login` or set HF_TOKEN"
        ) from None
    except Exception as error:  # the client lets errors of several libraries through
        first_line = next(iter(str(error).splitlines()), "")
        raise DownloadError(
            f"{repository.name} cannot be loaded ({type(error).__name__}: {redacted(first_line)}). Check the "
            "connection, HF_ENDPOINT and HF_HUB_OFFLINE; the same command goes on from what has arrived"
        ) from None
