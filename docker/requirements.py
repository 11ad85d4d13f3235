"""Which requirements of nemo_eppo an image does not meet yet; docker/install.sh installs them.

requirements.py missing actor|server [EXTRAS]   one per line; an error if the image itself should have brought it
requirements.py frozen                          NAME==VERSION of what must not change, for pip's --constraint
"""

import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# Built together in NVIDIA's images, for their CUDA and drivers: installing another version would break them.
FROM_IMAGE = {"torch", "megatron-core", "nemo-toolkit"}
# Only the PyTriton servers need these. The actor speaks gRPC to them and runs with numpy 2 as well.
SERVERS_ONLY = {"numpy", "nvidia-pytriton"}


def required(kind: str, extras: set[str]) -> list[Requirement]:
    """What setup.py asks for, of a kind of job."""
    found = [Requirement(line) for line in requires("nemo_eppo") or []]
    wanted = [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": x}) for x in {"", *extras})]
    return [r for r in wanted if kind == "server" or canonicalize_name(r.name) not in SERVERS_ONLY]


def installed(name: str) -> str | None:
    """The version that an import would find."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def missing(kind: str, extras: set[str]) -> list[Requirement]:
    """What is absent or of a wrong version. NVIDIA's versions look like 2.10.0a0+b4e4ee81d3.nv25.12."""
    lacking = []
    for requirement in required(kind, extras):
        version = installed(requirement.name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            continue
        if canonicalize_name(requirement.name) in FROM_IMAGE:
            has = f"has {version}" if version else "does not have it"
            sys.exit(f"requirements: the image has to bring {requirement}, but {has}; choose another BASE")
        lacking.append(requirement)
    return lacking


def frozen() -> list[str]:
    """What is installed, first found first, as constraints. The versions that are to be replaced are left out."""
    first: dict[str, Distribution] = {}
    for found in distributions():
        first.setdefault(canonicalize_name(found.name), found)
    replaced = {canonicalize_name(r.name) for r in missing("server", set())}
    return sorted(f"{name}=={found.version}" for name, found in first.items() if name not in replaced)


if __name__ == "__main__":
    if sys.argv[1] == "frozen":
        print("\n".join(frozen()))
    else:
        asked = {extra for extra in "".join(sys.argv[3:]).split(",") if extra}
        for needed in missing(sys.argv[2], asked):
            print(f"{needed.name}{needed.specifier}")
