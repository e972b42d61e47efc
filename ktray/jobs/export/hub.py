"""The export on the Hugging Face hub: one commit with the files of the folder and the model card."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from ktray.errors import KtrayError
from ktray.recipe.export import ExportConfig
from ktray.redact import scrub

logger = logging.getLogger("ktray")

BRANCH = "main"
_DENIED = (401, 403, 404)


def push(part: ExportConfig, folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Upload an export to ``export.push``. The same files again make no new commit.

    Args:
        part: the section ``export`` of the recipe.
        folder: the local folder of the export; all its files are uploaded.
        content: the content of ``export.json``.

    Returns:
        ``repository``, ``revision``, ``commit`` and ``url``.

    Raises:
        KtrayError: the hub does not answer or refuses the upload. The export itself is complete.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError

    repository, _, branch = str(part.push).partition("@")
    revision = branch or BRANCH
    api = huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None, library_name="ktray")
    try:
        # Without a token, the hub answers as if the repository did not exist.
        if not huggingface_hub.get_token():
            raise LocalTokenNotFoundError("there is no token")
        api.create_repo(repository, private=part.private, exist_ok=True)
        if revision != BRANCH:
            api.create_branch(repository, branch=revision, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            commit_message=f"{content['student']['name']}, run {content['run_id']}, exported by ktray",
        )
    except Exception as error:  # the hub's client and its network library raise many types
        status = getattr(getattr(error, "response", None), "status_code", None)
        text = str(scrub(" ".join(str(error).split("\n")[0].split())))[:200].rstrip(".") or type(error).__name__
        denied = status in _DENIED or isinstance(error, LocalTokenNotFoundError)
        remedy = (
            f"Set HF_TOKEN to a token that may write to {repository}, then run the same command again."
            if denied
            else "Check the network and HF_ENDPOINT, then run the same command again."
        )
        raise KtrayError(f"The export is written, but not uploaded to {repository}: {text}", remedy) from error
    url = f"{api.endpoint}/{repository}"
    logger.info(f"hub       {url} has the export (commit {str(done.oid)[:8]})")
    return {"repository": repository, "revision": revision, "commit": str(done.oid), "url": url}
