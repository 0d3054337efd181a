"""Bad inputs as data: each case is a setting or a file, what is wrong with it, and the command that meets it."""

from bad_inputs.archives import ARCHIVES
from bad_inputs.case import Case
from bad_inputs.configs import CONFIGS
from bad_inputs.datasets import DATASETS
from bad_inputs.flags import FLAGS
from bad_inputs.labels import LABELS
from bad_inputs.models import MODELS
from bad_inputs.scenes import SCENES
from bad_inputs.tiles import TILES

CASES: tuple[Case, ...] = (
    *SCENES,
    *TILES,
    *DATASETS,
    *LABELS,
    *CONFIGS,
    *MODELS,
    *ARCHIVES,
    *FLAGS,
)
