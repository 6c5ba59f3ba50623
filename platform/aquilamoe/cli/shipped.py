"""Where the files are that travel with the package: configurations and kept studies."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def _folder(in_wheel: str, in_checkout: str) -> Path:
    """A folder of an installed wheel, or of the checkout that `platform/` belongs to."""
    installed = PACKAGE / in_wheel
    return installed if installed.is_dir() else PACKAGE.parent.parent / in_checkout


CONF = _folder("conf", "conf")
STUDIES = _folder("studies", "docs/studies")


def config_folders() -> list[Path]:
    """Where configurations are looked for: the shipped ones first, then `conf/` of the working folder."""
    own = Path.cwd() / "conf"
    return [CONF] if not own.is_dir() or own.samefile(CONF) else [CONF, own]


def options(group: str) -> list[str]:
    """The options of a group of the configuration, by name."""
    return sorted({path.stem for folder in config_folders() for path in (folder / group).glob("*.yaml")})
