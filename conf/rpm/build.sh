#!/bin/sh
# Builds kvmagent-<version>-1.<arch>.rpm for the Python that is named, on the distribution that it is for.
#
#   conf/rpm/build.sh PYTHON DIRECTORY      PYTHON: the system's, 3.11 or newer: /usr/bin/python3.12, say. DIRECTORY:
#                                           where the package goes
#
# PIP is another pip. What is in the package, conf/locked says.
set -eu

python=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
pip=${PIP:-$python -m pip}
cd "$(dirname "$0")/../.."

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' kvmagent/__init__.py)
top=$(mktemp --directory --tmpdir kvmagent-rpm.XXXXXX)
trap 'rm -rf "$top"' EXIT
source=$top/kvmagent-$version
mkdir -p "$source" "$top/SOURCES"
cp -R setup.py pyproject.toml LICENSE README.md SECURITY.md CHANGELOG.md kvmagent plugins conf init.d docs "$source"
find "$source" -name __pycache__ -prune -exec rm -rf {} +
tar -C "$top" -czf "$top/SOURCES/kvmagent-$version.tar.gz" "kvmagent-$version"

# Where the packages of the host are not RPM's, what the build needs cannot be looked up there.
nodeps=""
[ -n "$(rpm --query --all --last 2>/dev/null | head -n 1)" ] || nodeps=--nodeps
if ! rpmbuild -bb $nodeps --define "_topdir $top" --define "version $version" --define "python $python" \
    --define "pip $pip" conf/rpm/kvmagent.spec >"$top/log" 2>&1; then
    cat "$top/log" >&2
    echo "build.sh: the package could not be built, see above" >&2
    exit 1
fi
cp "$top"/RPMS/*/kvmagent-"$version"-*.rpm "$out"
ls "$out"/kvmagent-"$version"-*.rpm
