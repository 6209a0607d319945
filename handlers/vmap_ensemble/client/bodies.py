"""The bodies of answers as pydantic models: typed answers, and what docs/answer.schema.json is generated from.

    body = ClassAnswer.model_validate(client.predict("a text").body)
    body.uncertainty.mutual_information

The only part of the client that needs pydantic. Probabilities are from 0 to 1, entropies in nats, `start` and `end`
count characters, `sha256` is in hexadecimal.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, RootModel, model_validator

Probability = Annotated[float, Field(ge=0, le=1)]
Nats = Annotated[float, Field(ge=0)]
Index = Annotated[int, Field(ge=0)]
Names = Annotated[list[str], Field(min_length=1, json_schema_extra={"uniqueItems": True})]
Numbers = Annotated[list[float], Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
# Of a key that may be missing, but is never null.
ABSENT: Any = None


class Body(BaseModel):
    """No other keys than these."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Archive(Body):
    """Which archive answers: with `detail`, or always by `"identify_answers": true`."""

    version: str
    sha256: Sha256


class Used(Body):
    """Which members answer."""

    size: Annotated[int, Field(ge=1)]
    used: Annotated[int, Field(ge=1)]
    subset: Names = Field(ABSENT, description="The members that the request asked for.")
    left_out: Names = Field(ABSENT, description="Members whose output was not finite.")


class Signed(Body):
    """What every answer may say beside its own."""

    ensemble: Used
    archive: Archive = Field(ABSENT)


class Cut(Body):
    """An answer to a text that may have been cut off."""

    truncated: Literal[True] = Field(
        ABSENT, description="The text was longer than max_length, and its end was not read."
    )


class Abstaining(Signed):
    """An answer that says whether to trust it."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"abstain": {"const": True}}},
            "then": {"required": ["abstain_reasons"]},
            "else": {"not": {"required": ["abstain_reasons"]}},
        }
    )
    abstain: bool
    abstain_reasons: Names = Field(ABSENT)

    @model_validator(mode="after")
    def _reasons_are_given(self) -> Abstaining:
        if self.abstain != ("abstain_reasons" in self.model_fields_set):
            raise ValueError("abstain_reasons: expected where abstain is true, and nowhere else")
        return self


class Uncertainty(Body):
    """Mutual information = predictive - expected entropy: what the members disagree about."""

    predictive_entropy: Nats
    expected_entropy: Nats
    mutual_information: Nats
    agreement: Probability


class TokenUncertainty(Body):
    """The mean over tokens, or over the start and the end of an answer."""

    mutual_information: Nats
    agreement: Probability


class Ranked(Body):
    """A label and how probable it is."""

    label: str
    index: Index
    probability: Probability


class Row(Body):
    """What one member says; its file's hash where members come from an archive."""

    name: str
    sha256: Sha256 = Field(ABSENT)


class RankedRow(Row, Ranked):
    """A member's own label."""


class ClassAnswer(Abstaining, Cut):
    """One label; "response": "full", the default."""

    prediction: Ranked
    top_k: Annotated[list[Ranked], Field(min_length=1)]
    uncertainty: Uncertainty
    members: Annotated[list[RankedRow], Field(min_length=1)] = Field(ABSENT)


class LabelsRow(Row):
    """A member's own labels."""

    labels: list[Ranked]


class LabelsAnswer(Abstaining, Cut):
    """Several labels. abstain goes by the least sure yes or no."""

    labels: list[Ranked]
    top_k: Annotated[list[Ranked], Field(min_length=1)]
    uncertainty: Uncertainty
    members: Annotated[list[LabelsRow], Field(min_length=1)] = Field(ABSENT)


class Values(Body):
    """Numbers of a regression."""

    values: Numbers


class Deviation(Body):
    """Between the members, of each number."""

    standard_deviation: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)]


class ValuesRow(Row, Values):
    """A member's own numbers."""


class NumbersAnswer(Signed, Cut):
    """A regression."""

    prediction: Values
    uncertainty: Deviation
    members: Annotated[list[ValuesRow], Field(min_length=1)] = Field(ABSENT)


class Entity(Body):
    """A stretch of a text."""

    entity: str
    text: Annotated[str, Field(min_length=1)]
    start: Index
    end: Index
    probability: Probability
    mutual_information: Nats
    abstain: Literal[True] = Field(ABSENT, description="This entity is beyond a limit; absent where it isn't.")


class EntitiesRow(Row):
    """A member's own entities."""

    entities: list[Entity]


