"""What a training run is told: a target, data, and stages that start from each other's draft."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from vllm_longspec.errors import LongSpecError, short
from vllm_longspec.records import check_source
from vllm_longspec.train.positions import END_MARGIN, MAX_SHIFT
from vllm_longspec.train.shipped import recipe_text, shipped

FILE = "recipe.yaml"  # in a run's folder
TENSORBOARD = "tensorboard"
# These change memory, time and disk, not what is learned; a run may go on with others.
NOT_COMPARED = {"checkpoint_every_minutes", "gradient_checkpointing", "log_with", "shard_target"}
WHERE = {"output"}  # in a run's record, and no part of what it is: a folder may be moved
NOT_COMPARED_IN_STAGES = {"sequences_per_batch"}


def _as_tuple(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(str(v) if isinstance(v, Path) else v for v in value)
    return (str(value),) if isinstance(value, str | Path) else value


Sources = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]


class Stage(BaseModel):
    """`learn_from`: the text's next token, as in the paper, or the target's distribution of it.
    `flash_noisy`: for each piece of text is drawn how far, 1 to 4 tokens, the draft is ahead of the
    target's cache; without it, always 1. `train_on`: all text, or only what the assistant answers,
    of data with `messages` or with `prompt` and `completion`. `window`, `data`: the recipe's, if
    left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    data: Sources = ()
    steps: PositiveInt
    learning_rate: PositiveFloat
    sequence_length: Annotated[int, Field(gt=MAX_SHIFT + 1)]
    sequences_per_step: PositiveInt
    sequences_per_batch: PositiveInt = 1
    max_sequences: PositiveInt | None = None
    positions: Literal["anchor-offset", "natural"] = "natural"
    learn_from: Literal["text", "target"] = "text"
    train_on: Literal["text", "answers"] = "text"
    flash_noisy: bool = True
    window: PositiveInt | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("name")
    @classmethod
    def names_no_other_folder(cls, name: str) -> str:
        """While a folder is replaced it lies beside these (`train/checkpoint.py`)."""
        if name.endswith((".old", ".new")):
            raise ValueError("it ends in .old or .new; choose another name")
        return name

    @property
    def max_shift(self) -> int:
        return MAX_SHIFT if self.flash_noisy else 1


Beta = Annotated[float, Field(ge=0, lt=1)]


