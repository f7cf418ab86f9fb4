"""The package's errors. Each message names the value, the limit and the remedy."""


class LayerParallelError(Exception):
    """Base of every error that hf_layerpar raises on purpose."""


class ConfigurationError(LayerParallelError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedModelError(LayerParallelError, ValueError):
    """The model can't be read as a stack of ODE steps, or can't be used in the way asked for."""


class RankMismatchError(LayerParallelError, RuntimeError):
    """The lp ranks disagree on what they are about to compute; raised on all of them before any blocks."""


class PeerLostError(LayerParallelError, RuntimeError):
    """Another rank died or stopped answering while this one waited for it."""


class CheckpointError(LayerParallelError, RuntimeError):
    """A checkpoint is missing, incomplete, or belongs to another model."""


class HubError(LayerParallelError, RuntimeError):
    """Another rank could not push to the Hub, whose former revision is untouched; that rank raises the cause."""


class UnsupportedVersionError(LayerParallelError, ImportError):
    """A library is of a version in which something that is relied on is missing or means something else."""
