"""What numbers of a configuration may be, and the classes that all configurations derive from."""

from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)


def _refuse_bool(value: Any) -> Any:
    """Python counts with true and false; a configuration that does is mistaken."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number; give it one")
    return value


# More than any network that will fit on a disk; what is larger is a mistake, and would keep every loop busy for hours.
MAX_LAYERS = 2**12
MAX_EXPERTS = 2**15
MAX_HEADS = 2**14
MAX_WIDTH = 2**18
MAX_NEURONS = 2**21
MAX_VOCABULARY = 2**24
MAX_HEAD_DIM = 2**13
MAX_POSITIONS = 2**40
MAX_TENSORS = 200_000  # of one checkpoint

Int = Annotated[int, BeforeValidator(_refuse_bool)]
Float = Annotated[float, BeforeValidator(_refuse_bool)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0.0)]
NonNegativeFloat = Annotated[Float, Field(ge=0.0)]
Seed = Annotated[Int, Field(ge=0, lt=10**18)]  # what every generator takes
Divisor = Annotated[Int, Field(gt=0, le=10**15)]
Fraction = Annotated[Float, Field(ge=0.0, le=1.0)]
# Numbers that float32 computes something with: a frequency that rises or is 0, a norm that is all epsilon, and weights
# that overflow in the first product are mistakes.
RopeTheta = Annotated[Float, Field(ge=1.0, le=1e15)]
Epsilon = Annotated[Float, Field(gt=0.0, le=1.0)]
InitialStd = Annotated[Float, Field(gt=0.0, le=1e3)]
Layers = Annotated[Int, Field(gt=0, le=MAX_LAYERS)]
Layer = Annotated[Int, Field(ge=0, lt=MAX_LAYERS)]
Experts = Annotated[Int, Field(ge=0, le=MAX_EXPERTS)]
Heads = Annotated[Int, Field(gt=0, le=MAX_HEADS)]
HeadDim = Annotated[Int, Field(gt=0, le=MAX_HEAD_DIM)]
Width = Annotated[Int, Field(gt=0, le=MAX_WIDTH)]
Neurons = Annotated[Int, Field(ge=0, le=MAX_NEURONS)]
PositiveNeurons = Annotated[Int, Field(gt=0, le=MAX_NEURONS)]
Vocabulary = Annotated[Int, Field(gt=0, le=MAX_VOCABULARY)]
Length = Annotated[Int, Field(gt=0, le=MAX_POSITIONS)]


class Config(BaseModel):
    """Base of all configuration: immutable, and a key that is not read is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
