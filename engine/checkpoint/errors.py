"""Why a checkpoint cannot be used. Every message names the file, setting or tensor and what to do about it.

CheckpointError(ValueError)
├── HubError         the model could not be fetched: network, repository, access, revision
├── FilesError       the folder cannot be read: no safetensors, pickles only, missing or truncated shards
├── FormatRefused    the quantization config asks for what no reader honours
└── TensorError      a tensor is missing, left over, or has another shape or dtype than the model needs
"""


class CheckpointError(ValueError):
    """Base of everything that can be wrong with a checkpoint."""


class HubError(CheckpointError):
    """The model could not be fetched."""


class FilesError(CheckpointError):
    """The folder cannot be read."""


class FormatRefused(CheckpointError):
    """The quantization config asks for what no reader honours."""


class TensorError(CheckpointError):
    """A tensor is missing, left over, or not what the model needs."""
