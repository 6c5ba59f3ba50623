"""What a corpus is made of: files or data sets of a hub, which of their documents, and how these are cleaned."""

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from aquilamoe.config.numbers import Config, Extended, Float, NonNegativeInt, PositiveInt

VALIDATION_FRACTION = 0.05  # held out where a corpus sets none
ValidationFraction = Annotated[
    Float,
    Field(
        gt=0.0,
        lt=0.5,
        description="Documents held out for validation, by the hash of their text; no effect where files have a split "
        "[fraction]",
    ),
]
CLEANING = (
    "Cleaning, in parallel, shard by shard; documents that cannot be used are counted and named. null: documents are "
    "read in order, in one process, and the first that cannot be used is an error"
)
Scalar = bool | int | float | str


class HubConfig(Config):
    """A data set that the library `datasets` opens."""

    name: str = Field(description="Name on the hub, or a local folder of parquet, JSON or text files")
    subset: str | None = Field(default=None, description="Configuration of the data set; null: its only one")
    split: str = Field(default="train", description="Split that is read, as the data set names it")
    revision: str | None = Field(default=None, description="Commit or tag of the data set; null: the newest")
    data_files: str | None = Field(default=None, description="Glob of files in the data set; null: all files")
    streaming: bool = Field(
        default=True, description="Whether documents are read over the network one by one; false: downloaded first"
    )


class FiltersConfig(Config):
    """Which documents are kept."""

    min_bytes: NonNegativeInt = Field(default=0, description="Shortest text, as UTF-8 [bytes]")
    max_bytes: PositiveInt | None = Field(default=None, description="Longest text, as UTF-8; null: no limit [bytes]")
    columns: dict[str, tuple[Scalar, ...]] = Field(
        default_factory=dict,
        description="Values that a column may have, e.g. {lang: [en], quality: [high, medium]}; null: any",
    )

    @field_validator("columns", mode="before")
    @classmethod
    def _as_lists(cls, columns: Any) -> Any:
        """`lang: zh` is `lang: [zh]`, and null nothing."""
        if not isinstance(columns, dict):
            return {} if columns is None else columns
        return {name: value if isinstance(value, list | tuple) else (value,) for name, value in columns.items()}


class SourceConfig(Extended):
    """One part of the corpus: files of documents, or a data set of a hub."""

    path: str | None = Field(
        default=None,
        description="File or glob of .parquet, .jsonl or .txt (one document a file), relative to where the command is "
        "started; package:// is the package's data folder; null with a hub [path]",
    )
    sha256: str | None = Field(
        default=None,
        description="SHA-256 of a single file, hexadecimal; null: not checked, and a change under the same path is "
        "not noticed",
    )
    hub: HubConfig | None = Field(
        default=None, description="Data set that the library datasets opens (extra data), instead of a path"
    )
    text: str = Field(default="text", description="Column or field of the text")
    split: str = Field(
        default="split",
        description="Column or field with train or validation; where there is none, texts are held out by their hash",
    )
    filters: FiltersConfig = Field(default=FiltersConfig(), description="Which documents are kept")
    added = ("hub", "text", "split", "filters")

    @model_validator(mode="after")
    def _check_origin(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError("set one of path (files) and hub (a data set), and null the other")
        if self.hub is not None and self.sha256 is not None:
            raise ValueError("sha256 is of a file; of a data set on a hub, set hub.revision, and sha256 to null")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether it sets no more than files and their checksum."""
        return all(getattr(self, key) == type(self).model_fields[key].default for key in self.added)


class CleaningConfig(Config):
    """How documents are cleaned on the way into the corpus, in parallel, shard by shard.

    Documents that cannot be used - not UTF-8, not JSON, without text, too long - are counted and named, not refused.
    """

    deduplicate: bool = Field(default=True, description="Whether only the first of a source's equal texts is kept")
    max_document_bytes: PositiveInt = Field(
        default=10_000_000, description="Longest text, as UTF-8; longer documents are skipped [bytes]"
    )
    shard_bytes: PositiveInt = Field(
        default=1 << 26, description="Input that is read, and written to a file of its own, at a time [bytes]"
    )


def with_mixture(data: Any) -> Any:
    """A corpus without the sources that are null, and with a share of each other: the mixture's, or equal ones."""
    if not isinstance(data, dict) or not isinstance(sources := data.get("sources"), dict):
        return data
    there = {name: source for name, source in sources.items() if source is not None}
    mixture = data.get("mixture")
    if mixture is None:
        mixture = dict.fromkeys(there, 1.0)
    elif isinstance(mixture, dict):
        mixture = {name: share for name, share in mixture.items() if name in there or name not in sources}
    return {**data, "sources": there, "mixture": mixture}


def check_cleaned(sources: dict[str, SourceConfig], cleaning: CleaningConfig | None) -> None:
    """Refuse a corpus without cleaning whose sources set what only cleaning does."""
    for name, source in sources.items():
        if cleaning is None and not source.is_plain:
            raise ValueError(
                f"sources.{name}: hub, text, split and filters are for a corpus that is cleaned; set cleaning, e.g. "
                "data.cleaning={deduplicate: true}"
            )
