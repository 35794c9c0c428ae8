"""The Hub as a push meets it: whose token it is, what lies under the name, and one commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, and loaded on first use

from finetune.artifact.run_folder import SETTINGS

ADAPTER_PLACE = "adapter"
"""The folder of the adapter alone, in a repository that holds merged weights."""
# What an earlier push of other weights may have left, and what would then be loaded in the place of the new.
STALE = (
    *("adapter_config.json", "*.safetensors", "*.safetensors.index.json", "generation_config.json"),
    *("modeling_*.py", "configuration_*.py", "chat_template.jinja"),
)
EMPTY = (".gitattributes", "README.md")
"""What a repository that holds no model has: its page makes them."""
TOKEN_PAGE = "https://huggingface.co/settings/tokens"
REASONS = {
    401: "the token is not valid (401)",
    403: "the token may not do that (403)",
    404: "there is no such repository, or the token may not see it (404)",
    409: "somebody else is changing it, or has taken its name (409)",
    413: "a file is too large (413)",
    429: "too many requests (429)",
}


@dataclass(frozen=True)
class Repository:
    """What lies under a name.

    Args:
        head: its newest commit; None where there is no repository.
        private: whether only its owners see it.
        files: paths in it.
    """

    head: str | None = None
    private: bool = False
    files: Sequence[str] = ()


@dataclass(frozen=True)
class Commit:
    """The commit that a repository has after a push.

    Args:
        oid: 40 hex digits.
        url: its page.
        is_new: False where every file was there already.
    """

    oid: str
    url: str
    is_new: bool


def check_name(repo: str) -> str | None:
    """What is wrong with a name; None if nothing is."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        return f"{repo!r}: must be a name that the Hub takes, got one that it does not: {error}"
    if "/" not in repo:
        return f"{repo!r}: must be owner/name, got no owner. Write your user name or an organization before it."
    return None


def check_account(api: HfApi, repo: str) -> list[str]:
    """What keeps the token of this machine from writing to a repository; each with its fix.

    Raises:
        Exception: whatever the client raises when the Hub does not answer.
    """
    if constants.is_offline_mode():
        return ["HF_HUB_OFFLINE: must be unset to push, got offline mode. Unset it, or add --dry-run."]
    if get_token() is None:
        return [
            f"token: must be there to push, got none. Make one that may write at {TOKEN_PAGE} and set HF_TOKEN, or: "
            "hf auth login"
        ]
    try:
        account = api.whoami()
    except HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        return [f"token: must be valid, got one that the Hub does not know (401). Make a new one at {TOKEN_PAGE}"]
    return _check_rights(account, repo)


def look_up(api: HfApi, repo: str) -> tuple[Repository, list[str]]:
    """What lies under a name, and what of it forbids a push.

    Raises:
        Exception: whatever the client raises when the Hub does not answer.
    """
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        return Repository(), [
            f"{repo}: must be a free name or a model, got a {kind}. Choose another name."
            for kind in ("dataset", "space")
            if api.repo_exists(repo, repo_type=kind)
        ]
    files = [file.rfilename for file in info.siblings or []]
    found = Repository(info.sha, bool(info.private), files)
    others = [name for name in files if name not in EMPTY]
    if others and SETTINGS not in files:
        return found, [
            f"{repo}: must be new, empty or pushed by this toolkit, got a model of another origin ({others[0]}). "
            "Choose another name."
        ]
    return found, []


def is_stale(name: str, pushed: set[str]) -> bool:
    """Whether a file in a repository would be loaded in the place of what is pushed, or beside it."""
    folder, _, last = name.rpartition("/")
    return name not in pushed and folder in ("", ADAPTER_PLACE) and any(fnmatchcase(last, part) for part in STALE)


def commit(
    api: HfApi, repo: str, found: Repository, files: Mapping[str, Path], *, private: bool, message: str
) -> Commit:
    """Make the repository if there is none, and put all files into it by one commit.

    What the Hub has is not sent again, and where nothing changed there is no commit.

    Args:
        api: with a token that may write.
        repo: owner/name.
        found: what lies there.
        files: path in the repository -> file.
        private: whether a new one is.
        message: of the commit.

    Raises:
        Exception: whatever the client raises; nothing of the repository changed then.
    """
    if found.head is None:
        api.create_repo(repo, private=private)
    additions = [CommitOperationAdd(name, path) for name, path in files.items()]
    stale = [CommitOperationDelete(name) for name in found.files if is_stale(name, set(files))]
    done = api.create_commit(repo, [*additions, *stale], commit_message=message)
    return Commit(done.oid, str(done.commit_url), done.oid != found.head)


def describe_failure(error: BaseException) -> str:
    """Why the Hub did not take something, in words: its own where it has any."""
    while not isinstance(error, HfHubHTTPError) and error.__cause__ is not None:
        error = error.__cause__  # the client wraps what happened to one file
    if not isinstance(error, HfHubHTTPError):
        return (
            f"a connection that broke ({type(error).__name__}: {' '.join(str(error).split())[:200] or 'no more said'})"
        )
    status = error.response.status_code
    words = REASONS.get(status, f"the Hub failed ({status})" if status >= 500 else f"the Hub refused ({status})")
    wait = error.response.headers.get("Retry-After")
    said = f": {error.server_message}" if error.server_message else ""
    return words + said + (f"; it asks to wait {wait} s" if wait else "")


def _check_rights(account: Mapping[str, Any], repo: str) -> list[str]:
    """What a token and its user may do, as `whoami` tells it."""
    user, owner = str(account.get("name", "")), repo.partition("/")[0]
    token = account.get("auth", {}).get("accessToken", {})
    if token.get("role") == "read":
        return [f"token: must be allowed to write, got one that may only read. Make another at {TOKEN_PAGE}"]
    if check_name(repo):  # told elsewhere
        return []
    organizations = {org["name"].lower(): org.get("roleInOrg") for org in account.get("orgs", [])}
    if owner.lower() not in {user.lower(), *organizations}:
        others = f" and {', '.join(sorted(organizations))}" if organizations else ""
        return [f"{repo}: must belong to whoever the token belongs to, which is {user}{others}. Choose one of them."]
    if organizations.get(owner.lower()) == "read":
        return [f"{repo}: must belong to who lets {user} write, got {owner}, where they may only read. Ask its owners."]
    if token.get("role") == "fineGrained" and not _grants_write(token.get("fineGrained", {}), repo):
        return [f"token: must be allowed to write to {owner}, got one that may not. Change its rights at {TOKEN_PAGE}"]
    return []


def _grants_write(rights: Mapping[str, Any], repo: str) -> bool:
    names = {repo.lower(), repo.partition("/")[0].lower()}
    return any(
        str(scope.get("entity", {}).get("name", "")).lower() in names and "repo.write" in scope.get("permissions", [])
        for scope in rights.get("scoped", [])
    )
