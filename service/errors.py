"""What the service refuses or fails at; ``api/errors.py`` maps each class to its HTTP status.

ServiceError
├── BadRequestError            the caller's mistake
│   └── PromptTooLongError     prompt and context length are in the message
├── UnauthorizedError          API key missing or wrong
├── NotFoundError              no such method page, model or route
├── QueueFullError             too many requests wait; retry later
├── UnavailableError           loading, draining or dead; retry later
│   └── QueueTimeoutError      waited in vain until its deadline
├── GenerationError            the engine failed while it worked on this request
│   ├── TokenizerError         the tokenizer could not read or write its text
│   └── MethodFaultError       its method raised (service/models/method_fault.py)
└── ModelNotSupportedError     the model cannot be served; raised at load
"""


class ServiceError(Exception):
    """Base of every error raised by ``service``.

    Attributes:
        param: Name of the request field at fault, if one is.
        retry_after_s: When to try again, if that is known, in seconds.
    """

    retry_after_s: int | None = None

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class BadRequestError(ServiceError):
    """The request cannot be served as it stands."""


class PromptTooLongError(BadRequestError):
    """The prompt leaves no room in the context or could never fit into the KV cache."""


class UnauthorizedError(ServiceError):
    """The API key is missing or wrong."""


class NotFoundError(ServiceError):
    """What the path names does not exist."""


class QueueFullError(ServiceError):
    """The waiting queue is full."""

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(ServiceError):
    """The service is loading, draining or dead."""


class QueueTimeoutError(UnavailableError):
    """The request's time was up before its turn came."""


class GenerationError(ServiceError):
    """The engine failed while it worked on this request."""


class TokenizerError(GenerationError):
    """The tokenizer failed on the text or the tokens of this request."""


class ModelNotSupportedError(ServiceError):
    """The model cannot be served by this engine; the message says why."""
