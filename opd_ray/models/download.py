"""Where the files of a model or LoRA are: a folder here, or a hub repository, downloaded once per node.

Every part comes through here, so that a gated model or a missing network reads the same wherever it
shows. The cache is huggingface_hub's own, with its locks: processes that want the same file wait for
the first of them.
"""

import logging
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from opd_ray.errors import ModelError

__all__ = ["Source"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
VARIANTS = ("*.fp16*", "*.bf16*", "*.non_ema*")
"""Second copies of the weights, which nothing here loads."""
DEPTHS, SEEN, SHOWN = ("*", "*/*", "*/*/*", "*/*/*/*"), 2000, 12
"""How far a folder is searched for what a message lists, and how much of it is listed."""
# Its HTTP library's root error, which is no OSError; which library that is depends on the version.
HTTP_ERROR = cast(type[Exception], HfHubHTTPError.__bases__[0])
CHECKED_OUT: dict[tuple[str, str | None], Path] = {}
"""(repository, revision) -> the cache's folder of the commit it stood for first: a process reads all parts of one."""


@dataclass(frozen=True, slots=True)
class Source:
    """A folder or hub repository, and the subfolder of it that counts."""

    what: str
    """For messages: whose files they are."""
    place: str
    """A folder, or a hub id."""
    revision: str | None = None
    subfolder: str | None = None

    def fetch(self, *patterns: str) -> Path:
        """The subfolder, with what there is of the files that match.

        Args:
            patterns: relative to the subfolder; ``*`` also stands for ``/``.

        Raises:
            ModelError: neither a folder nor a hub repository that can be read.
        """
        place = Path(self.place)
        if not place.is_dir():
            self._require_hub_id()
            place = self._download([self._inside(pattern) for pattern in patterns])
        return place / (self.subfolder or "")

    def files(self) -> list[str]:
        """Names of all files below the top folder, with ``/``, as far as they can be listed."""
        place = Path(self.place)
        if not place.is_dir():
            place = CHECKED_OUT[self.place, self.revision]
            try:
                told = HfApi().model_info(self.place, revision=place.name, timeout=constants.HF_HUB_ETAG_TIMEOUT)
                return sorted(sibling.rfilename for sibling in told.siblings or ())
            except (HTTP_ERROR, OSError):  # then what is in the cache
                pass
        found = (path for depth in DEPTHS for path in place.glob(depth) if path.is_file())
        return sorted(path.relative_to(place).as_posix() for path in islice(found, SEEN))

    def lacking(self, pattern: str) -> str:
        """That no file of the subfolder matches, and where such a file is."""
        if not Path(self.place).is_dir() and constants.HF_HUB_OFFLINE:
            return self._offline(self._inside(pattern))
        depth = pattern.count("/") + 1
        parts = [file.split("/") for file in self.files()]
        homes = {"/".join(part[:-depth]) for part in parts if fnmatch("/".join(part[-depth:]), pattern)}
        here = f"subfolder {self.subfolder!r}" if self.subfolder else "its top folder"
        if homes:
            return f"{here} has no {pattern}; give one of these subfolders: {_listed(homes)}"
        return f"{here} has no {pattern}; its folders are {_listed({part[0] for part in parts if len(part) > 1})}"

    def _inside(self, pattern: str) -> str:
        return f"{self.subfolder}/{pattern}" if self.subfolder else pattern

    def _require_hub_id(self) -> None:
        if not HUB_ID.fullmatch(self.place):
            raise ModelError(f"{self.what}: there is no such file or folder, and it is no hub id (owner/name)")

    def _download(self, patterns: list[str]) -> Path:
        """The repository's folder in the cache."""
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would hide the one line that counts
        key = (self.place, self.revision)
        known = CHECKED_OUT.get(key)
        try:
            folder = Path(
                snapshot_download(
                    self.place,
                    revision=known.name if known else self.revision,
                    allow_patterns=patterns,
                    ignore_patterns=list(VARIANTS),
                    tqdm_class=None if any("*" in pattern for pattern in patterns) else _Silent,
                )
            )
        except (HTTP_ERROR, OSError, ValueError) as error:
            why = self._explain(error, patterns[0] if patterns else "it")
            raise ModelError(f"{self.what} is no folder here, and {why}") from error
        return CHECKED_OUT.setdefault(key, folder)

    def _explain(self, error: Exception, wanted: str) -> str:
        page = f"https://huggingface.co/{self.place}"
        allow = f"accept the licence at {page} and set HF_TOKEN on the workers"
        if isinstance(error, GatedRepoError):
            return f"on the hub it is gated: {allow}"
        if isinstance(error, RepositoryNotFoundError):
            return f"{constants.ENDPOINT} has no such repository, or it is private: check the name, or {allow}"
        if isinstance(error, RevisionNotFoundError):
            return f"on the hub it has no revision {self.revision!r}: give a branch, tag or commit of {page}"
        if constants.HF_HUB_OFFLINE:
            return self._offline(wanted)
        cause = error.__cause__ or error
        if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
            return f"the hub refuses this token ({cause.response.status_code}): {allow}"
        text = " ".join(str(cause).split())
        return (
            f"{constants.ENDPOINT} does not give {wanted} ({type(cause).__name__}: {text[:200]}), which is not in the "
            "cache either: check the network and HF_ENDPOINT, or give a folder"
        )

    def _offline(self, wanted: str) -> str:
        return (
            f"HF_HUB_OFFLINE is set while {wanted} is not in the cache: unset it, or fill the cache with "
            f"`hf download {self.place}`"
        )


class _Silent(tqdm):
    """No progress bars for single small files."""

    def __init__(self, *args: object, **options: object) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def _listed(folders: set[str]) -> str:
    names = [name or "none (the top folder)" for name in sorted(folders)]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return (", ".join(names[:SHOWN]) or "none") + more
