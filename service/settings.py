"""Every operator setting: one frozen value, read once, passed in."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict


class Settings(BaseSettings):
    """Settings from the environment (prefix ``SPARSESERVE_``) or the command line."""

    model_config = SettingsConfigDict(
        env_prefix="SPARSESERVE_", frozen=True, extra="ignore", hide_input_in_errors=True
    )

    model: Path | None = Field(
        None, description="Directory of a Hugging Face model; unset serves the built-in model."
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Weights and KV cache; auto is float32 on a CPU, bfloat16 on a GPU."
    )
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="Processes, a GPU each, that hold the model together."
    )
    fuse_modules: bool = Field(
        default=True,
        description="Whether modules of the model are fused where that gives the same numbers.",
    )
    method: str = Field("flash_skip_softmax", description="Method of requests that name none.")
    allow_evaluation_methods: bool = Field(
        default=False,
        description="Whether clients may choose methods that cost more than dense attention.",
    )
    calibration: Path | None = Field(
        None,
        description="File of `sparseserve calibrate`; unset takes calibration.json of the model.",
    )
    max_context_tokens: int | None = Field(
        None, ge=1, description="Longest prompt plus output; unset takes the model's own limit."
    )
    block_size: int = Field(
        128, ge=8, le=256, multiple_of=8, description="Tokens of a KV page and of a sparsity block."
    )
    max_step_tokens: int = Field(2048, ge=256, le=131072, description="Tokens of one engine step.")
    max_prefill_s: float = Field(
        0.05,
        gt=0,
        description="Seconds that prompts may take, block by block, in a step in which somebody"
        " decodes: what a long prompt may add to the time between two tokens.",
    )
    prefix_caching: bool = Field(
        default=True,
        description="Whether prompts reuse keys and values computed for the same beginning.",
    )
    max_running_requests: int = Field(
        64, ge=1, le=1024, description="Generations that run at once."
    )
    max_waiting_requests: int = Field(256, ge=0, le=65536, description="Length of the queue.")
    max_waiting_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of all prompts in the queue; unset takes four times the KV cache's.",
    )
    max_queue_s: float | None = Field(
        None, gt=0, description="Seconds a request may wait for its turn; unset sets no limit."
    )
    max_request_s: float | None = Field(
        None, gt=0, description="Seconds from a request's arrival to its end; unset sets no limit."
    )
    run_ahead: bool | None = Field(
        None,
        description="Launch a step before the last one's tokens are known; unset does on a GPU.",
    )
    kv_cache_bytes: int | None = Field(
        None, ge=1, description="Size of the KV cache; unset takes a share of the free memory."
    )
    kv_cache_memory_fraction: float = Field(
        0.5, gt=0, le=0.95, description="Share of the free memory the KV cache may take."
    )
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    api_keys: Annotated[tuple[SecretStr, ...], NoDecode] = Field(
        (), description="Keys, comma-separated; empty lets everybody in."
    )
    metrics_need_key: bool = Field(default=False, description="Whether /metrics asks for a key.")
    vllm_metric_aliases: bool = Field(
        default=False, description="Whether /metrics also has vLLM's names, for tools made for it."
    )
    max_body_bytes: int = Field(
        8 * 2**20, ge=1024, le=2**30, description="Largest request body accepted."
    )
    max_connections: int = Field(
        1024, ge=1, description="Connections served; a few more are kept for probes."
    )
    client_timeout_s: float = Field(
        60.0,
        gt=0,
        description="Seconds a client may take to send a request's head, its body, or to read on.",
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="Origins whose pages may call this server, comma-separated."
    )
    stall_timeout_s: float = Field(
        30.0,
        gt=0,
        description="Seconds without progress after which the engine counts as stuck; after four"
        " times as long it is given up.",
    )
    exit_on_engine_death: bool = Field(
        default=True, description="Whether the process ends once the engine cannot go on."
    )
    shutdown_timeout_s: float = Field(
        30.0, ge=0, description="Seconds running requests may take to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe records that are logged."
    )
    log_format: Literal["json", "text"] = Field(
        "json", description="A record as one line of JSON, or as one line for people."
    )
    traces_endpoint: str | None = Field(
        None,
        description="OTLP/HTTP address spans are sent to; needs the extra otel. Unset sends none.",
    )

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        """The environment holds several values in one string, separated by commas."""
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        return value

    @model_validator(mode="after")
    def _leave_room_for_prefill(self) -> Self:
        """Beside one token of every running request, a step must hold a block of a new prompt."""
        needed = self.block_size + self.max_running_requests
        if self.max_step_tokens < needed:
            raise ValueError(
                f"max_step_tokens is {self.max_step_tokens}, but block_size and"
                f" max_running_requests together need {needed}: raise it or lower them"
            )
        return self
