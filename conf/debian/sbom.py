"""Writes the bill of materials of the package: CycloneDX 1.6, JSON. Run by build.sh.

    sbom.py REPORT SITE_PACKAGES DEB     REPORT: what pip says that it installed, and by which archives
                                         SITE_PACKAGES: where that is now; DEB: the package

What the distribution brings (Python, libvirt, OpenSSL) is in the package's Depends, and not here.
"""

import hashlib
import json
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

SPDX = {"Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MIT", "MPL-2.0", "PSF-2.0"}


def field(deb: Path, name: str) -> str:
    """A field of the package's control file."""
    done = subprocess.run(["dpkg-deb", "--field", str(deb), name], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def describe(name: str, version: str, purl: str, sha256: str, licence: dict[str, Any]) -> dict[str, Any]:
    """A component."""
    hashes = [{"alg": "SHA-256", "content": sha256}]
    return {"bom-ref": purl, "name": name, "version": version, "hashes": hashes, "licenses": [licence], "purl": purl}


def licence_of(found: Distribution) -> dict[str, Any]:
    """The licence that a distribution declares; older ones do it in words."""
    if expression := found.metadata.get("License-Expression"):
        return {"expression": expression}
    classifiers = found.metadata.get_all("Classifier") or []
    words = [one.rpartition(" :: ")[2] for one in classifiers if one.startswith("License ::")]
    declared = found.metadata.get("License") or ", ".join(words) or "see its files"
    name = declared.strip().splitlines()[0][:200]
    return {"license": {"id": name} if name in SPDX else {"name": name}}


def needs_of(found: Distribution) -> set[str]:
    """The names of what a distribution needs on this Python."""
    wanted = (Requirement(line) for line in found.requires or ())
    return {canonicalize_name(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}


def make_bom(report: dict[str, Any], site_packages: Path, deb: Path, *, made_at: int) -> dict[str, Any]:
    """The document. It is the same for the same package."""
    archives = {
        canonicalize_name(one["metadata"]["name"]): one["download_info"]["archive_info"]["hash"].partition("=")[2]
        for one in report["install"]
    }
    installed = {
        canonicalize_name(one.metadata["Name"]): one
        for one in distributions(path=[str(site_packages)])
        if canonicalize_name(one.metadata["Name"]) != "kvmagent"
    }
    purls = {name: f"pkg:pypi/{name}@{one.version}" for name, one in sorted(installed.items())}
    version = field(deb, "Version")
    own = f"pkg:generic/kvmagent@{version}?arch={field(deb, 'Architecture')}"
    digest = hashlib.sha256(deb.read_bytes()).hexdigest()
    (agent,) = distributions(name="kvmagent", path=[str(site_packages)])
    needed = {own: needs_of(agent), **{purls[name]: needs_of(one) for name, one in installed.items()}}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, digest)}",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(made_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                **describe("kvmagent", version, own, digest, {"license": {"id": "Apache-2.0"}}),
            },
        },
        "components": [
            {"type": "library", **describe(name, one.version, purls[name], archives[name], licence_of(one))}
            for name, one in sorted(installed.items())
        ],
        "dependencies": [
            {"ref": ref, "dependsOn": sorted(purls[name] for name in names & purls.keys())}
            for ref, names in needed.items()
        ],
    }


if __name__ == "__main__":
    pip_report, packages, made, at = sys.argv[1:]
    bom = make_bom(json.loads(Path(pip_report).read_text()), Path(packages), Path(made), made_at=int(at))
    sys.stdout.write(json.dumps(bom, indent=2) + "\n")
