#!/bin/sh
# Installs the distribution packages that `make demo` needs, or those of `make setup` and `make test`, and only those that
# are missing: with nothing missing, apt is not called. Starts, enables and configures no service.
#
#   tests/lab/packages.sh demo                  a third of all: to build, and to run one guest
#   PYTHON=python3.12 tests/lab/packages.sh     all; the interpreter that the virtual environment will use; empty or
#                                               unset where none is new enough: then a newer one is installed
set -eu

# To build libvirt-python, which comes as source only.
BUILD="gcc libc6-dev libvirt-dev pkg-config"
# To run a guest. The guest's own files come from packages that are downloaded, never installed (image.py);
# xz and zstd unpack the kernel modules of newer distributions.
GUEST="libvirt-daemon libvirt-daemon-driver-qemu qemu-system-x86 binutils xz-utils zstd"
# Other machines than the host's own.
LAB="$GUEST qemu-system-ppc qemu-system-misc qemu-system-arm"
# To hold the unit file and SECURITY.md to what they promise: systemd-analyze and libseccomp, of which nothing is
# started, and openssl.
UNIT="systemd util-linux openssl"
# To turn a log over as the hosts do.
LOGS="logrotate"
# The front of a node with two agents: conf/zstack. Its service is not started where services may not be.
FRONT="haproxy"
# To see the status page as an operator does; its font is downloaded, never installed (fonts.py). Ubuntu has chromium
# as a snap alone, which needs a service: there these tests are skipped.
BROWSER="chromium chromium-driver"
# shellcheck disable=SC1091
[ "$(. /etc/os-release 2>/dev/null && echo "${ID:-}")" = ubuntu ] && BROWSER=""
# To generate and compile a client for TypeScript, unless Node.js is there, from wherever. Ubuntu 22.04 has one that is
# too old.
NODE="nodejs npm"
if command -v node >/dev/null && command -v npm >/dev/null; then NODE=""; fi
# shellcheck disable=SC1091
[ "$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")" = jammy ] && NODE=""
# To build the Debian package, for the distribution's own python3, and to look into it; a fresh tree to install it in.
# systemd-container boots one.
DEB="build-essential debhelper python3 python3-dev lintian mandoc man-db shellcheck debootstrap systemd-container"
# To build the RPM package and to look into it.
RPM="rpm rpmlint cpio"
# To try completion in each shell.
SHELLS="bash fish zsh"
# To look into the lab by hand.
TOOLS="libvirt-clients"
# What the lab and the build call, for a distribution without apt.
COMMANDS="gcc pkg-config qemu-system-x86_64 qemu-system-ppc64 qemu-system-s390x qemu-system-aarch64 readelf xz zstd systemd-analyze setpriv openssl logrotate haproxy"

say() { printf '==> %s\n' "$*"; }
die() { printf 'packages.sh: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        die "root or sudo is needed to run: $*"
    fi
}

is_installed() {
    [ "$(dpkg-query --show --showformat '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# The packages that the interpreter lacks: headers for libvirt-python, venv and pip for the virtual environment.
python_packages() {
    if [ -z "${PYTHON:-}" ]; then
        # Ubuntu 22.04 has a python3.11 beside its python3, which is 3.10; the others have a python3 that is new enough.
        # shellcheck disable=SC1091
        case "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" in
            jammy) echo "python3.11 python3.11-dev python3.11-venv" ;;
            *) echo "python3 python3-dev python3-venv" ;;
        esac
        return
    fi
    "$PYTHON" - <<'PYTHON_END'
import importlib.util
import os
import sys
import sysconfig

name = f"python{sys.version_info.major}.{sys.version_info.minor}"
headers = os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))
venv = importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")
if sys.base_prefix == "/usr":
    print("" if headers else f"{name}-dev", "" if venv else f"{name}-venv")
elif not (headers and venv):
    sys.exit(f"packages.sh: {sys.executable} has no headers or no venv module, and is not a distribution's: choose another, PYTHON=...")
PYTHON_END
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    missing=""
    for command in $COMMANDS; do
        command -v "$command" >/dev/null || missing="$missing $command"
    done
    pkg-config --exists libvirt 2>/dev/null || missing="$missing libvirt(development files)"
    command -v libvirtd >/dev/null || command -v virtqemud >/dev/null || [ -x /usr/sbin/libvirtd ] ||
        [ -x /usr/sbin/virtqemud ] || missing="$missing libvirtd"
    [ -z "$missing" ] || die "this is no Debian or Ubuntu; please install what is missing by hand:$missing
(on Debian these are the packages: $BUILD $LAB $UNIT $LOGS $FRONT $BROWSER $NODE $DEB $RPM $SHELLS $TOOLS)"
    exit 0
fi

python=$(python_packages)
missing=""
wanted="$BUILD $LAB $UNIT $LOGS $FRONT $BROWSER $NODE $DEB $RPM $SHELLS $TOOLS $python"
[ "${1:-}" != demo ] || wanted="$BUILD $GUEST $python"
for package in $wanted; do
    is_installed "$package" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

say "installing distribution packages:$missing"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# shellcheck disable=SC2086  # a list of words
if ! { as_root apt-get update -qq &&
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq --yes --no-install-recommends $missing; } \
    >"$log" 2>&1; then
    cat "$log" >&2
    die "apt-get failed, its words are above"
fi
