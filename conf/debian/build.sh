#!/bin/sh
# Builds kvmagent_<version>_<arch>.deb in a copy of the sources, since Debian's tools want debian/ at the top; and its
# bill of materials beside it, kvmagent_<version>_<arch>.cdx.json.
#
#   conf/debian/build.sh PYTHON DIRECTORY     PYTHON: of the environment that the tests ran in, which lends its pip.
#                                             DIRECTORY: where the package goes. What is in it, conf/locked says.
set -eu

python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.."

copy=$(mktemp --directory --tmpdir kvmagent-deb.XXXXXX)
trap 'rm -rf "$copy"' EXIT
source=$copy/kvmagent
mkdir "$source"
cp -R setup.py pyproject.toml LICENSE README.md SECURITY.md CHANGELOG.md kvmagent plugins conf init.d docs "$source"
cp -R conf/debian "$source/debian"
find "$source" -name __pycache__ -prune -exec rm -rf {} +

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' kvmagent/__init__.py)-1
# The date of what is built, not of the build: the same sources make the same package.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat --format=%Y CHANGELOG.md)}
export SOURCE_DATE_EPOCH
{
    echo "kvmagent ($version) unstable; urgency=medium"
    echo
    # The newest section of CHANGELOG.md: a line for each entry, its headings in brackets, then folded.
    sed -n '/^## /,$p' CHANGELOG.md | sed '1d; /^## /,$d; s/^##* \(.*\)/[ \1 ]/; s/^- /* /; s/^  */ /' |
        awk '/^$/ || /^[*[]/ { if (text) print "  " text; text = "" } { text = text (text && !/^ / ? " " : "") $0 } END { if (text) print "  " text }' |
        fold --spaces --width 76 | sed 's/^[^ ]/    &/; s/ *$//'
    echo
    echo " -- $(sed -n 's/^Maintainer: //p' conf/debian/control)  $(LC_ALL=C date --utc --rfc-email --date "@$SOURCE_DATE_EPOCH")"
} >"$source/debian/changelog"

log=$copy/log
if ! (cd "$source" && PIP="$python -m pip" TMPDIR="$copy" dpkg-buildpackage --build=binary --no-sign) >"$log" 2>&1; then
    cat "$log" >&2
    echo "build.sh: the package could not be built, see above" >&2
    exit 1
fi
deb=$(ls "$copy"/kvmagent_*.deb)
bom=$(basename "$deb" .deb).cdx.json
"$python" conf/debian/sbom.py "$source/debian/installed.json" "$source"/debian/kvmagent/usr/lib/kvmagent/lib/python3*/site-packages \
    "$deb" "$SOURCE_DATE_EPOCH" >"$copy/$bom"
cp "$deb" "$copy/$bom" "$out"
ls "$out"/kvmagent_"$version"_*.deb "$out/$bom"