class Recipe(BaseModel):
    """`draft_vocab_size`: the draft proposes, and learns, only so many tokens, the most frequent of
    the stages' data; None: any token. `context_length`: the positions that the target is made for,
    up to which anchor-offset indices go; what vLLM would serve, if left out. `chat_template`: how
    conversations are written (Jinja); the tokenizer's own, if left out. `initial_weights`:
    "zero-output" starts a new layer's branches at zero, "normal" draws all of its matrices.
    `betas`, `epsilon`: AdamW's. `gradient_clipping`: the largest norm of a step's gradient.
    `checkpoint_every_minutes`: 0 after each step. `log_with`: trackers; TensorBoard where it is
    installed, if left out. `shard_target`: whether the processes of a run share its target; by the
    memory that it needs, if left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    target: str
    output: Path
    data: Sources = ()
    init: Path | None = None
    window: PositiveInt | None = None
    context_length: PositiveInt | None = None
    draft_vocab_size: PositiveInt | None = None
    chat_template: str | None = None
    initial_weights: Literal["zero-output", "normal"] = "zero-output"
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    epsilon: PositiveFloat = 1e-8
    gradient_clipping: PositiveFloat | None = None
    gradient_checkpointing: bool = False
    shard_target: bool | None = None
    checkpoint_every_minutes: NonNegativeFloat = 10
    log_with: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] | None,
        BeforeValidator(_as_tuple),
    ] = None
    stages: Annotated[tuple[Stage, ...], Field(min_length=1)]

    def sources(self, stage: Stage) -> tuple[str, ...]:
        return stage.data or self.data


def load_recipe(path: Path, **overrides: Any) -> Recipe:
    """A YAML file or a recipe of the package, with the keys in `overrides` that are not None in
    place of its own.

    Raises LongSpecError that names the file and the field.
    """
    try:
        content = yaml.safe_load(recipe_text(path))
    except (OSError, UnicodeDecodeError) as error:
        raise LongSpecError(
            f"config: {path} cannot be read; give a recipe's YAML file, or one of "
            f"{', '.join(shipped())}"
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = short(" ".join(str(error).split()))
        raise LongSpecError(f"config: {path} is not YAML ({reason}); correct it") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise LongSpecError(f"config: {path} is not a mapping with target, output and stages")
    content |= {key: value for key, value in overrides.items() if value is not None}
    try:
        content.pop("draws", None)  # of a run's own recipe.yaml
        recipe = Recipe(**content)
    except ValidationError as error:
        raise LongSpecError(_sentence(error, str(path))) from None
    check_recipe(recipe)
    return recipe


def one_stage(**options: Any) -> Recipe:
    """The recipe that `vllm-longspec train` makes of its options, without --config."""
    general = {key: options.pop(key) for key in ("target", "output", "data", "init")}
    names = ("window", "gradient_checkpointing", "checkpoint_every_minutes", "log_with")
    general |= {key: options.pop(key) for key in names}
    try:
        stage = Stage(name="train", **options)
        recipe = Recipe(**{k: v for k, v in general.items() if v is not None}, stages=(stage,))
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}"
        if first["type"] == "missing":
            raise LongSpecError(f"{option}: is missing; give it, or a recipe with it") from None
        given = short(repr(first["input"]))
        raise LongSpecError(f"{option}: {given} is not valid: {first['msg']}") from None
    check_recipe(recipe)
    return recipe


def check_recipe(recipe: Recipe) -> None:
    """Raises LongSpecError for fields that do not fit each other."""
    names = [stage.name for stage in recipe.stages]
    for name in names:
        if names.count(name) > 1:
            raise LongSpecError(f"stages: two are called {name!r}; give each its own name")
    for stage in recipe.stages:
        if stage.positions == "anchor-offset" and not has_room(stage, recipe.context_length):
            raise LongSpecError(
                f"context_length: {recipe.context_length} leaves no room for the anchor-offset "
                f"indices of stage {stage.name!r}; it needs more than "
                f"{stage.sequence_length + END_MARGIN}, or natural positions"
            )
        if not recipe.sources(stage):
            raise LongSpecError(
                f"data: stage {stage.name!r} has none; give --data, or data in the recipe"
            )
        for source in recipe.sources(stage):
            check_source(source)


def has_room(stage: Stage, context_length: int | None) -> bool:
    """Whether whole sequences of a stage can be moved."""
    return context_length is None or context_length - END_MARGIN > stage.sequence_length


# How shifts and offsets are drawn and pieces begin; a run begun under other draws would end with
# other weights. 2: a shift for each piece, offsets to the scaled length. 3: each piece begins with
# the token that the tokenizer puts before a text.
DRAWS = 4


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same: everything that the resulting weights depend on."""
    fields = recipe.model_dump(mode="json", exclude=NOT_COMPARED)
    for stage in fields["stages"]:
        for name in NOT_COMPARED_IN_STAGES:
            del stage[name]
    return fields | {"draws": DRAWS}


def flat(fields: dict[str, Any]) -> dict[str, Any]:
    """An identity by field, those of a stage as "stages.NAME.FIELD"."""
    stages = {
        f"stages.{stage['name']}.{name}": value
        for stage in fields["stages"]
        for name, value in stage.items()
    }
    order = " ".join(stage["name"] for stage in fields["stages"])
    return (
        {name: value for name, value in fields.items() if name != "stages"}
        | stages
        | {"stages": order}
    )


def difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """For a sentence: the first field in which two identities differ, with both values, except for
    steps that were raised in the last stage; empty if there is none. A run whose record lacks a
    field began before there was one, with its default."""
    ours, theirs = flat(here), flat(defaults(Recipe) | there | {
        "stages": [defaults(Stage) | stage for stage in there["stages"]]
    })  # fmt: skip
    raised = f"stages.{here['stages'][-1]['name']}.steps"
    for name in ["stages", *ours]:
        if name in WHERE or ours[name] == theirs.get(name):
            continue
        before = theirs.get(name)
        if name == raised and isinstance(before, int) and before < ours[name]:
            continue
        values = [short(repr(fields.get(name)), 60) for fields in (theirs, ours)]
        return f"{name} is {values[0]} there and {values[1]} here"
    return ""


def defaults(model: type[BaseModel]) -> dict[str, Any]:
    """As in a record."""
    fields = {name: field.default for name, field in model.model_fields.items()
              if not field.is_required()}  # fmt: skip
    return TypeAdapter(dict[str, Any]).dump_python(fields, mode="json")


def _sentence(error: ValidationError, file: str) -> str:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"{field}: is missing in {file}; add it"
    if first["type"] == "extra_forbidden":
        model = Stage if first["loc"][0] == "stages" else Recipe
        return f"{field}: is no field of a recipe ({file}); use {', '.join(model.model_fields)}"
    return f"{field}: {short(repr(first['input']))} in {file} is not valid: {first['msg']}"
