"""The one error of this folder, and how other libraries' failures become it."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from routing.errors import UserError

_UNWRITABLE = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
}


class DataError(UserError):
    """Data that can't be used: says what was given, what is valid and what to do."""


@contextmanager
def data_errors(cache_dir: Path) -> Iterator[None]:
    """Make the failures within the block readable.

    `datasets` wraps whatever goes wrong inside it in exceptions of its own; the DataError at the bottom is
    the one worth reading. Sources report their own unreadable files, so an operating system's refusal that
    arrives here bare is the cache's.

    Raises:
        DataError: the one that `datasets` wrapped, or one that names a `cache_dir` which can't be written.
    """
    try:
        yield
    except Exception as error:
        for cause in _causes(error):
            if isinstance(cause, DataError):
                raise cause from None
            if isinstance(cause, OSError) and cause.errno in _UNWRITABLE:
                raise DataError(
                    f"the data cache {cache_dir} can't be written: {cause}; free some space, or set "
                    "data.cache_dir to a folder that you may write to"
                ) from error
        raise


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__
