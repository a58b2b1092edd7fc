"""Room on the disk, asked for before a write.

Delta's writer survives a full disk without damage, but its threads panic onto standard error; a write that
cannot fit is refused before it starts.
"""

import errno
import os
import resource
import shutil

_SPARE_BYTES = 256 << 10
"""For the commit, the checkpoint and the footer of the file."""


def require_space(uri: str, nbytes: int) -> None:
    """Raise OSError (ENOSPC) when the local folder ``uri`` cannot take ``nbytes``; a store is not asked.

    The process's limit on file sizes counts too (EFBIG).
    """
    if "://" in uri:
        return
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if shutil.disk_usage(uri).free < nbytes + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), uri)
    if allowed != resource.RLIM_INFINITY and allowed < nbytes + _SPARE_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), uri)
