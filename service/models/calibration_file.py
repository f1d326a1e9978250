"""The calibration that belongs to a model: read, and refused if it belongs to another."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from service.errors import ModelNotSupportedError
from sparse_methods.calibration.artifact import CalibrationArtifact, MethodCalibration

FILE_NAME = "calibration.json"
_SAMPLE_BYTES = 256
_VOLATILE = ("transformers_version", "_name_or_path")  # change without changing the model


def fingerprint(directory: Path) -> str:
    """Hash of a model: its config, and name, dtype, shape and some bytes of every weight.

    Fast, as it reads a few bytes of each tensor; how the tensors are spread over files is nothing
    to it.
    """
    config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256()
    kept = {key: value for key, value in config.items() if key not in _VOLATILE}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    for entry in sorted(e for file in directory.glob("*.safetensors") for e in _tensors(file)):
        digest.update(repr(entry).encode())
    return digest.hexdigest()[:32]


def load_calibrations(path: Path | None, directory: Path) -> tuple[MethodCalibration, ...]:
    """Read the calibration of a model.

    Args:
        path: The file; None takes the one in the model's directory, if there is one.
        directory: The model's.

    Raises:
        ModelNotSupportedError: The file cannot be read, or belongs to another model.
    """
    file = path or directory / FILE_NAME
    if path is None and not file.exists():
        return ()
    try:
        artifact = CalibrationArtifact.model_validate_json(file.read_bytes())
    except OSError as error:
        raise ModelNotSupportedError(f"The calibration {file} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ModelNotSupportedError(
            f"{file} is no calibration of this release: {where}: {first['msg']}."
            " Make one with `sparseserve calibrate`."
        ) from None
    if artifact.model_fingerprint != fingerprint(directory):
        raise ModelNotSupportedError(
            f"The calibration {file} was made for another model ({artifact.model!r}), not for the"
            f" weights in {directory}. Make one with `sparseserve calibrate`, or remove it."
        )
    return artifact.methods


def _tensors(file: Path) -> Iterator[tuple[str, str, str, str]]:
    """Name, dtype, shape and some bytes in the middle of each tensor of a safetensors file."""
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, stop = entry["data_offsets"]
            stream.seek(8 + header_size + start + max(0, (stop - start - _SAMPLE_BYTES) // 2))
            sample = stream.read(min(_SAMPLE_BYTES, stop - start)).hex()
            yield name, entry["dtype"], str(entry["shape"]), sample
