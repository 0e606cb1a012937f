"""To the hub: one commit with exactly the files that are listed."""

from collections.abc import Mapping

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from diffusionopd.config_schema import redacted
from tools.publishing.content import PublishError

_OF_THE_HUB = {".gitattributes"}  # in a repository that is new
_TOKEN = "log in with `hf auth login`, or set HF_TOKEN, with the right to write"  # noqa: S105


def check_name(repo: str) -> None:
    """PublishError unless it can be the name of a repository, `owner/name`."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise PublishError(f"{repo!r} is no owner/name on the hub: {error}") from error
    if repo.count("/") != 1:
        raise PublishError(f"{repo!r} is no owner/name on the hub")


def check_token() -> None:
    """PublishError without a token for the hub."""
    if get_token() is None:
        raise PublishError(f"there is no token for the hub: {_TOKEN}")


def upload(repo: str, files: Mapping[str, bytes], *, private: bool = False, overwrite: bool = False) -> str:
    """Commit the files to a model repository, made if it is not there; returns the commit's address.

    Args:
        private: a new repository is; one that is there must be.
        overwrite: replace what is published there under the same names; other files stay.

    Raises:
        PublishError: no token, the hub refuses or is not reached, or something is there that must stay.
    """
    check_token()
    try:
        return _upload(HfApi(), repo, files, private, overwrite)
    except PublishError:
        raise
    except (HTTPError, OSError, ValueError) as error:  # of the connection, of the hub, of a header that it refuses
        text = " ".join(redacted(error).split()) or type(error).__name__
        raise PublishError(f"{repo} was not published: {text} If it is the token: {_TOKEN}") from error


def _upload(api: HfApi, repo: str, files: Mapping[str, bytes], private: bool, overwrite: bool) -> str:
    try:
        info = api.model_info(repo)
        there = {file.rfilename for file in info.siblings or ()} - _OF_THE_HUB
        if private and not info.private:
            raise PublishError(f"{repo} is public: publish under another name, or make it private on the hub first")
    except RepositoryNotFoundError:
        there = set()
    if there and not overwrite:
        raise PublishError(
            f"{repo} has files already ({', '.join(sorted(there))}): publish under another name, or replace those of "
            "the same names with --overwrite"
        )
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return str(api.create_commit(repo, operations, commit_message="Publish the student").commit_url)
