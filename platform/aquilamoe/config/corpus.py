"""What a corpus is made of: files or data sets of a hub, which of their documents, and how these are cleaned."""

from typing import Any, ClassVar, Self

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from aquilamoe.config.network import Config, NonNegativeInt, PositiveInt

VALIDATION_FRACTION = 0.05  # held out where a corpus sets none
Scalar = bool | int | float | str


class Extended(Config):
    """A configuration that got keys after outputs had been made with it.

    The keys in `added` enter a recipe only where they are set: outputs made before they existed are still found.
    """

    added: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _leave_out_defaults(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        if not isinstance(self, Extended):  # pydantic calls this for whatever is in its place, unchecked
            return dump(self)
        fields = type(self).model_fields
        silent = {key for key in self.added if getattr(self, key) == fields[key].get_default(call_default_factory=True)}
        return {key: value for key, value in dump(self).items() if key not in silent}


class HubConfig(Config):
    """A data set that the library `datasets` opens.

    name: on the hub, or a local folder of parquet, JSON or text files. subset: its configuration, null: the only one.
    split: as the data set names it. revision: commit or tag. data_files: a glob in it, null: all files.
    streaming: read over the network as it goes; otherwise it is fetched whole into the cache first.
    """

    name: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    data_files: str | None = None
    streaming: bool = True


class FiltersConfig(Config):
    """Which documents are kept: UTF-8 bytes of the text, and columns that must have one of the values listed."""

    min_bytes: NonNegativeInt = 0
    max_bytes: PositiveInt | None = None
    columns: dict[str, tuple[Scalar, ...]] = Field(default_factory=dict)

    @field_validator("columns", mode="before")
    @classmethod
    def _as_lists(cls, columns: Any) -> Any:
        """`lang: zh` is `lang: [zh]`, and null nothing."""
        if not isinstance(columns, dict):
            return {} if columns is None else columns
        return {name: value if isinstance(value, list | tuple) else (value,) for name, value in columns.items()}


class SourceConfig(Extended):
    """One part of the corpus: a file or glob of documents, with the checksum of a single file, or a data set of a hub.

    text: the column or field that holds the text. split: the one that holds train or validation where there is one.
    """

    path: str | None = None
    sha256: str | None = None
    hub: HubConfig | None = None
    text: str = "text"
    split: str = "split"
    filters: FiltersConfig = FiltersConfig()
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
    deduplicate: keep the first of equal texts of a source. max_document_bytes: UTF-8; longer ones are left out.
    shard_bytes: text that is read, and written to a file of its own, at a time.
    """

    deduplicate: bool = True
    max_document_bytes: PositiveInt = 10_000_000
    shard_bytes: PositiveInt = 1 << 26


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
