"""Where MLflow is."""

from pydantic import Field, field_validator

from aquilamoe.config.messages import nearest
from aquilamoe.config.numbers import Config

SERVERS = ("databricks", "http", "https", "mssql", "mysql", "postgresql", "sqlite")


class TrackingConfig(Config):
    """Where runs are logged."""

    uri: str | None = Field(
        description="Address of an MLflow server or database; null: a SQLite database under paths.root"
    )
    enabled: bool = Field(description="Whether runs are logged to MLflow")

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, uri: str | None) -> str | None:
        if uri is not None:
            check_tracking(uri)
        return uri


def check_tracking(uri: str) -> None:
    """ValueError for what is not the address of a tracking server or of a database."""
    scheme = uri.partition(":")[0] if ":" in uri else ""
    if scheme.partition("+")[0] not in SERVERS:
        raise ValueError(
            f"'{uri}' is not the address of a server or database ({nearest(scheme or uri, SERVERS)}); "
            "use http://HOST:PORT, sqlite:///FILE, or null for a database in paths.root"
        )
