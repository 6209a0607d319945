"""The settings of tasks on text."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from vmap_ensemble.archive.settings import PositiveInt, Probability, QuantisableSettings, list_names, refuse_unknown
from vmap_ensemble.models.text_modes import DEFAULT_MODE, TEXT_MODES, reason_against_mode

TextModeName = Annotated[str, refuse_unknown(reason_against_mode)]


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class TextSettings(QuantisableSettings):
    """Settings of handlers that take text; the keys of TorchServe's Hugging Face example among them."""

    mode: TextModeName = Field(
        DEFAULT_MODE, description="What is asked of the text.", json_schema_extra=list_names(lambda: list(TEXT_MODES))
    )
    model_name: str = Field("", description="Name of the pretrained model; for people, nothing is fetched.")
    do_lower_case: bool | None = Field(None, description="Lower the text; the tokenizer's own choice by default.")
    num_labels: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Number of labels; of a classification it must equal the members', 0 says nothing."
    )
    save_mode: Literal["pretrained", "torchscript"] = Field(
        "pretrained", description="`pretrained`: weights; `torchscript`: traced members."
    )
    max_length: PositiveInt = Field(
        512,
        description="Longest sequence in tokens. Token classification and question answering read the rest in "
        "windows; other modes cut it off, and the answer says `truncated`.",
    )
    captum_explanation: bool = Field(True, description="Whether /explanations/ is answered.")
    embedding_name: str = Field(
        "",
        description="Module of the model whose output explanations are about, or that holds `embeddings` (`bert`); "
        "found by default.",
    )
    explanation_steps: PositiveInt = Field(
        50, description="Points of the integral of an explanation; more make its `delta` smaller."
    )
    explanation_batch_size: PositiveInt = Field(
        16, description="Points of the integral that are computed at once; fewer need less memory."
    )
    max_explanations: PositiveInt = Field(
        16, description="Explanations that one request may ask for: items times targets; more are refused with a 413."
    )
    FasterTransformer: bool = Field(False, description="Members are traced FasterTransformer modules.")
    problem_type: Literal["single_label", "multi_label", "regression"] | None = Field(
        None, description="Of a sequence classification; the members' config by default."
    )
    label_threshold: Probability = Field(0.5, description="Least probability of a label in a multi-label answer.")
    pooling: Literal["mean", "cls"] = Field("mean", description="How an embedding is made of the tokens'.")
    doc_stride: PositiveInt = Field(128, description="Tokens that neighbouring windows of a long text share.")
    max_windows: PositiveInt | None = Field(
        None,
        description="Windows of one text; longer ones are refused with a 413. By default as many as hold 2,048 "
        "tokens together.",
    )
    max_request_tokens: PositiveInt = Field(
        32_768, description="Tokens over all texts of a request; more are refused with a 413."
    )
    max_answer_tokens: PositiveInt = Field(30, description="Longest answer to a question, in tokens.")
    max_characters: PositiveInt = Field(200_000, description="Longer texts are refused with a 413.")

    @model_validator(mode="after")
    def _abstaining_means_something(self) -> TextSettings:
        is_regression = self.mode == "sequence_classification" and self.problem_type == "regression"
        if self.abstains and (self.mode == "embedding" or is_regression):
            kind = "regression" if is_regression else "embedding"
            raise ValueError(f"{self.abstains[0]}: {kind} has no probabilities to abstain by; leave it out")
        return self

    @model_validator(mode="after")
    def _heads_give_logits(self) -> TextSettings:
        if self.output not in ("auto", "logits"):
            raise ValueError(
                f"output: expected 'auto' or 'logits', which transformers' heads give, got '{self.output}'"
            )
        return self


@dataclass(frozen=True, kw_only=True, config={"extra": "forbid", "strict": False})
class TracedSettings(TextSettings):
    """Settings of the handler of traced FasterTransformer modules."""

    save_mode: Literal["torchscript"] = Field("torchscript", description="Members are traced modules.")
    quantization: None = Field(None, description="Traced modules have the precision that they were traced in.")
    FasterTransformer: Literal[True] = Field(True, description="Members call FasterTransformer's class.")
    library: str = Field(
        "libpyt_fastertransformer.so", description="The library's file in the archive; later releases: libth_*.so."
    )
