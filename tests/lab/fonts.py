"""The font of the page's pictures: that of Debian 12's package, on every host.

Letters of another version are wider or narrower: lines break elsewhere, and no picture is like before.
"""

import os
import shutil
import tempfile
from pathlib import Path

from tests.lab.foreign import make_apt
from tests.lab.image import cache_directory, call, only, publish
from tests.lab.tree import find_mirror

PACKAGE = "fonts-inter"
VERSION = "4.0~beta7+ds-1"
_FONTS = "usr/share/fonts/opentype/inter"


def find_fonts() -> Path:
    """Return the directory of its files, fetched if need be.

    Raises:
        ImageError: the archive does not have this version of the package.
    """
    directory = cache_directory() / f"{PACKAGE}-{VERSION}"
    if not directory.exists():
        with tempfile.TemporaryDirectory(dir=cache_directory()) as scratch:
            Path(scratch).chmod(0o755)  # apt's download user must reach it
            fetched, unpacked = Path(scratch) / "packages", Path(scratch) / "unpacked"
            fetched.mkdir(mode=0o755)
            if os.getuid() == 0:
                shutil.chown(fetched, "_apt")
            mirror, _release = find_mirror()
            apt = make_apt("amd64", Path(scratch), mirror)  # the files are the same for every architecture
            call(*apt, "apt-get", "update", "-qq")
            call(*apt, "apt-get", "download", f"{PACKAGE}={VERSION}", directory=fetched)
            call("dpkg-deb", "--extract", str(only(fetched.iterdir(), what="package")), str(unpacked))
            publish(unpacked / _FONTS, directory)
    return directory


if __name__ == "__main__":
    if shutil.which("chromium") is None:
        print("no chromium: the page is not tested here")
    else:
        find_fonts()
