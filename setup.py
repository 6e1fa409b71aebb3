"""Packaging: metadata, what is installed, and the entry points. Tool settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "kvmagent/__init__.py").read_text()).group(1)

# What the fast tests need, on each Python.
FAST = ["hypothesis>=6.100", "pytest>=8.0", "pytest-xdist>=3.6", "pyyaml>=6.0", "trustme>=1.1"]

setup(
    name="kvmagent",
    version=VERSION,
    license="Apache-2.0",
    license_files=["LICENSE"],
    author="the kvmagent maintainers, by the project's issue tracker",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: System :: Systems Administration",
        "Typing :: Typed",
    ],
    description="Host agent for live CPU and memory hotplug of KVM guests",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["kvmagent", "kvmagent.*"]),
        "kvmagent_plugins",
        "kvmagent_plugins.host",
        "kvmagent_plugins.vm",
    ],
    package_dir={"kvmagent_plugins": "plugins"},
    package_data={
        "kvmagent": ["py.typed"],
        "kvmagent_plugins": ["py.typed"],
        "kvmagent.api.page": ["*.html", "*.css", "*.js", "*.svg"],
    },
    install_requires=[
        # Internals of these two are used: a newer one is let in once the tests have passed with it.
        "cheroot>=10.0,<12",
        "cherrypy>=18.8,<19",
        "click>=8.1",
        "cryptography>=42",
        "libvirt-python>=8.0",
        "lxml>=4.9",
        "msgspec>=0.18",
        "prometheus_client>=0.19",
        "simplejson>=3.17",
        "urllib3>=2.0",
    ],
    extras_require={
        "audit": ["pip-audit>=2.7"],
        "bench": ["py-spy>=0.3.14"],
        "fuzz": ["atheris>=2.3"],
        "fast": FAST,
        "lock": ["uv>=0.9"],
        "test": [
            *FAST,
            "ansible-core>=2.17",
            "ansible-lint>=24.2",
            "cyclonedx-python-lib>=8.0",
            "lxml-stubs",
            "mypy>=1.10",
            "openapi-python-client>=0.29.1",
            "pillow>=10.0",
            "ruff>=0.6",
            "schemathesis>=4.0",
            "selenium>=4.20",
            "setuptools>=70.1",
            "types-simplejson",
        ],
    },
    entry_points={
        "console_scripts": ["kvmagent = kvmagent.cli.daemon:main", "kvmagentctl = kvmagent.cli.ctl.main:main"],
        "kvmagent.plugins": [
            "host = kvmagent_plugins.host_plugin:PLUGIN",
            "vm = kvmagent_plugins.vm_plugin:PLUGIN",
        ],
    },
    data_files=[
        (
            "share/kvmagent/conf",
            [
                "conf/kvmagent.conf",
                "conf/50-kvmagent.rules",
                "conf/60-kvmagent-access.rules",
                "conf/kvmagent.sysusers",
            ],
        ),
        ("share/kvmagent/conf/logrotate.d", ["conf/logrotate.d/kvmagent"]),
        (
            "share/kvmagent/conf/prometheus",
            ["conf/prometheus/kvmagent.rules.yml", "conf/prometheus/kvmagent.recording.yml"],
        ),
        ("share/kvmagent/conf/grafana", ["conf/grafana/kvmagent.json"]),
        ("share/kvmagent/init.d", ["init.d/kvmagent", "init.d/kvmagent.service"]),
    ],
)