class EntitiesAnswer(Abstaining):
    """Entities of a text, read in windows where it is long. abstain: one of them is beyond a limit."""

    entities: list[Entity]
    uncertainty: TokenUncertainty
    members: Annotated[list[EntitiesRow], Field(min_length=1)] = Field(ABSENT)


class Span(Body):
    """A stretch of the context."""

    answer: str
    start: Index
    end: Index
    score: Probability


class SpanRow(Row, Span):
    """A member's own answer."""


class NoAnswer(Body):
    """What the members give for the context holding no answer."""

    score: Probability
    chosen: bool


class QuestionAnswer(Abstaining):
    """Answer to a question, read in windows where the context is long. abstain goes by the prediction's score."""

    prediction: Span
    top_k: list[Span]
    no_answer: NoAnswer
    uncertainty: TokenUncertainty
    members: Annotated[list[SpanRow], Field(min_length=1)] = Field(ABSENT)


class Filled(Body):
    """A word for a mask."""

    token: str
    index: Index
    probability: Probability


class MasksRow(Row):
    """A member's own word for each mask."""

    masks: Annotated[list[Filled], Field(min_length=1)]


class MasksAnswer(Abstaining, Cut):
    """Words for masks. abstain goes by the least sure mask."""

    masks: Annotated[list[Annotated[list[Filled], Field(min_length=1)]], Field(min_length=1)]
    uncertainty: Uncertainty
    members: Annotated[list[MasksRow], Field(min_length=1)] = Field(ABSENT)


class Spread(Body):
    """1 - the mean cosine of the members' own vectors to the answer's."""

    spread: Annotated[float, Field(ge=0, le=2)]


class CosineRow(Row):
    """The cosine of a member's own vector to the answer's."""

    cosine: Annotated[float, Field(ge=-1, le=1)]


class EmbeddingAnswer(Signed, Cut):
    """A normalised vector."""

    embedding: Numbers
    uncertainty: Spread
    members: Annotated[list[CosineRow], Field(min_length=1)] = Field(ABSENT)


class PlainAnswer(Cut):
    """ "response": "torchserve": label -> probability; with detail also the members."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"minProperties": 1})
    __pydantic_extra__: dict[str, Probability]
    members: list[RankedRow] = Field(ABSENT)
    archive: Archive = Field(ABSENT)


class Answer(
    RootModel[
        ClassAnswer
        | LabelsAnswer
        | NumbersAnswer
        | EntitiesAnswer
        | QuestionAnswer
        | MasksAnswer
        | EmbeddingAnswer
        | PlainAnswer
    ]
):
    """The answer to one item, by what is served."""


class Attribution(Body):
    """value - baseline is the sum of the importances, one per word, up to delta."""

    value: float
    baseline: float
    delta: float
    importances: list[float]


class AttributionRow(Row, Attribution):
    """A member's own importances."""


class Word(Body):
    """A word of one of an item's texts."""

    word: str
    start: Index
    end: Index
    of: Literal["text", "text_pair", "question", "context"]


class Explained(Attribution):
    """What is explained: a label, an entity, an end of an answer, or a word for a mask; and what each word adds."""

    label: str = Field(ABSENT)
    index: Index = Field(ABSENT)
    entity: str = Field(ABSENT)
    text: str = Field(ABSENT)
    position: Literal["start", "end"] = Field(ABSENT)
    answer: str = Field(ABSENT)
    mask: Index = Field(ABSENT)
    token: str = Field(ABSENT)
    start: Index = Field(ABSENT)
    end: Index = Field(ABSENT)
    words: list[Word]
    members: Annotated[list[AttributionRow], Field(min_length=1)] = Field(ABSENT)


class Explanation(Signed):
    """What each word adds to what is explained."""

    explains: Literal["probability", "log_probability", "value"]
    explanations: list[Explained]


class Told(Body):
    """A status and what is wrong."""

    code: Annotated[int, Field(ge=400, le=599)]
    message: Annotated[str, Field(min_length=1)]


class Error(Body):
    """Why a request has no answer."""

    error: Told


class KServeV1(Body):
    """To `instances`: one answer each."""

    predictions: Annotated[list[Answer | Explanation], Field(min_length=1)]


class KServeOutput(Body):
    """The answers as one tensor; each of `data` is the JSON text of one."""

    name: Literal["answers"]
    datatype: Literal["BYTES"]
    shape: Annotated[list[int], Field(min_length=1, max_length=1)]
    data: list[str]


class KServeV2(Body):
    """To `inputs`."""

    id: str = Field(ABSENT)
    model_name: str
    outputs: Annotated[list[KServeOutput], Field(min_length=1, max_length=1)]
